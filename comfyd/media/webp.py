"""The chunks of WebP (https://developers.google.com/speed/webp/docs/riff_container); decodes nothing."""

import struct
from collections.abc import Iterator
from typing import BinaryIO, Final, NamedTuple

from comfyd.errors import MediaError
from comfyd.media.orientation import MOST_EXIF, only_orientation
from comfyd.media.pieces import Pieces, exactly

HEADER_BYTES: Final = 12
FRAME_BYTES: Final = 16  # of ANMF before its own chunks
MOST_CHUNKS: Final = 100_000
EXIF_FLAG: Final = 0x08
XMP_FLAG: Final = 0x04
KEPT: Final = frozenset({b"VP8 ", b"VP8L", b"ALPH", b"ICCP", b"ANIM"})


class Chunk(NamedTuple):
    """One chunk: `file[start:end]` with its header and padding; its payload has `length` bytes."""

    name: bytes
    start: int
    end: int
    length: int


def chunks(file: BinaryIO, start: int, end: int) -> Iterator[Chunk]:
    """The chunks of `file[start:end]`. Raises `MediaError` where they do not add up."""
    for _ in range(MOST_CHUNKS):
        if start >= end:
            return
        name, length = struct.unpack("<4sI", exactly(file, start, 8))
        after = start + 8 + length
        if after > end:
            raise MediaError("the WebP file is broken: it ends within a chunk")
        after = min(after + (length & 1), end)
        yield Chunk(name, start, after, length)
        start = after
    raise MediaError("the WebP file is broken: it has too many chunks")


def duration(file: BinaryIO, size: int) -> float | None:
    """Seconds of an animation; None for a still picture."""
    frames = [
        int.from_bytes(exactly(file, chunk.start + 20, 3), "little")
        for chunk in chunks(file, HEADER_BYTES, _end(file, size))
        if chunk.name == b"ANMF"
    ]
    return sum(frames) / 1000 if frames else None


def stripped(file: BinaryIO, size: int) -> Pieces:
    """The file without EXIF, XMP, unknown chunks, and without what follows its end."""
    body = Pieces()
    exif: bytes | None = None
    extended: tuple[int, int] | None = None
    for chunk in chunks(file, HEADER_BYTES, _end(file, size)):
        if chunk.name in KEPT:
            body.keep(chunk.start, chunk.end)
        elif chunk.name == b"ANMF":
            _check_frame(file, chunk)
            body.keep(chunk.start, chunk.end)
        elif chunk.name == b"VP8X" and chunk.length >= 10:
            extended = (chunk.start + 8, chunk.end)
        elif chunk.name == b"EXIF":
            exif = only_orientation(exactly(file, chunk.start + 8, min(chunk.length, MOST_EXIF)))
    return _assembled(file, body, exif if extended is not None else None, extended)


def _assembled(file: BinaryIO, body: Pieces, exif: bytes | None, extended: tuple[int, int] | None) -> Pieces:
    """RIFF header, VP8X with flags that are true, pictures, orientation."""
    pieces = Pieces()
    ending = b"" if exif is None else struct.pack("<4sI", b"EXIF", len(exif)) + exif
    length = 4 + body.size + len(ending) + (0 if extended is None else extended[1] - extended[0] + 8)
    header = struct.pack("<4sI4s", b"RIFF", length, b"WEBP")
    if header == exactly(file, 0, HEADER_BYTES):
        pieces.keep(0, HEADER_BYTES)
    else:
        pieces.put(header)
    if extended is not None:
        at, end = extended
        written = exactly(file, at, 1)[0]
        flags = written & ~(EXIF_FLAG | XMP_FLAG) | (0 if exif is None else EXIF_FLAG)
        pieces.keep(at - 8, at)
        if flags == written:
            pieces.keep(at, at + 1)
        else:
            pieces.put(bytes((flags,)))
        pieces.keep(at + 1, end)
    pieces.extend(body)
    if ending:
        pieces.put(ending)
    return pieces


def _end(file: BinaryIO, size: int) -> int:
    end = 8 + int.from_bytes(exactly(file, 4, 4), "little")
    if end > size:
        raise MediaError("the WebP file is broken: it is shorter than it says")
    return end


def _check_frame(file: BinaryIO, frame: Chunk) -> None:
    """A frame may hold unknown chunks, whose sizes are counted in it: such a file is not taken apart."""
    inner = chunks(file, frame.start + 8 + FRAME_BYTES, frame.start + 8 + frame.length)
    if any(chunk.name not in KEPT for chunk in inner):
        raise MediaError("the WebP file has parts that are not known, so it cannot be stripped")
