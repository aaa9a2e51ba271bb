"""Where a waiting task stands and when a task may end, learned from past runs; never a promise."""

import msgspec

from comfyd.clock import Clock
from comfyd.progress import Board
from comfyd.store.base import AHEAD_MOST, Store
from comfyd.tasks import Status, Task


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """`queue_position` 1 is next; `eta_seconds` is to the end of the task. None where not known."""

    queue_position: int | None = None
    eta_seconds: float | None = None


class Estimator:
    """Answers for one task at a time. Lives as long as the process; `servers` counts the ComfyUIs."""

    def __init__(self, store: Store, board: Board, clock: Clock, servers: int) -> None:
        self._store = store
        self._board = board
        self._clock = clock
        self._servers = max(servers, 1)

    async def of(self, task: Task) -> Estimate:
        """The estimate of a task that waits or runs; an ended one has none."""
        if task.status is Status.QUEUED:
            return await self._queued(task)
        if task.status is Status.RUNNING:
            return Estimate(eta_seconds=await self._running(task))
        return Estimate()

    async def position(self, task: Task) -> int | None:
        """The estimate's `queue_position` alone, which takes a look at the queue and no more."""
        if task.status is not Status.QUEUED:
            return None
        ahead = await self._store.ahead(task, self._clock.now())
        return None if ahead >= AHEAD_MOST else ahead + 1

    async def _queued(self, task: Task) -> Estimate:
        position = await self.position(task)
        if position is None:
            return Estimate()
        own = await self._store.run_times(task.shape)
        overall = await self._store.mean_run_time()
        if overall is None or own is None:
            return Estimate(queue_position=position)
        running = (await self._store.counts())[Status.RUNNING]
        before = (position - 1 + running / 2) * overall.mean_ms / self._servers
        delay = max(task.available_at - self._clock.now(), 0)
        return Estimate(queue_position=position, eta_seconds=_seconds(max(before, delay) + own.mean_ms))

    async def _running(self, task: Task) -> float | None:
        """From the mean of past runs where there were some, else from the run's own progress."""
        own = await self._store.run_times(task.shape)
        attempt = task.attempts[-1] if task.attempts else None
        started = attempt.seen_running_at if attempt is not None else None
        if started is None:
            return _seconds(own.mean_ms) if own is not None else None
        elapsed = max(self._clock.now() - started, 0)
        progress = self._board.progress(task.id)
        value = progress.value if progress is not None else 0.0
        if own is not None:
            return _seconds(max(own.mean_ms - elapsed, own.mean_ms * (1 - value) * 0.1))
        return _seconds(elapsed * (1 - value) / value) if value > 0.05 else None


def _seconds(milliseconds: float) -> float:
    return round(milliseconds / 1000, 1)
