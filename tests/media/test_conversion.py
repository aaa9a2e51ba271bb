"""Pictures in another wanted look the same, and carry nothing along."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image, ImageChops, ImageCms, ImageOps, ImageStat
from PIL.PngImagePlugin import PngInfo

from comfyd.errors import MediaError, StorageError
from comfyd.media import convert, facts, gif, strip
from comfyd.media.conversion import MOST_ANIMATED_PIXELS, MOST_PIXELS
from comfyd.tasks import PictureFormat
from tests.media import samples

FORMATS: tuple[PictureFormat, ...] = get_args(PictureFormat)
NAMES = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP", "avif": "AVIF"}


def opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        return picture


def difference(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of a channel, of 255."""
    found = ImageStat.Stat(ImageChops.difference(one.convert("RGBA"), other.convert("RGBA")))
    return max(found.mean)


def converted(source: Path, wanted: PictureFormat, quality: int | None = None) -> Image.Image:
    target = source.with_name("target")
    assert convert(source, target, wanted, quality)
    assert samples.CANARY.encode() not in target.read_bytes()
    found = opened(target)
    assert found.format == NAMES[wanted]
    return found


@pytest.mark.parametrize("wanted", FORMATS)
@pytest.mark.parametrize("made", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_every_picture_converts_to_every_format(tmp_path: Path, made: str, wanted: PictureFormat) -> None:
    source = tmp_path / "source"
    source.write_bytes(samples.encoded(samples.picture(), made))
    if made == NAMES[wanted]:
        assert not convert(source, tmp_path / "target", wanted)
        assert not (tmp_path / "target").exists()
    else:
        assert difference(converted(source, wanted), opened(source)) < 9


@pytest.mark.parametrize("wanted", FORMATS)
def test_no_prompt_goes_along(tmp_path: Path, wanted: PictureFormat) -> None:
    for make in (samples.png, samples.jpeg, samples.apng, samples.webp, samples.gif):
        source = make(tmp_path / "source")
        if convert(source, tmp_path / "target", wanted, 80):
            data = (tmp_path / "target").read_bytes()
            assert samples.CANARY.encode() not in data
            if wanted != "avif":
                assert not strip(tmp_path / "target", tmp_path / "again")


def test_the_same_format_is_written_anew_only_for_a_quality(tmp_path: Path) -> None:
    source = tmp_path / "a"
    samples.picture(size=(200, 200)).save(source, "JPEG", quality=95)
    assert not convert(source, tmp_path / "b", "jpeg")
    assert convert(source, tmp_path / "b", "jpeg", 20)
    assert (tmp_path / "b").stat().st_size < source.stat().st_size
    assert not convert(samples.png(tmp_path / "c"), tmp_path / "d", "png", 50)


@pytest.mark.parametrize("wanted", ["jpeg", "webp", "avif"])
def test_quality_is_a_trade(tmp_path: Path, wanted: PictureFormat) -> None:
    source = samples.png(tmp_path / "a", Image.effect_noise((96, 96), 90).convert("RGB"))
    sizes = []
    for quality in (1, 60, 100):
        converted(source, wanted, quality)
        sizes.append((tmp_path / "target").stat().st_size)
    assert sizes == sorted(set(sizes))


def test_transparency_stays_where_it_can_and_is_white_in_a_jpeg(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    source = samples.png(tmp_path / "a", clear)
    for wanted in ("webp", "avif"):
        alpha = converted(source, wanted).getchannel("A")
        assert alpha.getextrema() == (0, 0)
    found = converted(source, "jpeg")
    assert (found.mode, found.getpixel((8, 8))) == ("RGB", (255, 255, 255))


def test_a_transparent_colour_of_a_palette_is_transparency(tmp_path: Path) -> None:
    picture = Image.new("P", (16, 16), 1)
    picture.putpalette([0, 0, 0, 0, 0, 255])
    source = samples.png(tmp_path / "a", picture, transparency=1)
    assert converted(source, "webp").getchannel("A").getextrema() == (0, 0)
    assert converted(source, "jpeg").getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("wanted", ["jpeg", "webp", "avif"])
def test_sixteen_bits_keep_their_brightness(tmp_path: Path, wanted: PictureFormat) -> None:
    source = samples.png(tmp_path / "a", Image.new("I;16", (16, 16), 128 * 257))
    shade = converted(source, wanted).convert("L").getpixel((8, 8))
    assert shade in range(126, 131)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
@pytest.mark.parametrize("wanted", FORMATS)
def test_every_mode_has_a_way(tmp_path: Path, mode: str, wanted: PictureFormat) -> None:
    source = tmp_path / "a"
    shown = Image.new("I;16", (16, 16), 9999) if mode == "I;16" else samples.picture(mode)
    shown.save(source, "TIFF")
    assert converted(source, wanted).size == shown.size


def test_a_picture_of_numbers_has_none(tmp_path: Path) -> None:
    source = tmp_path / "a"
    Image.new("F", (16, 16), 0.5).save(source, "TIFF")
    with pytest.raises(MediaError, match="mode F"):
        convert(source, tmp_path / "b", "webp")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("made", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("turned", range(1, 9))
def test_orientation_is_applied_as_pillow_does(tmp_path: Path, made: str, turned: int) -> None:
    notes = samples.exif()
    notes[0x0112] = turned
    source = tmp_path / "a"
    samples.picture().save(source, made, exif=notes)
    found = converted(source, "webp" if made == "PNG" else "png")
    upright = ImageOps.exif_transpose(opened(source))
    assert (found.size, dict(found.getexif())) == (upright.size, {})
    assert difference(found, upright) < 9


@pytest.mark.parametrize("wanted", FORMATS)
def test_a_profile_stays_if_it_is_for_the_colours(tmp_path: Path, wanted: PictureFormat) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    source = tmp_path / "a"
    samples.picture().save(source, "TIFF", icc_profile=profile)
    assert converted(source, wanted).info["icc_profile"] == profile
    samples.picture("CMYK").save(source, "TIFF", icc_profile=profile[:16] + b"CMYK" + profile[20:])
    assert "icc_profile" not in converted(source, wanted).info


@pytest.mark.parametrize("wanted", ["png", "webp", "avif"])
@pytest.mark.parametrize("make", [samples.apng, samples.webp, samples.gif])
def test_an_animation_keeps_its_frames_and_times(
    tmp_path: Path, make: Callable[[Path], Path], wanted: PictureFormat
) -> None:
    source = make(tmp_path / "a")
    if convert(source, tmp_path / "b", wanted, 90):
        before, after = facts(source, "image/*"), facts(tmp_path / "b", "image/*")
        assert after.duration == pytest.approx(before.duration, abs=0.002)
        with Image.open(source) as old, Image.open(tmp_path / "b") as new:
            assert getattr(new, "n_frames", 1) == getattr(old, "n_frames", 1) == 3
            for frame in range(3):
                old.seek(frame)
                new.seek(frame)
                assert difference(old, new) < 9
    else:
        assert (make, wanted) == (samples.apng, "png")


@pytest.mark.parametrize(("loop", "shown"), [(None, 1), (0, 0), (2, 3)])
def test_an_animation_is_shown_as_often_as_before(tmp_path: Path, loop: int | None, shown: int) -> None:
    source = samples.gif(tmp_path / "a", loop=loop)
    for wanted in ("png", "webp"):
        assert convert(source, tmp_path / "b", wanted)
        assert opened(tmp_path / "b").info["loop"] == shown


def test_an_animation_is_left_alone_by_a_jpeg(tmp_path: Path) -> None:
    for make in (samples.apng, samples.webp, samples.gif):
        assert not convert(make(tmp_path / "a"), tmp_path / "b", "jpeg", 80)
    assert not (tmp_path / "b").exists()


def test_an_avif_sequence_becomes_an_animated_webp(tmp_path: Path) -> None:
    source = tmp_path / "a"
    shown = [samples.picture(shade=index * 20) for index in range(3)]
    shown[0].save(source, "AVIF", save_all=True, append_images=shown[1:], duration=125)
    assert convert(source, tmp_path / "b", "webp")
    assert facts(tmp_path / "b", "image/webp").duration == pytest.approx(0.375)


def test_pages_are_left_alone(tmp_path: Path) -> None:
    source = tmp_path / "a"
    samples.picture().save(source, "TIFF", save_all=True, append_images=[samples.picture()])
    assert not convert(source, tmp_path / "b", "webp")


def test_texts_of_a_png_are_not_taken_for_facts(tmp_path: Path) -> None:
    info = PngInfo()
    for name in ("transparency", "icc_profile", "background", "loop", "duration", "exif"):
        info.add_text(name, samples.CANARY)
    source = tmp_path / "a"
    samples.picture().save(source, "PNG", pnginfo=info)
    assert difference(converted(source, "webp", 100), samples.picture()) < 9
    frames = [samples.picture(shade=9)]
    samples.picture().save(source, "PNG", pnginfo=info, save_all=True, append_images=frames, duration=100)
    assert convert(source, tmp_path / "b", "webp")


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize(
    ("data", "wanted", "why"),
    [
        (png_header(100_000, 100_000), "webp", "too large to convert"),
        (png_header(2**31 - 1, 2**31 - 1), "jpeg", "too large to convert"),
        (png_header(16_384, 10), "webp", "at most 16383 pixels"),
        (png_header(70_000, 10), "jpeg", "at most 65500 pixels"),
        (png_header(70_000, 10), "avif", "at most 65536 pixels"),
        (png_header(10, 10), "webp", "broken"),
        (samples.encoded(samples.picture(), "JPEG")[:-200], "png", "broken"),
        (b"words", "png", "text/plain; charset=utf-8 is no picture"),
        (b"<svg/>", "png", "image/svg.xml is no picture"),
        (b"", "png", "no picture"),
    ],
)
def test_what_cannot_be_converted_is_said_and_leaves_nothing(
    tmp_path: Path, data: bytes, wanted: PictureFormat, why: str
) -> None:
    source = tmp_path / "a"
    source.write_bytes(data)
    with pytest.raises(MediaError, match=why):
        convert(source, tmp_path / "b", wanted)
    assert not (tmp_path / "b").exists()


def test_an_animation_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    data = samples.encoded(Image.new("P", (8000, 2500)), "GIF")
    source = tmp_path / "a"
    source.write_bytes(data)
    with source.open("rb") as file:
        frame = next(data[block.start : block.end] for block in gif.blocks(file) if block.kind == "image")
    source.write_bytes(data[:-1] + frame * (MOST_PIXELS // (8000 * 2500)) + data[-1:])
    with pytest.raises(MediaError, match="too many frames"):
        convert(source, tmp_path / "b", "png")
    assert MOST_ANIMATED_PIXELS > MOST_PIXELS


def test_a_target_that_cannot_be_written_is_a_media_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the disk says: no such file"):
        convert(samples.png(tmp_path / "a"), tmp_path / "none" / "b", "webp")
