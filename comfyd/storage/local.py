"""Artefacts on the local disk: made beside, synced, renamed into place; never half a file under a name."""

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Final

from comfyd.disk import BLOCK, make_empty, on_disk, opened, sync_folder
from comfyd.errors import FileNotFound, NotAccepted, StorageError
from comfyd.storage.base import LocalFile, StoredFile
from comfyd.storage.objects import key_parts

RENAME_TRIES: Final = 10
_UNFINISHED: Final = ".unfinished"
_PROBE: Final = b"comfyd"
_NO_LINK: Final = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP}
)
"""Why a file cannot have a second name here: another disk, no links on this one, somebody else's file."""


_NEVER: Final = frozenset({errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG})
"""What no waiting mends: something else has the name, or the disk has no such names."""


class LocalStorage:
    """A folder that holds artefacts under their keys. Made by `open_local`."""

    name = "local"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._unfinished = folder / _UNFINISHED

    async def put(self, key: str, file: LocalFile) -> str | None:
        """See `Storage`. The file and its folder are synced before this returns.

        On the same disk the file gets a second name, and no byte is copied.
        """
        target = self._path(key)
        unfinished = self._unfinished / secrets.token_hex(16)
        what = f"cannot store {key}"
        try:
            if not await on_disk(what, _link, file.path, unfinished):
                await _copy(what, file.path, unfinished)
            size = await on_disk(what, _sync, unfinished)
            if size != file.size_bytes:
                raise StorageError(f"{what}: it has {size} bytes instead of {file.size_bytes}")
            await on_disk(what, _rename, unfinished, target, self._folder)
        except StorageError as exc:
            if isinstance(exc.__cause__, OSError) and exc.__cause__.errno in _NEVER:
                raise NotAccepted(exc.message) from exc
            raise
        finally:
            await on_disk(what, unfinished.unlink, missing_ok=True)
        return None

    @asynccontextmanager
    async def open(self, key: str, start: int = 0, length: int | None = None) -> AsyncIterator[StoredFile]:
        """See `Storage`."""
        path = self._path(key)
        what = f"cannot read {key}"
        async with opened(what, lambda: _existing(path, key)) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(start)
            left = size - start if length is None else length
            yield StoredFile(size_bytes=size, chunks=_read(what, file, left))

    async def delete(self, key: str) -> None:
        """See `Storage`. Folders that become empty go too."""
        path = self._path(key)
        await on_disk(f"cannot delete {key}", _remove, path, self._folder)

    async def url(self, key: str, location: str | None) -> str | None:  # noqa: ARG002 - comfyd serves it
        """See `Storage`. None: comfyd serves it."""
        return None

    async def ping(self) -> None:
        """See `Storage`."""
        source = self._unfinished / f"{secrets.token_hex(16)}.probe"
        key = f".probe/{secrets.token_hex(8)}"
        try:
            await on_disk(f"cannot write to {self._folder}", source.write_bytes, _PROBE)
            await self.put(key, _probe(source))
            async with self.open(key) as file:
                found = b"".join([block async for block in file.chunks])
            await self.delete(key)
        finally:
            await on_disk(f"cannot write to {self._folder}", source.unlink, missing_ok=True)
        if found != _PROBE:
            raise StorageError(f"{self._folder} gives back other bytes than were written")

    def _path(self, key: str) -> Path:
        """The file of a key, which must stay below the folder."""
        parts = key_parts(key)
        if parts[0] == _UNFINISHED:
            raise FileNotFound(f"not a key: {key!r}")
        return self._folder.joinpath(*parts)


@asynccontextmanager
async def open_local(folder: Path) -> AsyncIterator[LocalStorage]:
    """Open the folder, and forget what an earlier process had not finished. Raises `StorageError`."""
    await on_disk(f"cannot use {folder}", _prepare, folder)
    yield LocalStorage(folder)


def _prepare(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    make_empty(folder / _UNFINISHED)


def _probe(path: Path) -> LocalFile:
    return LocalFile(
        path=path,
        size_bytes=len(_PROBE),
        sha256=hashlib.sha256(_PROBE).hexdigest(),
        md5=hashlib.md5(_PROBE, usedforsecurity=False).hexdigest(),
        content_type="text/plain",
        name="probe",
    )


def _link(source: Path, unfinished: Path) -> bool:
    """Give the file a second name; whether that is possible."""
    try:
        unfinished.hardlink_to(source)
    except OSError as exc:
        if exc.errno not in _NO_LINK:
            raise
        return False
    return True


async def _copy(what: str, source: Path, unfinished: Path) -> None:
    """Copy a file block by block, so that a cancellation has to wait for one block only."""
    async with (
        opened(what, lambda: source.open("rb")) as old,
        opened(what, lambda: unfinished.open("xb")) as new,
    ):
        while await on_disk(what, _copy_block, old, new):
            pass


def _copy_block(old: IO[bytes], new: IO[bytes]) -> int:
    return new.write(old.read(BLOCK))


def _sync(path: Path) -> int:
    """Let the disk hold the file's bytes; its size. Raises `OSError` where it is none, as behind a link."""
    descriptor = os.open(
        path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    )  # a pipe would wait for its writer
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "it is not a file")
        os.fsync(descriptor)
        return facts.st_size
    finally:
        os.close(descriptor)


def _existing(path: Path, key: str) -> IO[bytes]:
    try:
        return path.open("rb")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise FileNotFound(f"there is no file {key}") from None


async def _read(what: str, file: IO[bytes], left: int) -> AsyncIterator[bytes]:
    while left > 0 and (block := await on_disk(what, file.read, min(BLOCK, left))):
        left -= len(block)
        yield block


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
        sync_folder(changed)


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
