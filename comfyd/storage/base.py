"""The seam between comfyd and a place for files: files in, streams out; never a whole file in memory."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import msgspec


class LocalFile(msgspec.Struct, frozen=True, kw_only=True):
    """A finished file on this machine's disk, to be stored. Nobody changes it; whoever made it deletes it."""

    path: Path
    size_bytes: int
    sha256: str
    """Hexadecimal, as is `md5`, which is for storages that can check nothing else."""
    md5: str
    content_type: str
    name: str
    """What it is called where somebody saves it; not safe for anything else."""


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file as it comes back: its size, and its bytes from `start` on."""

    size_bytes: int
    chunks: AsyncIterator[bytes]


async def nothing() -> AsyncIterator[bytes]:
    """The chunks where there are no bytes."""
    for chunk in list[bytes]():
        yield chunk


class Storage(Protocol):
    """A place for artefacts. Lives as long as the process; an object in hand is open.

    A key is a relative path of safe ASCII parts, made by comfyd. Where the place fails `StorageError` is
    raised, whose `details["key"]` names the key of the configuration that mends it, where one does. A verb
    does not repeat itself, but where the place says when to: whoever calls knows how long there is to wait.
    """

    name: str
    """The word that configuration and requests use."""

    async def put(self, key: str, file: LocalFile) -> str | None:
        """Take a file whole or not at all; an existing one under the same key is replaced. Safe to repeat.

        Returns what is needed for its url and is not known from the key, if anything. Raises `NotAccepted`
        for a file that this storage will never take.
        """

    def open(
        self, key: str, start: int = 0, length: int | None = None
    ) -> AbstractAsyncContextManager[StoredFile]:
        """Read `length` bytes from `start`, within the block. Entering it raises `FileNotFound`.

        A stream that breaks off raises `StorageError`.
        """

    async def delete(self, key: str) -> None:
        """Forget a file; one that is not there is forgotten already."""

    async def url(self, key: str, location: str | None) -> str | None:
        """Where anybody can fetch the file without comfyd, for as long as is configured; no request is made.

        `location` is what `put` returned. None where comfyd has to serve it.
        """

    async def ping(self) -> None:
        """Write, read and delete a probe. Raises `StorageError` in one line that says what to mend."""
