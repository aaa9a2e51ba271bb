"""Storages by name, each opened when it is first used; never imports a driver that nobody uses."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib.util import find_spec
from typing import Final

import structlog

from comfyd.clock import Clock
from comfyd.config import Config, StorageConfig, StorageName
from comfyd.errors import ComfydError, ConfigError, StorageError, StorageNotConfigured
from comfyd.storage.base import Storage
from comfyd.storage.local import open_local

log = structlog.get_logger("comfyd.storage")

DELETE_SECONDS: Final = 5.0
"""How long a storage may take to delete one file: whoever waits has more to do."""
_DRIVERS: Final[dict[str, tuple[str, str]]] = {
    "s3": ("aioboto3", "s3"),
    "r2": ("aioboto3", "s3"),
    "gcs": ("gcloud", "gcs"),
}
"""The module that a storage needs, and the extra of comfyd that installs it."""


def open_storage(name: StorageName, config: Config, clock: Clock) -> AbstractAsyncContextManager[Storage]:
    """The storage of this name, within the block; it is not asked anything yet.

    Raises `ConfigError` where its driver is not installed, `StorageError` where it cannot be opened.
    """
    missing = _missing_driver(name)
    if missing is not None:
        raise ConfigError(missing, details={"key": "storage.provider"})
    table = config.storage
    # The drivers are large: only what is used is imported, so that a local comfyd starts fast.
    match name:
        case "local":
            return open_local(config.files)
        case "s3":
            from comfyd.storage.s3 import open_s3  # noqa: PLC0415 - see above

            return open_s3(table.s3)
        case "r2":
            from comfyd.storage.s3 import open_r2  # noqa: PLC0415 - see above

            return open_r2(table.r2)
        case "gcs":
            from comfyd.storage.gcs import open_gcs  # noqa: PLC0415 - see above

            return open_gcs(table.gcs, clock)
        case "cf_images":
            from comfyd.storage.cloudflare_images import open_cloudflare_images  # noqa: PLC0415 - see above

            return open_cloudflare_images(table.cf_images, clock)


def check_usable(name: str, usable: Sequence[str]) -> None:
    """Raise `StorageNotConfigured` for a storage that a request may not name: said before a GPU is used."""
    missing = f"storage {name!r} is not configured here; there is {', '.join(usable)}"
    problem = _missing_driver(name) if name in usable else missing
    if problem is not None:
        raise StorageNotConfigured(problem, details={"storage": name, "configured": list(usable)})


def _missing_driver(name: str) -> str | None:
    """What to say of a storage whose driver is not installed; None where it is, or none is needed."""
    module, extra = _DRIVERS.get(name, ("", ""))
    if not module or find_spec(module) is not None:
        return None
    return f"storage {name} needs a driver that is not installed: pip install 'comfyd[{extra}]'"


Opener = Callable[[StorageName], AbstractAsyncContextManager[Storage]]


class Storages:
    """The storages of one comfyd. Made by `open_storages`; lives as long as the process."""

    def __init__(self, config: StorageConfig, opener: Opener, stack: AsyncExitStack) -> None:
        self._usable = config.usable
        self._opener = opener
        self._stack = stack
        self._opened: dict[str, Storage] = {}
        self._opening = asyncio.Lock()
        self.default = config.provider
        """Takes what a request names no storage for."""
        self.fallback = config.fallback
        """Takes what another one does not accept."""

    async def get(self, name: str) -> Storage:
        """The storage of this name. Raises `StorageError`, also for one that is not configured any more."""
        opened = self._opened.get(name)
        if opened is not None:
            return opened
        if name not in self._usable:
            raise StorageError(f"storage {name!r} is not configured (any more)")
        async with self._opening:
            if name not in self._opened:
                known = next(usable for usable in self._usable if usable == name)
                # a driver takes up to a second to import
                opening = await asyncio.to_thread(self._opener, known)
                self._opened[name] = await self._stack.enter_async_context(opening)
        return self._opened[name]

    async def delete(self, files: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Delete files, each by its storage's name and its key; those that are gone. The rest is logged.

        A storage that says nothing is not asked again and again.
        """
        silent: set[str] = set()
        gone: list[tuple[str, str]] = []
        for name, key in files:
            reason = f"{name} does not answer"
            if name not in silent:
                try:
                    async with asyncio.timeout(DELETE_SECONDS):
                        await (await self.get(name)).delete(key)
                    gone.append((name, key))
                    continue
                except TimeoutError:
                    silent.add(name)
                except ComfydError as exc:
                    reason = exc.message
            log.warning("file.left", storage=name, key=key, reason=reason)
        return gone


@asynccontextmanager
async def open_storages(config: Config, clock: Clock) -> AsyncIterator[Storages]:
    """All that are configured; the ones that results go to are opened at once, so that what is wrong shows.

    Raises `ConfigError` and `StorageError`.
    """
    async with AsyncExitStack() as stack:
        storages = Storages(config.storage, lambda name: open_storage(name, config, clock), stack)
        for name in {storages.default, storages.fallback}:
            await storages.get(name)
        yield storages
