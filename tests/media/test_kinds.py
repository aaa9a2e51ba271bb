"""What a file is comes from its content, whatever it is called."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from comfyd.errors import MediaError
from comfyd.media import Sniffed, sniff
from comfyd.simulator import containers
from comfyd.simulator.values import Audio
from tests.media import samples

AUDIO = Audio(seconds=0.2, sample_rate=44_100, channels=1, notes=(440,))
UNKNOWN = Sniffed(content_type="application/octet-stream", extension="bin")


def written(folder: Path, data: bytes) -> Path:
    path = folder / "input"
    path.write_bytes(data)
    return path


def seen(folder: Path, data: bytes, name: str | None = None) -> tuple[str, str, str]:
    found = sniff(written(folder, data), name)
    return found.kind, found.content_type, found.extension


@pytest.mark.parametrize(
    ("wanted", "content_type", "extension"),
    [
        ("PNG", "image/png", "png"),
        ("JPEG", "image/jpeg", "jpg"),
        ("WEBP", "image/webp", "webp"),
        ("GIF", "image/gif", "gif"),
        ("BMP", "image/bmp", "bmp"),
        ("TIFF", "image/tiff", "tiff"),
        ("AVIF", "image/avif", "avif"),
    ],
)
def test_a_picture_is_known_with_its_size_under_any_name(
    tmp_path: Path, wanted: str, content_type: str, extension: str
) -> None:
    path = written(tmp_path, samples.encoded(samples.picture(), wanted))
    assert sniff(path, "movie.mp4") == Sniffed(
        content_type=content_type, extension=extension, kind="image", width=48, height=32
    )


def test_animations_are_images(tmp_path: Path) -> None:
    assert sniff(samples.apng(tmp_path / "a")).kind == "image"
    assert sniff(samples.webp(tmp_path / "b")).kind == "image"
    assert sniff(samples.gif(tmp_path / "c")).kind == "image"


def test_videos_and_sounds_are_known_without_any_name(tmp_path: Path) -> None:
    made = {
        "video/mp4": samples.mp4(tmp_path / "a"),
        "video/webm": samples.webm(tmp_path / "b"),
        "video/quicktime": samples.sound(tmp_path / "c", "mov", "aac"),
        "video/x-matroska": samples.webm(tmp_path / "d", format="matroska"),
        "audio/flac": samples.sound(tmp_path / "e", "flac", "flac"),
        "audio/mpeg": samples.sound(tmp_path / "f", "mp3", "libmp3lame"),
        "audio/aac": samples.sound(tmp_path / "g", "adts", "aac"),
        "audio/wav": samples.sound(tmp_path / "h", "wav", "pcm_s16le"),
        "audio/mp4": samples.sound(tmp_path / "i", "mp4", "aac"),
        "audio/webm": samples.sound(tmp_path / "j", "webm", "libopus"),
        "audio/x-matroska": samples.sound(tmp_path / "k", "matroska", "flac"),
        "audio/aiff": samples.sound(tmp_path / "l", "aiff", "pcm_s16be"),
        "video/x-msvideo": samples.sound(tmp_path / "m", "avi", "pcm_s16le"),
        "video/x-flv": samples.sound(tmp_path / "n", "flv", "aac"),
    }
    found = {content_type: sniff(path, "picture.png") for content_type, path in made.items()}
    found["video/quicktime"] = sniff(samples.mp4(tmp_path / "c", format="mov"))
    assert {content_type: one.content_type for content_type, one in found.items()} == {
        content_type: content_type for content_type in made
    }
    assert {one.kind for one in found.values()} == {"video", "audio"}


def test_each_codec_of_ogg_has_its_extension(tmp_path: Path) -> None:
    opus = sniff(samples.sound(tmp_path / "a", "opus", "libopus"))
    flac = sniff(samples.sound(tmp_path / "b", "ogg", "flac"))
    assert (opus.extension, opus.content_type) == ("opus", "audio/ogg")
    assert (flac.extension, flac.kind) == ("ogg", "audio")
    assert seen(tmp_path, b"OggS" + bytes(24) + b"\x80theora") == ("video", "video/ogg", "ogv")
    assert seen(tmp_path, b"OggS" + bytes(40)) == ("file", "application/octet-stream", "bin")


def test_what_the_simulator_makes_is_known(tmp_path: Path) -> None:
    frames = [samples.picture()]
    assert seen(tmp_path, containers.webm(frames, 1.0)) == ("video", "video/webm", "webm")
    assert seen(tmp_path, containers.mp4(frames, 1.0)) == ("video", "video/mp4", "mp4")
    assert seen(tmp_path, containers.flac(AUDIO, {})) == ("audio", "audio/flac", "flac")
    assert seen(tmp_path, containers.mp3(AUDIO)) == ("audio", "audio/mpeg", "mp3")
    assert seen(tmp_path, containers.glb(1.0)) == ("file", "model/gltf-binary", "glb")


@pytest.mark.parametrize(
    ("brands", "kind", "content_type"),
    [
        (b"avis\0\0\0\0avis", "file", "application/octet-stream"),  # a picture without a size is none
        (b"mif1\0\0\0\0heic", "file", "image/heif"),
        (b"mif1\0\0\0\0avif", "file", "application/octet-stream"),
        (b"heic\0\0\0\0mif1", "file", "image/heic"),
        (b"3gp4\0\0\0\0isom", "video", "video/3gpp"),
        (b"dash\0\0\0\0iso5", "video", "video/mp4"),
        (b"M4A \0\0\0\0isom", "audio", "audio/mp4"),
    ],
)
def test_brands_tell_the_family_of_mp4_apart(
    tmp_path: Path, brands: bytes, kind: str, content_type: str
) -> None:
    data = struct.pack(">I4s", 8 + len(brands), b"ftyp") + brands
    assert seen(tmp_path, data)[:2] == (kind, content_type)


def test_quicktime_from_before_brands_is_known(tmp_path: Path) -> None:
    assert seen(tmp_path, struct.pack(">I4s", 8, b"wide"))[1] == "video/quicktime"


@pytest.mark.parametrize(
    ("data", "content_type"),
    [
        (b"<!DOCTYPE html><p>", "text/html"),
        (b"\xef\xbb\xbf \n<HTML >", "text/html"),
        (b"<script>alert(1)</script>", "text/html"),
        ("<html><body>".encode("utf-16"), "text/html"),
        (b"<!-- note --><html>", "text/html"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image/svg+xml"),
        (b'<?xml version="1.0"?><!-- x --><svg>', "image/svg+xml"),
        (b'<?xml version="1.0"?><note/>', "application/xml"),
    ],
)
def test_markup_is_a_file_and_never_an_image(tmp_path: Path, data: bytes, content_type: str) -> None:
    found = sniff(written(tmp_path, data), "photo.png")
    assert (found.kind, found.content_type, found.width) == ("file", content_type, None)


@pytest.mark.parametrize(
    ("data", "name", "content_type", "extension"),
    [
        (b"v 0 0 0\nf 1 1 1\n", "cube.OBJ", "model/obj", "obj"),
        (b'{"a": 1}', "a.json", "application/json", "json"),
        ("Grüße".encode(), "a.txt", "text/plain; charset=utf-8", "txt"),
        ("Grüße".encode(), None, "text/plain; charset=utf-8", "txt"),
        (b"plain words", "a.png", "text/plain; charset=utf-8", "txt"),
        (b"plain words", "a.glb", "text/plain; charset=utf-8", "txt"),
        (b"plain words", "a.html", "text/plain; charset=utf-8", "txt"),
        (b"\x00\x01\x02\x03", "a.stl", "model/stl", "stl"),
        (b"\x00\x01\x02\x03", "a.png", "application/octet-stream", "bin"),
        (b"\x00\x01\x02\x03", "a.mp4", "application/octet-stream", "bin"),
        (b"\x00\x01\x02\x03", "../../x.sh\0", "application/octet-stream", "bin"),
        (b"\x00\x01\x02\x03", "a.txt", "application/octet-stream", "bin"),
        (b"\xff\xfe\xfd\xfc", None, "application/octet-stream", "bin"),
        (b"PK\x03\x04rest", "scene.usdz", "model/vnd.usdz+zip", "usdz"),
        (b"PK\x03\x04rest", "scene.docx", "application/zip", "zip"),
        (b"\x76\x2f\x31\x01rest", "a.png", "image/x-exr", "exr"),
        (b"%PDF-1.7", "a.txt", "application/pdf", "pdf"),
        (b"", "a.png", "application/x-empty", "bin"),
    ],
)
def test_a_name_only_chooses_among_what_no_content_tells_apart(
    tmp_path: Path, data: bytes, name: str | None, content_type: str, extension: str
) -> None:
    assert seen(tmp_path, data, name) == ("file", content_type, extension)


def test_a_text_may_be_cut_within_a_character(tmp_path: Path) -> None:
    assert seen(tmp_path, b"x" + "ü".encode() * 4096, "a.txt")[2] == "txt"


def test_tensors_keep_the_name_of_their_family(tmp_path: Path) -> None:
    path = samples.latent(tmp_path / "x")
    assert [sniff(path, name).extension for name in ("a.latent", "a.sft", "a.pt", None)] == [
        "latent",
        "sft",
        "safetensors",
        "safetensors",
    ]
    assert seen(tmp_path, struct.pack("<Q", 1 << 40) + b"{}")[2] == "bin"


def test_a_header_of_any_magnitude_gives_its_size_without_a_warning(tmp_path: Path) -> None:
    for width, height in ((100_000, 100_000), (2**31 - 1, 2**31 - 1)):
        header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
        chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        found = sniff(written(tmp_path, b"\x89PNG\r\n\x1a\n" + chunk))
        assert (found.kind, found.width, found.height) == ("image", width, height)


@pytest.mark.parametrize(
    "start", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"II*\0"]
)
def test_a_picture_without_a_readable_header_is_no_picture(tmp_path: Path, start: bytes) -> None:
    assert sniff(written(tmp_path, start)) == UNKNOWN


def test_a_large_size_may_stand_behind_a_long_profile(tmp_path: Path) -> None:
    data = samples.encoded(samples.picture(), "JPEG", icc_profile=bytes(500_000))
    assert sniff(written(tmp_path, data)).width == 48


def test_sound_needs_two_frames_or_a_tag(tmp_path: Path) -> None:
    frame = containers.mp3(AUDIO)[:104]
    assert seen(tmp_path, frame)[2] == "mp3"
    assert seen(tmp_path, frame + b"\0" * 104)[2] == "bin"
    assert seen(tmp_path, b"\xff\xff\xff\xff" * 8)[2] == "bin"
    assert seen(tmp_path, b"ID3\x04\0\0\0\0\0\0" + frame)[2] == "mp3"
    assert seen(tmp_path, b"ID3\x04\0\0\0\0\0\x02xxfLaC")[2] == "flac"
    aac = samples.sound(tmp_path / "aac", "adts", "aac").read_bytes()
    assert seen(tmp_path, b"ID3\x04\0\0\0\0\0\0" + aac)[2] == "aac"
    assert seen(tmp_path, b"\xff\xf1\x50\x80\0\0\0" + b"\0" * 20)[2] == "bin"


def test_other_containers_under_known_starts_are_unknown(tmp_path: Path) -> None:
    assert seen(tmp_path, b"\x1a\x45\xdf\xa3" + b"\x42\x82\x84else" + bytes(20))[2] == "bin"
    assert seen(tmp_path, b"RIFF\x04\0\0\0ACON")[2] == "bin"
    assert seen(tmp_path, b"BM" + b"\xfe" * 40)[2] == "bin"


def test_a_file_that_is_not_there_is_a_media_error(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="cannot be read"):
        sniff(tmp_path / "none")
