"""Leg 2: a claim becomes an outcome, on one straight path that is entered again where a crash left it.

    fetch inputs -> seat -> upload inputs -> intent -> POST -> follow -> collect -> store

Every step first asks whether its result is recorded, or true in ComfyUI, and only then acts. Exceptions stop
in `Executor.execute`, one of the two broad catches; how a task goes on is decided elsewhere (`lifecycle`).
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, TypeVar, assert_never

import structlog
from msgspec import UNSET

from comfyd import failpoints, graphs
from comfyd.artefacts import ArtefactWriter, from_memory, text_source
from comfyd.clock import Clock
from comfyd.comfy import outputs
from comfyd.comfy.backend import Backend
from comfyd.comfy.files import OutputStream
from comfyd.comfy.sightings import HistoryEntry
from comfyd.credentials import Credentials
from comfyd.errors import (
    BackendError,
    BackendUnreachable,
    ComfydError,
    DiskFull,
    OutputUnavailable,
    StaleClaim,
)
from comfyd.listener import Frame, Listener
from comfyd.metrics import Metrics
from comfyd.progress import Board
from comfyd.prompt import Prompter
from comfyd.queue import Attention
from comfyd.run import Run, Stop, task_error
from comfyd.slots import Place
from comfyd.staging import Stager, Staging
from comfyd.store.base import Store
from comfyd.storing import Storing
from comfyd.tasks import (
    Claim,
    Failed,
    Graph,
    Interrupted,
    Interruption,
    Outcome,
    OutputFile,
    OutputType,
    Step,
    Succeeded,
    TaskError,
)

T = TypeVar("T")

log = structlog.get_logger("comfyd.execution")

FREE_IMAGE_LOSSES: Final = 2
"""Re-runs of a task whose images were lost with the socket, before it is held to lose them each time."""
DISK_PAUSE_MS: Final = 2_000
"""How long inputs wait for room on a full disk before they are fetched again."""
SOCKET_FOLDER: Final = "socket"
"""The folder of an image that came over the socket: it is in this process's memory only."""
TRANSIENT: Final = (
    "OutOfMemoryError",
    "ConnectionError",
    "ConnectionResetError",
    "TimeoutError",
    "ReadTimeout",
)
"""Ends of the names of a node's exceptions that another try may not meet."""


class Executor:
    """Runs attempts. Lives as long as the process and keeps nothing between attempts."""

    def __init__(  # noqa: PLR0913, PLR0917 - one for each stop of the pipeline
        self,
        store: Store,
        backends: Mapping[str, Backend],
        stager: Stager,
        writer: ArtefactWriter,
        board: Board,
        metrics: Metrics,
        clock: Clock,
        credentials: Credentials,
    ) -> None:
        self._store = store
        self._backends = backends
        self._stager = stager
        self._writer = writer
        self._board = board
        self._metrics = metrics
        self._clock = clock
        self._credentials = credentials
        self._prompter = Prompter(clock)

    async def execute(self, claim: Claim, place: Place, attention: Attention) -> Outcome:
        """Take the attempt from its recorded step to its end. `StaleClaim` if it is not the live one."""
        try:
            credentials = self._credentials.of(claim.task.id)
            run = Run(claim, place, attention, self._store, self._clock, credentials)
            return await self._pipeline(run)
        except Stop as stop:
            return stop.outcome
        except StaleClaim:
            raise
        except ComfydError as exc:
            return Failed(error=task_error(exc))
        except Exception as exc:  # the one catch: whatever else went wrong is an attempt that failed
            log.exception("attempt.broken")
            message = f"comfyd itself failed: {type(exc).__name__}"
            return Failed(error=TaskError(code="internal_error", message=message, retryable=True))

    async def _pipeline(self, run: Run) -> Outcome:
        task = run.claim.task
        async with Storing(task, run.attempt, self._writer, self._board, self._clock) as storing:
            if run.attempt.step is Step.CLAIMED:
                run.check_credentials()  # a prompt that ComfyUI may have needs them no more
                backend = await self._prepare(run)
            else:
                backend = self._adopted(run)
            if run.attempt.step is not Step.COLLECTED:
                try:
                    entry = await self._run_prompt(run, backend, storing)
                finally:  # whatever is to be stored or forgotten now, ComfyUI is not needed for it
                    run.place.release()
                await self._collect(run, backend, entry)
            return await self._keep(run, backend, storing)

    async def _prepare(self, run: Run) -> Backend:
        """Bring the inputs, and take a slot for the prompt.

        A disk that is full is not the task's fault: it waits for room, and meanwhile holds nothing that
        others may wait for.
        """
        graph = run.claim.graph
        known = await self._unless_canceled(run, self._known_classes(graph))
        while True:
            async with self._stager.staging(graph, known) as staging:
                try:
                    return await self._staged(run, staging)
                except DiskFull as exc:
                    log.warning("inputs.wait", reason=exc.message)
            with run.place.fetching():
                pause = round(DISK_PAUSE_MS * (0.5 + self._clock.jitter()))
                await self._unless_canceled(run, self._clock.sleep(pause))

    async def _staged(self, run: Run, staging: Staging) -> Backend:
        """Fetch, seat, upload. Raises `DiskFull` where the fetched files have no room."""
        if staging:
            with run.place.fetching():
                await self._unless_canceled(run, staging.fetch())
            failpoints.reach("inputs.fetched")
            if len(self._backends) == 1:  # then it is known who will run it: the GPU need not wait for this
                (only,) = self._backends.values()
                await self._unless_canceled(run, _delivered(staging, only))
        backend = self._backends[await self._unless_canceled(run, run.place.acquire())]
        failpoints.reach("slot.given")
        if staging:
            run.graph = await self._unless_canceled(run, _delivered(staging, backend))
            failpoints.reach("inputs.uploaded")
        return backend

    async def _known_classes(self, graph: Graph) -> Mapping[str, Any] | None:
        """What some ComfyUI said of its classes, where that is needed to tell which inputs are files."""
        if not graphs.remote_values(graph):
            return None
        for backend in self._backends.values():
            if backend.state.ready:
                with contextlib.suppress(BackendError):
                    return await backend.object_info()
        return None

    async def _unless_canceled(self, run: Run, work: Coroutine[Any, Any, T]) -> T:
        """Do this, but drop it at a cancel; only while nothing of the attempt is in ComfyUI's queue."""
        working = asyncio.ensure_future(work)
        try:
            while not working.done():
                called = asyncio.ensure_future(run.attention.wait())
                try:
                    await asyncio.wait({working, called}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    called.cancel()
                await self._prompter.stop_if_canceled(run)
            return working.result()
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    def _adopted(self, run: Run) -> Backend:
        """The backend on which an earlier process left this attempt."""
        backend = self._backends.get(run.attempt.backend or "")
        if backend is None:
            message = f"ComfyUI {run.attempt.backend!r} is no longer configured"
            raise Stop(Interrupted(reason=Interruption.LOST, message=message))
        return backend

    async def _run_prompt(self, run: Run, backend: Backend, storing: Storing) -> HistoryEntry:
        """From the POST to ComfyUI's verdict. What a node saves is stored while the next ones run."""
        task, graph = run.claim.task, run.claim.graph
        image_nodes = outputs.websocket_image_nodes(graph)
        nodes, targets = await self._needed(backend, run)
        listener = Listener(task.id, nodes, image_nodes, self._board, self._clock, targets)
        if run.attempt.step is Step.CLAIMED:
            await self._prompter.await_socket(run, backend, needed=bool(image_nodes))
        sent_under = UNSET if run.attempt.step is Step.CLAIMED else run.attempt.client_id
        with (
            backend.watch(run.id, listener, sent_under, run.secrets) as watch,
            run.attention.relay(watch.nudge),
        ):
            listener.started = watch.nudge
            listener.made = _storing_early(run, storing, backend)
            if run.attempt.step is Step.CLAIMED:
                await self._prompter.submit(run, backend, watch)
            else:
                listener.say("taken up again after a restart: progress is not known")
            if run.attempt.step is Step.SUBMITTING:
                await self._prompter.find(run, backend, listener)
            entry = await self._prompter.follow(run, backend, watch, listener)
            failpoints.reach("verdict.known")
            await storing.no_more_early()
            intact = watch.connected and watch.ended
        run.frames = listener.frames
        if entry.verdict == "success" and not listener.whole(intact=intact):
            await self._prompter.seen_running(run)
            raise Stop(_images_lost(run))
        return entry

    async def _needed(self, backend: Backend, run: Run) -> tuple[dict[str, str], frozenset[str]]:
        """The nodes that will run and their classes, and those for whose sake they do.

        All of them, and none, where ComfyUI cannot be asked.
        """
        graph = run.claim.graph
        targets: list[str] = []
        needed = set(graph)
        with contextlib.suppress(BackendError):
            known = await backend.object_info()
            targets, needed = graphs.output_nodes(graph, known), graphs.executable_nodes(graph, known)
        return {node: graph[node]["class_type"] for node in graph if node in needed}, frozenset(targets)

    async def _collect(self, run: Run, backend: Backend, entry: HistoryEntry) -> None:
        """Judge the verdict and record what there is to keep."""
        if entry.execution_ms is not None:
            self._metrics.executed(entry.execution_ms)
            if run.attempt.number == 1:
                began = self._clock.now() - entry.execution_ms
                self._metrics.waited(began - run.claim.task.created_at)
        match entry.verdict:
            case "error":
                raise Stop(Failed(error=_node_error(run, entry)))
            case "interrupted":
                message = "somebody else interrupted the prompt in ComfyUI"
                raise Stop(Interrupted(reason=Interruption.STRAY, message=message))
            case "success":
                await self._refuse_part(run, backend, entry)
            case _:
                assert_never(entry.verdict)
        files = outputs.wanted(outputs.output_files(entry.outputs), run.claim.task.output.include_temp)
        await run.record(
            Step.COLLECTED,
            collected=(*files, *_frame_files(run.frames)),
            executed_at=self._clock.now(),
            execution_ms=entry.execution_ms,
        )
        failpoints.reach("collected.committed")

    async def _refuse_part(self, run: Run, backend: Backend, entry: HistoryEntry) -> None:
        """A success of only some outputs is none (Q11). The POST's answer says so too, unless it was lost."""
        if entry.targets is None:
            return
        try:
            wanted = graphs.output_nodes(run.claim.graph, await backend.object_info())
        except BackendError:
            return
        left_out = sorted(set(wanted) - set(entry.targets))
        if left_out:
            message = f"ComfyUI ran only a part of the workflow: not node {', '.join(left_out)}"
            raise Stop(Failed(error=TaskError(code="partial_validation", message=message)))

    async def _keep(self, run: Run, backend: Backend, storing: Storing) -> Outcome:
        """Store every collected file."""
        files = run.attempt.collected
        in_memory = [file for file in files if file.folder == SOCKET_FOLDER]
        if len(in_memory) != len(run.frames):
            await self._prompter.seen_running(run)
            raise Stop(_images_lost(run))
        frames = {
            (file.node_id, file.index): frame for file, frame in zip(in_memory, run.frames, strict=True)
        }

        def source(file: OutputFile) -> AbstractAsyncContextManager[OutputStream]:
            frame = frames.get((file.node_id, file.index))
            if frame is not None:
                return from_memory(frame.data, frame.image_type)
            return _source(backend, file)

        try:
            artefacts = await self._unless_canceled(run, storing.finish(files, source))
        except OutputUnavailable as exc:
            if run.attempt.execution_ms is not None:
                raise  # ComfyUI itself said that it succeeded; what was salvaged has no such word
            raise Stop(Interrupted(reason=Interruption.SUSPECT, message=exc.message)) from exc
        failpoints.reach("outputs.stored")
        return Succeeded(artefacts=artefacts)


async def _delivered(staging: Staging, backend: Backend) -> Graph:
    """The graph with its files on this ComfyUI. One that was not reached was given nothing to do: free."""
    try:
        return await staging.deliver(backend)
    except BackendUnreachable as exc:
        raise Stop(Interrupted(reason=Interruption.LOST, message=exc.message)) from exc
    except DiskFull as exc:  # some inputs are known only to the ComfyUI that runs them
        lost = Interrupted(reason=Interruption.LOST, message=exc.message, details={"disk_full": True})
        raise Stop(lost) from exc


def _source(backend: Backend, file: OutputFile) -> AbstractAsyncContextManager[OutputStream]:
    return text_source(file) if file.text is not None else backend.open_output(file)


def _storing_early(run: Run, storing: Storing, backend: Backend) -> Callable[[str, dict[str, Any]], None]:
    """What to do when a node has run: what it saved is wanted in any case."""

    def made(node: str, output: dict[str, Any]) -> None:
        for file in outputs.output_files({node: output}):
            if file.text is not None or file.folder == "output":
                storing.begin_early(file, lambda file: _source(backend, file), run.collect_early)

    return made


def _images_lost(run: Run) -> Outcome:
    """Free, but not for ever: a socket that never brings them would cost the GPU one run after the other."""
    task = run.claim.task
    lost = sum(
        attempt.outcome == Interruption.LOST
        and attempt.seen_running_at is not None
        and attempt.claimed_at >= (task.started_at or 0)
        for attempt in task.attempts
    )
    message = "images that come over the socket were lost with it"
    if lost < FREE_IMAGE_LOSSES:
        return Interrupted(reason=Interruption.LOST, message=message)
    return Failed(error=TaskError(code="output_unavailable", message=f"{message}, {lost + 1} times"))


def _frame_files(frames: list[Frame]) -> list[OutputFile]:
    """Socket images as output files, numbered within their node."""
    counted: dict[str, int] = {}
    files = []
    for frame in frames:
        index = counted.get(frame.node_id, 0)
        counted[frame.node_id] = index + 1
        suffix = frame.image_type.rpartition("/")[2] or "png"
        files.append(
            OutputFile(
                node_id=frame.node_id,
                index=index,
                kind="images",
                type=OutputType.IMAGE,
                filename=f"websocket_{index + 1:05}.{suffix}",
                folder=SOCKET_FOLDER,
            )
        )
    return files


def _node_error(run: Run, entry: HistoryEntry) -> TaskError:
    """What a node raised, in words that name it."""
    error = entry.error
    if error is None or error.node_id is None:
        said = error.message if error is not None else ""
        return TaskError(
            code="execution_error", message=said or "ComfyUI says that the prompt failed, not why"
        )
    title = graphs.title(run.claim.graph, error.node_id) if error.node_id in run.claim.graph else None
    details = {
        "node_id": error.node_id,
        "class_type": error.node_class,
        "title": title,
        "exception_type": error.exception_type,
    }
    message = f"node {error.node_id} ({error.node_class}): {error.message}"
    retryable = (error.exception_type or "").endswith(TRANSIENT)
    return TaskError(code="execution_error", message=message, retryable=retryable, details=details)
