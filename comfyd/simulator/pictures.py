"""Draws the pictures of a simulated sampler: the prompt in readable text over a seeded pattern.

Cheap on purpose: a few whole-picture operations of Pillow, no work per pixel in Python.
"""

from __future__ import annotations

import colorsys
import functools
import io
import random
import textwrap
from dataclasses import replace
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

if TYPE_CHECKING:
    from comfyd.simulator.values import Painting

PREVIEW_SIDE = 512  # the longer side of a sampler preview, as ComfyUI's --preview-size
PATTERN_SIDE = 192  # the pattern is drawn this small and enlarged: soft edges for little work


def paint_batch(painting: Painting, batch: int) -> tuple[Image.Image, ...]:
    """`batch` pictures; each further one has its own pattern, as a sampler gives each its own noise."""
    return tuple(paint(replace(painting, seed=painting.seed + index), index) for index in range(batch))


def paint(painting: Painting, index: int = 0) -> Image.Image:
    """The finished picture. The seed shown is the one asked for, also in a batch."""
    picture = background(painting)
    shown = f"seed {painting.seed - index}" + (f" +{index}" if index else "")
    details = f"{shown} · {painting.steps} steps · {painting.width} x {painting.height}"
    caption(picture, painting.text, details)
    return picture


def sketch(painting: Painting) -> Image.Image:
    """The picture in preview size."""
    scale = min(1.0, PREVIEW_SIDE / max(painting.width, painting.height))
    size = (max(8, round(painting.width * scale)), max(8, round(painting.height * scale)))
    return paint(replace(painting, width=size[0], height=size[1]))


def preview(sketched: Image.Image, done: float) -> bytes:
    """A JPEG of the sketch as it may look when `done` (0..1) of the steps are taken: ever finer."""
    width, height = sketched.size
    grain = max(1, round(32 * (1.0 - done) ** 2))
    coarse = sketched.resize((max(1, width // grain), max(1, height // grain)), Image.Resampling.BOX)
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def background(painting: Painting) -> Image.Image:
    """A seeded gradient with soft discs, or the source picture under a veil of it."""
    source = random.Random(painting.seed)  # noqa: S311  # the pattern of a picture
    hue = source.random()
    scale = PATTERN_SIDE / max(painting.width, painting.height)
    width, height = max(1, round(painting.width * scale)), max(1, round(painting.height * scale))
    gradient = Image.linear_gradient("L").rotate(source.choice((0, 90, 180, 270)))
    pattern = ImageOps.colorize(
        gradient.resize((width, height)),
        black=_color(hue, 0.75, 0.35),
        white=_color(hue + 0.18, 0.45, 0.95),
        mid=_color(hue + 0.08, 0.6, 0.7),
    )
    pen = ImageDraw.Draw(pattern, "RGBA")
    for _ in range(9):
        radius = source.uniform(0.04, 0.25) * PATTERN_SIDE
        x, y = source.random() * width, source.random() * height
        color = (*_color(hue + source.uniform(-0.2, 0.3), 0.5, 1.0), source.randint(40, 120))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    size = (max(1, painting.width), max(1, painting.height))
    pattern = pattern.filter(ImageFilter.GaussianBlur(1.2)).resize(size, Image.Resampling.BICUBIC)
    if not painting.source:
        return pattern
    original = ImageOps.fit(painting.source[0].convert("RGB"), size)
    return Image.blend(original, pattern, painting.strength * 0.7)


def caption(picture: Image.Image, text: str, details: str) -> None:
    """Write the text and, smaller, the details on a dark band at the foot of the picture."""
    width, height = picture.size
    size = max(9, min(width, height) // 16)
    margin = size // 2
    per_line = max(8, int((width - 2 * margin) / (size * 0.52)))
    fitting = max(1, int(height * 0.6 / (size * 1.25)))
    lines = textwrap.wrap(text, per_line, max_lines=fitting, placeholder=" ...") or ["(no prompt)"]
    small = max(8, round(size * 0.7))
    band = round(len(lines) * size * 1.25 + small * 1.3 + 2 * margin)
    pen = ImageDraw.Draw(picture, "RGBA")
    pen.rectangle((0, height - band, width, height), fill=(12, 14, 22, 176))
    y = float(height - band + margin)
    for line in lines:
        pen.text((margin, y), line, font=_font(size), fill=(255, 255, 255, 255))
        y += size * 1.25
    pen.text((margin, y), details, font=_font(small), fill=(200, 210, 225, 255))


@functools.lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _color(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)
