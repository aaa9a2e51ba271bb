"""The API over real HTTP: uvicorn on a free port in the test's own loop, in front of the real legs.

Nothing works the queue: a test that needs a task to move plays the worker itself, by the store and the board.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import uvicorn

from comfyd.api.routes import create_api
from comfyd.api.state import State
from comfyd.config import Config
from comfyd.progress import Progress
from comfyd.tasks import Artefact, Claim, Settlement, Status, Task, TaskError
from tests.support.logs import captured_logs
from tests.support.service import Bench, bench, configuration

PATIENCE = 20.0
GONE = "http://127.0.0.1:9"
"""Where no ComfyUI listens."""


class Edge:
    """A served API, its state, and a client. Lives as long as the test's block."""

    def __init__(self, made: Bench, base: str, http: aiohttp.ClientSession) -> None:
        self.bench = made
        self.state: State = made.state
        self.base = base
        self.http = http

    async def call(self, method: str, path: str, **facts: Any) -> tuple[int, Any]:
        """Status and JSON of one request."""
        async with self.http.request(method, f"{self.base}{path}", **facts) as response:
            text = await response.text()
            return response.status, msgspec.json.decode(text) if text else None

    async def claim(self, task_id: str) -> Claim:
        """Play the worker: take the task."""
        now = self.state.clock.now()
        claim = await self.state.store.claim(task_id, self.state.clock.new_id(), now)
        assert claim is not None
        self.state.board.status(task_id, Status.RUNNING)
        return claim

    async def succeed(self, claim: Claim, *artefacts: Artefact) -> Task:
        """Play the worker: the attempt ends well."""
        settlement = Settlement(status=Status.SUCCEEDED, outcome="succeeded", artefacts=artefacts)
        return await self.settle(claim, settlement)

    async def fail(self, claim: Claim) -> Task:
        """Play the worker: the attempt ends badly, and the task with it."""
        error = TaskError(code="node_failed", message="KSampler: it broke", details={"node_id": "3"})
        settlement = Settlement(status=Status.FAILED, outcome="failed", error=error, failures=1)
        return await self.settle(claim, settlement)

    async def settle(self, claim: Claim, settlement: Settlement) -> Task:
        """Play the worker: the attempt ends so."""
        task = await self.state.store.settle(claim.attempt.id, settlement, self.state.clock.now())
        self.state.board.status(task.id, task.status)
        return task

    def report(self, task_id: str, value: float, **facts: Any) -> None:
        """Play the worker: the task got further."""
        self.state.board.report(task_id, Progress(value=value, nodes_total=2, **facts))

    async def watched(self, task_id: str, *, by: int = 1) -> None:
        """Until so many readers watch the task."""
        await until(lambda: self.state.board.watchers >= by and self.state.board.watched(task_id))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that no event announces."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(
    config: Config, *, works: bool = False, state: Any = None, **facts: Any
) -> AsyncIterator[Edge]:
    """Serve the API of this configuration; `state` changes the state before. `facts` are those of `bench`."""
    async with bench(config, works=works, **facts) as made:
        if state is not None:
            made.state = state(made.state)
        timeout = aiohttp.ClientTimeout(total=PATIENCE)
        async with (
            _served(create_api(made.state)) as port,
            aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as http,
        ):
            yield Edge(made, f"http://127.0.0.1:{port}", http)
            made.state.closing.set()


@asynccontextmanager
async def _served(app: Any) -> AsyncIterator[int]:
    """uvicorn without its main loop, which only sees a stop ten times a second."""
    # asyncio sends small answers at once only on sockets that say that they are TCP.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, lifespan="off", log_config=None, access_log=False, ws="wsproto", timeout_graceful_shutdown=2
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=[listening])
    try:
        yield listening.getsockname()[1]
    finally:
        await server.shutdown(sockets=[listening])


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """No ComfyUI answers."""
    return configuration(tmp_path / "data", GONE)


@pytest.fixture
async def edge(config: Config) -> AsyncIterator[Edge]:
    """The API with nobody who works the queue; whatever it logs as an error fails the test."""
    with captured_logs() as lines:
        async with serving(config) as served:
            yield served
    assert [line for line in lines if line["log_level"] == "error"] == []
