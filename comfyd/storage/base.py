"""The seam between comfyd and a place for files: streams in, streams out; never a whole file in memory."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """What a storage knows of a file that it has taken whole."""

    key: str
    size_bytes: int
    sha256: str


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file as it comes back: its size, and its bytes from `start` on."""

    size_bytes: int
    chunks: AsyncIterator[bytes]


class Storage(Protocol):
    """A place for artefacts. Lives as long as the process; an object in hand is open.

    A key is a relative path of safe ASCII parts, made by comfyd. Raises `StorageError` where the place fails.
    """

    name: str

    async def put(self, key: str, chunks: AsyncIterator[bytes], content_type: str) -> Stored:
        """Take a file whole or not at all; an existing one under the same key is replaced."""

    def open(
        self, key: str, start: int = 0, length: int | None = None
    ) -> AbstractAsyncContextManager[StoredFile]:
        """Read `length` bytes from `start`, within the block. Entering it raises `FileNotFound`."""

    async def delete(self, key: str) -> None:
        """Forget a file; one that is not there is forgotten already."""

    async def ping(self) -> None:
        """Write, read and delete a probe."""
