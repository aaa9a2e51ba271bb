"""Painted pictures are seeded, captioned and quick."""

from __future__ import annotations

import io

import pytest
from PIL import Image, ImageChops, ImageStat

from comfyd.simulator import pictures, png
from comfyd.simulator.values import Painting

PAINTING = Painting(text="a lighthouse at dusk", seed=42, steps=20, width=256, height=192)


def difference(one: Image.Image, other: Image.Image) -> float:
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean)


def test_the_caption_depends_on_the_text() -> None:
    other = Painting(text="a quite different thing", seed=42, steps=20, width=256, height=192)
    one, two = pictures.paint(PAINTING), pictures.paint(other)
    changed = ImageChops.difference(one, two).getbbox()
    assert changed is not None
    assert changed[1] > 256 * 0.3  # the pattern above the caption is that of the seed


@pytest.mark.parametrize(("width", "height"), [(8, 8), (64, 512), (1024, 64)])
@pytest.mark.parametrize("text", ["", "word " * 200])
def test_any_size_and_text_can_be_painted(width: int, height: int, text: str) -> None:
    painting = Painting(text=text, seed=1, steps=1, width=width, height=height)
    assert pictures.paint(painting).size == (width, height)


def test_a_batch_has_a_pattern_for_each() -> None:
    first, second = pictures.paint_batch(PAINTING, 2)
    assert difference(first, second) > 1


def test_previews_get_closer_to_the_picture() -> None:
    sketch = pictures.sketch(Painting(text="x", seed=3, steps=9, width=2048, height=1024))
    assert sketch.size == (512, 256)
    distances = []
    for done in (0.1, 0.5, 1.0):
        with Image.open(io.BytesIO(pictures.preview(sketch, done))) as seen:
            assert seen.format == "JPEG"
            distances.append(difference(seen, sketch))
    assert distances == sorted(distances, reverse=True)


def test_a_source_shines_through() -> None:
    source = (Image.new("RGB", (10, 10), "white"),)
    faint = Painting(text="x", seed=3, steps=9, width=64, height=64, strength=0.0, source=source)
    assert pictures.background(faint).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("at_least", [None, 10, 5000])
def test_padding_keeps_a_png_whole(at_least: int | None) -> None:
    data = png.encode(Image.new("RGB", (4, 4), "red"), None, 4, at_least)
    assert len(data) == max(at_least or 0, len(png.encode(Image.new("RGB", (4, 4), "red"), None, 4, None)))
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        assert picture.getpixel((0, 0)) == (255, 0, 0)
