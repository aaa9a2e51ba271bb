"""Whatever is wrong with a request is answered with a 4xx that names it, and leaves nothing behind."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from comfyd.api.requests import converted, parse_json
from comfyd.api.schemas import TaskRequest
from comfyd.config import Config, LimitsConfig
from comfyd.errors import MalformedRequest
from tests.api.conftest import Edge, serving
from tests.support.values import GRAPH

UI_FORMAT: dict[str, Any] = {"nodes": [], "links": [], "version": 0.4}


async def nothing_stored(edge: Edge) -> bool:
    return sum((await edge.state.store.counts()).values()) == 0


async def test_wrong_fields_are_400_and_named(edge: Edge) -> None:
    wrong: list[tuple[Any, str]] = [
        ([], "$"),
        ("text", "$"),
        ({}, "$.workflow"),
        ({"workflow": 1}, "$.workflow"),
        ({"workflow": []}, "$.workflow"),
        ({"workflow": ""}, "$.workflow"),
        ({"workflow": GRAPH, "colour": "red"}, "$.colour"),
        ({"workflow": GRAPH, "prompt": GRAPH}, "$.prompt"),
        ({"workflow": GRAPH, "webhook_url": 1}, "$.webhook_url"),
        ({"workflow": GRAPH, "webhook_url": ""}, "$.webhook_url"),
        ({"workflow": GRAPH, "webhook_url": "http://x/" + "a" * 2040}, "$.webhook_url"),
        ({"workflow": GRAPH, "callbackUrl": ["http://x/"]}, "$.callbackUrl"),
        ({"workflow": GRAPH, "callback_url": "http://x/"}, "$.callback_url"),
        ({"workflow": GRAPH, "webhook_url": "http://x/", "callbackUrl": "http://y/"}, "$.callbackUrl"),
        ({"workflow": GRAPH, "webhook_events": ["task.completed"]}, "$.webhook_events"),
        ({"workflow": GRAPH, "webhook_url": "http://x/", "webhook_events": []}, "$.webhook_events"),
        (
            {"workflow": GRAPH, "webhook_url": "http://x/", "webhook_events": "task.failed"},
            "$.webhook_events",
        ),
        (
            {"workflow": GRAPH, "webhook_url": "http://x/", "webhook_events": ["done"]},
            "$.webhook_events[0]",
        ),
        ({"workflow": GRAPH, "webhook_url": "http://x/", "webhook_events": [1]}, "$.webhook_events[0]"),
        (
            {"workflow": GRAPH, "webhook_url": "http://x/", "webhook_events": ["task.failed", "task.failed"]},
            "$.webhook_events",
        ),
        (
            {"workflow": GRAPH, "webhook_url": "http://x/", "webhook_events": ["task.failed"] * 6},
            "$.webhook_events",
        ),
        ({"workflow": GRAPH, "inputs": []}, "$.inputs"),
        ({"workflow": GRAPH, "priority": True}, "$.priority"),
        ({"workflow": GRAPH, "priority": 1.5}, "$.priority"),
        ({"workflow": GRAPH, "priority": "1"}, "$.priority"),
        ({"workflow": GRAPH, "priority": "urgent"}, "$.priority"),
        ({"workflow": GRAPH, "priority": 1001}, "$.priority"),
        ({"workflow": GRAPH, "priority": -1001}, "$.priority"),
        ({"workflow": GRAPH, "priority": 10**30}, "$.priority"),
        ({"workflow": GRAPH, "priority": None}, "$.priority"),
        ({"workflow": GRAPH, "max_attempts": 0}, "$.max_attempts"),
        ({"workflow": GRAPH, "max_attempts": 101}, "$.max_attempts"),
        ({"workflow": GRAPH, "max_attempts": True}, "$.max_attempts"),
        ({"workflow": GRAPH, "timeout": 0}, "$.timeout"),
        ({"workflow": GRAPH, "timeout": -1}, "$.timeout"),
        ({"workflow": GRAPH, "timeout": "5"}, "$.timeout"),
        ({"workflow": GRAPH, "timeout": 1e300}, "$.timeout"),
        ({"workflow": GRAPH, "start_timeout": False}, "$.start_timeout"),
        ({"workflow": GRAPH, "metadata": {"a": 1}}, "$.metadata[...]"),
        ({"workflow": GRAPH, "metadata": {"a": "x" * 513}}, "$.metadata[...]"),
        ({"workflow": GRAPH, "metadata": {"a" * 65: "x"}}, "a key of $.metadata"),
        ({"workflow": GRAPH, "metadata": {str(n): "x" for n in range(17)}}, "$.metadata"),
        ({"workflow": GRAPH, "output": {"format": "gif"}}, "$.output.format"),
        ({"workflow": GRAPH, "output": {"format": "png", "quality": 50}}, "$.output.quality"),
        ({"workflow": GRAPH, "output": {"format": "jpeg", "quality": 0}}, "$.output.quality"),
        ({"workflow": GRAPH, "output": {"format": "jpeg", "quality": 101}}, "$.output.quality"),
        ({"workflow": GRAPH, "output": {"storage": "ftp"}}, "$.output.storage"),
        ({"workflow": GRAPH, "output": {"prefix": "../up"}}, "$.output.prefix"),
        ({"workflow": GRAPH, "output": {"prefix": "/abs"}}, "$.output.prefix"),
        ({"workflow": GRAPH, "output": {"prefix": "a//b"}}, "$.output.prefix"),
        ({"workflow": GRAPH, "output": {"prefix": ".hidden"}}, "$.output.prefix"),
        ({"workflow": GRAPH, "output": {"prefix": "a\n"}}, "$.output.prefix"),
        ({"workflow": GRAPH, "output": {"prefix": "a/" * 20}}, "$.output.prefix"),
        ({"workflow": GRAPH, "output": {"metadata": "none"}}, "$.output.metadata"),
        ({"workflow": GRAPH, "output": {"inline": "yes"}}, "$.output.inline"),
        ({"workflow": GRAPH, "output": {"include_temp": 1}}, "$.output.include_temp"),
    ]
    for body, path in wrong:
        status, answer = await edge.call("POST", "/api/tasks", json=body)
        assert status == 400, body
        assert answer["error"]["code"] == "invalid_request"
        assert answer["error"]["details"] == {"path": path}, body
        assert path in answer["error"]["message"]
    assert await nothing_stored(edge)


async def test_what_is_no_json_is_400(edge: Edge) -> None:
    broken = (
        b"",
        b"{",
        b"nul",
        b'{"workflow": NaN}',
        b'{"workflow": "\\ud800"}',
        b'{"workflow": "\xff"}',
        b'{"timeout": 1e999}',
        b"[" * 100_000,
    )
    for body in broken:
        status, answer = await edge.call(
            "POST", "/api/tasks", data=body, headers={"Content-Type": "application/json"}
        )
        assert status == 400, body[:40]
        assert answer["error"]["code"] == "invalid_request"
    assert await nothing_stored(edge)


async def test_wrong_graphs_are_422(edge: Edge) -> None:
    cycle = {
        "1": {"class_type": "A", "inputs": {"x": ["2", 0]}},
        "2": {"class_type": "A", "inputs": {"x": ["1", 0]}},
    }
    wrong: list[tuple[Any, str]] = [
        ({}, "invalid_workflow"),
        ({"1": 1}, "invalid_workflow"),
        ({"1": {"inputs": {}}}, "invalid_workflow"),
        (cycle, "invalid_workflow"),
        (UI_FORMAT, "workflow_format_ui"),
    ]
    for graph, code in wrong:
        status, answer = await edge.call("POST", "/api/tasks", json={"workflow": graph})
        assert (status, answer["error"]["code"]) == (422, code), graph
    assert await nothing_stored(edge)


async def test_wrong_inputs_are_422_and_each_is_named(edge: Edge) -> None:
    status, answer = await edge.call(
        "POST", "/api/tasks", json={"workflow": GRAPH, "inputs": {"9.width": 1, "1.nothing.x": 2}}
    )
    assert (status, answer["error"]["code"]) == (422, "invalid_inputs")
    assert set(answer["error"]["details"]["inputs"]) == {"9.width", "1.nothing.x"}
    status, answer = await edge.call("POST", "/api/tasks", json={"workflow": "no-such-template"})
    assert (status, answer["error"]["code"]) == (404, "workflow_not_found")
    assert await nothing_stored(edge)


async def test_other_media_types_are_415(edge: Edge) -> None:
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "json",
    ):
        headers = {"Content-Type": kind}
        status, answer = await edge.call("POST", "/api/tasks", data=b'{"workflow": "x"}', headers=headers)
        assert (status, answer["error"]["code"]) == (415, "unsupported_media_type"), kind


async def test_json_is_taken_under_every_name_it_has(edge: Edge) -> None:
    body = msgspec.json.encode({"workflow": GRAPH})
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
        status, _ = await edge.call("POST", "/api/tasks", data=body, headers={"Content-Type": kind})
        assert status == 202, kind
    async with edge.http.post(
        f"{edge.base}/api/tasks", data=body, skip_auto_headers=["Content-Type"]
    ) as response:
        assert "Content-Type" not in response.request_info.headers
        assert response.status == 202


async def test_body_over_the_limit_is_413_announced_or_not(config: Config) -> None:
    async def chunked() -> AsyncIterator[bytes]:
        yield b'{"workflow": "'
        for _ in range(8):
            yield b"x" * 500
        yield b'"}'

    small = msgspec.structs.replace(config, limits=LimitsConfig(body_bytes=2000))
    async with serving(small) as edge:
        for path in ("/api/tasks", "/api/workflows/noise-image/run"):
            for body in (b"x" * 2001, chunked()):
                status, answer = await edge.call("POST", path, data=body, headers={"Content-Type": ""})
                assert (status, answer["error"]["code"]) == (413, "body_too_large")
                assert answer["error"]["details"] == {"limit": 2000}
        assert await nothing_stored(edge)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["workflow", "inputs", "priority", "metadata", "output", "timeout", "x"]), _JSON
    )
)
def test_any_json_is_a_request_or_a_malformed_one(body: dict[str, Any]) -> None:
    with contextlib.suppress(MalformedRequest):
        assert isinstance(converted(body, TaskRequest).workflow, str | dict)


@given(st.binary(max_size=60))
def test_any_bytes_are_json_or_malformed(body: bytes) -> None:
    with contextlib.suppress(MalformedRequest):
        msgspec.json.encode(parse_json(body))
