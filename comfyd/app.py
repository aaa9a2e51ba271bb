"""The one place that knows every part: opens, wires and closes them; never does their work."""

import asyncio
import os
import random
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import structlog
import uvicorn

from comfyd import __version__
from comfyd.api.links import Links
from comfyd.api.routes import create_api
from comfyd.api.state import State
from comfyd.artefacts import ArtefactWriter, StoringTerms
from comfyd.catalog import Catalog, graph_limits
from comfyd.clock import Clock, SystemClock
from comfyd.comfy.backend import Backend
from comfyd.config import Config
from comfyd.control import Control
from comfyd.errors import BackendError, ConfigError, StorageError, StoreError, StoreUnavailable
from comfyd.estimate import Estimator
from comfyd.execution import Executor
from comfyd.fetch import Fetcher
from comfyd.forgetting import Forgetter
from comfyd.guard import Guard, GuardedClient, open_client
from comfyd.intake import GraphChecker, Intake
from comfyd.lifecycle import RetryPolicy
from comfyd.loops import Crew, Health, Loop
from comfyd.maintenance import Figures, Leftovers, Probe, Retention, Templates, UploadSweep, tell
from comfyd.metrics import Metrics
from comfyd.progress import Board
from comfyd.queue import TaskQueue
from comfyd.scratch import Scratch, open_scratch
from comfyd.signing import Signer, key_of
from comfyd.slots import Slots
from comfyd.staging import Stager
from comfyd.storage.opening import Storages, open_storages
from comfyd.store.base import Store
from comfyd.store.sqlite import open_sqlite
from comfyd.submission import Renderer, Submission, Terms
from comfyd.uploads import Uploads, open_uploads
from comfyd.worker import Settler, Workers

log = structlog.get_logger("comfyd")


class Changes:
    """Tells whoever wants to know that a ComfyUI became ready or is ready no more. Lives with the process."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[], None]] = []

    def tell_to(self, listener: Callable[[], None]) -> None:
        """From now on call this too."""
        self._listeners.append(listener)

    def tell(self) -> None:
        """Something changed."""
        for listener in self._listeners:
            listener()


class Ground(msgspec.Struct, frozen=True, kw_only=True):
    """What is opened first and closed last."""

    config: Config
    clock: Clock
    store: Store
    storages: Storages
    scratch: Scratch
    uploads: Uploads
    outbound: GuardedClient
    signer: Signer
    catalog: Catalog
    backends: tuple[Backend, ...]
    slots: Slots
    changes: Changes
    broken: Callable[[], Awaitable[str]]
    """Waits until the database can no longer be trusted, and says why."""


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """A wired comfyd: what answers requests, and what works."""

    state: State
    workers: Workers
    loops: tuple[Loop, ...]
    """What keeps running until the end."""
    claims: tuple[Loop, ...]
    """What takes new tasks: stopped first."""


@asynccontextmanager
async def open_ground(config: Config, clock: Clock) -> AsyncIterator[Ground]:
    """Open the database, the storages, the folders of files, the templates and the way to each ComfyUI."""
    _make_data_folder(config)
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_sqlite(config.database))
        storages = await stack.enter_async_context(open_storages(config, clock))
        scratch = await stack.enter_async_context(open_scratch(config.temporary))
        uploads = await stack.enter_async_context(open_uploads(config.uploads, config.inputs, clock))
        outbound = await stack.enter_async_context(open_client(Guard.of(config.outbound.allow)))
        expires_ms = round(config.storage.local.url_expires * 1000)
        signer = Signer(key_of(config.url_key), expires_ms, clock)
        catalog = Catalog(Path(config.workflows.dir), graph_limits(config.limits))
        tell(await asyncio.to_thread(catalog.refresh))

        changes = Changes()
        backends = tuple(
            [
                await stack.enter_async_context(Backend.open(server, clock, changes.tell))
                for server in config.comfyui
            ]
        )
        slots = Slots(backends, config.queue.prefetch)
        changes.tell_to(slots.changed)
        yield Ground(
            config=config,
            clock=clock,
            store=store,
            storages=storages,
            scratch=scratch,
            uploads=uploads,
            outbound=outbound,
            signer=signer,
            catalog=catalog,
            backends=backends,
            slots=slots,
            changes=changes,
            broken=store.wait_broken,
        )


def _make_data_folder(config: Config) -> None:
    data = Path(config.data.dir)
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        message = f"data.dir: cannot make {data}: {exc.strerror or exc}"
        raise ConfigError(message, details={"key": "data.dir"}) from exc


def wire(ground: Ground) -> Service:
    """Make every part, each with what it needs and no more."""
    config, clock, store = ground.config, ground.clock, ground.store
    metrics, board, health = Metrics(), Board(), Health()
    queue = TaskQueue(store, clock)
    forgetter = Forgetter(store, ground.storages, ground.uploads)
    control = Control(store, forgetter, queue, board, metrics, clock)
    executor = _executor(ground, board, metrics, health)
    retries = RetryPolicy(
        first_ms=round(config.queue.retry_delay * 1000), most_ms=round(config.queue.retry_delay_max * 1000)
    )
    settler = Settler(store, forgetter, board, metrics, clock, retries)
    workers = Workers(store, queue, ground.slots, executor, settler, clock)
    state = State(
        config=config,
        clock=clock,
        store=store,
        storages=ground.storages,
        links=Links(ground.storages, ground.signer),
        uploads=ground.uploads,
        board=board,
        submission=_submission(ground, queue),
        control=control,
        estimator=Estimator(store, board, clock, len(ground.backends)),
        catalog=ground.catalog,
        backends=ground.backends,
        metrics=metrics,
        health=health,
        started_at=clock.now(),
        version=__version__,
        closing=asyncio.Event(),
    )
    refill = Loop(name="queue", step=queue.refill, expected=(StoreError,))
    return Service(
        state=state,
        workers=workers,
        loops=(refill, *_chores(state, forgetter), *_backend_loops(ground, metrics)),
        claims=tuple(
            Loop(name=f"worker-{number}", step=workers.step, expected=(StoreError,))
            for number in range(config.queue.workers)
        ),
    )


def _submission(ground: Ground, queue: TaskQueue) -> Submission:
    """Leg 1, from a request to its row."""
    config, clock, store = ground.config, ground.clock, ground.store
    renderer = Renderer(ground.catalog, random.SystemRandom(), graph_limits(config.limits))
    checker = GraphChecker(ground.backends, clock)
    intake = Intake(checker, ground.outbound.guard, ground.uploads, store)
    terms = Terms.of(config.queue, config.limits, config.storage)
    return Submission(renderer, intake, store, queue, clock, terms)


def _executor(ground: Ground, board: Board, metrics: Metrics, health: Health) -> Executor:
    """Leg 2, from a claim to its outcome."""
    config, clock = ground.config, ground.clock
    fetcher = Fetcher(config.inputs, ground.outbound, clock)
    stager = Stager(fetcher, ground.uploads, ground.scratch, metrics, config.inputs)
    terms = StoringTerms(
        retry_ms=round(config.storage.retry_for * 1000), inline_bytes=config.limits.inline_bytes
    )
    writer = ArtefactWriter(ground.storages, ground.scratch, health, metrics, clock, terms)
    backends = {backend.name: backend for backend in ground.backends}
    return Executor(ground.store, backends, stager, writer, board, metrics, clock)


def _chores(state: State, forgetter: Forgetter) -> tuple[Loop, ...]:
    """What has to be done now and then."""
    keep_ms = round(state.config.queue.retention * 1000)
    figures = Figures(state.store, state.board, state.metrics)
    retention = Retention(
        state.store, state.control, state.clock, keep_ms, state.config.queue.retention_bytes
    )
    sweep = UploadSweep(state.store, state.uploads)
    return (
        Loop(name="figures", step=figures.step, expected=(StoreError,)),
        Loop(name="retention", step=retention.step, expected=(StoreError,)),
        Loop(name="leftovers", step=Leftovers(forgetter).step, expected=(StoreError,)),
        Loop(name="uploads", step=sweep.step, expected=(StoreError, StorageError)),
        Loop(name="workflows", step=Templates(state.catalog).step),
    )


def _backend_loops(ground: Ground, metrics: Metrics) -> list[Loop]:
    """For each ComfyUI one loop that asks how it is, and one that holds its socket."""
    loops = []
    for backend in ground.backends:
        probe = Probe(backend, metrics)
        ground.changes.tell_to(probe.wake)
        loops.append(Loop(name=f"probe:{backend.name}", step=probe.step))
        loops.append(
            Loop(
                name=f"socket:{backend.name}",
                step=SocketLife(backend).step,
                expected=(BackendError,),
                jittered=True,
            )
        )
    return loops


class SocketLife:
    """Holds one ComfyUI's socket: a step is one life of it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def step(self) -> int:
        """Connect, read until the end, and come back at once."""
        await self._backend.run_socket()
        return 0


@asynccontextmanager
async def working(service: Service, grace_ms: int, hurry: asyncio.Event) -> AsyncIterator[None]:
    """Within this block the queue is worked; then what is nearly done may end, unless there is a hurry."""
    state = service.state
    async with Crew(service.loops, state.clock, state.health):
        service.workers.adopt(await state.store.live())
        try:
            async with Crew(service.claims, state.clock, state.health):
                yield
        finally:
            await service.workers.drain(grace_ms, hurry)


class _Server(uvicorn.Server):
    """uvicorn, but signals are comfyd's: a stop also has work to finish, and ends with exit code 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Within this block SIGTERM and SIGINT call `stop`."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def listen(config: Config) -> socket.socket:
    """Take the port. Raises `ConfigError` if somebody else has it."""
    host, port = config.server.host, config.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as exc:
        raise ConfigError(
            # `create_server` adds the address once more, in brackets
            f"server.port: cannot listen on {host}:{port}: {os.strerror(exc.errno) if exc.errno else exc}",
            details={"key": "server.port"},
        ) from exc
    # Accepted connections inherit this. The loop sets it only on sockets whose protocol number is not 0, and
    # without it every answer of two packets waits 40 ms for the client's delayed acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


async def serve(config: Config, listening: socket.socket, clock: Clock | None = None) -> None:
    """Serve and work until a signal ends it. Raises `StoreUnavailable` if the database breaks."""
    async with open_ground(config, clock or SystemClock()) as ground:
        service = wire(ground)
        server = _Server(_uvicorn_config(service))
        closing, hurry = service.state.closing, asyncio.Event()

        def stop() -> None:
            if closing.is_set():  # the second signal does not wait
                server.force_exit = True
                hurry.set()
            server.should_exit = True
            closing.set()

        host, port = listening.getsockname()[:2]
        log.info("serving", url=f"http://{host}:{port}", version=__version__, data=config.data.dir)
        broken = asyncio.ensure_future(ground.broken())
        with _signals(stop):
            async with working(service, round(config.server.grace * 1000), hurry):
                served = asyncio.ensure_future(server.serve(sockets=[listening]))
                closed = asyncio.ensure_future(closing.wait())
                await asyncio.wait({served, closed, broken}, return_when=asyncio.FIRST_COMPLETED)
                server.should_exit = True
                closing.set()
                log.info("closing")
            await served
        closed.cancel()
        if broken.done():
            raise StoreUnavailable(broken.result())
        broken.cancel()
    log.info("closed")


def _uvicorn_config(service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        create_api(service.state),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        ws="wsproto",
        timeout_graceful_shutdown=max(round(service.state.config.server.grace), 1),
    )
