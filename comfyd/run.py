"""One attempt while it is worked on: its claim, how far it durably got, the way out early; never decides."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Literal, TypeVar, get_args

import msgspec
import structlog

from comfyd import failpoints
from comfyd.clock import Clock
from comfyd.credentials import Secrets
from comfyd.errors import ComfydError, CredentialsLost, StaleClaim, StoreError
from comfyd.listener import Frame
from comfyd.queue import Attention
from comfyd.slots import Place
from comfyd.store.base import Store
from comfyd.tasks import Attempt, Claim, Graph, JsonObject, Outcome, OutputFile, Step, TaskError

T = TypeVar("T")

Moment = Literal["intent_at", "accepted_at", "seen_running_at"]
"""What a time-out counts from."""

STORE_PAUSE_MS: Final = 1_000
"""How long a step waits for a database that refuses it: to drop the attempt would leave its task running."""

log = structlog.get_logger("comfyd.run")


class Stop(Exception):
    """Leaves the pipeline early, with the outcome."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class Run:
    """One attempt being worked on. Lives as long as it.

    `credentials` are what the task brought for ComfyUI; None if it brought none, or they are lost.
    """

    def __init__(
        self,
        claim: Claim,
        place: Place,
        attention: Attention,
        store: Store,
        clock: Clock,
        credentials: Mapping[str, str] | None = None,
    ) -> None:
        self.claim = claim
        self.place = place
        self.attention = attention
        self.attempt: Attempt = claim.attempt
        self.graph: Graph = claim.graph
        """What ComfyUI is given: the task's graph, with the names of the files that were brought to it."""
        self.extra_data: JsonObject = {**claim.extra_data, **(credentials or {})}
        """What ComfyUI is given besides; the only value here that holds the credentials."""
        self._lost = claim.task.credentials and credentials is None
        self.secrets = Secrets(None if self._lost else (credentials or {}).values())
        """What must not be shown of what ComfyUI says."""
        self.frames: list[Frame] = []
        self.seen_waiting = False
        """ComfyUI was seen to have the prompt in its queue."""
        self.life: int | None = None
        """Which life of its ComfyUI the prompt was sent to; None where an earlier process sent it."""
        self._store = store
        self._clock = clock
        self._marks: dict[str, int] = {}
        self._recording = asyncio.Lock()
        for moment in get_args(Moment):
            before = getattr(claim.attempt, moment)
            if before is not None:  # in an earlier process: the wall clock is all there is to tell
                self._marks[moment] = clock.monotonic() - max(clock.now() - before, 0)

    @property
    def id(self) -> str:
        """The prompt's id."""
        return self.attempt.id

    def check_credentials(self) -> None:
        """Raise `CredentialsLost` if ComfyUI cannot be given what the task brought."""
        if self._lost:
            raise CredentialsLost(
                "comfyd was restarted, and the credentials that came with the task were only in its memory: "
                "submit it again"
            )

    async def record(self, step: Step, **facts: object) -> None:
        """Make it durable how far the attempt got; waits while the database cannot take it.

        Raises `StaleClaim` if it is no longer the live one.
        """
        async with self._recording:
            await self._record(step, facts)

    async def collect_early(self, file: OutputFile) -> None:
        """Make it durable that this output may be stored before the prompt has ended. Raises `StaleClaim`."""
        async with self._recording:
            await self._record(self.attempt.step, {"collected": (*self.attempt.collected, file)})
        failpoints.reach("early.committed")

    async def _record(self, step: Step, facts: Mapping[str, object]) -> None:
        attempt = msgspec.structs.replace(self.attempt, step=step, **facts)
        await self._patiently(lambda: self._store.record(attempt))
        self._marks.update(dict.fromkeys(facts, self._clock.monotonic()))
        self.attempt = attempt

    def elapsed(self, moment: Moment) -> int:
        """Milliseconds since that, however the wall clock was set meanwhile; 0 while it is to come."""
        now = self._clock.monotonic()
        return now - self._marks.get(moment, now)

    async def cancel_asked(self) -> bool:
        """Whether somebody called us, and the row says that it was for a cancel."""
        if not self.attention.take():
            return False
        task = await self._patiently(lambda: self._store.get(self.claim.task.id))
        return task is not None and task.cancel_requested_at is not None

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await ask()
            except StaleClaim:
                raise
            except StoreError as exc:
                log.warning("step.waits", reason=exc.message)
            await self._clock.sleep(STORE_PAUSE_MS)


def task_error(exc: ComfydError) -> TaskError:
    """An error of comfyd's tree as what a task keeps of it."""
    return TaskError(code=exc.code, message=exc.message, retryable=exc.retryable, details=exc.details)
