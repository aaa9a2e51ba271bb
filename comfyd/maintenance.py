"""The chores of a running comfyd: forget the old, count, re-read templates, mind ComfyUI; a step each."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Final

import structlog

from comfyd.catalog import Catalog, TemplateChange
from comfyd.clock import Clock
from comfyd.comfy.backend import Backend
from comfyd.comfy.restarting import RestartCommand
from comfyd.control import Control
from comfyd.errors import Conflict, TaskNotFound
from comfyd.forgetting import Forgetter
from comfyd.library import EXPIRED_AT_ONCE, Library
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
PROBE_LEAST_MS: Final = 20
RESTART_FIRST_MS: Final = 60_000
RESTART_MOST_MS: Final = 900_000
"""The pause before a ComfyUI that is still sick is started anew once more; doubles up to the second."""


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
            moment = self._clock.now() - self._keep_ms
            old = await self._store.ended_before(moment, BATCH)
            await self._forget(old, moment)
        more = await self._forget_bytes() if self._keep_bytes else False
        return 0 if more or len(old) == BATCH else RETENTION_EVERY_MS

    async def _forget_bytes(self) -> bool:
        """Forget the oldest tasks while there are too many bytes; whether to go on at once."""
        if await self._store.artefact_bytes() <= self._keep_bytes:
            return False
        moment = self._clock.now() + 1
        for task_id in await self._store.ended_before(moment, BATCH):
            if await self._store.artefact_bytes() <= self._keep_bytes:
                return False
            await self._forget((task_id,), moment)
        return bool(await self._store.ended_before(moment, 1))

    async def _forget(self, task_ids: Sequence[str], moment: int) -> None:
        """Forget these, less those that were run again or owe something since it was looked."""
        forgot = 0
        for task_id in task_ids:
            try:
                await self._control.delete(task_id, ended_before=moment)
            except (TaskNotFound, Conflict) as exc:
                log.info("retention.skipped", task_id=task_id, reason=exc.message)
            else:
                forgot += 1
        if forgot:
            log.info("retention.forgot", tasks=forgot)


class UploadSweep:
    """Forgets uploads that no task and no asset uses."""

    def __init__(self, store: Store, uploads: Uploads) -> None:
        self._store = store
        self._uploads = uploads

    async def step(self) -> int:
        """Forget one batch."""
        gone = await self._uploads.sweep(self._store.unused_uploads, BATCH)
        if gone:
            log.info("uploads.forgot", files=gone)
        return 0 if gone == BATCH else RETENTION_EVERY_MS


class AssetSweep:
    """Forgets assets that have expired, and their uploads where nothing else names them."""

    def __init__(self, library: Library) -> None:
        self._library = library

    async def step(self) -> int:
        """Forget one batch; comes back at once while there is more."""
        gone = await self._library.expire()
        if gone:
            log.info("assets.forgot", assets=gone)
        return 0 if gone == EXPIRED_AT_ONCE else RETENTION_EVERY_MS


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
        state = self._backend.state
        self._metrics.backend_ready(self._backend.name, state.ready)
        self._metrics.backend_sick(self._backend.name, state.sick)
        self._woken.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._pause_ms(ready=state.ready) / 1000):
                await self._woken.wait()
        return 0

    def _pause_ms(self, *, ready: bool) -> int:
        wanted = self._backend.probe_every_ms or PROBE_WELL_MS
        return max(min(wanted, PROBE_WELL_MS if ready else PROBE_SICK_MS), PROBE_LEAST_MS)


class SocketLife:
    """Holds one ComfyUI's socket: a step is one life of it. While ComfyUI is down nothing is tried."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Something changed: ComfyUI may be back."""
        self._woken.set()

    async def step(self) -> int:
        """Connect, read until the end, and come back at once. Raises `BackendError`."""
        state = self._backend.state
        if state.ready or state.sick:
            await self._backend.run_socket()
            return 0
        self._woken.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBE_SICK_MS / 1000):
                await self._woken.wait()
        return 0


class Restarts:
    """Has one ComfyUI started anew when it is sick, and again, ever later, while it stays so.

    One that is merely down is the business of whoever keeps it running. Nothing is begun after `closing`;
    what was begun may end within the grace.
    """

    def __init__(
        self,
        backend: Backend,
        command: RestartCommand,
        metrics: Metrics,
        clock: Clock,
        closing: asyncio.Event,
    ) -> None:
        self._backend = backend
        self._command = command
        self._metrics = metrics
        self._clock = clock
        self._closing = closing
        self._woken = asyncio.Event()
        self._pause_ms = RESTART_FIRST_MS
        self._ended_at: int | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def wake(self) -> None:
        """Something changed: look whether it is sick."""
        self._woken.set()

    async def step(self) -> int:
        """Run the command if it is time, else wait until it may be."""
        self._woken.clear()
        wait_ms = self._due_in()
        if wait_ms == 0:
            await self._run()
            return 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_ms / 1000 if wait_ms is not None else None):
                await self._woken.wait()
        return 0

    async def drain(self, grace_ms: int, hurry: asyncio.Event) -> None:
        """Let a command that was begun end within the grace, or until `hurry`.

        Broken off between 'stop' and 'start' it would leave a ComfyUI that is down, and nobody to start it.
        """
        idle, hurried = asyncio.ensure_future(self._idle.wait()), asyncio.ensure_future(hurry.wait())
        await asyncio.wait({idle, hurried}, timeout=grace_ms / 1000, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        hurried.cancel()

    def _due_in(self) -> int | None:
        """In how many milliseconds it may run; None while there is no reason to."""
        if self._closing.is_set() or not self._backend.state.sick:
            return None
        if self._ended_at is None:
            return 0
        return max(self._ended_at + self._pause_ms - self._clock.monotonic(), 0)

    async def _run(self) -> None:
        log.warning("backend.restarting", backend=self._backend.name, reason=self._backend.state.reason)
        now = self._clock.monotonic()
        if self._ended_at is not None:
            # It was well for long enough: the longest pause has passed twice.
            was_well = now - self._ended_at >= 2 * RESTART_MOST_MS
            self._pause_ms = RESTART_FIRST_MS if was_well else min(self._pause_ms * 2, RESTART_MOST_MS)
        self._idle.clear()
        try:
            result = await self._command.run()
        finally:  # whatever came of it, the next one is due only later
            self._ended_at = self._clock.monotonic()
            self._idle.set()
        self._metrics.restarted(self._backend.name, result)


def tell(changes: Sequence[TemplateChange]) -> None:
    """Say which templates are new, other, gone or broken."""
    for change in changes:
        say = log.warning if change.kind == "broken" else log.info
        say("workflow.changed", workflow=change.name, kind=change.kind, reason=change.message)
