"""The workers: take what is most urgent, hold the claim while it is executed, settle it; never more."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

import structlog

from comfyd import failpoints
from comfyd.clock import Clock
from comfyd.errors import StaleClaim, StoreError
from comfyd.execution import Executor
from comfyd.forgetting import Forgetter
from comfyd.lifecycle import RetryPolicy, decide
from comfyd.loops import stop
from comfyd.metrics import Metrics
from comfyd.progress import Board
from comfyd.queue import TaskQueue
from comfyd.slots import Place, Slots, TurnedAway
from comfyd.store.base import Store
from comfyd.tasks import Claim, Outcome, Ready, Settlement, Status, Step, Succeeded, Task

log = structlog.get_logger("comfyd.worker")

UNATTENDED: Final = 256
"""Tasks that may wait for their storage without holding a worker, what was adopted included."""
SETTLE_PAUSE_MS: Final = 1_000
"""How long an outcome waits for a database that refuses it."""


class Settler:
    """Turns outcomes into rows, and tells who should know. Lives as long as the process."""

    def __init__(
        self,
        store: Store,
        forgetter: Forgetter,
        board: Board,
        metrics: Metrics,
        clock: Clock,
        policy: RetryPolicy,
    ) -> None:
        self._store = store
        self._forgetter = forgetter
        self._board = board
        self._metrics = metrics
        self._clock = clock
        self._policy = policy
        self.owed: Callable[[], None] = _nobody
        """Called when something may be owed: after a claim or a settlement of a task with a webhook."""
        self.ended: Callable[[str], None] = _nobody_asks
        """Called with the id of a task that has ended."""

    def started(self, task: Task) -> None:
        """A worker has the task."""
        self._board.status(task.id, task.status)
        if task.webhook is not None:
            self.owed()

    async def settle(self, claim: Claim, outcome: Outcome) -> Task:
        """Apply the outcome; waits while the database cannot take it. Raises `StaleClaim`."""
        while True:
            try:
                task = await self._apply(claim, outcome)
            except StaleClaim:
                raise
            except StoreError as exc:
                log.warning("settle.waits", reason=exc.message)
                await self._clock.sleep(SETTLE_PAUSE_MS)
            else:
                return task

    async def _apply(self, claim: Claim, outcome: Outcome) -> Task:
        current = await self._store.get(claim.task.id)
        if current is None:
            raise StaleClaim(f"task {claim.task.id} is gone")
        settlement = decide(current, outcome, self._policy, self._clock.now(), self._clock.jitter())
        failpoints.reach("settle.decided")
        task = await self._store.settle(claim.attempt.id, settlement, self._clock.now())
        failpoints.reach("settle.committed")
        self._tell(task, settlement)
        if isinstance(outcome, Succeeded) and task.status is not Status.SUCCEEDED:
            await self._forgetter.outputs(outcome.artefacts)
        return task

    def _tell(self, task: Task, settlement: Settlement) -> None:
        error = settlement.error
        code = error.code if error is not None else None
        reason = error.message if error is not None else None
        log.info("task.settled", status=task.status, outcome=settlement.outcome, error=code, reason=reason)
        self._board.status(task.id, task.status)
        if task.webhook is not None:
            self.owed()
        if task.status.terminal:
            self.ended(task.id)
            self._metrics.finished(task.status, (task.completed_at or task.created_at) - task.created_at)
        else:
            self._metrics.repeated(settlement.outcome)


class Workers:
    """What the worker loops share. Lives as long as the process; `drain` before the database is closed."""

    def __init__(
        self,
        store: Store,
        queue: TaskQueue,
        slots: Slots,
        executor: Executor,
        settler: Settler,
        clock: Clock,
    ) -> None:
        self._store = store
        self._queue = queue
        self._slots = slots
        self._executor = executor
        self._settler = settler
        self._clock = clock
        queue.crowded = slots.turn_away
        self._working: set[asyncio.Task[None]] = set()
        self._unattended: set[asyncio.Task[None]] = set()
        self.unattended_most = UNATTENDED

    async def step(self) -> int:
        """One task, from the queue to the end of its prompt. Cancelled, it leaves what it began to `drain`.

        What is left to do then, and what was adopted, goes on without a worker, but only so much of it: a
        storage that stays down stops the queue before the disk is full.
        """
        while len(self._unattended) >= self.unattended_most:
            await asyncio.wait(self._unattended, return_when=asyncio.FIRST_COMPLETED)
        ready = await self._queue.take()
        admitted: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        work = self._spawn(self._claim_and_work(ready, admitted))
        try:
            await self._attend(work, admitted)
        except asyncio.CancelledError:
            if not admitted.done():
                work.cancel()
            raise
        return 0

    async def _attend(self, work: asyncio.Task[None], admitted: asyncio.Future[Place]) -> None:
        """Wait until the work is over, or until its prompt is."""
        first: set[asyncio.Future[Any]] = {work, admitted}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            released = asyncio.ensure_future(admitted.result().released.wait())
            try:
                then: set[asyncio.Future[Any]] = {work, released}
                await asyncio.wait(then, return_when=asyncio.FIRST_COMPLETED)
            finally:
                released.cancel()
        if work.done():
            work.result()
        else:
            self._leave_alone(work)

    def _leave_alone(self, work: asyncio.Task[None]) -> None:
        """Nobody waits for this work any more."""
        self._unattended.add(work)
        work.add_done_callback(self._unattended.discard)
        work.add_done_callback(_tell_of_failure)

    def adopt(self, claims: Sequence[Claim]) -> None:
        """Take up what an earlier process left, before anything new is claimed."""
        for claim in claims:
            log.info("task.adopted", task_id=claim.task.id, step=claim.attempt.step)
            failpoints.reach("adopt.begun")
            self._leave_alone(self._spawn(self._resume(claim)))

    async def drain(self, grace_ms: int, hurry: asyncio.Event) -> None:
        """Let what is nearly done end within the grace, or until `hurry`; the rest is the next process's.

        ComfyUI is given nothing new: what it makes then might be heard by nobody.
        """
        self._slots.close()
        ended, hurried = asyncio.ensure_future(self._ended()), asyncio.ensure_future(hurry.wait())
        await asyncio.wait({ended, hurried}, timeout=grace_ms / 1000, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        hurried.cancel()
        await stop(tuple(self._working))

    async def _ended(self) -> None:
        if self._working:
            await asyncio.wait(self._working)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        return task

    async def _claim_and_work(self, ready: Ready, admitted: asyncio.Future[Place]) -> None:
        try:
            async with self._slots.admit(ready) as place:
                admitted.set_result(place)
                claim = await self._claim(ready)
                if claim is not None:
                    await self._work(claim, place)
        except TurnedAway:
            self._queue.give_back(ready)

    async def _claim(self, ready: Ready) -> Claim | None:
        if not self._queue.current(ready):
            return None
        failpoints.reach("claim.taken")
        try:
            claim = await self._store.claim(ready.task_id, self._clock.new_id(), self._queue.now())
        except StoreError:
            self._queue.look_again()
            raise
        finally:
            self._queue.taken(ready)
        failpoints.reach("claim.committed")
        return claim

    async def _resume(self, claim: Claim) -> None:
        ready = Ready(rank=-claim.task.priority, seq=claim.task.seq, task_id=claim.task.id)
        host = claim.attempt.backend
        if claim.attempt.step in {Step.SUBMITTING, Step.SUBMITTED} and host in self._slots.used:
            async with self._slots.adopt(ready, host) as place:
                await self._work(claim, place)
        elif claim.attempt.step is Step.CLAIMED:
            async with self._slots.readmit(ready) as place:
                await self._work(claim, place)
        else:
            await self._work(claim, Place(self._slots, ready))

    async def _work(self, claim: Claim, place: Place) -> None:
        task_id = claim.task.id
        structlog.contextvars.bind_contextvars(task_id=task_id, attempt_id=claim.attempt.id)
        with self._queue.attention(task_id) as attention:
            if claim.task.cancel_requested_at is not None:
                attention.call()
            self._settler.started(claim.task)
            try:
                outcome = await self._executor.execute(claim, place, attention)
                task = await self._settler.settle(claim, outcome)
            except StaleClaim as exc:
                log.warning("claim.stale", reason=exc.message)
                return
        if task.status is Status.QUEUED:
            self._queue.offer(task)


def _tell_of_failure(work: asyncio.Task[None]) -> None:
    """Nobody waits for it, so what broke it is said here."""
    if not work.cancelled() and (error := work.exception()) is not None:
        log.error("work.broken", exc_info=error)


def _nobody() -> None:
    """Who is told of what is owed where nobody delivers."""


def _nobody_asks(_: str) -> None:
    """Who is told of ended tasks where nobody keeps anything for them."""
