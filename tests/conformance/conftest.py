"""The servers under test: the simulator in both flavors, and the real ComfyUI when it is asked for.

One process per kind and session; every test leaves its server idle. The tests know a server only by its URL
and by what it answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import aiohttp
import pytest
import pytest_asyncio

from tests.conformance.raw_client import Facts, Server
from tests.support.comfyui import ComfyUIProcess, ServerKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterator

FOLDER: Final = Path(__file__).parent
KINDS: Final = [
    "simulator-0.3.75",
    "simulator-0.33",
    pytest.param("real", marks=pytest.mark.comfyui),
]
# As on the real one a step takes time: a prompt that is to be interrupted would be over at once otherwise.
SIMULATOR_OPTIONS: Final = ("--step-seconds", "0.001")

process_key: Final = pytest.StashKey[ComfyUIProcess]()


def new_process(kind: ServerKind) -> ComfyUIProcess:
    """A server of that kind, not started yet."""
    return ComfyUIProcess(kind, options=() if kind == "real" else SIMULATOR_OPTIONS)


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> ServerKind:
    """Which server the test runs against."""
    chosen: ServerKind = request.param
    return chosen


@pytest.fixture(scope="session")
def process(kind: ServerKind) -> Iterator[ComfyUIProcess]:
    """The server process all tests of one kind share."""
    with new_process(kind) as started:
        yield started


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def connection(process: ComfyUIProcess) -> AsyncIterator[Server]:
    """The one session all tests share with that process."""
    async with aiohttp.ClientSession(process.url) as http:
        yield Server(http, await facts(http))


@pytest_asyncio.fixture(loop_scope="session")
async def server(
    connection: Server, process: ComfyUIProcess, request: pytest.FixtureRequest
) -> AsyncIterator[Server]:
    """The shared server, idle before and after the test."""
    request.node.stash[process_key] = process
    yield connection
    await connection.idle()


async def facts(http: aiohttp.ClientSession) -> Facts:
    """What the server says about itself."""
    async with http.get("/api/jobs", params={"limit": "1"}) as response:
        return Facts(modern=response.status != 404)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One event loop for all tests of this folder: they share a session."""
    for item in items:
        if FOLDER in item.path.parents and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the server's log with a failure."""
    report = yield
    failed_process = item.stash.get(process_key, None)
    if report.failed and failed_process is not None:
        report.sections.append((f"log of {failed_process.kind}", failed_process.log_tail()))
    return report
