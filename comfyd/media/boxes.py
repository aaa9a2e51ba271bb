"""The boxes of MP4, QuickTime, AVIF and their kin (ISO 14496-12); never reads what is inside a media box."""

import os
from collections.abc import Iterator
from typing import BinaryIO, Final, Literal, NamedTuple

from comfyd.errors import MediaError

MOST_BOXES: Final = 10_000
BoxType = tuple[Literal["image", "video", "audio", "file"], str, str]

_BRANDS: Final[dict[bytes, BoxType]] = {
    b"avif": ("image", "image/avif", "avif"),
    b"avis": ("image", "image/avif", "avif"),
    b"heic": ("file", "image/heic", "heic"),
    b"heix": ("file", "image/heic", "heic"),
    b"mif1": ("file", "image/heif", "heif"),
    b"msf1": ("file", "image/heif", "heif"),
    b"qt  ": ("video", "video/quicktime", "mov"),
    b"M4A ": ("audio", "audio/mp4", "m4a"),
    b"M4B ": ("audio", "audio/mp4", "m4a"),
    b"3gp4": ("video", "video/3gpp", "3gp"),
    b"3gp5": ("video", "video/3gpp", "3gp"),
    b"3gp6": ("video", "video/3gpp", "3gp"),
}
_MP4: Final[BoxType] = ("video", "video/mp4", "mp4")
_OLD_QUICKTIME: Final = frozenset({b"moov", b"mdat", b"wide", b"pnot"})


class Box(NamedTuple):
    """One box: its payload is `file[start:end]`."""

    name: bytes
    start: int
    end: int


def boxes(file: BinaryIO, start: int, end: int) -> Iterator[Box]:
    """The boxes of `file[start:end]` in order. Raises `MediaError` where they do not add up."""
    for _ in range(MOST_BOXES):
        if start >= end:
            return
        file.seek(start)
        header = file.read(16)
        size = int.from_bytes(header[:4], "big")
        payload = 8
        if size == 1:
            size, payload = int.from_bytes(header[8:16], "big"), 16
        elif size == 0:  # to the end
            size = end - start
        if len(header) < payload or size < payload or start + size > end:
            raise MediaError("the file is broken: its boxes do not add up")
        yield Box(header[4:8], start + payload, start + size)
        start += size
    raise MediaError("the file is broken: it has too many boxes")


def brand_type(file: BinaryIO, head: bytes) -> BoxType | None:
    """What a file that starts with `head` is by its brands; None if it is of another family."""
    if head[4:8] in _OLD_QUICKTIME:
        return _BRANDS[b"qt  "]
    if head[4:8] != b"ftyp" or len(head) < 16:
        return None
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))]
    if brands[0] in {b"mif1", b"msf1"} and not {b"avif", b"avis"}.isdisjoint(brands):
        return _BRANDS[b"avif"]
    found = _BRANDS.get(brands[0], _MP4)
    if found[0] == "video" and _tracks(file) == {b"soun"}:
        return _BRANDS[b"M4A "]
    return found


def _tracks(file: BinaryIO) -> set[bytes]:
    """The handlers of the tracks (`vide`, `soun`, ...) as far as they can be found."""
    found: set[bytes] = set()
    try:
        for movie in _inside(file, [Box(b"", 0, file.seek(0, os.SEEK_END))], b"moov"):
            for media in _inside(file, _inside(file, [movie], b"trak"), b"mdia"):
                for handler in _inside(file, [media], b"hdlr"):
                    file.seek(handler.start + 8)
                    found.add(file.read(4))
    except MediaError:
        return set()
    return found


def _inside(file: BinaryIO, outer: list[Box], name: bytes) -> list[Box]:
    return [box for one in outer for box in boxes(file, one.start, one.end) if box.name == name]
