"""What the tests of this folder stand on: backends, open sockets, misbehaving servers; never a test."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from comfyd.clock import SystemClock
from comfyd.comfy import Backend
from comfyd.config import ComfyUIConfig
from comfyd.errors import BackendError
from comfyd.tasks import Graph

GRAPHS = Path(__file__).parent.parent / "graphs"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def graph(name: str) -> Graph:
    """One of the shipped graphs."""
    loaded: Graph = json.loads((GRAPHS / f"{name}.json").read_text())
    return loaded


def tiny_graph() -> Graph:
    """Two nodes that any server runs."""
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 7},
        },
        "2": {
            "class_type": "SaveImage",
            "inputs": {"images": ["1", 0], "filename_prefix": "tiny"},
            "_meta": {"title": "Keep"},
        },
    }


class QuickClock(SystemClock):
    """Waits for nothing."""

    async def sleep(self, milliseconds: int) -> None:
        """See `Clock`."""
        del milliseconds
        await asyncio.sleep(0)


@asynccontextmanager
async def backend_at(
    url: str, timeout: float = 10.0, on_change: Callable[[], None] = lambda: None, quick: bool = False
) -> AsyncIterator[Backend]:
    """A backend for the server at this url."""
    config = ComfyUIConfig(url=url, request_timeout=timeout)
    clock = QuickClock() if quick else SystemClock()
    async with Backend.open(config, clock, on_change) as backend:
        yield backend


@asynccontextmanager
async def socket_open(backend: Backend) -> AsyncIterator[asyncio.Task[None]]:
    """The backend's socket, open; the task that reads it ends with the block."""
    reader = asyncio.create_task(backend.run_socket())
    try:
        await until(lambda: backend.client_id is not None or reader.done())
        assert not reader.done(), reader.exception()
        yield reader
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for a condition, not for longer than that."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


async def sees(ask: Callable[[], Awaitable[Any]], kind: type[Any], seconds: float = 10.0) -> Any:
    """Ask until the answer is of that kind."""
    async with asyncio.timeout(seconds):
        while not isinstance(answer := await ask(), kind):
            await asyncio.sleep(0.01)
        return answer


async def fails(task: asyncio.Task[None], seconds: float = 10.0) -> BackendError:
    """The error that the socket's reader ends with."""
    async with asyncio.timeout(seconds):
        with pytest.raises(BackendError) as caught:
            await task
    return caught.value


@asynccontextmanager
async def serving(routes: dict[str, Handler]) -> AsyncIterator[str]:
    """A server of these routes (`GET /queue`) on a free port of this machine; its url."""
    application = web.Application()
    for route, handler in routes.items():
        method, _, path = route.partition(" ")
        application.router.add_route(method, path, handler)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    async with AsyncExitStack() as closing:
        await runner.setup()
        closing.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"


def answering(body: Any, status: int = 200) -> Handler:
    """A handler that always says that: a JSON value, or bytes as they are."""

    async def handler(_request: web.Request) -> web.StreamResponse:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return web.Response(body=raw, status=status, content_type="application/json")

    return handler


async def chunked(*parts: bytes) -> AsyncIterator[bytes]:
    """These bytes as a stream."""
    for part in parts:
        yield part
