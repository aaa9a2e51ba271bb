"""Files on their way through comfyd: in one folder of its own, each gone when its block ends; never kept."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from comfyd.disk import make_empty, to_its_end
from comfyd.errors import StorageError

log = structlog.get_logger("comfyd.scratch")


class Scratch:
    """The folder of temporary files. Made by `open_scratch`; lives as long as the process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @asynccontextmanager
    async def file(self) -> AsyncIterator[Path]:
        """A path where nothing is yet; whatever file is there at the end of the block is deleted.

        One that cannot be is left to the next start: what was done with it is done.
        """
        path = self._folder / secrets.token_hex(16)
        try:
            yield path
        finally:
            try:
                # to free the blocks of a large file takes the disk a while
                await to_its_end(asyncio.to_thread(path.unlink, missing_ok=True))
            except OSError as exc:
                log.warning("scratch.left", file=str(path), reason=exc.strerror or str(exc))


@asynccontextmanager
async def open_scratch(folder: Path) -> AsyncIterator[Scratch]:
    """Make the folder, and empty it of what an earlier process left. Raises `StorageError`."""
    try:
        await asyncio.to_thread(make_empty, folder)
    except OSError as exc:
        raise StorageError(
            f"cannot use {folder}: {exc.strerror or exc}", details={"key": "data.dir"}
        ) from exc
    yield Scratch(folder)
