"""The chunks of PNG and APNG (https://www.w3.org/TR/png-3/); never inflates one, checks no checksum."""

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Final, NamedTuple

from comfyd.errors import MediaError
from comfyd.media.orientation import MOST_EXIF, only_orientation
from comfyd.media.pieces import Pieces, exactly

SIGNATURE_BYTES: Final = 8
MOST_CHUNKS: Final = 500_000
KEPT: Final = frozenset(
    {b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"cICP", b"mDCV", b"cLLI", b"sBIT"}
    | {b"bKGD", b"pHYs", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"IEND"}
)
"""What pixels, colours and animation need. Whatever else there is goes, known or not: ComfyUI alone writes
its prompt as `tEXt` (SaveImage) and as `comf` (SaveAnimatedPNG)."""


class Chunk(NamedTuple):
    """One chunk: `file[start:end]` with its length, name and checksum; the payload has `length` bytes."""

    name: bytes
    start: int
    end: int
    length: int


def chunks(file: BinaryIO, size: int) -> Iterator[Chunk]:
    """All chunks up to and with IEND. Raises `MediaError` where they do not add up."""
    start = SIGNATURE_BYTES
    for _ in range(MOST_CHUNKS):
        length, name = struct.unpack(">I4s", exactly(file, start, 8))
        end = start + 12 + length
        if end > size:
            raise MediaError("the PNG file is broken: it ends within a chunk")
        yield Chunk(name, start, end, length)
        if name == b"IEND":
            return
        start = end
    raise MediaError("the PNG file is broken: it has too many chunks")


def duration(file: BinaryIO, size: int) -> float | None:
    """Seconds of an animation; None for a still picture."""
    animated, seconds = False, 0.0
    for chunk in chunks(file, size):
        if chunk.name == b"acTL":
            animated = True
        elif chunk.name == b"IDAT" and not animated:
            return None
        elif chunk.name == b"fcTL":
            numerator, denominator = struct.unpack(">HH", exactly(file, chunk.start + 28, 4))
            seconds += numerator / (denominator or 100)
    return round(seconds, 6) if animated else None


def stripped(file: BinaryIO, size: int) -> Pieces:
    """The file without anything that is not pixels, colour or animation, and without what follows its end."""
    pieces = Pieces()
    pieces.keep(0, SIGNATURE_BYTES)
    for chunk in chunks(file, size):
        if chunk.name in KEPT:
            pieces.keep(chunk.start, chunk.end)
        elif chunk.name == b"eXIf":
            exif = only_orientation(exactly(file, chunk.start + 8, min(chunk.length, MOST_EXIF)))
            if exif is not None:
                pieces.put(_chunk(b"eXIf", exif))
        elif not chunk.name[0] & 0x20:  # an upper case letter: not to be understood without it
            raise MediaError("the PNG file has parts that are not known, so it cannot be stripped")
    return pieces


def _chunk(name: bytes, payload: bytes) -> bytes:
    body = name + payload
    return struct.pack(">I", len(payload)) + body + struct.pack(">I", zlib.crc32(body))
