"""Width and height of a picture from its header; never decodes a pixel, never reads more than a little.

The reading is done by `imagesize`, which is plain Python: no decompression, so no bomb, and a size of any
magnitude comes back as it is written. What is bounded here is how much a header may make it read.
"""

import io
import os
from typing import BinaryIO, Final

import imagesize

MOST_READ: Final = 4 << 20
"""Bytes. A JPEG may carry some megabytes of colour profile and previews before its size."""
MOST_READS: Final = 20_000


class _Allowance(io.RawIOBase):
    """A file of which only so much can be read; then it ends. Lives as long as one look at a header."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._bytes = MOST_READ
        self._reads = MOST_READS

    def read(self, size: int = -1, /) -> bytes:
        self._reads -= 1
        if self._reads < 0:
            return b""
        data = self._file.read(self._bytes if size < 0 else min(size, self._bytes))
        self._bytes -= len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)


def picture_size(file: BinaryIO) -> tuple[int, int] | None:
    """Width and height in pixels as stored (orientation is not applied); None where they cannot be read."""
    width, height = imagesize.get(_Allowance(file), exif_rotation=False)
    return (int(width), int(height)) if width > 0 and height > 0 else None
