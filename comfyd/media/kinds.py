"""What a file really is, by its content; never believes a name, decodes nothing and runs no native code.

Meant for files of strangers: a few kilobytes are looked at, whatever the file says of itself.
Sources: the formats' own specifications; for markup and the simplest of the signatures
https://mimesniff.spec.whatwg.org (sections 6 and 7.1).
"""

import codecs
import os
import re
from pathlib import Path
from typing import BinaryIO, Final, Literal

import msgspec

from comfyd.errors import MediaError
from comfyd.media import avif
from comfyd.media.boxes import brand_type
from comfyd.media.mpeg_audio import is_adts, is_mp3
from comfyd.media.sizes import picture_size

HEAD_BYTES: Final = 4096
Kind = Literal["image", "video", "audio", "file"]


class Sniffed(msgspec.Struct, frozen=True, kw_only=True):
    """What a file is. `extension` is safe: 1 to 10 of [a-z0-9], no dot. Every image has a size in pixels."""

    content_type: str
    extension: str
    kind: Kind = "file"
    width: int | None = None
    height: int | None = None


def _of(kind: Kind, content_type: str, extension: str) -> Sniffed:
    return Sniffed(kind=kind, content_type=content_type, extension=extension)


UNKNOWN: Final = _of("file", "application/octet-stream", "bin")
EMPTY: Final = _of("file", "application/x-empty", "bin")
PLAIN: Final = _of("file", "text/plain; charset=utf-8", "txt")

_MP3: Final = _of("audio", "audio/mpeg", "mp3")
_AAC: Final = _of("audio", "audio/aac", "aac")
_FLAC: Final = _of("audio", "audio/flac", "flac")

_SIGNATURES: Final[tuple[tuple[bytes, Sniffed], ...]] = (
    (b"\x89PNG\r\n\x1a\n", _of("image", "image/png", "png")),
    (b"\xff\xd8\xff", _of("image", "image/jpeg", "jpg")),
    (b"GIF87a", _of("image", "image/gif", "gif")),
    (b"GIF89a", _of("image", "image/gif", "gif")),
    (b"II*\0", _of("image", "image/tiff", "tiff")),
    (b"MM\0*", _of("image", "image/tiff", "tiff")),
    (b"fLaC", _FLAC),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", _of("video", "video/x-ms-asf", "wmv")),
    (b"FLV\x01", _of("video", "video/x-flv", "flv")),
    (b"\0\0\x01\xba", _of("video", "video/mpeg", "mpg")),
    (b"glTF", _of("file", "model/gltf-binary", "glb")),
    (b"\x76\x2f\x31\x01", _of("file", "image/x-exr", "exr")),
    (b"#?RADIANCE", _of("file", "image/vnd.radiance", "hdr")),
    (b"8BPS", _of("file", "image/vnd.adobe.photoshop", "psd")),
    (b"\0\0\0\x0cjP  ", _of("file", "image/jp2", "jp2")),
    (b"\0\0\0\x0cJXL ", _of("file", "image/jxl", "jxl")),
    (b"\xff\x0a", _of("file", "image/jxl", "jxl")),
    (b"GGUF", _of("file", "application/octet-stream", "gguf")),
    (b"PK\x03\x04", _of("file", "application/zip", "zip")),
    (b"\x1f\x8b\x08", _of("file", "application/gzip", "gz")),
    (b"%PDF-", _of("file", "application/pdf", "pdf")),
)
_RIFF: Final = {
    b"WEBP": _of("image", "image/webp", "webp"),
    b"WAVE": _of("audio", "audio/wav", "wav"),
    b"AVI ": _of("video", "video/x-msvideo", "avi"),
}
_AIFF: Final = _of("audio", "audio/aiff", "aiff")
# an Ogg stream's first packet names its codec; a video stream comes first where there is one
_OGG: Final = (
    (b"\x80theora", _of("video", "video/ogg", "ogv")),
    (b"OpusHead", _of("audio", "audio/ogg", "opus")),
    (b"\x01vorbis", _of("audio", "audio/ogg", "ogg")),
    (b"\x7fFLAC", _of("audio", "audio/ogg", "ogg")),
    (b"Speex   ", _of("audio", "audio/ogg", "ogg")),
)
_EBML: Final = b"\x1a\x45\xdf\xa3"
_DOCUMENT_TYPE: Final = re.compile(rb"\x42\x82.{1,8}?(webm|matroska)", re.DOTALL)
_WEBM_CODECS: Final = re.compile(rb"V_(?:VP8|VP9|AV1|MPEG|MS/|THEORA|FFV1|PRORES|UNCOMPRESSED)")
_BMP_HEADERS: Final = frozenset({12, 40, 52, 56, 64, 108, 124})

_TEXT_NAMES: Final = {
    "csv": "text/csv",
    "cube": "text/plain; charset=utf-8",
    "gltf": "model/gltf+json",
    "json": "application/json",
    "md": "text/markdown",
    "mtl": "model/mtl",
    "obj": "model/obj",
    "ply": "model/ply",
    "srt": "text/plain; charset=utf-8",
    "stl": "model/stl",
    "toml": "text/plain; charset=utf-8",
    "txt": "text/plain; charset=utf-8",
    "vtt": "text/vtt",
    "yaml": "text/plain; charset=utf-8",
    "yml": "text/plain; charset=utf-8",
}
"""Extensions that a text may keep: nothing in the content tells these from each other."""
_BINARY_NAMES: Final = {
    "bvh": "application/octet-stream",
    "fbx": "application/octet-stream",
    "ksplat": "application/octet-stream",
    "npy": "application/octet-stream",
    "ply": "model/ply",
    "splat": "application/octet-stream",
    "spz": "application/octet-stream",
    "stl": "model/stl",
    "vdb": "application/octet-stream",
}
_ZIP_NAMES: Final = {"3mf": "model/3mf", "npz": "application/octet-stream", "usdz": "model/vnd.usdz+zip"}
_TENSOR_NAMES: Final = frozenset({"latent", "safetensors", "sft"})
_MOST_TENSOR_HEADER: Final = 100_000_000  # bytes, the format's own limit

_HTML: Final = re.compile(
    rb"<(?:!doctype html|html|head|script|iframe|h1|div|font|table|a|style|title|b|body|br|p)[\s>]|<!--"
)
_MARKUP_SPACE: Final = b"\xef\xbb\xbf \t\r\n\x0c"
_NO_TEXT: Final = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def sniff(path: Path, name: str | None = None) -> Sniffed:
    """What the file is. `name` only chooses among kinds that no content tells apart.

    A picture whose header cannot be read is no picture. Raises `MediaError` where there is no such file.
    """
    try:
        with path.open("rb") as file:
            return sniff_open(file, name)
    except OSError as exc:
        raise MediaError("the file cannot be read") from exc


def sniff_open(file: BinaryIO, name: str | None = None) -> Sniffed:
    """The same for a file that is open; leaves it at any position."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    if not head:
        return EMPTY
    found = _signature(head) or _container(file, head) or _sound(file, head)
    if found is None:
        return _document(file, head, _extension(name))
    if found.kind == "image":
        return _sized(file, found)
    if found.extension == "zip":
        return _named(found, _ZIP_NAMES, _extension(name))
    return found


def _signature(head: bytes) -> Sniffed | None:
    return next((found for start, found in _SIGNATURES if head.startswith(start)), None)


def _container(file: BinaryIO, head: bytes) -> Sniffed | None:
    if head.startswith(b"RIFF"):
        return _RIFF.get(head[8:12])
    if head.startswith(b"FORM") and head[8:12] in {b"AIFF", b"AIFC"}:
        return _AIFF
    if head.startswith(b"OggS"):
        return next((found for start, found in _OGG if start in head), None)
    if head.startswith(_EBML):
        return _matroska(file, head)
    if head.startswith(b"BM") and len(head) >= 30:
        known = int.from_bytes(head[14:18], "little") in _BMP_HEADERS
        return _of("image", "image/bmp", "bmp") if known else None
    found = brand_type(file, head)
    return None if found is None else _of(*found)


def _matroska(file: BinaryIO, head: bytes) -> Sniffed | None:
    """By document type, and by whether any codec of pictures is named near the start."""
    document = _DOCUMENT_TYPE.search(head, 0, 256)
    if document is None:
        return None
    start = head + file.read(16 * HEAD_BYTES)
    video = _WEBM_CODECS.search(start) is not None or b"A_" not in start
    if document[1] == b"webm":
        return _of("video", "video/webm", "webm") if video else _of("audio", "audio/webm", "webm")
    return _of("video", "video/x-matroska", "mkv") if video else _of("audio", "audio/x-matroska", "mka")


def _sound(file: BinaryIO, head: bytes) -> Sniffed | None:
    """MPEG audio has no signature: an ID3 tag, or two frames in a row."""
    if head.startswith(b"ID3") and len(head) >= 10:
        size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        file.seek(10 + size)
        following = file.read(HEAD_BYTES)
        if following.startswith(b"fLaC"):
            return _FLAC
        return _AAC if is_adts(following) else _MP3
    if is_mp3(head):
        return _MP3
    return _AAC if is_adts(head) else None


def _sized(file: BinaryIO, found: Sniffed) -> Sniffed:
    # imagesize fails on an AVIF that is turned
    size = avif.picture_size(file) if found.extension == "avif" else picture_size(file)
    if size is None:
        return UNKNOWN
    return msgspec.structs.replace(found, width=size[0], height=size[1])


def _document(file: BinaryIO, head: bytes, extension: str) -> Sniffed:
    markup = _markup(head)
    if markup is not None:
        return markup
    if _is_tensors(file, head):
        kept = extension if extension in _TENSOR_NAMES else "safetensors"
        return _of("file", "application/octet-stream", kept)
    if _is_text(head):
        return _named(PLAIN, _TEXT_NAMES, extension)
    return _named(UNKNOWN, _BINARY_NAMES, extension)


def _markup(head: bytes) -> Sniffed | None:
    """HTML, SVG and XML as a browser would see them, whatever bytes follow."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        head = head.decode("utf-16", "replace").encode()
    start = head.lstrip(_MARKUP_SPACE).lower()
    if re.match(rb"<(?:svg[\s/>]|\?xml|!doctype svg|!--)", start) and re.search(rb"<svg[\s/>]", start):
        return _of("file", "image/svg+xml", "svg")
    if _HTML.match(start):
        return _of("file", "text/html", "html")
    return _of("file", "application/xml", "xml") if start.startswith(b"<?xml") else None


def _is_tensors(file: BinaryIO, head: bytes) -> bool:
    """Safetensors: the length of a JSON object (8 bytes, little-endian), then the object."""
    if head[8:9] != b"{":
        return False
    length = int.from_bytes(head[:8], "little")
    return length <= min(_MOST_TENSOR_HEADER, file.seek(0, os.SEEK_END) - 8)


def _is_text(head: bytes) -> bool:
    """Whether this start of a file is UTF-8 without control characters; it may end within a character."""
    if _NO_TEXT.search(head):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _extension(name: str | None) -> str:
    _stem, dot, extension = (name or "").rpartition(".")
    return extension.lower() if dot else ""


def _named(found: Sniffed, names: dict[str, str], extension: str) -> Sniffed:
    content_type = names.get(extension)
    return found if content_type is None else _of(found.kind, content_type, extension)
