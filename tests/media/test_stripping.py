"""No byte of the prompt survives, and no pixel and no sample changes."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image, ImageSequence
from PIL.PngImagePlugin import PngInfo

from comfyd.errors import DiskFull, MediaError, StorageError
from comfyd.media import facts, strip
from tests.media import samples

CANARY = samples.CANARY.encode()

PICTURES: dict[str, Callable[[Path], Path]] = {
    "png": samples.png,
    "png-grey-16": lambda path: samples.png(path, Image.new("I;16", (9, 9), 40_000)),
    "png-palette": lambda path: samples.png(path, samples.picture("P")),
    "apng": samples.apng,
    "webp-animated": samples.webp,
    "webp-lossy": lambda path: samples.webp(path, frames=1, lossless=False),
    "webp-lossless": lambda path: samples.webp(path, frames=1),
    "jpeg": samples.jpeg,
    "jpeg-progressive": lambda path: samples.jpeg(path, progressive=True),
    "jpeg-restarts": lambda path: samples.jpeg(path, restart_marker_rows=1),
    "gif": samples.gif,
    "gif-once": lambda path: samples.gif(path, loop=None),
}

STREAMS: dict[str, Callable[[Path], Path]] = {
    "mp4": samples.mp4,
    "mp4-silent": lambda path: samples.mp4(path, sound=False),
    "mov": lambda path: samples.mp4(path, format="mov"),
    "webm": samples.webm,
    "webm-live": lambda path: samples.webm(path, live=True),
    "mkv": lambda path: samples.webm(path, format="matroska"),
    "flac": lambda path: samples.sound(path, "flac", "flac"),
    "mp3": lambda path: samples.sound(path, "mp3", "libmp3lame"),
    "opus": lambda path: samples.sound(path, "opus", "libopus"),
    "ogg": lambda path: samples.sound(path, "ogg", "flac"),
    "wav": lambda path: samples.sound(path, "wav", "pcm_s16le"),
    "m4a": lambda path: samples.sound(path, "ipod", "aac"),
}


def stripped(source: Path) -> Path:
    """The copy, which holds nothing of the prompt while its source does."""
    assert CANARY in source.read_bytes()
    target = source.with_name("stripped")
    assert strip(source, target)
    assert CANARY not in target.read_bytes()
    return target


def frames(path: Path) -> list[tuple[Any, bytes]]:
    """Duration and decoded pixels of every picture in a file."""
    with Image.open(path) as picture:
        return [
            (frame.info.get("duration"), frame.convert("RGBA").tobytes())
            for frame in ImageSequence.Iterator(picture)
        ]


def packets(path: Path) -> list[tuple[int, bytes]]:
    with av.open(str(path)) as container:
        return [(packet.stream.index, bytes(packet)) for packet in container.demux() if packet.size]


@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES)
def test_a_picture_loses_its_prompt_and_no_pixel(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    source = make(tmp_path / "source")
    target = stripped(source)
    assert frames(target) == frames(source)
    assert facts(target, "image/*") == facts(source, "image/*")
    with Image.open(source) as before, Image.open(target) as after:
        assert (after.mode, after.size, after.info.get("loop")) == (
            before.mode,
            before.size,
            before.info.get("loop"),
        )


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
def test_streams_lose_their_prompt_and_no_packet(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    source = make(tmp_path / "source")
    target = stripped(source)
    assert sorted(packets(target)) == sorted(packets(source))
    before, after = facts(source, "video/*"), facts(target, "video/*")
    assert (after.width, after.height) == (before.width, before.height)
    assert after.duration == pytest.approx(before.duration, abs=0.03)
    with av.open(str(target)) as container:
        told = {name.lower() for one in (container, *container.streams) for name in one.metadata}
        assert not told & {"prompt", "workflow", "title", "comment", "artist"}


@pytest.mark.parametrize(
    ("name", "make"), [*PICTURES.items(), ("latent", samples.latent), ("svg", samples.svg)]
)
def test_what_is_clean_is_left_as_it_is(tmp_path: Path, name: str, make: Callable[[Path], Path]) -> None:
    clean = stripped(make(tmp_path / name))
    assert not strip(clean, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_stripping_streams_twice_gives_the_same_file(tmp_path: Path) -> None:
    once = stripped(samples.mp4(tmp_path / "a"))
    assert strip(once, tmp_path / "twice")
    assert (tmp_path / "twice").read_bytes() == once.read_bytes()


def test_every_kind_of_png_text_goes_and_colours_stay(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("prompt", samples.CANARY)
    info.add_itxt("XML:com.adobe.xmp", samples.CANARY)
    info.add(b"prVt", CANARY)
    source = tmp_path / "a"
    samples.picture().save(
        source, "PNG", pnginfo=info, icc_profile=b"x" * 200, dpi=(72, 72), exif=samples.exif()
    )
    source.write_bytes(source.read_bytes() + CANARY)  # what follows the end
    target = stripped(source)
    with Image.open(target) as picture:
        assert picture.info["icc_profile"] == b"x" * 200
        assert set(picture.info) == {"icc_profile", "dpi"}


def test_compressed_texts_go_too(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("prompt", samples.CANARY * 50, zip=True)
    source, target = tmp_path / "a", tmp_path / "b"
    samples.picture().save(source, "PNG", pnginfo=info)
    assert strip(source, target)
    with Image.open(target) as picture:
        picture.load()
        assert not picture.info


@pytest.mark.parametrize("wanted", ["PNG", "JPEG", "WEBP"])
def test_a_turned_picture_stays_turned(tmp_path: Path, wanted: str) -> None:
    notes = samples.exif()
    notes[0x0112] = 6
    source = tmp_path / "a"
    samples.picture().save(source, wanted, exif=notes)
    target = stripped(source)
    with Image.open(target) as picture:
        assert dict(picture.getexif()) == {0x0112: 6}


def test_an_exif_that_makes_no_sense_says_nothing(tmp_path: Path) -> None:
    for notes in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x09" + CANARY):
        source = tmp_path / "a"
        samples.picture().save(source, "JPEG", exif=notes)
        source.write_bytes(source.read_bytes() + CANARY)
        with Image.open(stripped(source)) as picture:
            assert "exif" not in picture.info


def test_a_jpeg_keeps_what_its_colours_need(tmp_path: Path) -> None:
    source = tmp_path / "a"
    samples.picture("CMYK").save(source, "JPEG", icc_profile=b"x" * 100_000, comment=samples.CANARY)
    target = stripped(source)
    with Image.open(target) as picture:
        assert picture.info["icc_profile"] == b"x" * 100_000
        assert picture.info["adobe_transform"] is not None
    assert frames(target) == frames(source)


def test_filling_between_segments_is_passed_over(tmp_path: Path) -> None:
    source = samples.jpeg(tmp_path / "a")
    data = source.read_bytes()
    source.write_bytes(data[:2] + b"\xff\xff" + data[2:])
    assert frames(stripped(source)) == frames(samples.jpeg(tmp_path / "b"))


def test_a_gif_keeps_its_loop_and_profile_and_no_other_extension(tmp_path: Path) -> None:
    source = samples.gif(tmp_path / "a", loop=3)
    data = source.read_bytes()
    profile = b"\x21\xff\x0bICCRGBG1012\x03abc\0"
    xmp = b"\x21\xff\x0bXMP DataXMP" + bytes((len(CANARY),)) + CANARY + b"\0"
    text = b"\x21\x01\x0c" + bytes(12) + bytes((len(CANARY),)) + CANARY + b"\0"
    other = b"\x21\x77" + bytes((len(CANARY),)) + CANARY + b"\0"
    control = b"\x21\xf9" + bytes((len(CANARY),)) + CANARY + b"\0"
    source.write_bytes(data[:-1] + profile + xmp + text + other + control + b";" + CANARY)
    target = stripped(source)
    assert profile in target.read_bytes()
    with Image.open(target) as picture:
        assert picture.info["loop"] == 3


def test_webp_flags_tell_the_truth_afterwards(tmp_path: Path) -> None:
    source = samples.webp(tmp_path / "a")
    assert source.read_bytes()[20] & 0x0C
    source.write_bytes(source.read_bytes() + CANARY)
    data = stripped(source).read_bytes()
    assert not data[20] & 0x0C
    assert int.from_bytes(data[4:8], "little") == len(data) - 8
    assert b"EXIF" not in data


def test_a_webp_frame_with_unknown_parts_is_refused(tmp_path: Path) -> None:
    source = samples.webp(tmp_path / "a")
    data = source.read_bytes()
    at = data.index(b"ANMF")
    size = int.from_bytes(data[at + 4 : at + 8], "little")
    hidden = b"hide" + struct.pack("<I", 20) + CANARY.ljust(20)
    frame = b"ANMF" + struct.pack("<I", size + 28) + data[at + 8 : at + 8 + size] + hidden
    body = data[8:at] + frame + data[at + 8 + size :]
    source.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    refused(source, "parts that are not known")


def refused(source: Path, why: str) -> None:
    target = source.with_name("target")
    with pytest.raises(MediaError, match=why):
        strip(source, target)
    assert not target.exists()


def test_an_avif_is_left_alone_only_if_it_is_clean(tmp_path: Path) -> None:
    clean, told, moving = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    samples.picture().save(clean, "AVIF")
    assert not strip(clean, tmp_path / "x")
    samples.picture().save(moving, "AVIF", save_all=True, append_images=[samples.picture(shade=9)])
    assert not strip(moving, tmp_path / "x")
    for options in ({"exif": samples.exif()}, {"xmp": CANARY}):
        samples.picture().save(told, "AVIF", **options)
        refused(told, "without loss")


def test_an_avif_with_other_boxes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    data = samples.encoded(samples.picture(), "AVIF")
    path.write_bytes(data + struct.pack(">I4s", 8 + len(CANARY), b"uuid") + CANARY)
    refused(path, "without loss")


def test_tensors_stay_at_their_offsets(tmp_path: Path) -> None:
    target = stripped(samples.latent(tmp_path / "a"))
    data = target.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert "__metadata__" not in header
    begin, end = header["latent_tensor"]["data_offsets"]
    assert data[8 + length + begin : 8 + length + end] == struct.pack("<16f", *range(16))


def test_a_glb_keeps_its_mesh_and_the_extras_that_are_no_prompt(tmp_path: Path) -> None:
    document = {
        "asset": {"version": "2.0", "extras": samples.TAGS},
        "extras": {"about": samples.CANARY},
        "scenes": [{"nodes": [0], "extras": {"about": samples.CANARY}}],
        "nodes": [{"mesh": 0, "extras": samples.TAGS}],
        "meshes": [{"extras": {"targetNames": ["smile"]}}],
    }
    hidden = struct.pack("<I4s", 20, b"HIDE") + CANARY.ljust(20)
    data = stripped(samples.glb(tmp_path / "a", document, hidden)).read_bytes()
    length = int.from_bytes(data[12:16], "little")
    kept = json.loads(data[20 : 20 + length])
    assert kept["meshes"] == document["meshes"]
    assert kept["nodes"] == [{"mesh": 0}]
    assert int.from_bytes(data[8:12], "little") == len(data)
    assert data[20 + length + 8 :] == struct.pack("<9f", *range(9))
    assert not strip(tmp_path / "stripped", tmp_path / "again")


def test_an_svg_is_the_same_but_for_metadata(tmp_path: Path) -> None:
    text = stripped(samples.svg(tmp_path / "a")).read_text()
    assert "metadata" not in text
    assert '<svg><rect width="4" height="4" fill="é"/></svg></svg>' in text


def test_an_empty_metadata_element_with_a_value_goes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    empty, comment = f"<x:metadata a='>{samples.CANARY}>'/>", f"<!--{samples.CANARY}-->"
    path.write_text(
        f"<svg xmlns:x='y'>{empty}<g/>{comment}<g>{empty}</g><metadata >{empty}</metadata ></svg>"
    )
    assert stripped(path).read_text() == "<svg xmlns:x='y'><g/><g></g></svg>"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<svg><metadata></svg>", "not well-formed"),
        ('<!DOCTYPE svg [<!ENTITY a "<metadata>x</metadata>">]><svg>&a;</svg>', "entities"),
        ('<?xml version="1.0" encoding="iso-8859-1"?><svg/>', "not in UTF-8"),
        ('<?xml version="1.0" encoding="utopia-8"?><svg/>', "not in UTF-8"),
    ],
)
def test_an_svg_that_is_not_understood_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "a"
    path.write_text(text)
    refused(path, why)


def test_an_svg_of_wide_characters_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes('<svg><metadata a="b"/></svg>'.encode("utf-16"))
    refused(path, "not in UTF-8")


def test_a_sound_loses_its_cover_and_old_tags(tmp_path: Path) -> None:
    source = samples.sound(tmp_path / "a", "mp3", "libmp3lame")
    source.write_bytes(source.read_bytes() + b"TAG" + CANARY.ljust(125))
    stripped(source)
    cover = tmp_path / "cover"
    with samples.container(cover, format="mp3") as out:
        sound = out.add_stream("libmp3lame", rate=48_000)
        shown = out.add_stream("png", rate=1)
        shown.width, shown.height, shown.pix_fmt = 48, 32, "rgb24"
        shown.disposition = av.stream.Disposition.attached_pic
        out.mux(shown.encode(samples.video_frame(samples.picture())))
        out.mux(sound.encode(samples.tone(48_000, 0.2)))
        out.mux(sound.encode(None))
    with av.open(str(stripped(cover))) as container:
        assert [stream.type for stream in container.streams] == ["audio"]


def test_a_video_keeps_its_transparency(tmp_path: Path) -> None:
    source = tmp_path / "a"
    with samples.container(source, format="webm") as out:
        video = out.add_stream("libvpx-vp9", rate=4, options={"cpu-used": "8", "deadline": "realtime"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuva420p"
        for frame in samples.video_frames(2):
            out.mux(video.encode(frame.reformat(format="yuva420p")))
        out.mux(video.encode(None))
    alpha_mode = b"\x53\xc0\x81\x01"
    assert alpha_mode in source.read_bytes()
    assert alpha_mode in stripped(source).read_bytes()


@pytest.mark.parametrize("text", ["", "just words\n", '{"a": 1}'])
def test_plain_texts_and_bitmaps_carry_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a"
    path.write_text(text)
    assert not strip(path, tmp_path / "b")
    path.write_bytes(samples.encoded(samples.picture(), "BMP"))
    assert not strip(path, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\0\1\2\3",
        b"\x76\x2f\x31\x01 exr",
        b"PK\x03\x04",
        b"<html>",
        samples.encoded(samples.picture(), "TIFF"),
        b"FLV\x01" + bytes(20),
    ],
)
def test_what_is_not_known_to_be_clean_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    refused(path, "cannot be stripped of its metadata")


def chunk(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def broken_files() -> dict[str, tuple[bytes, str]]:
    png = samples.encoded(samples.picture(), "PNG")
    webp = samples.encoded(samples.picture(), "WEBP")
    jpeg = samples.encoded(samples.picture(), "JPEG")
    gif = samples.encoded(samples.picture("P"), "GIF")
    glb = struct.pack("<4sII", b"glTF", 2, 30) + struct.pack("<I4s", 2, b"JSON") + b"{}"
    scan = jpeg.index(b"\xff\xda")
    return {
        "png-cut": (png[:-30], "within a chunk"),
        "png-endless": (png[:-12], "too early"),
        "png-critical": (png[:33] + chunk(b"ABCD", b"x") + png[33:], "not known"),
        "webp-cut": (webp[:-4], "shorter than it says"),
        "webp-lies": (webp[:16] + b"\xff\xff\xff\x7f" + webp[20:], "within a chunk"),
        "jpeg-cut": (jpeg[:-2], "does not end"),
        "jpeg-cut-segment": (jpeg[: scan - 4], "within a segment"),
        "jpeg-no-marker": (jpeg[:scan] + b"x" + jpeg[scan:], "segment is missing"),
        "jpeg-short": (jpeg[:scan] + b"\xff\xfe\0\1" + jpeg[scan:], "within a segment"),
        "gif-cut": (gif[:-3], "do not end"),
        "gif-endless": (gif[:-1], "too early"),
        "gif-unknown": (gif[:-1] + b"\x99", "unknown block"),
        "tensors-long": (struct.pack("<Q", 5 << 20) + b"{" + bytes(6 << 20), "too long"),
        "tensors-no-json": (struct.pack("<Q", 4) + b"{abc", "not JSON"),
        "glb-cut": (glb, "broken"),
        "glb-no-json": (
            glb[:8] + b"\x18\0\0\0" + glb[12:12] + struct.pack("<I4s", 4, b"JSON") + b"{abc",
            "not JSON",
        ),
        "glb-chunk": (glb[:8] + b"\x1e\0\0\0" + glb[12:] + b"\xff\0\0\0BIN\0", "within a chunk"),
        "avif-boxes": (samples.encoded(samples.picture(), "AVIF") + b"\0\0\0\2x", "cannot be stripped"),
        "mp4": (struct.pack(">I4s", 16, b"ftyp") + b"isom\0\0\0\0", "broken"),
        "webm": (b"\x1a\x45\xdf\xa3\x8b\x42\x82\x84webm" + bytes(90), "broken"),
        "flac": (b"fLaC" + bytes(90), "broken"),
        "svg-large": (b"<svg>" + b" " * (17 << 20), "too large"),
    }


@pytest.mark.parametrize(("data", "why"), broken_files().values(), ids=broken_files())
def test_a_broken_file_is_refused_and_nothing_is_left(tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    refused(path, why)


def test_a_target_that_cannot_be_written_is_the_disks_fault(tmp_path: Path) -> None:
    made = (
        samples.png(tmp_path / "a"),
        samples.sound(tmp_path / "b", "wav", "pcm_s16le"),
        tmp_path / "nothing",
    )
    for source in made:
        with pytest.raises(StorageError, match="the disk says: no such file"):
            strip(source, tmp_path / "none" / "target")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk here that is always full")
def test_a_full_disk_is_said(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for source in (samples.png(tmp_path / "a"), samples.sound(tmp_path / "b", "wav", "pcm_s16le")):
        target.symlink_to("/dev/full")
        with pytest.raises(DiskFull, match="the disk says: no space left"):
            strip(source, target)
        assert not target.is_symlink()


def test_large_pictures_are_copied_in_blocks(tmp_path: Path) -> None:
    noise = Image.effect_noise((1600, 1200), 200)
    source = samples.png(tmp_path / "a", noise)
    assert source.stat().st_size > 4 * (1 << 18) > 1_000_000
    assert frames(stripped(source)) == [(None, noise.convert("RGBA").tobytes())]
    jpeg = tmp_path / "b"
    noise.save(jpeg, "JPEG", quality=95, comment=samples.CANARY)
    assert frames(stripped(jpeg)) == frames(jpeg)
    assert io.BytesIO(jpeg.read_bytes()).getbuffer().nbytes > 1 << 19
