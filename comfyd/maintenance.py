"""The chores of a running comfyd: forget the old, count, re-read templates, look at ComfyUI; a step each."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Final

import structlog

from comfyd.catalog import Catalog, TemplateChange
from comfyd.clock import Clock
from comfyd.comfy.backend import Backend
from comfyd.control import Control
from comfyd.errors import Conflict, TaskNotFound
from comfyd.forgetting import Forgetter
from comfyd.metrics import Metrics
from comfyd.progress import Board
from comfyd.store.base import Store
from comfyd.uploads import Uploads

log = structlog.get_logger("comfyd.maintenance")

BATCH: Final = 100
RETENTION_EVERY_MS: Final = 60_000
FIGURES_EVERY_MS: Final = 2_000
CATALOG_EVERY_MS: Final = 1_000
PROBE_WELL_MS: Final = 5_000
PROBE_SICK_MS: Final = 500


class Retention:
    """Forgets ended tasks and their files when they are too old, or too many bytes: the oldest first.

    `keep_ms` 0 and `keep_bytes` 0 are no limit.
    """

    def __init__(
        self, store: Store, control: Control, clock: Clock, keep_ms: int, keep_bytes: int = 0
    ) -> None:
        self._store = store
        self._control = control
        self._clock = clock
        self._keep_ms = keep_ms
        self._keep_bytes = keep_bytes

    async def step(self) -> int:
        """Forget one batch of the old, and of the rest what is too much; comes back while there is more."""
        old: tuple[str, ...] = ()
        if self._keep_ms:
            old = await self._store.ended_before(self._clock.now() - self._keep_ms, BATCH)
            await self._forget(old)
        more = await self._forget_bytes() if self._keep_bytes else False
        return 0 if more or len(old) == BATCH else RETENTION_EVERY_MS

    async def _forget_bytes(self) -> bool:
        """Forget the oldest tasks while there are too many bytes; whether to go on at once."""
        if await self._store.artefact_bytes() <= self._keep_bytes:
            return False
        for task_id in await self._store.ended_before(self._clock.now() + 1, BATCH):
            if await self._store.artefact_bytes() <= self._keep_bytes:
                return False
            await self._forget((task_id,))
        return bool(await self._store.ended_before(self._clock.now() + 1, 1))

    async def _forget(self, task_ids: Sequence[str]) -> None:
        for task_id in task_ids:
            try:
                await self._control.delete(task_id)
            except (TaskNotFound, Conflict) as exc:
                log.info("retention.skipped", task_id=task_id, reason=exc.message)
        if task_ids:
            log.info("retention.forgot", tasks=len(task_ids))


class UploadSweep:
    """Forgets uploads that no task uses."""

    def __init__(self, store: Store, uploads: Uploads) -> None:
        self._store = store
        self._uploads = uploads

    async def step(self) -> int:
        """Forget one batch."""
        gone = await self._uploads.sweep(self._store.unused_uploads, BATCH)
        if gone:
            log.info("uploads.forgot", files=gone)
        return 0 if gone == BATCH else RETENTION_EVERY_MS


class Leftovers:
    """Deletes files of forgotten tasks whose storage did not do it at once."""

    def __init__(self, forgetter: Forgetter) -> None:
        self._forgetter = forgetter

    async def step(self) -> int:
        """Try one batch."""
        gone = await self._forgetter.leftovers(BATCH)
        if gone:
            log.info("leftovers.deleted", files=gone)
        return 0 if gone == BATCH else RETENTION_EVERY_MS


class Figures:
    """Keeps the gauges up to date."""

    def __init__(self, store: Store, board: Board, metrics: Metrics) -> None:
        self._store = store
        self._board = board
        self._metrics = metrics

    async def step(self) -> int:
        """Count once."""
        self._metrics.counted(await self._store.counts())
        self._metrics.watching(self._board.watchers)
        return FIGURES_EVERY_MS


class Templates:
    """Re-reads workflow templates when their files change."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def step(self) -> int:
        """Look once."""
        tell(await asyncio.to_thread(self._catalog.refresh))
        return CATALOG_EVERY_MS


class Probe:
    """Asks one ComfyUI whether it can work: often while it cannot, seldom while it can, and after `wake`."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._metrics = metrics
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Something changed: do not wait for the next time."""
        self._woken.set()

    async def step(self) -> int:
        """Ask once, then wait until it is time to ask again."""
        await self._backend.probe()
        ready = self._backend.state.ready
        self._metrics.backend_ready(self._backend.name, ready)
        self._woken.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout((PROBE_WELL_MS if ready else PROBE_SICK_MS) / 1000):
                await self._woken.wait()
        return 0


def tell(changes: Sequence[TemplateChange]) -> None:
    """Say which templates are new, other, gone or broken."""
    for change in changes:
        say = log.warning if change.kind == "broken" else log.info
        say("workflow.changed", workflow=change.name, kind=change.kind, reason=change.message)
