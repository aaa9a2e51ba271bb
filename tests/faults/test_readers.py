"""Clients that are many, deaf or slow: what they do not take costs a bounded memory, and others nothing.

Everything here runs in one event loop, the thousand clients too, so each figure includes what they cost.
"""

import asyncio
import contextlib
import resource
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import pytest

from comfyd.config import Config
from comfyd.progress import Preview
from tests.api.conftest import Edge, serving
from tests.support.service import configuration, until
from tests.support.values import GRAPH

NOBODY: Final = "http://127.0.0.1:9"
CROWD: Final = 880
"""Readers of a task of which little is to be said."""
NEAR: Final = 20
"""Readers of the task whose previews pour in."""
DEAF: Final = 100
"""Others of that task, that never read."""
PREVIEWS: Final = 200
PREVIEW: Final = Preview(node_id="2", image_type="image/png", data=b"A" * 49_152)
"""64 KiB in base64."""
BOUND: Final = 250_000_000
"""Bytes; what the deaf did not take is five times as much."""


@pytest.fixture(autouse=True)
def files() -> Iterator[None]:
    """Both ends of each connection are ours."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4_096), hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return configuration(tmp_path / "data", NOBODY)


def memory() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Reader:
    """A client that reads the events of one task as they come: their names, in order."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.last = b""

    async def read(self, port: int, task_id: str) -> None:
        """Until the stream ends."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        try:
            writer.write(_head("GET", f"/api/tasks/{task_id}/events", "Connection: close"))
            async for line in reader:
                if line.startswith(b"event: "):
                    self.heard.append(line[7:-1])
                elif line.startswith(b"data: "):
                    self.last = line
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


def _head(method: str, path: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *headers, "", ""]).encode()


@contextlib.contextmanager
def deaf_readers(port: int, task_id: str) -> Iterator[None]:
    """Within this block so many clients ask for the events of a task and take none of them."""
    with contextlib.ExitStack() as stack:
        for _ in range(DEAF):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            client.connect(("127.0.0.1", port))
            client.sendall(_head("GET", f"/api/tasks/{task_id}/events"))
        yield


async def submitted(edge: Edge) -> str:
    status, task = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH})
    assert status == 202
    return str(task["task_id"])


@pytest.mark.fault(35)
async def test_a_hundred_readers_that_never_read_cost_the_other_nine_hundred_nothing(config: Config) -> None:
    async with serving(config) as edge:
        port = int(edge.base.rpartition(":")[2])
        calm, busy = await submitted(edge), await submitted(edge)
        readers = {
            task_id: [Reader() for _ in range(count)] for task_id, count in ((calm, CROWD), (busy, NEAR))
        }
        with deaf_readers(port, busy):
            reading = [
                asyncio.ensure_future(reader.read(port, task_id))
                for task_id, those in readers.items()
                for reader in those
            ]
            await until(lambda: edge.state.board.watchers == CROWD + NEAR + DEAF)
            everybody = [reader for those in readers.values() for reader in those]
            await until(lambda: all(reader.last for reader in everybody))

            before = memory()
            claims = [await edge.claim(calm), await edge.claim(busy)]
            for number in range(PREVIEWS):
                edge.state.board.show(busy, PREVIEW)
                heard = 3 + number  # the task twice, waiting and running, and the previews
                await until(lambda: all(len(reader.heard) >= heard for reader in readers[busy]))  # noqa: B023 # waited for here
            assert memory() - before < BOUND

            began = time.monotonic()
            assert (await edge.call("GET", f"/api/tasks/{busy}"))[0] == 200
            assert time.monotonic() - began < 2
            for claim in claims:
                await edge.succeed(claim)
            await asyncio.gather(*reading)
    assert {tuple(reader.heard) for reader in readers[calm]} == {(b"status", b"status", b"status")}
    expected = (b"status", b"status", *[b"preview"] * PREVIEWS, b"status")
    assert {tuple(reader.heard) for reader in readers[busy]} == {expected}
    assert all(b'"status":"COMPLETED"' in reader.last for reader in everybody)


LORISES: Final = 200


@contextlib.asynccontextmanager
async def lorises(port: int) -> AsyncIterator[None]:
    """Within this block many clients send their requests byte by byte: half the head, half the body."""
    head = _head("GET", "/api/health", "X-Slow: " + "x" * 10_000)
    body = (
        _head("POST", "/api/tasks", "Content-Type: application/json", "Content-Length: 10000") + b" " * 10_000
    )
    begun = body.index(b"\r\n\r\n") + 4
    async with contextlib.AsyncExitStack() as stack:
        writers = []
        for number in range(LORISES):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            stack.push_async_callback(_gone, writer)
            writer.write(body[:begun] if number % 2 else b"")
            writers.append(writer)

        async def drip() -> None:
            for place in range(10_000):
                for number, writer in enumerate(writers):
                    source, at = (body, begun + place) if number % 2 else (head, place)
                    writer.write(source[at : at + 1])
                await asyncio.sleep(0.05)

        dripping = asyncio.ensure_future(drip())
        try:
            yield
        finally:
            dripping.cancel()
            await asyncio.gather(dripping, return_exceptions=True)


async def _gone(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.mark.fault(36)
async def test_clients_that_send_a_byte_now_and_then_keep_nobody_waiting(config: Config) -> None:
    """Nobody is kept waiting by them; that they are sent away after a while is not promised yet."""
    async with serving(config) as edge, lorises(int(edge.base.rpartition(":")[2])):
        before = memory()
        took = []
        for _ in range(20):
            began = time.monotonic()
            task_id = await submitted(edge)
            assert (await edge.call("GET", f"/api/tasks/{task_id}"))[0] == 200
            took.append(time.monotonic() - began)
        assert sorted(took)[10] < 1
        assert max(took) < 5
        assert memory() - before < BOUND
