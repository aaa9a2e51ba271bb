"""Finished files as storages take them, and what storages give back."""

import hashlib
import resource
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from comfyd.config import StorageConfig
from comfyd.storage.base import LocalFile, Storage
from comfyd.storage.opening import Storages


def local_file(folder: Path, data: bytes, name: str = "a.png", content_type: str = "image/png") -> LocalFile:
    """A file with this content in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(data).hexdigest()
    path = folder / f"{digest}.source"
    path.write_bytes(data)
    return LocalFile(
        path=path,
        size_bytes=len(data),
        sha256=digest,
        md5=hashlib.md5(data, usedforsecurity=False).hexdigest(),
        content_type=content_type,
        name=name,
    )


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Within this block no file of this process may become longer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def only(storage: Any) -> Storages:
    """This storage as the only one there is; `local` is its name."""
    return Storages(StorageConfig(), lambda _: nullcontext(storage), AsyncExitStack())


async def read(storage: Storage, key: str) -> bytes:
    """What the storage has under this key."""
    async with storage.open(key) as file:
        return b"".join([part async for part in file.chunks])
