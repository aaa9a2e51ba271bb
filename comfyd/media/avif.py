"""The size of an AVIF, and whether it holds nothing but pictures; never changes one: its parts are fixed.

Boxes after ISO 23008-12 and https://aomediacodec.github.io/av1-avif/.
"""

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO, Final

from comfyd.errors import MediaError
from comfyd.media.boxes import Box, boxes
from comfyd.media.pieces import exactly

_TOP: Final = frozenset({b"ftyp", b"meta", b"mdat", b"moov"})
_META: Final = frozenset({b"hdlr", b"pitm", b"iloc", b"iinf", b"iprp", b"iref", b"idat", b"grpl"})
_MOVIE: Final = frozenset({b"mvhd", b"trak"})
_TRACK: Final = frozenset({b"tkhd", b"edts", b"mdia", b"tref"})
_PICTURES: Final = frozenset({b"av01", b"grid", b"iovl", b"tmap"})


def picture_size(file: BinaryIO) -> tuple[int, int] | None:
    """Width and height in pixels as stored; None where they cannot be read.

    The largest picture in the file: beside it there may be thumbnails, tiles of it, and its transparency.
    """
    try:
        found = _inside(file, Box(b"", 0, file.seek(0, os.SEEK_END)), b"meta", b"iprp", b"ipco", b"ispe")
        sizes = [struct.unpack(">II", exactly(file, box.start + 4, 8)) for box in found]
    except MediaError:
        return None
    width, height = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
    return (width, height) if width and height else None


def _inside(file: BinaryIO, outer: Box, *path: bytes) -> list[Box]:
    """The boxes at the end of the path."""
    if not path:
        return [outer]
    start = outer.start + 4 if outer.name == b"meta" else outer.start  # after version and flags
    inner = boxes(file, start, outer.end)
    return [found for box in inner if box.name == path[0] for found in _inside(file, box, *path[1:])]


def check_clean(file: BinaryIO, size: int) -> None:
    """Raise `MediaError` if there is Exif, XMP or anything else besides pictures in the file."""
    if not all(_is_clean(file, box) for box in boxes(file, 0, size)):
        raise MediaError("an AVIF picture with metadata cannot be stripped of it without loss")


def _is_clean(file: BinaryIO, box: Box) -> bool:
    if box.name == b"meta":
        inner = list(boxes(file, box.start + 4, box.end))  # after version and flags
        listed = [item for one in inner if one.name == b"iinf" for item in _items(file, one)]
        return all(one.name in _META for one in inner) and _PICTURES.issuperset(listed)
    if box.name == b"moov":
        inner = list(boxes(file, box.start, box.end))
        tracks = [part for one in inner if one.name == b"trak" for part in boxes(file, one.start, one.end)]
        return all(one.name in _MOVIE for one in inner) and all(part.name in _TRACK for part in tracks)
    return box.name in _TOP


def _items(file: BinaryIO, listing: Box) -> Iterator[bytes]:
    """The types of the items that `iinf` lists."""
    version = exactly(file, listing.start, 1)[0]
    for entry in boxes(file, listing.start + (6 if version == 0 else 8), listing.end):
        wide = exactly(file, entry.start, 1)[0] >= 3
        yield exactly(file, entry.start + (10 if wide else 8), 4)
