"""Part of a file on disk, as a file of its own for drivers that send one; never all of it in memory."""

import base64
import hashlib
import io
import os
from typing import IO

from comfyd.disk import BLOCK


class Part(io.RawIOBase):
    """Some bytes of an open file, as a file of its own. The driver reads it on a thread, 64 KiB at a time."""

    def __init__(self, source: IO[bytes], start: int, length: int) -> None:
        self.length = length
        self._descriptor = source.fileno()
        self._start = start
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes: a request that is sent again begins anew."""
        return True

    def tell(self) -> int:
        """Bytes before what is read next."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See `io.IOBase`."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.length}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """See `io.RawIOBase`. Raises `OSError` where the file has become shorter: the server would wait."""
        left = self.length - self._at
        wanted = left if size < 0 else min(size, left)
        found = os.pread(self._descriptor, wanted, self._start + self._at) if wanted > 0 else b""
        if wanted > 0 and not found:
            raise OSError("the file has become shorter")
        self._at += len(found)
        return found

    def md5(self) -> str:
        """The digest of all of it, in base64. Takes a while: for a thread."""
        digest = hashlib.md5(usedforsecurity=False)
        self.seek(0)
        while block := self.read(BLOCK):
            digest.update(block)
        self.seek(0)
        return base64.b64encode(digest.digest()).decode()
