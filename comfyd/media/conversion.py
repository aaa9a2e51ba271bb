"""Pictures in another format: what is asked for and what is possible; the pixels are `pictures`' work.

Never copies metadata, and never converts what would lose more than its metadata without saying so.
"""

from pathlib import Path
from typing import Final

from comfyd.errors import MediaError
from comfyd.media.kinds import sniff
from comfyd.tasks import PictureFormat

MOST_PIXELS: Final = 200_000_000
"""Of one picture. Pillow holds 3 or 4 bytes for each, twice while it converts."""
MOST_ANIMATED_PIXELS: Final = 1_000_000_000
"""Of all frames together, where they are encoded one after the other."""
DEFAULT_QUALITY: Final = {"jpeg": 90, "webp": 90, "avif": 75}
_MOST_SIDE: Final = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383, "avif": 65_536}
_SAME: Final = {"png": "png", "jpeg": "jpg", "webp": "webp", "avif": "avif"}


def convert(source: Path, target: Path, format: PictureFormat, quality: int | None = None) -> bool:  # noqa: A002 - the API's word
    """Write the picture anew in `format`; `quality` is 1 to 100, and nothing to a PNG.

    False, and no file, where it is left as it is: it has that format already and no quality is asked for, it
    is animated and a JPEG cannot be, or it has several pages. Transparency becomes white in a JPEG; EXIF's
    orientation is applied; colour profiles stay. Raises `MediaError` for what is no picture, is broken or is
    too large, and where the target cannot be written.
    """
    found = sniff(source)
    if found.kind != "image" or found.width is None or found.height is None:
        raise MediaError(f"a file of type {found.content_type} is no picture that can be converted")
    if found.extension == _SAME[format] and (quality is None or format == "png"):
        return False
    if found.width * found.height > MOST_PIXELS:
        raise MediaError(
            f"a picture of {found.width} x {found.height} pixels is too large to convert: "
            f"at most {MOST_PIXELS // 1_000_000} megapixels"
        )
    if max(found.width, found.height) > _MOST_SIDE[format]:
        raise MediaError(f"{format} takes at most {_MOST_SIDE[format]} pixels on a side")
    from comfyd.media import pictures  # noqa: PLC0415 - Pillow is loaded when there is something to convert

    order = pictures.Order(
        format=format,
        quality=None if format == "png" else quality or DEFAULT_QUALITY[format],
        most_frames=_most_pixels(format) // (found.width * found.height),
    )
    try:
        done = pictures.encode(source, found.extension, target, order)
    except MediaError:
        target.unlink(missing_ok=True)
        raise
    return done


def _most_pixels(format: PictureFormat) -> int:  # noqa: A002 - as above
    # Pillow holds all frames of an animated PNG until it knows what changes between them
    return MOST_PIXELS if format == "png" else MOST_ANIMATED_PIXELS
