"""Metadata of files that are headed by text: safetensors and GLB; leaves tensors and meshes alone."""

import struct
from typing import Any, BinaryIO, Final

import msgspec

from comfyd.errors import MediaError
from comfyd.media.pieces import Pieces, exactly

MOST_JSON: Final = 4 << 20
"""Bytes of a header that is read at once. A prompt with its workflow is seldom 1 MB."""
_JSON_CHUNK: Final = b"JSON"
_BINARY_CHUNK: Final = b"BIN\0"
_CHUNK: Final = struct.Struct("<I4s")
_TELLING: Final = frozenset({"prompt", "workflow"})


def tensors(file: BinaryIO, size: int) -> Pieces:
    """Safetensors, as ComfyUI's `.latent` is one, without `__metadata__`.

    Shape: https://github.com/huggingface/safetensors#format: offsets count from the end of the header.
    """
    length = int.from_bytes(exactly(file, 0, 8), "little")
    if length > MOST_JSON or 8 + length > size:
        raise MediaError("the header of the tensors is too long to be stripped of its metadata")
    try:
        header = msgspec.json.decode(exactly(file, 8, length), type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise MediaError("the file is broken: its header is not JSON") from exc
    pieces = Pieces()
    if header.pop("__metadata__", None) is None:
        pieces.keep(0, size)
        return pieces
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    pieces.put(len(text).to_bytes(8, "little") + text)
    pieces.keep(8 + length, size)
    return pieces


def glb(file: BinaryIO, size: int) -> Pieces:
    """A binary glTF without `extras` of the asset and of scenes, and without any that hold a prompt.

    Shape: https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html section 4.4.
    """
    _magic, version, total = struct.unpack("<4sII", exactly(file, 0, 12))
    length, name = _CHUNK.unpack(exactly(file, 12, 8))
    if version != 2 or total > size or name != _JSON_CHUNK or length > min(MOST_JSON, total - 20):
        raise MediaError("the GLB file is broken, or too large to be stripped of its metadata")
    document = _object(exactly(file, 20, length))
    body, unknown = _binary(file, 20 + length, total)
    pieces = Pieces()
    if not _without_extras(document) and not unknown and total == size:
        pieces.keep(0, size)
        return pieces
    text = msgspec.json.encode(document)
    text += b" " * (-len(text) % 4)
    header = struct.pack("<4sII", b"glTF", 2, 20 + len(text) + body.size)
    pieces.put(header + _CHUNK.pack(len(text), _JSON_CHUNK) + text)
    pieces.extend(body)
    return pieces


def _binary(file: BinaryIO, at: int, end: int) -> tuple[Pieces, bool]:
    """The chunk of vertices and textures, and whether there were others."""
    body, unknown = Pieces(), False
    while at < end:
        length, name = _CHUNK.unpack(exactly(file, at, 8))
        after = at + 8 + length
        if after > end:
            raise MediaError("the GLB file is broken: it ends within a chunk")
        if name == _BINARY_CHUNK and not body.size:
            body.keep(at, after)
        else:
            unknown = True
        at = after
    return body, unknown


def _without_extras(document: dict[str, Any]) -> bool:
    """Take the extras out; whether there were any."""
    scenes = document.get("scenes")
    free = {
        id(one) for one in (document, document.get("asset"), *(scenes if isinstance(scenes, list) else ()))
    }
    found = False
    waiting: list[Any] = [document]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            extras = item.get("extras")
            told = isinstance(extras, dict) and not _TELLING.isdisjoint(extras)
            if "extras" in item and (told or id(item) in free):
                del item["extras"]
                found = True
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
    return found


def _object(data: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise MediaError("the file is broken: its header is not JSON") from exc
