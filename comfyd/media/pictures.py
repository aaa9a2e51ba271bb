"""Decodes and encodes pictures with Pillow; never copies metadata, never guesses what a file is.

The decoder is named by what the content was seen to be, so no other one of Pillow's is ever tried.
Importing this module loads Pillow (some 35 ms).
"""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from comfyd.errors import MediaError
from comfyd.media.failures import failure
from comfyd.media.orientation import orientation
from comfyd.tasks import PictureFormat

# the classes and not Image.open: its limit on pixels is the process's, and a warning
_DECODERS: Final[dict[str, Callable[[Path], ImageFile.ImageFile]]] = {
    "avif": AvifImagePlugin.AvifImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "jpg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
}
_FAILURES: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
    RuntimeError,
    AttributeError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,
)
"""Whatever Pillow raises for a broken file, or for one that it cannot write. It warns of some damage, which
is an error where warnings are."""
_ANIMATED: Final = frozenset({"gif", "png", "webp", "avif"})
_PROFILES: Final = {
    "RGB": b"RGB ",
    "RGBA": b"RGB ",
    "P": b"RGB ",
    "L": b"GRAY",
    "LA": b"GRAY",
    "I;16": b"GRAY",
}
"""The colour space that a profile has to be for, by Pillow's mode."""
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to make upright what EXIF says is turned. Pillow's own way fails where the rest of EXIF is broken."""
_WHITE: Final = (255, 255, 255)
_DEEP_GREY: Final = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to make of a picture. `quality` is None where the format has none."""

    format: PictureFormat
    quality: int | None
    most_frames: int


def encode(source: Path, extension: str, target: Path, order: Order) -> bool:
    """Write `source`, which is what `extension` says, as is ordered. False, and no file, if left alone.

    Raises `MediaError`; a half-written target may be left then.
    """
    try:
        with _DECODERS[extension](source) as picture:
            frames = int(getattr(picture, "n_frames", 1))
            if frames == 1:
                _save_still(picture, target, order)
                return True
            if (
                order.format == "jpeg"
                or extension not in _ANIMATED
                or picture.info.get("default_image") is True
            ):
                return False
            if frames > order.most_frames:
                raise MediaError("the animation is too large to convert: it has too many frames of this size")
            _save_animation(picture, extension, target, order)
            return True
    except _FAILURES as exc:
        what = f"the picture cannot be converted to {order.format}"
        raise failure(exc, what, "it is broken") from exc


def _save_still(picture: ImageFile.ImageFile, target: Path, order: Order) -> None:
    picture.load()
    exif, profile = picture.info.get("exif"), picture.info.get("icc_profile")
    # a PNG's texts stand among its facts, under names of their own
    transparency = picture.info.get("transparency")
    picture.info = {"transparency": transparency} if isinstance(transparency, int | bytes | tuple) else {}
    turn = _TURNS.get(orientation(exif)) if isinstance(exif, bytes) else None
    fitting = _FITTING[order.format](picture if turn is None else picture.transpose(turn))
    fitting.save(target, order.format, icc_profile=_fitting_profile(profile, fitting.mode), **_options(order))


def _save_animation(picture: ImageFile.ImageFile, extension: str, target: Path, order: Order) -> None:
    loop = picture.info.get("loop")
    times = loop if isinstance(loop, int) else (1 if extension == "gif" else 0)
    if extension == "gif" and times and loop is not None:  # GIF counts repeats, the others count showings
        times += 1
    options = _options(order) | {"duration": _durations(picture)}
    if order.format != "avif":
        options["loop"] = times
    if order.format == "webp":
        options["background"] = (0, 0, 0, 0)
    picture.seek(0)
    profile = _fitting_profile(picture.info.get("icc_profile"), "RGB")
    picture.save(target, order.format, save_all=True, icc_profile=profile, **options)


def _durations(picture: ImageFile.ImageFile) -> list[int]:
    """Milliseconds of each frame; most decoders know them only after decoding it."""
    found = []
    for frame in range(int(getattr(picture, "n_frames", 1))):
        picture.seek(frame)
        picture.load()
        duration = picture.info.get("duration")
        found.append(round(duration) if isinstance(duration, int | float) else 0)
    return found


def _options(order: Order) -> dict[str, Any]:
    return {} if order.quality is None else {"quality": order.quality}


def _for_png(picture: Image.Image) -> Image.Image:
    if picture.mode in {"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"}:
        return picture
    return _eight_bits(picture, alpha=True)


def _eight_bits(picture: Image.Image, alpha: bool) -> Image.Image:
    """In L, RGB or, where `alpha` is wanted and there is any, RGBA; 8 bits each."""
    if picture.mode in {"F", "LAB"}:
        raise MediaError(f"a picture of Pillow's mode {picture.mode} cannot be converted")
    if picture.mode in _DEEP_GREY:
        return picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if picture.has_transparency_data:
        return picture.convert("RGBA") if alpha else _on_white(picture.convert("RGBA"))
    return picture if picture.mode in {"L", "RGB"} else picture.convert("L" if picture.mode == "1" else "RGB")


def _on_white(picture: Image.Image) -> Image.Image:
    background = Image.new("RGB", picture.size, _WHITE)
    background.paste(picture, mask=picture.getchannel("A"))
    return background


def _fitting_profile(profile: object, mode: str) -> bytes | None:
    """The profile if it is one for colours of this mode: byte 16 on says for which space it is."""
    if not isinstance(profile, bytes) or profile[16:20] != _PROFILES.get(mode):
        return None
    return profile


_FITTING: Final[dict[str, Callable[[Image.Image], Image.Image]]] = {
    "avif": lambda picture: _eight_bits(picture, alpha=True),
    "jpeg": lambda picture: _eight_bits(picture, alpha=False),
    "png": _for_png,
    "webp": lambda picture: _eight_bits(picture, alpha=True),
}
