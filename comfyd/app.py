"""The one place that knows every part: opens, wires and closes them; never does their work."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import structlog

from comfyd import __version__
from comfyd.api.links import Links
from comfyd.api.notices import Notices, base_of
from comfyd.api.state import State
from comfyd.artefacts import ArtefactWriter, StoringTerms
from comfyd.catalog import Catalog, graph_limits
from comfyd.clock import Clock
from comfyd.comfy.backend import Backend
from comfyd.comfy.restarting import RestartCommand
from comfyd.config import Config
from comfyd.control import Control
from comfyd.credentials import Credentials
from comfyd.disk import Room, free_bytes
from comfyd.errors import BackendError, ConfigError, StorageError, StoreError
from comfyd.estimate import Estimator
from comfyd.execution import Executor
from comfyd.fetch import Fetcher
from comfyd.forgetting import Forgetter
from comfyd.guard import Guard, GuardedClient, SystemNames, open_client
from comfyd.intake import GraphChecker, Intake
from comfyd.library import Library
from comfyd.lifecycle import RetryPolicy
from comfyd.loops import Crew, Health, Loop
from comfyd.maintenance import (
    AssetSweep,
    Figures,
    Leftovers,
    Probe,
    Restarts,
    Retention,
    SocketLife,
    Templates,
    UploadSweep,
    tell,
)
from comfyd.metrics import Metrics
from comfyd.orphans import Orphans
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
from comfyd.watchdog import Watchdog
from comfyd.webhooks import AT_ONCE, Deliverer, Sender, Signatures, secret_of
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
    room: Room
    uploads: Uploads
    outbound: GuardedClient
    """To what clients name as inputs."""
    receivers: GuardedClient
    """To webhooks. Names that nobody answers for hold up those of inputs in neither direction."""
    signer: Signer
    signatures: Signatures
    """Of webhooks."""
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
    deliverer: Deliverer
    restarts: tuple[Restarts, ...]
    loops: tuple[Loop, ...]
    """What keeps running until the end."""
    claims: tuple[Loop, ...]
    """What takes new tasks: stopped first."""
    watchdog: Watchdog
    """One of the loops feeds it; whoever enters it has its loop watched."""


@asynccontextmanager
async def open_ground(
    config: Config, clock: Clock, measure: Callable[[Path], int] = free_bytes
) -> AsyncIterator[Ground]:
    """Open the database, the storages, the folders of files, the templates and the way to each ComfyUI.

    `measure` says how many bytes the disk of a folder has free.
    """
    _make_data_folder(config)
    room = Room(Path(config.data.dir), config.limits.free_bytes, measure)
    await room.look()
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_sqlite(config.database))
        storages = await stack.enter_async_context(open_storages(config, clock))
        scratch = await stack.enter_async_context(open_scratch(config.temporary))
        uploads = await stack.enter_async_context(open_uploads(config.uploads, config.inputs, clock))
        guard = Guard.of(config.outbound.allow)
        outbound = await stack.enter_async_context(open_client(guard))
        receivers = await stack.enter_async_context(open_client(guard, lookup=SystemNames(AT_ONCE)))
        expires_ms = round(config.storage.local.url_expires * 1000)
        signer = Signer(key_of(config.url_key), expires_ms, clock)
        secret = config.webhooks.secret or secret_of(config.webhook_secret)
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
            room=room,
            uploads=uploads,
            outbound=outbound,
            receivers=receivers,
            signer=signer,
            signatures=Signatures(secret, config.webhooks.old_secrets),
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
    queue = TaskQueue(store, clock, round(config.queue.retry_delay_max * 1000))
    forgetter = Forgetter(store, ground.storages, ground.uploads)
    control = Control(store, forgetter, queue, board, metrics, clock)
    credentials = Credentials()
    executor = _executor(ground, board, metrics, health, credentials)
    retries = RetryPolicy(
        first_ms=round(config.queue.retry_delay * 1000), most_ms=round(config.queue.retry_delay_max * 1000)
    )
    settler = Settler(store, forgetter, board, metrics, clock, retries)
    workers = Workers(store, queue, ground.slots, executor, settler, clock)
    links = Links(ground.storages, ground.signer)
    deliverer = _deliverer(ground, links, metrics)
    control.owed = settler.owed = deliverer.wake
    control.ended = settler.ended = credentials.forget
    library = _library(ground, board)
    state = State(
        config=config,
        clock=clock,
        store=store,
        storages=ground.storages,
        links=links,
        uploads=ground.uploads,
        room=ground.room,
        board=board,
        library=library,
        submission=_submission(ground, queue, library, credentials),
        control=control,
        estimator=Estimator(store, board, clock, len(ground.backends)),
        catalog=ground.catalog,
        backends=ground.backends,
        metrics=metrics,
        health=health,
        started_at=clock.now(),
        version=__version__,
        closing=asyncio.Event(),
        wake_deliverer=deliverer.wake,
    )
    refill = Loop(name="queue", step=queue.refill, expected=(StoreError,))
    watchdog = Watchdog(clock, metrics.loop_late)
    restarts = _restarts(ground, state)
    return Service(
        state=state,
        workers=workers,
        deliverer=deliverer,
        restarts=tuple(restarts.values()),
        loops=(
            Loop(name="watchdog", step=watchdog.step),
            refill,
            Loop(name="webhooks", step=deliverer.step, expected=(StoreError,)),
            *_chores(state, forgetter),
            *_backend_loops(ground, state),
            *(Loop(name=f"restart:{name}", step=each.step) for name, each in restarts.items()),
        ),
        claims=tuple(
            Loop(name=f"worker-{number}", step=workers.step, expected=(StoreError,))
            for number in range(config.queue.workers)
        ),
        watchdog=watchdog,
    )


def _library(ground: Ground, board: Board) -> Library:
    """Assets live as long as other uploads that nobody uses."""
    keep_ms = round(ground.config.inputs.keep * 1000)
    return Library(ground.store, ground.uploads, ground.storages, board, ground.clock, keep_ms)


def _submission(ground: Ground, queue: TaskQueue, library: Library, credentials: Credentials) -> Submission:
    """Leg 1, from a request to its row."""
    config, clock, store = ground.config, ground.clock, ground.store
    renderer = Renderer(ground.catalog, random.SystemRandom(), graph_limits(config.limits))
    checker = GraphChecker(ground.backends, clock)
    intake = Intake(checker, ground.outbound.guard, ground.uploads, store)
    terms = Terms.of(config.queue, config.limits, config.storage, ground.room)
    return Submission(renderer, library, intake, store, credentials, queue, clock, terms)


def _executor(
    ground: Ground, board: Board, metrics: Metrics, health: Health, credentials: Credentials
) -> Executor:
    """Leg 2, from a claim to its outcome."""
    config, clock = ground.config, ground.clock
    fetcher = Fetcher(config.inputs, ground.outbound, clock)
    stager = Stager(fetcher, ground.uploads, ground.scratch, metrics, config.inputs)
    terms = StoringTerms(
        retry_ms=round(config.storage.retry_for * 1000), inline_bytes=config.limits.inline_bytes
    )
    writer = ArtefactWriter(ground.storages, ground.scratch, health, metrics, clock, terms)
    backends = {backend.name: backend for backend in ground.backends}
    return Executor(ground.store, backends, stager, writer, board, metrics, clock, credentials)


def _deliverer(ground: Ground, links: Links, metrics: Metrics) -> Deliverer:
    """Leg 3, from what is owed to a signed POST."""
    config, clock = ground.config, ground.clock
    notices = Notices(links, base_of(config.server))
    sender = Sender(ground.receivers, ground.signatures, notices.render, config.webhooks.timeout, clock)
    return Deliverer(ground.store, sender, metrics, clock)


def _chores(state: State, forgetter: Forgetter) -> tuple[Loop, ...]:
    """What has to be done now and then."""
    keep_ms = round(state.config.queue.retention * 1000)
    figures = Figures(state.store, state.board, state.metrics)
    retention = Retention(
        state.store, state.control, state.clock, keep_ms, state.config.queue.retention_bytes
    )
    sweep = UploadSweep(state.store, state.uploads)
    return (
        Loop(name="disk", step=state.room.look, expected=(StorageError,)),
        Loop(name="figures", step=figures.step, expected=(StoreError,)),
        Loop(name="retention", step=retention.step, expected=(StoreError,)),
        Loop(name="leftovers", step=Leftovers(forgetter).step, expected=(StoreError,)),
        Loop(name="uploads", step=sweep.step, expected=(StoreError, StorageError)),
        Loop(name="assets", step=AssetSweep(state.library).step, expected=(StoreError, StorageError)),
        Loop(name="workflows", step=Templates(state.catalog).step),
    )


def _backend_loops(ground: Ground, state: State) -> list[Loop]:
    """For each ComfyUI a loop that asks how it is, one that holds its socket, and so on."""
    loops, metrics = [], state.metrics
    for backend in ground.backends:
        orphans = Orphans(backend, ground.store, metrics)
        loops.append(Loop(name=f"orphans:{backend.name}", step=orphans.step, expected=(StoreError,)))
        probe = Probe(backend, metrics)
        ground.changes.tell_to(probe.wake)
        loops.append(Loop(name=f"probe:{backend.name}", step=probe.step))
        socket_life = SocketLife(backend)
        ground.changes.tell_to(socket_life.wake)
        loops.append(
            Loop(
                name=f"socket:{backend.name}", step=socket_life.step, expected=(BackendError,), jittered=True
            )
        )
    return loops


def _restarts(ground: Ground, state: State) -> dict[str, Restarts]:
    """For each ComfyUI that comfyd may start anew who does that, by its name."""
    made = {}
    for backend, server in zip(ground.backends, ground.config.comfyui, strict=True):
        if server.restart:
            command = RestartCommand(backend.name, server.restart, os.environ)
            made[backend.name] = Restarts(backend, command, state.metrics, ground.clock, state.closing)
            ground.changes.tell_to(made[backend.name].wake)
    return made


@asynccontextmanager
async def working(service: Service, grace_ms: int, hurry: asyncio.Event) -> AsyncIterator[None]:
    """Within this block the queue is worked; then what is nearly done may end, unless there is a hurry."""
    state = service.state
    async with service.deliverer, Crew(service.loops, state.clock, state.health):
        service.workers.adopt(await state.store.live())
        try:
            async with Crew(service.claims, state.clock, state.health):
                yield
        finally:
            drained = [each.drain(grace_ms, hurry) for each in service.restarts]
            await asyncio.gather(service.workers.drain(grace_ms, hurry), *drained)
