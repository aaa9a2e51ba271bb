"""Artefacts on the local disk: written beside, synced, renamed into place; never half a file under a name."""

import asyncio
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Final, ParamSpec, TypeVar

from comfyd.errors import FileNotFound, StorageError
from comfyd.storage.base import Stored, StoredFile

P = ParamSpec("P")
T = TypeVar("T")

RENAME_TRIES: Final = 10
BLOCK: Final = 1 << 20
"""Bytes read or written in one go on a thread."""


class LocalStorage:
    """A folder that holds artefacts under their keys. Made by `open_local`."""

    name = "local"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._unfinished = folder / ".unfinished"

    async def put(self, key: str, chunks: AsyncIterator[bytes], content_type: str) -> Stored:  # noqa: ARG002 - the row keeps it
        """See `Storage`. The file and its folder are synced before this returns."""
        target = self._path(key)
        unfinished = self._unfinished / secrets.token_hex(16)
        digest = hashlib.sha256()
        size = 0
        what = f"cannot store {key}"
        try:
            async with _created(what, unfinished) as file:
                async for block in _blocks(chunks):
                    size += len(block)
                    await _on_disk(what, _write, file, block, digest)
                await _on_disk(what, _sync, file)
            await _on_disk(what, _rename, unfinished, target, self._folder)
        finally:
            await _on_disk(what, unfinished.unlink, missing_ok=True)
        return Stored(key=key, size_bytes=size, sha256=digest.hexdigest())

    @asynccontextmanager
    async def open(self, key: str, start: int = 0, length: int | None = None) -> AsyncIterator[StoredFile]:
        """See `Storage`."""
        path = self._path(key)
        try:
            file = await asyncio.to_thread(path.open, "rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise FileNotFound(f"there is no file {key}") from None
        except OSError as exc:
            raise StorageError(f"cannot read {key}: {exc.strerror or exc}") from exc
        with file:
            size = os.fstat(file.fileno()).st_size
            file.seek(start)
            yield StoredFile(size_bytes=size, chunks=_read(file, size - start if length is None else length))

    async def delete(self, key: str) -> None:
        """See `Storage`. Folders that become empty go too."""
        path = self._path(key)
        await _on_disk(f"cannot delete {key}", _remove, path, self._folder)

    async def ping(self) -> None:
        """See `Storage`."""
        key = f".probe/{secrets.token_hex(8)}"
        stored = await self.put(key, _once(b"comfyd"), "text/plain")
        async with self.open(key) as file:
            found = b"".join([block async for block in file.chunks])
        await self.delete(key)
        if hashlib.sha256(found).hexdigest() != stored.sha256:
            raise StorageError(f"{self._folder} gives back other bytes than were written")

    def _path(self, key: str) -> Path:
        """The file of a key, which must stay below the folder."""
        parts = PurePosixPath(key).parts
        if not parts or any(part in {"..", "/"} for part in parts) or "\\" in key or "\0" in key:
            raise FileNotFound(f"not a key: {key!r}")
        return self._folder.joinpath(*parts)


@asynccontextmanager
async def open_local(folder: Path) -> AsyncIterator[LocalStorage]:
    """Open the folder, and forget what an earlier process had not finished. Raises `StorageError`."""
    await _on_disk(f"cannot use {folder}", _prepare, folder)
    yield LocalStorage(folder)


def _prepare(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = folder / ".unfinished"
    unfinished.mkdir(mode=0o700, exist_ok=True)
    for rest in unfinished.iterdir():
        rest.unlink(missing_ok=True)


async def _blocks(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Join small chunks, so that one thread hop writes about `BLOCK` bytes."""
    held = bytearray()
    async for chunk in chunks:
        held += chunk
        if len(held) >= BLOCK:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _read(file: IO[bytes], left: int) -> AsyncIterator[bytes]:
    while left > 0 and (block := await asyncio.to_thread(file.read, min(BLOCK, left))):
        left -= len(block)
        yield block


@asynccontextmanager
async def _created(what: str, path: Path) -> AsyncIterator[IO[bytes]]:
    """A new file to write to; closed on a thread, because that may still write, and fail."""
    opened: list[IO[bytes]] = []
    try:
        await _on_disk(what, lambda: opened.append(path.open("xb")))
        yield opened[0]
    finally:
        for file in opened:
            await _on_disk(what, file.close)


def _write(file: IO[bytes], block: bytes, digest: "hashlib._Hash") -> None:
    digest.update(block)
    file.write(block)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _rename(unfinished: Path, target: Path, folder: Path) -> None:
    """Give the file its name, and sync every folder in which a name is new."""
    fresh: set[Path] = set()
    for left in reversed(range(RENAME_TRIES)):
        try:
            fresh |= _make_parents(target, folder)
            unfinished.replace(target)
            break
        except FileNotFoundError:  # somebody deleted a folder that had become empty
            if left == 0:
                raise
    for changed in {target.parent, *(parent.parent for parent in fresh)}:
        descriptor = os.open(changed, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _make_parents(target: Path, folder: Path) -> set[Path]:
    """Make the folders above a file that are not there yet; which."""
    missing = [parent for parent in target.parents if folder in parent.parents and not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir(mode=0o700, exist_ok=True)
    return set(missing)


def _remove(path: Path, stop: Path) -> None:
    path.unlink(missing_ok=True)
    for folder in path.parents:
        if folder == stop:
            return
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return  # it is not empty


async def _on_disk(what: str, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run this on a thread, and let the disk's errors leave as `StorageError`.

    Canceled, it waits for the thread, which cannot be stopped: nothing happens on the disk after it has left.
    """
    call = asyncio.ensure_future(asyncio.to_thread(action, *args, **kwargs))
    try:
        return await asyncio.shield(call)
    except OSError as exc:
        raise StorageError(f"{what}: {exc.strerror or exc}") from exc
    finally:
        await asyncio.gather(call, return_exceptions=True)
