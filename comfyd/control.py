"""What a client may do to a task it has: cancel, run again, forget; never touches ComfyUI or a worker.

Each verb changes the row and then nudges whoever works on it.
"""

from collections.abc import Callable
from typing import TypeVar

import structlog

from comfyd import failpoints
from comfyd.clock import Clock
from comfyd.errors import Conflict, TaskNotFound
from comfyd.forgetting import Forgetter
from comfyd.metrics import Metrics
from comfyd.progress import Board
from comfyd.queue import TaskQueue
from comfyd.store.base import Store
from comfyd.tasks import Task

T = TypeVar("T")

log = structlog.get_logger("comfyd.control")


class Control:
    """The verbs on existing tasks. Lives as long as the process."""

    def __init__(
        self,
        store: Store,
        forgetter: Forgetter,
        queue: TaskQueue,
        board: Board,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._store = store
        self._forgetter = forgetter
        self._queue = queue
        self._board = board
        self._metrics = metrics
        self._clock = clock
        self.owed: Callable[[], None] = _nobody
        """Called when a task has ended of which a webhook is to be told."""
        self.ended: Callable[[str], None] = _nobody_asks
        """Called with the id of a task that has ended."""

    async def cancel(self, task_id: str) -> Task:
        """Cancel exactly this task. A waiting one ends at once, a running one when ComfyUI let go of it."""
        now = self._clock.now()
        result = _found(await self._store.cancel(task_id, now), task_id)
        failpoints.reach("cancel.committed")
        task = result.task
        if result.ended:
            self.ended(task_id)
            self._metrics.finished(task.status, now - task.created_at)
            if task.webhook is not None:
                self.owed()
        if result.ended or not task.status.terminal:  # a running one is being canceled: watchers want to know
            self._board.status(task_id, task.status)
        self._queue.nudge(task_id)
        return task

    async def retry(self, task_id: str) -> Task:
        """Queue an ended task again and forget its outputs.

        Raises `Conflict` if it has not ended, or needs credentials: those were forgotten when it did.
        """
        before = _found(await self._store.get(task_id), task_id)
        if not before.status.terminal:  # one that ends just now has outputs that we did not see
            message = f"the task is {before.status}; only an ended one can be run again"
            raise Conflict(message, details={"status": str(before.status)})
        if before.credentials:
            message = "the task came with credentials, which are forgotten when it ends: submit it again"
            raise Conflict(message, details={"status": str(before.status)})
        task = _found(await self._store.retry(task_id, self._clock.now()), task_id)
        failpoints.reach("retry.committed")
        self._board.status(task_id, task.status)
        self._queue.offer(task)
        await self._forgetter.outputs(before.artefacts)
        return task

    async def delete(self, task_id: str, *, ended_before: int | None = None) -> None:
        """Forget an ended task, its outputs, and the uploads that no other task names.

        Raises `Conflict` if it has not ended; with `ended_before` as `Store.delete` does.
        """
        named = await self._store.uploads(task_id)
        task = _found(await self._store.delete(task_id, ended_before=ended_before), task_id)
        failpoints.reach("delete.committed")
        await self._forgetter.outputs(task.artefacts)
        await self._forgetter.uploads(named)


def _found(found: T | None, task_id: str) -> T:
    if found is None:
        raise TaskNotFound(f"there is no task {task_id}")
    return found


def _nobody() -> None:
    """Who is told of what is owed where nobody delivers."""


def _nobody_asks(_: str) -> None:
    """Who is told of ended tasks where nobody keeps anything for them."""
