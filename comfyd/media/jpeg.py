"""The segments of JPEG (ITU T.81 annex B); decodes nothing, keeps every byte of the compressed picture."""

import re
import struct
from typing import BinaryIO, Final

from comfyd.errors import MediaError
from comfyd.media.orientation import only_orientation
from comfyd.media.pieces import BLOCK, Pieces, exactly

_START_OF_SCAN: Final = 0xDA
_END: Final = 0xD9
_EXIF: Final = b"Exif\0\0"
_APPLICATION: Final = range(0xE0, 0xF0)
_COMMENT: Final = 0xFE
_ALONE: Final = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length
_KEPT: Final = {0xE0: b"JFIF\0", 0xE2: b"ICC_PROFILE\0", 0xEE: b"Adobe"}
MOST_SEGMENTS: Final = 50_000
# within a scan FF is followed by 00, by a restart marker or by more FF; all else ends the scan
_SCAN_ENDS: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def stripped(file: BinaryIO, size: int) -> Pieces:
    """The file without Exif (but for orientation), XMP, comments, previews, and without what follows its end.

    JFIF, colour profile and Adobe's note on colours stay.
    """
    pieces = Pieces()
    pieces.keep(0, 2)
    at = 2
    for _ in range(MOST_SEGMENTS):
        lead, marker = exactly(file, at, 2)
        if lead != 0xFF:
            raise MediaError("the JPEG file is broken: a segment is missing")
        if marker == 0xFF:  # filling
            at += 1
            continue
        if marker in _ALONE or marker == _END:
            pieces.keep(at, at + 2)
            at += 2
            if marker == _END:
                return pieces
            continue
        end = at + 2 + int.from_bytes(exactly(file, at + 2, 2), "big")
        if end < at + 4 or end > size:
            raise MediaError("the JPEG file is broken: it ends within a segment")
        _segment(file, pieces, (marker, at, end))
        at = end
        if marker == _START_OF_SCAN:
            at = _scan_end(file, end)
            pieces.keep(end, at)
    raise MediaError("the JPEG file is broken: it has too many segments")


def _segment(file: BinaryIO, pieces: Pieces, segment: tuple[int, int, int]) -> None:
    """Keep, replace or drop the segment (marker, start, end)."""
    marker, start, end = segment
    if marker not in _APPLICATION and marker != _COMMENT:
        pieces.keep(start, end)
        return
    payload = exactly(file, start + 4, end - start - 4)
    if marker in _KEPT and payload.startswith(_KEPT[marker]):
        pieces.keep(start, end)
    elif marker == 0xE1 and payload.startswith(_EXIF):
        exif = only_orientation(payload)
        if exif is not None:
            pieces.put(struct.pack(">HH", 0xFFE1, 2 + len(_EXIF) + len(exif)) + _EXIF + exif)


def _scan_end(file: BinaryIO, start: int) -> int:
    """Where the marker after the compressed data stands."""
    file.seek(start)
    before = b""
    while block := file.read(BLOCK):
        data = before + block
        found = _SCAN_ENDS.search(data)
        if found is not None:
            return start + found.start()
        start += len(data) - 1
        before = data[-1:]
    raise MediaError("the JPEG file is broken: its picture does not end")
