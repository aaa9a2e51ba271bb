"""Event streams: a snapshot first, everything in order, an end, and no watcher left behind."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from starlette.requests import HTTPConnection

from comfyd.api.events import OwnTelling, Reader
from comfyd.progress import EVENTS_HELD, Preview, Watcher
from comfyd.tasks import Status
from tests.api.conftest import Edge, until
from tests.support.values import GRAPH, artefact

UNKNOWN = "5e1f6c1e-0000-4000-8000-00000000dead"
PICTURE = b"\xff\xd8picture"


async def submitted(edge: Edge) -> str:
    status, task = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH})
    assert status == 202
    return str(task["task_id"])


async def heard(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    """The events of a stream, comments as `#`."""
    name = "#"
    async for line in response.content:
        text = line.decode().rstrip("\n")
        if text.startswith("event: "):
            name = text[7:]
        elif text.startswith("data: "):
            yield name, json.loads(text[6:])
        elif text.startswith(":"):
            yield "#", text


def preview(edge: Edge, task_id: str) -> None:
    edge.state.board.show(task_id, Preview(node_id="2", image_type="image/jpeg", data=PICTURE))


async def test_stream_begins_with_the_task_and_ends_after_its_end(edge: Edge) -> None:
    task_id = await submitted(edge)
    async with edge.http.get(f"{edge.base}/api/tasks/{task_id}/events") as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Accel-Buffering"] == "no"
        assert "Content-Length" not in response.headers
        events = heard(response)
        name, first = await anext(events)
        assert (name, first["status"], first["task_id"]) == ("status", "PENDING", task_id)
        claim = await edge.claim(task_id)
        name, running = await anext(events)
        assert (name, running["status"]) == ("status", "PROCESSING")
        assert set(running) == set(first)
        edge.report(task_id, 0.5, nodes_done=1)
        assert await anext(events) == (
            "progress",
            {
                "value": 0.5,
                "nodes_done": 1,
                "nodes_total": 2,
                "current_node": None,
                "current_node_class": None,
                "step": None,
                "steps": None,
                "message": None,
            },
        )
        preview(edge, task_id)
        assert await anext(events) == (
            "preview",
            {"node_id": "2", "image_type": "image/jpeg", "data": "/9hwaWN0dXJl"},
        )
        stored = artefact(key=f"{task_id}/1/2_0_x.png")
        edge.state.board.publish(task_id, "output", stored)
        name, output = await anext(events)
        assert name == "output"
        assert output["url"] == f"{edge.base}/api/files/{task_id}/1/2_0_x.png"
        edge.state.board.publish(task_id, "log", {"line": "hello"})
        assert await anext(events) == ("log", {"line": "hello"})
        await edge.succeed(claim, stored)
        name, last = await anext(events)
        assert (name, last["status"], last["outputs"]) == ("status", "COMPLETED", [output])
        assert [event async for event in events] == []
    assert edge.state.board.watchers == 0


async def test_stream_of_an_ended_task_is_its_last_status(edge: Edge) -> None:
    task_id = await submitted(edge)
    await edge.fail(await edge.claim(task_id))
    async with edge.http.get(f"{edge.base}/api/tasks/{task_id}/events") as response:
        events = [event async for event in heard(response)]
    assert [(name, data["status"]) for name, data in events] == [("status", "FAILED")]


async def test_head_of_a_stream_ends(edge: Edge) -> None:
    task_id = await submitted(edge)
    async with edge.http.head(f"{edge.base}/api/tasks/{task_id}/events") as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
    await until(lambda: edge.state.board.watchers == 0)


async def test_progress_never_falls_behind_a_snapshot(edge: Edge) -> None:
    """What was waiting when the whole task was read is older than it."""
    task_id = await submitted(edge)
    await edge.claim(task_id)
    edge.report(task_id, 0.1)
    async with edge.http.get(f"{edge.base}/api/tasks/{task_id}/events") as response:
        events = heard(response)
        await anext(events)
        # All at once: the reader reads the row for the first of them when the others wait already.
        edge.state.board.status(task_id, Status.RUNNING)
        for step in range(2, 9):
            edge.report(task_id, step / 10)
        preview(edge, task_id)
        name, snapshot = await anext(events)
        assert (name, snapshot["progress"]["value"]) == ("status", 0.8)
        edge.report(task_id, 0.9)
        names = []
        async for name, data in events:
            names.append(name)
            if name == "progress":
                assert data["value"] == 0.9
                break
        assert set(names) <= {"progress", "preview"}


async def test_retry_while_watching_does_not_end_the_stream(edge: Edge) -> None:
    task_id = await submitted(edge)
    claim = await edge.claim(task_id)
    async with edge.http.get(f"{edge.base}/api/tasks/{task_id}/events") as response:
        events = heard(response)
        await anext(events)
        # The task ends and is queued again before the reader looks.
        edge.state.board.status(task_id, Status.FAILED)
        assert (await anext(events))[1]["status"] == "PROCESSING"
        await edge.succeed(claim)
        assert [data["status"] async for _, data in events] == ["COMPLETED"]


def reader_of(edge: Edge, task_id: str, watcher: Watcher) -> Reader:
    """A reader that looks at the row whenever nothing has come for a moment."""
    app = SimpleNamespace(state=SimpleNamespace(comfyd=edge.state))
    scope = {"type": "http", "app": app, "scheme": "http", "headers": [], "server": ("h", 1)}
    telling = OwnTelling(HTTPConnection(scope), quiet=0.01)
    return Reader(edge.state, task_id, watcher, telling)


async def test_quiet_stream_looks_at_the_row_itself(edge: Edge) -> None:
    """An event that got lost costs time, not the end."""
    task_id = await submitted(edge)
    with edge.state.board.watch(task_id) as watcher:
        reader = reader_of(edge, task_id, watcher)
        assert not (await reader.opening())[-1].final
        following = reader.following()
        assert await anext(following) is None
        assert await anext(following) is None
        await edge.state.store.cancel(task_id, edge.state.clock.now())
        event = await anext(following)
        while event is None:
            event = await anext(following)
        assert (event.name, event.final) == ("status", True)
        assert json.loads(event.data)["status"] == "CANCELED"
        assert [event async for event in following] == []


async def test_reader_that_leaves_frees_its_watcher_at_once(edge: Edge) -> None:
    task_id = await submitted(edge)
    async with edge.http.get(f"{edge.base}/api/tasks/{task_id}/events") as response:
        await anext(heard(response))
        assert edge.state.board.watchers == 1
        response.close()
    await until(lambda: edge.state.board.watchers == 0)


async def test_reader_that_is_overrun_is_told_and_ended(edge: Edge) -> None:
    task_id = await submitted(edge)
    async with edge.http.get(f"{edge.base}/api/tasks/{task_id}/events") as response:
        events = heard(response)
        await anext(events)
        for number in range(EVENTS_HELD + 2):
            edge.state.board.publish(task_id, "log", {"line": number})
        rest = [event async for event in events]
    assert [name for name, _ in rest] == ["log"] * EVENTS_HELD + ["#"]
    assert "too slow" in rest[-1][1]


async def test_stop_ends_streams(edge: Edge) -> None:
    task_id = await submitted(edge)
    async with edge.http.get(f"{edge.base}/api/tasks/{task_id}/events") as response:
        events = heard(response)
        await anext(events)
        edge.state.closing.set()
        async with asyncio.timeout(5):
            assert [event async for event in events] == []


async def test_task_forgotten_while_watched_ends_the_stream(edge: Edge) -> None:
    task_id = await submitted(edge)
    async with edge.http.get(f"{edge.base}/api/tasks/{task_id}/events") as response:
        events = heard(response)
        await anext(events)
        await edge.state.store.cancel(task_id, edge.state.clock.now())
        await edge.state.store.delete(task_id)
        edge.state.board.status(task_id, Status.CANCELED)
        async with asyncio.timeout(5):
            assert [event async for event in events] == []


async def test_websocket_says_the_same(edge: Edge) -> None:
    task_id = await submitted(edge)
    async with edge.http.ws_connect(f"{edge.base}/api/tasks/{task_id}/ws") as socket:
        first = await socket.receive_json()
        assert (first["event"], first["data"]["status"]) == ("status", "PENDING")
        claim = await edge.claim(task_id)
        assert (await socket.receive_json())["data"]["status"] == "PROCESSING"
        await socket.send_str("whatever a client says is not listened to")
        edge.report(task_id, 0.5)
        progress = await socket.receive_json()
        assert (progress["event"], progress["data"]["value"]) == ("progress", 0.5)
        preview(edge, task_id)
        shown = await socket.receive_json()
        assert (shown["event"], shown["data"]["data"]) == ("preview", "/9hwaWN0dXJl")
        await edge.succeed(claim)
        assert (await socket.receive_json())["data"]["status"] == "COMPLETED"
        assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
        assert socket.close_code == 1000
    await until(lambda: edge.state.board.watchers == 0)


async def test_websocket_of_an_ended_task_is_its_last_status(edge: Edge) -> None:
    task_id = await submitted(edge)
    await edge.fail(await edge.claim(task_id))
    async with edge.http.ws_connect(f"{edge.base}/api/tasks/{task_id}/ws") as socket:
        assert (await socket.receive_json())["data"]["status"] == "FAILED"
        assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE


async def test_binary_previews_are_the_picture(edge: Edge) -> None:
    task_id = await submitted(edge)
    url = f"{edge.base}/api/tasks/{task_id}/ws?binary_previews=true"
    async with edge.http.ws_connect(url) as socket:
        await socket.receive_json()
        preview(edge, task_id)
        assert await socket.receive_bytes() == PICTURE


async def test_websocket_that_leaves_frees_its_watcher(edge: Edge) -> None:
    task_id = await submitted(edge)
    async with edge.http.ws_connect(f"{edge.base}/api/tasks/{task_id}/ws") as socket:
        await socket.receive_json()
        assert edge.state.board.watchers == 1
    await until(lambda: edge.state.board.watchers == 0)


async def test_websocket_that_is_overrun_is_closed_as_too_slow(edge: Edge) -> None:
    task_id = await submitted(edge)
    async with edge.http.ws_connect(f"{edge.base}/api/tasks/{task_id}/ws") as socket:
        await socket.receive_json()
        for number in range(EVENTS_HELD + 2):
            edge.state.board.publish(task_id, "log", {"line": number})
        for _ in range(EVENTS_HELD):
            assert (await socket.receive_json())["event"] == "log"
        assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
        assert socket.close_code == 1008


async def test_stop_closes_websockets(edge: Edge) -> None:
    task_id = await submitted(edge)
    async with edge.http.ws_connect(f"{edge.base}/api/tasks/{task_id}/ws") as socket:
        await socket.receive_json()
        edge.state.closing.set()
        assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
        assert socket.close_code == 1001


async def test_websocket_is_refused_before_it_opens(edge: Edge) -> None:
    task_id = await submitted(edge)
    refused = {
        f"/api/tasks/{UNKNOWN}/ws": 404,
        "/api/tasks/nothing/ws": 404,
        f"/api/tasks/{task_id}/ws?binary_previews=perhaps": 400,
        "/api/comfyui/ws": 404,
        "/elsewhere": 404,
    }
    for path, status in refused.items():
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await edge.http.ws_connect(f"{edge.base}{path}")
        assert caught.value.status == status, path
        assert caught.value.headers is not None
        assert caught.value.headers["X-Request-Id"]


async def test_websocket_address_without_an_upgrade_is_400(edge: Edge) -> None:
    status, answer = await edge.call("GET", f"/api/tasks/{UNKNOWN}/ws")
    assert status == 400
    assert "/events" in answer["error"]["message"]
