"""Every answer has an id, and every error one envelope and one status."""

import asyncio
import dataclasses
import logging
from typing import Any

import aiohttp
import msgspec
import pytest
import structlog
from starlette.types import Message

from comfyd import errors
from comfyd.api.errors import answer, status_of
from comfyd.api.request_id import RequestIds
from comfyd.api.state import State
from comfyd.config import Config, LogConfig
from comfyd.errors import ComfydError, InsufficientStorage
from comfyd.tasks import Status, Task
from tests.api.conftest import Edge, serving
from tests.support.clock import HandClock
from tests.support.logs import captured_logs
from tests.support.values import task

UNKNOWN = "5e1f6c1e-0000-4000-8000-00000000dead"


class BrokenStore:
    """A database layer with a mistake in it, and a full disk."""

    async def get(self, task_id: str) -> Task | None:
        """The mistake."""
        raise ZeroDivisionError(f"secret detail of {task_id}")

    async def replay(self, _: object) -> Task | None:
        """The full disk."""
        raise InsufficientStorage("the disk is full")


def broken(state: State) -> State:
    store: Any = BrokenStore()
    return dataclasses.replace(state, store=store)


def every_error() -> list[type[ComfydError]]:
    kinds = [getattr(errors, name) for name in dir(errors)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, ComfydError)]


def test_every_error_of_the_tree_has_a_status() -> None:
    expected = {
        errors.MalformedRequest: 400,
        errors.TaskNotFound: 404,
        errors.Conflict: 409,
        errors.ForeignOrigin: 403,
        errors.BodyTooLarge: 413,
        errors.UnsupportedMediaType: 415,
        errors.WorkflowFormatUi: 422,
        errors.IdempotencyKeyReuse: 422,
        errors.QueueFull: 429,
        errors.StoreUnavailable: 503,
        errors.InsufficientStorage: 507,
        errors.ConfigError: 500,
    }
    for kind in every_error():
        assert status_of(kind) == expected.get(kind, status_of(kind))
        assert 400 <= status_of(kind) <= 599


def test_error_of_our_own_making_keeps_its_details_to_itself() -> None:
    response = answer(errors.ConfigError("a secret", details={"key": "a secret"}))
    assert response.status_code == 500
    assert b"internal_error" in bytes(response.body)
    assert b"secret" not in bytes(response.body)


async def test_unexpected_error_is_500_without_details_and_logged_with_its_traceback(config: Config) -> None:
    async with serving(config, state=broken) as edge:
        with captured_logs(structlog.contextvars.merge_contextvars) as lines:
            async with edge.http.get(f"{edge.base}/api/tasks/{UNKNOWN}") as response:
                body = await response.json()
                request_id = response.headers["X-Request-Id"]
        assert response.status == 500
        assert body["error"]["code"] == "internal_error"
        assert "secret" not in str(body)
        (line,) = [line for line in lines if line["event"] == "request.broken"]
        assert isinstance(line["exc_info"], ZeroDivisionError)
        assert line["request_id"] == request_id


async def test_unexpected_error_refuses_a_websocket_with_500(config: Config) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    with captured_logs():
        async with serving(config, state=broken) as edge:
            async with edge.http.get(f"{edge.base}/api/tasks/{UNKNOWN}/ws", headers=upgrade) as response:
                assert response.status == 500
                assert (await response.json())["error"]["code"] == "internal_error"
            status, _ = await edge.call("GET", "/api/health")
            assert status == 200


async def test_unexpected_error_closes_an_open_websocket_with_1011(config: Config) -> None:
    class BreaksLater:
        """A store whose second look at a task goes wrong."""

        looks = 0

        async def get(self, task_id: str) -> Task | None:
            """The task, once."""
            self.looks += 1
            if self.looks > 1:
                raise ZeroDivisionError
            return task(id=task_id, status=Status.RUNNING)

    def breaks_later(state: State) -> State:
        store: Any = BreaksLater()
        return dataclasses.replace(state, store=store)

    with captured_logs() as lines:
        async with (
            serving(config, state=breaks_later) as edge,
            edge.http.ws_connect(f"{edge.base}/api/tasks/{UNKNOWN}/ws") as socket,
        ):
            await socket.receive_json()
            edge.state.board.status(UNKNOWN, Status.SUCCEEDED)
            assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
            assert socket.close_code == 1011
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["request.broken"]


async def test_full_disk_is_507(config: Config) -> None:
    async with serving(config, state=broken) as edge:
        headers = {"Idempotency-Key": "k"}
        status, body = await edge.call("POST", "/api/tasks", json={"workflow": {}}, headers=headers)
    assert (status, body["error"]["code"]) == (507, "insufficient_storage")


async def test_routers_own_errors_wear_the_envelope(edge: Edge) -> None:
    status, body = await edge.call("GET", "/api/nothing")
    assert (status, body["error"]["code"]) == (404, "not_found")
    status, body = await edge.call("GET", "/api/tasks/")
    assert status == 404
    async with edge.http.put(f"{edge.base}/api/tasks/{UNKNOWN}") as response:
        assert response.status == 405
        assert (await response.json())["error"]["code"] == "method_not_allowed"
        assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD", "DELETE", "OPTIONS"}


async def test_options_names_the_methods(edge: Edge) -> None:
    async with edge.http.options(f"{edge.base}/api/tasks") as response:
        assert response.status == 204
        assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD", "POST", "OPTIONS"}


async def test_request_id_of_the_client_is_kept_if_it_is_sane(edge: Edge) -> None:
    async with edge.http.get(f"{edge.base}/api/health", headers={"X-Request-Id": "abc-123"}) as response:
        assert response.headers["X-Request-Id"] == "abc-123"
    for insane in ("a b", "x" * 129, "a;b", '"'):
        async with edge.http.get(f"{edge.base}/api/health", headers={"X-Request-Id": insane}) as response:
            assert len(response.headers["X-Request-Id"]) == 36, insane
    async with edge.http.get(f"{edge.base}/api/nothing") as response:
        assert len(response.headers["X-Request-Id"]) == 36


async def test_access_log_is_a_line_with_the_request_id(config: Config) -> None:
    logged = msgspec.structs.replace(config, log=LogConfig(access=True))
    async with serving(logged) as edge:
        with captured_logs(structlog.contextvars.merge_contextvars) as lines:
            await edge.call("GET", "/api/tasks/nothing?wait=1", headers={"X-Request-Id": "r"})
    (line,) = [line for line in lines if line["event"] == "request"]
    assert (line["method"], line["path"], line["status"]) == ("GET", "/api/tasks/nothing", 404)
    assert line["request_id"] == "r"
    assert line["duration_ms"] >= 0


async def test_lifespan_passes_untouched() -> None:
    seen: list[str] = []

    async def app(scope: Any, _: Any, __: Any) -> None:
        seen.append(scope["type"])

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(_: Message) -> None:
        raise AssertionError("nothing is sent")

    await RequestIds(app, HandClock(), access_log=True)({"type": "lifespan"}, receive, send)
    assert seen == ["lifespan"]


async def test_client_that_leaves_in_the_middle_of_its_body_is_no_error(
    edge: Edge, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = edge.base.removeprefix("http://").split(":")
    with captured_logs() as lines, caplog.at_level(logging.ERROR):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /api/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        await writer.wait_closed()
        status, _ = await edge.call("GET", "/api/health")
    assert status == 200
    assert [line for line in lines if line["event"] in {"request.broken", "request.failed"}] == []
    assert caplog.records == []
