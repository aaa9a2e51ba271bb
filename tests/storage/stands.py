"""What the storage suite needs of each place: a storage in front of a real or contract server, and its truth.

A module `stand_<name>.py` has `stand(server, folder)`, an async context manager that yields a `Stand` on an
empty place of its own (a new bucket, folder or account), and leaves nothing open.
"""

import hashlib
import random
import struct
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from comfyd.storage.base import LocalFile, Storage

ANY_SIZE = 1 << 40
"""`Stand.largest` of a place without a limit that a test could reach."""
SMALLEST = 1024
"""Bytes of the smallest sample that may be asked for."""


@dataclass(frozen=True, kw_only=True)
class Stand:
    """One storage, open, and what the suite knows about it. Lives as long as the test."""

    storage: Storage
    held: Callable[[], Awaitable[list[str]]]
    """Everything that the place holds by its server's own account, in words of its own: files, and uploads
    that were begun and are neither completed nor aborted. Empty on a new stand."""
    sample: Callable[[int, int | None], bytes]
    """Content that this storage accepts: `(number, size)`. Another number gives other bytes of the same
    size, the same arguments the same bytes. `size` is exact, at least `SMALLEST`; None is a few kilobytes."""
    content_type: str
    """Of the samples."""
    suffix: str
    """Of the samples' names, such as `.png`."""
    largest: int = ANY_SIZE
    """Bytes of the largest file that it takes."""


def random_sample(number: int, size: int | None = None) -> bytes:
    """Bytes that mean nothing, for `Stand.sample` of places that take anything."""
    return random.Random(number).randbytes(size or 3_000)


def png_sample(number: int, size: int | None = None) -> bytes:
    """A valid PNG of 8 x 8 pixels, for `Stand.sample` of places that take pictures; padded to the size."""
    chance = random.Random(number)
    rows = b"".join(b"\0" + chance.randbytes(8 * 3) for _ in range(8))
    head = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    tail = _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    rest = (size or 3_000) - len(head) - len(tail) - 12
    return head + _chunk(b"coMf", chance.randbytes(rest)) + tail


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def local_file(folder: Path, data: bytes, name: str, content_type: str) -> LocalFile:
    """A finished file with this content, as the suite gives it to `Storage.put`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{random.randbytes(8).hex()}.source"
    path.write_bytes(data)
    return LocalFile(
        path=path,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        md5=hashlib.md5(data, usedforsecurity=False).hexdigest(),
        content_type=content_type,
        name=name,
    )
