"""Streams of jobs: a snapshot first, every output before the end, and no step back."""

import asyncio
import base64
import dataclasses
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec
from starlette.requests import HTTPConnection

from comfyd.api.events import Reader
from comfyd.api.state import State
from comfyd.api.v2.events import JobTelling
from comfyd.errors import StoreUnavailable
from comfyd.progress import EVENTS_HELD, Preview, Watcher
from comfyd.tasks import Artefact, Settlement, Status, TaskError
from tests.api.conftest import Edge, until
from tests.support.comfy_v2 import check
from tests.support.values import GRAPH, artefact

JOBS = "/api/v2/jobs"
PICTURE = b"\xff\xd8picture"
MODELS = {"status": "StatusEvent", "progress": "Progress", "preview": "PreviewEvent", "output": "Output"}
Heard = AsyncIterator[tuple[str, Any]]


async def submitted(edge: Edge) -> str:
    status, job = await edge.call("POST", JOBS, json={"workflow": GRAPH})
    assert status == 201
    return str(job["id"])


async def heard(response: aiohttp.ClientResponse) -> Heard:
    """The events of a stream, each as the contract has it; comments as `#`."""
    name = "#"
    async for line in response.content:
        text = line.decode().rstrip("\n")
        assert not text.startswith(("id:", "retry:"))
        if text.startswith("event: "):
            name = text[7:]
        elif text.startswith("data: "):
            data = json.loads(text[6:])
            check(MODELS[name], data)
            yield name, data
        elif text.startswith(":"):
            yield "#", text


@asynccontextmanager
async def stream(edge: Edge, job_id: str) -> AsyncIterator[Heard]:
    async with edge.http.get(f"{edge.base}{JOBS}/{job_id}/events") as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["X-Accel-Buffering"] == "no"
        yield heard(response)


async def rest(events: Heard) -> list[tuple[str, Any]]:
    async with asyncio.timeout(10):
        return [event async for event in events]


def output(job_id: str, index: int = 0, attempt: int = 1) -> Artefact:
    return artefact(key=f"{job_id}/{attempt}/2_{index}_x.png", index=index, blake3="b" * 64)


def show(edge: Edge, job_id: str, data: bytes = PICTURE) -> None:
    edge.state.board.show(job_id, Preview(node_id="2", image_type="image/jpeg", data=data))


async def test_stream_tells_all_of_a_job_in_order(edge: Edge) -> None:
    job_id = await submitted(edge)
    async with stream(edge, job_id) as events:
        assert await anext(events) == ("status", {"status": "queued", "queue_position": 1})
        claim = await edge.claim(job_id)
        assert await anext(events) == ("status", {"status": "running", "queue_position": None})
        edge.report(job_id, 0.5, nodes_done=1)
        name, progress = await anext(events)
        assert (name, progress["value"], progress["nodes_total"]) == ("progress", 0.5, 2)
        show(edge, job_id)
        name, preview = await anext(events)
        assert (name, preview["node_id"], preview["content_type"]) == ("preview", "2", "image/jpeg")
        assert base64.b64decode(preview["data_base64"]) == PICTURE
        edge.state.board.stored(job_id, output(job_id))
        name, first = await anext(events)
        assert (name, first["id"], first["job_id"]) == ("output", output(job_id).id, job_id)
        assert first["url"].startswith(f"{edge.base}/api/files/")
        await edge.succeed(claim, output(job_id), output(job_id, 1))
        ending = await rest(events)
        _, job = await edge.call("GET", f"{JOBS}/{job_id}")
        assert [data for _, data in ending[1:]] == [{"status": "succeeded", "queue_position": None}]
        assert [first["id"], ending[0][1]["id"]] == [each["id"] for each in job["outputs"]]
    assert edge.state.board.watchers == 0


async def test_late_reader_is_told_what_there_is(edge: Edge) -> None:
    job_id = await submitted(edge)
    await edge.claim(job_id)
    for index in range(2):
        edge.state.board.stored(job_id, output(job_id, index))
    edge.report(job_id, 0.25)
    show(edge, job_id, b"older")
    show(edge, job_id)
    async with stream(edge, job_id) as events:
        opening = [await anext(events) for _ in range(5)]
    assert [name for name, _ in opening] == ["status", "output", "output", "progress", "preview"]
    assert opening[3][1]["value"] == 0.25
    assert base64.b64decode(opening[4][1]["data_base64"]) == PICTURE


async def test_own_streams_begin_with_the_latest_picture_too(edge: Edge) -> None:
    job_id = await submitted(edge)
    await edge.claim(job_id)
    show(edge, job_id)
    async with edge.http.ws_connect(f"{edge.base}/api/tasks/{job_id}/ws?binary_previews=true") as socket:
        assert (await socket.receive_json())["event"] == "status"
        assert await socket.receive_bytes() == PICTURE


async def test_stream_of_an_ended_job_is_its_outputs_and_its_end(edge: Edge) -> None:
    job_id = await submitted(edge)
    await edge.succeed(await edge.claim(job_id), output(job_id), output(job_id, 1))
    async with stream(edge, job_id) as events:
        told = await rest(events)
    assert [name for name, _ in told] == ["output", "output", "status"]
    assert told[-1][1]["status"] == "succeeded"


async def test_no_output_is_told_twice(edge: Edge) -> None:
    job_id = await submitted(edge)
    claim = await edge.claim(job_id)
    edge.state.board.stored(job_id, output(job_id))
    async with stream(edge, job_id) as events:
        await anext(events)
        edge.state.board.stored(job_id, output(job_id))
        edge.state.board.status(job_id, Status.RUNNING)
        await edge.succeed(claim, output(job_id))
        told = await rest(events)
    assert [name for name, _ in told].count("output") == 1


async def test_progress_takes_no_step_back_in_another_attempt(edge: Edge) -> None:
    job_id = await submitted(edge)
    claim = await edge.claim(job_id)
    async with stream(edge, job_id) as events:
        await anext(events)
        edge.report(job_id, 0.75)
        assert (await anext(events))[1]["value"] == 0.75
        error = TaskError(code="lost", message="ComfyUI went away", retryable=True)
        now = edge.state.clock.now()
        again = Settlement(status=Status.QUEUED, outcome="lost", available_at=now, error=error)
        await edge.settle(claim, again)
        assert (await anext(events))[1]["status"] == "queued"
        claim = await edge.claim(job_id)
        assert (await anext(events))[1]["status"] == "running"
        for value in (0.1, 0.8):
            edge.report(job_id, value, nodes_done=1)
            name, progress = await anext(events)
            assert (name, progress["value"], progress["nodes_done"]) == ("progress", max(value, 0.75), 1)
        edge.state.board.stored(job_id, output(job_id, attempt=2))
        await edge.succeed(claim, output(job_id, attempt=2))
        assert [name for name, _ in await rest(events)] == ["output", "status"]


async def test_status_is_told_once_however_often_it_is_looked_at(edge: Edge) -> None:
    job_id = await submitted(edge)
    async with stream(edge, job_id) as events:
        await anext(events)
        claim = await edge.claim(job_id)
        edge.state.board.status(job_id, Status.RUNNING)
        edge.state.board.status(job_id, Status.RUNNING)
        await edge.succeed(claim)
        assert [data["status"] for name, data in await rest(events) if name == "status"] == [
            "running",
            "succeeded",
        ]


async def test_cancel_of_a_running_job_is_told_at_once(edge: Edge) -> None:
    job_id = await submitted(edge)
    claim = await edge.claim(job_id)
    async with stream(edge, job_id) as events:
        await anext(events)
        await edge.call("POST", f"{JOBS}/{job_id}/cancel")
        assert await anext(events) == ("status", {"status": "canceling", "queue_position": None})
        await edge.settle(claim, Settlement(status=Status.CANCELED, outcome="canceled"))
        assert [data["status"] for _, data in await rest(events)] == ["canceled"]


class Failing:
    """A database that answers the first look at a task, fails at so many, and answers again."""

    def __init__(self, store: Any, failures: int) -> None:
        self._store = store
        self._failures = failures
        self._looks = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def get(self, task_id: str) -> Any:
        """See `Store`."""
        self._looks += 1
        if 1 < self._looks <= 1 + self._failures:
            raise StoreUnavailable("the database does not answer")
        return await self._store.get(task_id)


async def test_database_that_fails_for_a_while_ends_no_stream(edge: Edge) -> None:
    job_id = await submitted(edge)
    store: Any = Failing(edge.state.store, failures=3)
    state = dataclasses.replace(edge.state, store=store)
    with edge.state.board.watch(job_id) as watcher:
        reader = reader_of(state, job_id, watcher)
        await reader.opening()
        await edge.succeed(await edge.claim(job_id), output(job_id))  # two statuses, both looked for in vain
        following = [event async for event in reader.following()]
    assert following[:2] == [None, None]
    assert [event.name for event in following if event is not None] == ["output", "status"]


async def test_failure_ends_the_stream(edge: Edge) -> None:
    job_id = await submitted(edge)
    claim = await edge.claim(job_id)
    async with stream(edge, job_id) as events:
        await anext(events)
        await edge.fail(claim)
        assert [data["status"] for _, data in await rest(events)] == ["failed"]


async def test_what_the_contract_does_not_tell_is_left_out(edge: Edge) -> None:
    job_id = await submitted(edge)
    claim = await edge.claim(job_id)
    async with stream(edge, job_id) as events:
        await anext(events)
        edge.state.board.publish(job_id, "log", {"node_id": "1", "message": "hello"})
        assert (await anext(events))[0] == "#"
        await edge.succeed(claim)
        assert [name for name, _ in await rest(events)] == ["status"]


async def test_picture_of_no_known_node_is_told(edge: Edge) -> None:
    job_id = await submitted(edge)
    await edge.claim(job_id)
    edge.state.board.show(job_id, Preview(image_type="image/png", data=b"x"))
    async with stream(edge, job_id) as events:
        await anext(events)
        name, preview = await anext(events)
    assert (name, preview["node_id"]) == ("preview", "")


async def test_reader_that_is_overrun_is_ended(edge: Edge) -> None:
    job_id = await submitted(edge)
    async with stream(edge, job_id) as events:
        await anext(events)
        for number in range(EVENTS_HELD + 2):
            edge.state.board.publish(job_id, "log", {"line": number})
        told = await rest(events)
    assert "too slow" in told[-1][1]


async def test_many_readers_of_one_job_are_all_served(edge: Edge) -> None:
    job_id = await submitted(edge)

    async def one() -> list[str]:
        async with stream(edge, job_id) as events:
            return [name for name, _ in await rest(events)]

    readers = [asyncio.ensure_future(one()) for _ in range(40)]
    await edge.watched(job_id, by=40)
    claim = await edge.claim(job_id)
    edge.state.board.stored(job_id, output(job_id))
    await edge.succeed(claim, output(job_id))
    told = await asyncio.gather(*readers)
    assert {names.count("output") for names in told} == {1}
    assert {names[-1] for names in told} == {"status"}
    await until(lambda: edge.state.board.watchers == 0)


async def test_head_of_a_stream_ends(edge: Edge) -> None:
    job_id = await submitted(edge)
    async with edge.http.head(f"{edge.base}{JOBS}/{job_id}/events") as response:
        assert response.status == 200
    await until(lambda: edge.state.board.watchers == 0)


def reader_of(state: State, job_id: str, watcher: Watcher) -> Reader:
    """A reader that looks at the row whenever nothing has come for a moment."""
    app = SimpleNamespace(state=SimpleNamespace(comfyd=state))
    scope = {"type": "http", "app": app, "scheme": "http", "headers": [], "server": ("h", 1)}
    return Reader(state, job_id, watcher, JobTelling(HTTPConnection(scope), job_id, quiet=0.01))


async def test_job_that_moves_up_in_the_queue_says_so(edge: Edge) -> None:
    first, second = await submitted(edge), await submitted(edge)
    with edge.state.board.watch(second) as watcher:
        reader = reader_of(edge.state, second, watcher)
        (status,) = await reader.opening()
        assert msgspec.json.decode(status.data)["queue_position"] == 2
        following = reader.following()
        assert await anext(following) is None
        await edge.state.store.cancel(first, edge.state.clock.now())
        event = await anext(following)
        while event is None:
            event = await anext(following)
        assert msgspec.json.decode(event.data) == {"status": "queued", "queue_position": 1}
        await edge.state.store.cancel(second, edge.state.clock.now())  # nobody announces it
        event = await anext(following)
        while event is None:
            event = await anext(following)
        assert (event.final, msgspec.json.decode(event.data)["status"]) == (True, "canceled")


async def test_quiet_stream_of_a_running_job_only_says_that_it_is_there(edge: Edge) -> None:
    job_id = await submitted(edge)
    await edge.claim(job_id)
    with edge.state.board.watch(job_id) as watcher:
        reader = reader_of(edge.state, job_id, watcher)
        await reader.opening()
        following = reader.following()
        assert [await anext(following) for _ in range(3)] == [None] * 3


async def test_picture_that_came_before_the_opening_is_told_once(edge: Edge) -> None:
    job_id = await submitted(edge)
    await edge.claim(job_id)
    with edge.state.board.watch(job_id) as watcher:
        show(edge, job_id)
        reader = reader_of(edge.state, job_id, watcher)
        assert [event.name for event in await reader.opening()] == ["status", "preview"]
        following = reader.following()
        assert await anext(following) is None
