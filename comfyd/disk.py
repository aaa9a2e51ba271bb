"""Work on this machine's disk: on threads, in blocks, not left half done; never says what a file is for."""

import asyncio
import contextlib
import errno
import hashlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any, Final, ParamSpec, TypeVar

import msgspec
import structlog
from blake3 import blake3 as new_blake3

from comfyd.errors import DiskFull, StorageError

log = structlog.get_logger("comfyd.disk")

P = ParamSpec("P")
T = TypeVar("T")

BLOCK: Final = 1 << 18
"""Bytes written or read in one go on a thread."""
LOOK_MS: Final = 1_000
"""How often it is looked how much room there is."""


class Digest(msgspec.Struct, frozen=True, kw_only=True):
    """What a file is known by."""

    size_bytes: int
    sha256: str
    md5: str | None = None
    """Only where it was asked for, as some storages do."""
    blake3: str | None = None
    """Only where it was asked for: assets are known by it. All three are hexadecimal."""


async def on_disk(what: str, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run this on a thread, and let the disk's errors leave as `StorageError`, whose message begins `what`.

    Canceled, it waits for the thread, which cannot be stopped: nothing happens on the disk after it has left.
    """
    try:
        return await to_its_end(asyncio.to_thread(action, *args, **kwargs))
    except OSError as exc:
        kind = DiskFull if exc.errno in {errno.ENOSPC, errno.EDQUOT} else StorageError
        raise kind(f"{what}: {exc.strerror or exc}") from exc


@asynccontextmanager
async def opened(what: str, action: Callable[[], IO[bytes]]) -> AsyncIterator[IO[bytes]]:
    """The file that this opens; closed on a thread, because that may still write, and fail.

    What ended the block says more than that: a cancellation that meets a full disk stays one.
    """
    held: list[IO[bytes]] = []
    try:
        await on_disk(what, lambda: held.append(action()))
        yield held[0]
    except BaseException:
        for file in held:
            with contextlib.suppress(StorageError):
                await on_disk(what, file.close)
        raise
    await on_disk(what, held[0].close)


async def to_its_end(call: Coroutine[Any, Any, T]) -> T:
    """Run this to its end. However often this is canceled meanwhile, the cancellation comes after it."""
    task = asyncio.ensure_future(call)
    canceled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as exc:
            canceled = exc
    if canceled is not None:
        if not task.cancelled():
            task.exception()  # a failure is heard, or the loop would complain; the cancellation says enough
        raise canceled
    return task.result()


async def write_stream(
    what: str,
    path: Path,
    chunks: AsyncIterator[bytes],
    *,
    sync: bool = False,
    md5: bool = False,
    blake3: bool = False,
) -> Digest:
    """Write a stream to a new file; with `sync` it is on the disk when this returns. `md5` costs time.

    Raises `StorageError`, and errors of `chunks` as they are; then there is no such file, as far as the disk
    lets go of it.
    """
    counting = _Counting(md5=md5, blake3=blake3)

    def write(block: bytearray) -> None:
        counting.add(block)
        file.write(block)

    def finish(block: bytearray) -> None:
        write(block)
        if sync:
            file.flush()
            os.fsync(file.fileno())

    made: list[Path] = []

    def create() -> IO[bytes]:
        created = path.open("xb")
        made.append(path)
        return created

    try:
        async with opened(what, create) as file:
            held = bytearray()
            async for chunk in chunks:
                held += chunk
                if len(held) >= BLOCK:
                    await on_disk(what, write, held)
                    held = bytearray()
            await on_disk(what, finish, held)
    except BaseException:
        for ours in made:
            await _unmade(what, ours)
        raise
    return counting.digest


async def _unmade(what: str, path: Path) -> None:
    """Take a half-made file back, as far as the disk lets go of it."""
    try:
        await on_disk(what, path.unlink, missing_ok=True)
    except StorageError as exc:  # what went wrong before says more, above all a cancellation
        log.warning("disk.left", file=str(path), reason=exc.message)


async def read_blocks(what: str, path: Path) -> AsyncGenerator[bytes, None]:
    """The bytes of a file. Raises `StorageError`."""
    async with opened(what, lambda: path.open("rb")) as file:
        while block := await on_disk(what, file.read, BLOCK):
            yield block


def free_bytes(folder: Path) -> int:
    """What the file system of this folder has left for us; blocks, for a thread."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


class Room:
    """Whether a folder's file system has room for new work: none is let in before it is really full.

    Lives as long as the process. `look` is a step of a loop; `check` asks no disk, only what that has seen.
    """

    def __init__(self, folder: Path, least_bytes: int, measure: Callable[[Path], int] = free_bytes) -> None:
        self._folder = folder
        self._least = least_bytes
        self._measure = measure
        self.shortage: str | None = None
        """Why new work is refused; None while there is room."""

    async def look(self) -> int:
        """See how much is free. Raises `StorageError`, and then what was seen before holds on."""
        if self._least:
            free = await on_disk("cannot see how much room data.dir has", self._measure, self._folder)
            self._saw(free)
        return LOOK_MS

    def check(self) -> None:
        """Raise `DiskFull` while there is too little room for new work."""
        if self.shortage is not None:
            raise DiskFull(self.shortage)

    def _saw(self, free: int) -> None:
        short = free < self._least
        if short != (self.shortage is not None):
            log.warning("disk.short" if short else "disk.enough", free_bytes=free, least_bytes=self._least)
        self.shortage = (
            f"data.dir has {free} bytes free and limits.free_bytes keeps {self._least}: "
            "no new work is taken until there is more room"
            if short
            else None
        )


def make_empty(folder: Path) -> None:
    """Make the folder, or delete the files in it; blocks, for a thread."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.scandir(folder) as found:
        for rest in found:
            if not rest.is_dir(follow_symlinks=False):
                Path(rest.path).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Let the disk hold the names in a folder; blocks, for a thread."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(path: Path, *, md5: bool = False, blake3: bool = False) -> Digest:
    """Read a file through; blocks, for a thread."""
    counting = _Counting(md5=md5, blake3=blake3)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            counting.add(block)
    return counting.digest


class _Counting:
    """The digest of what has passed so far."""

    def __init__(self, *, md5: bool, blake3: bool) -> None:
        self._sha256 = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False) if md5 else None
        self._blake3 = new_blake3() if blake3 else None
        self._size = 0

    def add(self, block: bytes | bytearray) -> None:
        self._sha256.update(block)
        if self._md5 is not None:
            self._md5.update(block)
        if self._blake3 is not None:
            self._blake3.update(block)
        self._size += len(block)

    @property
    def digest(self) -> Digest:
        return Digest(
            size_bytes=self._size,
            sha256=self._sha256.hexdigest(),
            md5=None if self._md5 is None else self._md5.hexdigest(),
            blake3=None if self._blake3 is None else self._blake3.hexdigest(),
        )
