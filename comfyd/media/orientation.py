"""The one part of EXIF that pixels need: which way is up; never copies anything else of it."""

import struct
from typing import Final

MOST_EXIF: Final = 1 << 20
"""Bytes that are looked at: what is longer has its orientation in its first directory anyway."""
_TAG: Final = 0x0112
_SHORT: Final = 3
_EXIF_ID: Final = b"Exif\0\0"


def orientation(exif: bytes) -> int:
    """1 (upright) to 8 by a block of EXIF, with or without its identifier; 1 where it says nothing.

    Shape: https://www.cipa.jp/std/documents/download_e.html?DC-008-Translation-2023-E section 4.6.
    """
    data = exif.removeprefix(_EXIF_ID)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None or len(data) < 8:
        return 1
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    if start + 2 > len(data):
        return 1
    (count,) = struct.unpack_from(f"{order}H", data, start)
    for at in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12):
        tag, kind, _values, value = struct.unpack_from(f"{order}HHIH", data, at)
        if tag == _TAG and kind == _SHORT:
            return int(value) if 1 <= value <= 8 else 1
    return 1


def only_orientation(exif: bytes) -> bytes | None:
    """A block of EXIF (without its identifier) that says nothing but the orientation; None if upright."""
    turned = orientation(exif)
    if turned == 1:
        return None
    # header, one directory with one entry (a short, padded to 4 bytes), no next directory
    return struct.pack(">4sIHHHIHHI", b"MM\0*", 8, 1, _TAG, _SHORT, 1, turned, 0, 0)
