"""One prompt in one ComfyUI: posted, found again, followed to its verdict, stopped; never stored or settled.

Messages of the socket wake and inform. What counts is ComfyUI's queue, then its history, in this order (Q1).
"""

import asyncio
from typing import Final

import msgspec
import structlog

from comfyd import failpoints, graphs
from comfyd.clock import Clock
from comfyd.comfy import outputs
from comfyd.comfy.backend import Backend
from comfyd.comfy.prompts import HistoryUnclear
from comfyd.comfy.sightings import Absent, Ended, HistoryEntry, Pending, Running, Sighting
from comfyd.comfy.socket import Watch
from comfyd.errors import BackendError, BackendRejected, BackendUnclear, BackendUnreachable
from comfyd.listener import Listener
from comfyd.run import Run, Stop, task_error
from comfyd.tasks import Canceled, Failed, Interrupted, Interruption, Outcome, Step, TaskError

log = structlog.get_logger("comfyd.prompt")

LOOK_MS: Final = 1_000
"""How often ComfyUI is asked although its socket speaks: messages are hints, the queue is the authority."""
LOOK_DEAF_MS: Final = 400
"""The same while the prompt's socket connection is gone."""
ABSENT_LOOKS: Final = 2
"""How often a prompt must be missed before it is held to be gone."""
CLEARED: Final = {"cleared": True}
VANISHED: Final = {"vanished": True}
UNANSWERED: Final = {"unanswered": True}
"""What is kept with an attempt that was lost although ComfyUI may have run it."""
FREE_VANISHINGS: Final = 3
"""Re-runs of a task whose prompt ComfyUI forgot without being restarted, before it is held to be no use."""
ILLEGIBLE_LOOKS: Final = 10
"""How often the history of a prompt that left the queue must be unreadable before it is held to stay so."""
GHOST_LOOKS: Final = 3
GHOST_PAUSE_MS: Final = 2_000
GHOST_AGE_MS: Final = 5_000
"""An unclear POST may still be read by ComfyUI (Q6): so many looks, so far apart, so long after it."""
CANCEL_FIRST_MS: Final = 50
CANCEL_MOST_MS: Final = 1_000
ENDED_PAUSE_MS: Final = 10
"""An end is announced a moment before it is in the history (Q2); each further look waits twice as long."""
LATE_END_MS: Final = 200
"""How long an end seen by asking is given to be announced as well, before the socket counts as deaf."""
SOCKET_PAUSE_MS: Final = 50
SOCKET_GRACE_MS: Final = 2_000
"""How long after ComfyUI became ready a prompt waits for the socket; later it goes without."""
SOCKET_WAIT_MS: Final = 30_000
"""How long a prompt whose images come over the socket waits for one that is closed."""


class Illegible(msgspec.Struct, frozen=True, kw_only=True):
    """Not in ComfyUI's queue any more, and what its history holds cannot be read."""

    reason: str


class Prompter:
    """Takes prompts through ComfyUI. Lives as long as the process and keeps nothing between prompts."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._turns: dict[str, asyncio.Lock] = {}

    async def stop_if_canceled(self, run: Run) -> None:
        """While nothing of it is in ComfyUI's queue a cancel is simply the end."""
        if await run.cancel_asked():
            raise Stop(Canceled(message="canceled while nothing of it was in ComfyUI's queue"))

    async def await_socket(self, run: Run, backend: Backend, *, needed: bool) -> None:
        """Give a socket that is closed the moment that it takes to open: what is sent before has no progress.

        `needed` says that images come over it: without one they would be made for nothing.
        """
        since = self._clock.monotonic()
        ready_ms = max(self._clock.now() - backend.state.since, 0)  # 0 if the wall clock was set back
        patience = SOCKET_WAIT_MS if needed else SOCKET_GRACE_MS - ready_ms
        while backend.client_id is None:
            await self.stop_if_canceled(run)
            if self._clock.monotonic() - since >= patience:
                if not needed:
                    return
                message = "the images come over ComfyUI's WebSocket, and that is not open"
                raise Stop(Failed(error=TaskError(code="backend_unclear", message=message, retryable=True)))
            await self._clock.sleep(SOCKET_PAUSE_MS)

    async def submit(self, run: Run, backend: Backend, watch: Watch) -> None:
        """Record the intent, then POST; in the order in which the slots were given."""
        graph = graphs.rewrite_prefixes(run.graph, own_prefix(run.id))
        async with self._turns.setdefault(backend.name, asyncio.Lock()):
            await self.stop_if_canceled(run)
            client_id = watch.client_id or self._clock.new_id()
            run.life = backend.life
            await run.record(
                Step.SUBMITTING, backend=backend.name, client_id=client_id, intent_at=self._clock.now()
            )
            failpoints.reach("intent.committed")
            try:
                await backend.submit(run.id, client_id, graph, run.extra_data)
                failpoints.reach("post.answered")
            except BackendRejected as exc:
                raise Stop(Failed(error=task_error(exc))) from exc
            except BackendUnreachable as exc:
                raise Stop(Interrupted(reason=Interruption.LOST, message=exc.message)) from exc
            except BackendUnclear as exc:
                log.warning("prompt.unclear", reason=exc.message)
                return
        await run.record(Step.SUBMITTED, accepted_at=self._clock.now())
        failpoints.reach("submitted.committed")

    async def find(self, run: Run, backend: Backend, listener: Listener) -> None:
        """Learn whether a POST of unknown fate has arrived: the queue is asked until that is certain."""
        since, absent = self._clock.monotonic(), 0
        if run.claim.attempt.step is Step.SUBMITTING:  # that process is gone, and its connection with it
            since -= run.elapsed("intent_at")
        while True:
            sighting = await self._look(run, backend)
            if listener.running or (sighting is not None and not isinstance(sighting, Absent)):
                await run.record(Step.SUBMITTED, accepted_at=self._clock.now())
                return
            absent += sighting is not None
            if absent >= GHOST_LOOKS and self._clock.monotonic() - since >= GHOST_AGE_MS:
                message = "ComfyUI did not take the prompt"
                raise Stop(Interrupted(reason=Interruption.LOST, message=message, details=UNANSWERED))
            left = GHOST_AGE_MS - (self._clock.monotonic() - since)
            await self._clock.sleep(GHOST_PAUSE_MS if absent < GHOST_LOOKS else max(left, 1))

    async def _look(self, run: Run, backend: Backend, *, ended: bool = False) -> Sighting | Illegible | None:
        """Where the prompt is; None if ComfyUI did not say, which proves nothing (Q20)."""
        try:
            return await backend.look(run.id, ended)
        except HistoryUnclear as exc:
            return Illegible(reason=exc.message)
        except BackendError as exc:
            log.debug("look.unclear", reason=exc.message)
            return None

    async def follow(self, run: Run, backend: Backend, watch: Watch, listener: Listener) -> HistoryEntry:
        """Until ComfyUI's verdict."""
        absent = illegible = hasty = 0
        if run.attempt.client_id == watch.client_id:  # posted a moment ago, so there is nothing to see yet
            await self._pause(run, backend, watch, listener)
        while True:
            announced = watch.ended
            sighting = await self._look(run, backend, ended=announced)
            absent = absent + 1 if isinstance(sighting, Absent) else 0
            illegible = illegible + 1 if isinstance(sighting, Illegible) else 0
            match sighting:
                case Ended(entry=entry):
                    await self._expect_end(backend, watch, announced=announced)
                    return entry
                case Absent() if absent >= ABSENT_LOOKS:
                    return await self._salvaged(run, backend, listener)
                case Illegible(reason=reason) if illegible >= ILLEGIBLE_LOOKS:
                    raise Stop(_unreadable(reason))
                case Running():
                    await self.seen_running(run)
                case Pending():
                    run.seen_waiting = True
                case _:
                    pass  # was missed for the first time, or nobody knows
            if sighting is None or not watch.connected:  # then silence says nothing
                listener.last_sign = self._clock.monotonic()
            if isinstance(sighting, Pending | Running):
                quicker = await self._check_clocks(run, backend, listener)
                if quicker is not None:
                    return quicker
            if watch.ended:
                await self._clock.sleep(min(ENDED_PAUSE_MS << hasty, LOOK_MS))
                hasty += 1
            await self._pause(run, backend, watch, listener)

    async def _pause(self, run: Run, backend: Backend, watch: Watch, listener: Listener) -> None:
        """Wait until it is time to look. A cancel is obeyed at once, a first sign of life recorded."""
        while not watch.ended:
            await watch.wait(LOOK_MS if watch.connected else LOOK_DEAF_MS)
            started = listener.running and run.attempt.seen_running_at is None
            called = run.attention.called
            if called and await run.cancel_asked():
                await self._cancel(run, backend)
            if started and not watch.ended:
                await self.seen_running(run)
            if not (started or called):
                return

    async def _expect_end(self, backend: Backend, watch: Watch, *, announced: bool) -> None:
        """The socket should have told; an open one that does not is deaf although it answers pings (Q3)."""
        if announced or not watch.connected:
            return
        await watch.wait(LATE_END_MS)
        if watch.heard == 0 and watch.connected:
            log.warning("socket.deaf", backend=backend.name)
            backend.reset_socket()

    async def seen_running(self, run: Run) -> None:
        """Make it durable that it was executed, if that is news."""
        if run.attempt.seen_running_at is None:
            await run.record(run.attempt.step, seen_running_at=self._clock.now())
            failpoints.reach("running.committed")

    async def _salvaged(self, run: Run, backend: Backend, listener: Listener) -> HistoryEntry:
        """What was heard of a prompt that is in neither queue nor history any more, if that is all there is.

        ComfyUI was restarted, or somebody cleared its queue or its history. What it saved is still there.
        """
        if listener.running:
            await self.seen_running(run)
        entry = listener.verdict()
        if entry is not None and _are_its_own(entry, run.id):
            log.info("prompt.salvaged", verdict=entry.verdict)
            return entry
        if run.attempt.seen_running_at is None:
            raise Stop(_lost(run, restarted=backend.life != run.life))
        message = "ComfyUI lost the prompt while it ran"
        raise Stop(Interrupted(reason=Interruption.SUSPECT, message=message))

    async def _check_clocks(self, run: Run, backend: Backend, listener: Listener) -> HistoryEntry | None:
        """End the prompt if one of the task's clocks has run out.

        If it succeeds before it is stopped and would only be run again, that history is the answer.
        """
        error = self._overdue(run, backend, listener)
        if error is None:
            return None
        entry = await self._stop_prompt(run, backend)
        if entry is not None and entry.verdict == "success" and error.retryable:
            return entry
        raise Stop(Failed(error=error))

    def _overdue(self, run: Run, backend: Backend, listener: Listener) -> TaskError | None:
        policy = run.claim.task.policy
        if run.attempt.seen_running_at is None:
            waited = run.elapsed("accepted_at")
            if backend.state.sick:
                return None  # it starts nobody's: the task waits with it
            if policy.start_timeout_ms is not None and waited > policy.start_timeout_ms:
                return _overdue("start_timeout", "did not start to execute", policy.start_timeout_ms)
            return None
        if policy.timeout_ms is not None and run.elapsed("seen_running_at") > policy.timeout_ms:
            return _overdue("execution_timeout", "did not finish", policy.timeout_ms, retryable=False)
        silent = self._clock.monotonic() - listener.last_sign
        if policy.stall_timeout_ms is not None and silent > policy.stall_timeout_ms:
            return _overdue("stalled", "gave no sign of life", policy.stall_timeout_ms)
        return None

    async def _cancel(self, run: Run, backend: Backend) -> None:
        """Stop exactly this prompt; returns only by leaving the pipeline."""
        entry = await self._stop_prompt(run, backend)
        if entry is not None and entry.verdict == "success":
            raise Stop(Canceled(message="the prompt had finished before it could be stopped"))
        raise Stop(Canceled(message="canceled"))

    async def _stop_prompt(self, run: Run, backend: Backend) -> HistoryEntry | None:
        """Ask until the prompt is neither waiting nor running (Q7); its history, if it has one."""
        pause, gone = CANCEL_FIRST_MS, 0
        while True:
            try:
                await backend.cancel(run.id)
                failpoints.reach("stop.asked")
            except BackendError as exc:
                log.info("cancel.unclear", reason=exc.message)
            sighting = await self._look(run, backend)
            if isinstance(sighting, Ended):
                failpoints.reach("stop.verified")
                return sighting.entry
            gone = gone + 1 if isinstance(sighting, Absent | Illegible) else 0
            if gone >= ABSENT_LOOKS:
                return None
            await self._clock.sleep(pause)
            pause = min(pause * 2, CANCEL_MOST_MS)


def _are_its_own(entry: HistoryEntry, prompt_id: str) -> bool:
    """Whether nobody else can have made files of these names since: ComfyUI may have begun to count anew."""
    own = f"{own_prefix(prompt_id)}/"
    paths = [
        f"{file.subfolder}/{file.filename}".replace("\\", "/")
        for file in outputs.output_files(entry.outputs)
        if file.text is None and file.folder == "output"
    ]
    return all(path.startswith(own) for path in paths)


def own_prefix(prompt_id: str) -> str:
    """What the files of one attempt begin with in ComfyUI's output folder."""
    return f"comfyd/{prompt_id}"


def _lost(run: Run, *, restarted: bool) -> Outcome:
    """Free. But one that ComfyUI forgets again and again while it goes on may have run each time, unseen."""
    task = run.claim.task
    vanished = sum(
        attempt.error is not None
        and attempt.error.details == VANISHED
        and attempt.claimed_at >= (task.started_at or 0)
        for attempt in task.attempts
    )
    if restarted or run.seen_waiting or vanished < FREE_VANISHINGS:
        message = "ComfyUI lost the prompt before it was seen to run"
        details = {} if restarted else CLEARED if run.seen_waiting else VANISHED
        return Interrupted(reason=Interruption.LOST, message=message, details=details)
    message = f"ComfyUI took the prompt {vanished + 1} times, and its queue and history forgot it each time"
    return Failed(error=TaskError(code="output_unavailable", message=message))


def _unreadable(reason: str) -> Failed:
    """The same workflow would end the same way: a node's output is probably what ComfyUI cannot write."""
    message = f"ComfyUI has ended the prompt, but what it says of it cannot be read: {reason}"
    return Failed(error=TaskError(code="backend_unclear", message=message))


def _overdue(code: str, what: str, limit_ms: int, *, retryable: bool = True) -> TaskError:
    message = f"the prompt {what} within {limit_ms / 1000:g} s"
    return TaskError(code=code, message=message, retryable=retryable)
