"""Files that leave for comfyd: opened before anything is sent, read in blocks; never whole in memory."""

import asyncio
import os
import stat
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import msgspec

from comfyd.commands.exits import UnreadableFile

BLOCK: Final = 1 << 18
"""Bytes read in one go."""


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """A file of this machine that stands for an input value until it is uploaded."""

    path: Path


class OutgoingFile:
    """A file that is open for sending. Made by `outgoing`, and lives as long as that block."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._file = file
        facts = os.fstat(file.fileno())
        self.size_bytes = facts.st_size
        self.identity = (facts.st_dev, facts.st_ino)
        """The same for the same file, whatever it is called."""

    async def blocks(self) -> AsyncGenerator[bytes, None]:
        """Its bytes, once. Raises `UnreadableFile`, also where it changes its size meanwhile."""
        left = self.size_bytes
        while left > 0:
            with _translated(self._path):
                block = await asyncio.to_thread(self._file.read, min(BLOCK, left))
            left -= len(block)
            # Before the last block leaves: comfyd would have a whole file otherwise, and not this one.
            if not block or (left == 0 and os.fstat(self._file.fileno()).st_size != self.size_bytes):
                raise UnreadableFile(f"{self._path} changed while it was read")
            yield block


@contextmanager
def outgoing(path: Path) -> Iterator[OutgoingFile]:
    """Open a file for sending. Raises `UnreadableFile`, also for pipes: they cannot be read a second time."""
    with _translated(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableFile(f"{path} is not a regular file")
        file = path.open("rb", buffering=0)
    with file:
        yield OutgoingFile(path, file)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnreadableFile(f"{path} cannot be read: {error.strerror or error}") from error
