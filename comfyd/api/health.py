"""The routes that say how comfyd is: alive, ready, in detail, and as figures; never a secret."""

from starlette.requests import Request
from starlette.responses import Response

from comfyd.api.responses import JsonResponse
from comfyd.api.schemas import (
    AliveView,
    BackendView,
    ChecksView,
    CheckView,
    LoopView,
    QueueView,
    ReadyView,
    StatusView,
    StorageView,
)
from comfyd.api.state import State, state_of
from comfyd.api.views import WORDS, moment
from comfyd.artefacts import STORAGE
from comfyd.config import public
from comfyd.errors import StoreError
from comfyd.tasks import Status

NO_STORE = {"Cache-Control": "no-store"}


async def alive(request: Request) -> Response:
    """`GET /api/health`: asks nobody."""
    return JsonResponse(AliveView(status="ok", version=state_of(request).version), headers=NO_STORE)


async def ready(request: Request) -> Response:
    """`GET /api/ready`: 503 while nothing could be worked on, or nothing new is taken for want of room.

    One ComfyUI of several that is away, and its own loops (`socket:name`, `probe:name`), make comfyd slower
    but not unready; any other sick loop does.
    """
    state = state_of(request)
    store = await _store(state)
    backends = _backends(state)
    loops = _loops(state)
    able = all(":" in loop.name for loop in loops)
    disk = CheckView(ok=state.room.shortage is None, reason=state.room.shortage)
    works = store.ok and disk.ok and able and any(backend.ready for backend in backends)
    checks = ChecksView(store=store, disk=disk, comfyui=backends, storages=_storages(state), loops=loops)
    return JsonResponse(ReadyView(ready=works, checks=checks), 200 if works else 503, NO_STORE)


async def status(request: Request) -> Response:
    """`GET /api/status`."""
    state = state_of(request)
    counts = await state.store.counts()
    answer = StatusView(
        version=state.version,
        started_at=moment(state.started_at),
        uptime_seconds=(state.clock.now() - state.started_at) / 1000,
        tasks={word: counts.get(own, 0) for own, word in WORDS.items()},
        queue=QueueView(
            waiting=counts.get(Status.QUEUED, 0),
            running=counts.get(Status.RUNNING, 0),
            limit=state.config.limits.queued_tasks,
        ),
        backends=_backends(state),
        watchers=state.board.watchers,
        loops=_loops(state),
        storage=state.config.storage.provider,
        workflows=len(state.catalog.list()),
        configuration=public(state.config),
    )
    return JsonResponse(answer, headers=NO_STORE)


async def metrics(request: Request) -> Response:
    """`GET /metrics`: what changes without anybody counting is looked at now."""
    state = state_of(request)
    state.metrics.watching(state.board.watchers)
    for backend in state.backends:
        state.metrics.backend_ready(backend.name, backend.state.ready)
    body, content_type = state.metrics.render()
    return Response(body, headers={**NO_STORE, "Content-Type": content_type})


async def _store(state: State) -> CheckView:
    try:
        await state.store.ping()
    except StoreError as exc:
        return CheckView(ok=False, reason=exc.message)
    return CheckView(ok=True, reason=None)


def _backends(state: State) -> tuple[BackendView, ...]:
    return tuple(
        BackendView(
            name=backend.name,
            url=backend.url,
            ready=backend.state.ready,
            reason=backend.state.reason,
            version=backend.state.version,
            socket=backend.state.socket,
            since=moment(backend.state.since),
        )
        for backend in state.backends
    )


def _loops(state: State) -> tuple[LoopView, ...]:
    return tuple(
        LoopView(name=name, reason=reason)
        for name, reason in sorted(state.health.problems().items())
        if not name.startswith(STORAGE)
    )


def _storages(state: State) -> tuple[StorageView, ...]:
    """The storages that results wait for."""
    return tuple(
        StorageView(name=name.removeprefix(STORAGE), reason=reason)
        for name, reason in sorted(state.health.problems().items())
        if name.startswith(STORAGE)
    )
