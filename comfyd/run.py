"""One attempt while it is worked on: its claim, how far it durably got, the way out early; never decides."""

import msgspec

from comfyd.errors import ComfydError
from comfyd.listener import Frame
from comfyd.queue import Attention
from comfyd.slots import Place
from comfyd.store.base import Store
from comfyd.tasks import Attempt, Claim, Outcome, Step, TaskError


class Stop(Exception):
    """Leaves the pipeline early, with the outcome."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class Run:
    """One attempt being worked on. Lives as long as it."""

    def __init__(self, claim: Claim, place: Place, attention: Attention, store: Store) -> None:
        self.claim = claim
        self.place = place
        self.attention = attention
        self.attempt: Attempt = claim.attempt
        self.frames: list[Frame] = []
        self._store = store

    @property
    def id(self) -> str:
        """The prompt's id."""
        return self.attempt.id

    async def record(self, step: Step, **facts: object) -> None:
        """Make it durable how far the attempt got. Raises `StaleClaim` if it is no longer the live one."""
        attempt = msgspec.structs.replace(self.attempt, step=step, **facts)
        await self._store.record(attempt)
        self.attempt = attempt

    async def cancel_asked(self) -> bool:
        """Whether somebody called us, and the row says that it was for a cancel."""
        if not self.attention.take():
            return False
        task = await self._store.get(self.claim.task.id)
        return task is not None and task.cancel_requested_at is not None


def task_error(exc: ComfydError) -> TaskError:
    """An error of comfyd's tree as what a task keeps of it."""
    return TaskError(code=exc.code, message=exc.message, retryable=exc.retryable, details=exc.details)
