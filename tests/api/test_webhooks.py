"""Asking for webhooks: in the body, in the query, under both names; a url that leads inward is refused."""

from typing import Any

import pytest

from comfyd.tasks import EventType, Webhook
from tests.api.conftest import Edge
from tests.support.logs import captured_logs
from tests.support.values import GRAPH

URL = "https://example.com/hook?token=t0ken"
ENDS = (EventType.COMPLETED, EventType.FAILED, EventType.CANCELED)


async def webhook_of(edge: Edge, **facts: Any) -> Webhook | None:
    status, task = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH, **facts})
    assert status == 202, task
    return (await edge.bench.task(task["task_id"])).webhook


async def nothing_stored(edge: Edge) -> bool:
    return sum((await edge.state.store.counts()).values()) == 0


async def test_a_url_asks_to_be_told_of_every_end(edge: Edge) -> None:
    told = Webhook(url=URL, events=ENDS)
    assert await webhook_of(edge, webhook_url=URL) == told
    assert await webhook_of(edge, callbackUrl=URL) == told
    assert await webhook_of(edge, callbackUrl=URL, webhook_url=URL) == told
    assert await webhook_of(edge, callbackUrl=None, webhook_url=URL, webhook_events=None) == told


async def test_without_a_url_nobody_is_told(edge: Edge) -> None:
    assert await webhook_of(edge) is None
    assert await webhook_of(edge, webhook_url=None, callbackUrl=None, webhook_events=None) is None


async def test_the_events_are_those_that_were_asked_for(edge: Edge) -> None:
    asked = [str(word) for word in EventType]
    told = await webhook_of(edge, webhook_url=URL, webhook_events=asked)
    assert told == Webhook(url=URL, events=tuple(EventType))
    told = await webhook_of(edge, callbackUrl=URL, webhook_events=["task.started"])
    assert told == Webhook(url=URL, events=(EventType.STARTED,))


async def test_run_takes_both_as_parameters(edge: Edge) -> None:
    query = {"webhook_url": URL, "webhook_events": "task.output,task.failed"}
    status, task = await edge.call("POST", "/api/workflows/noise-image/run", params=query)
    assert status == 202, task
    row = await edge.bench.task(task["task_id"])
    assert row.webhook == Webhook(url=URL, events=(EventType.OUTPUT, EventType.FAILED))
    status, task = await edge.call("POST", "/api/workflows/noise-image/run", params={"webhook_url": URL})
    assert status == 202, task
    assert (await edge.bench.task(task["task_id"])).webhook == Webhook(url=URL, events=ENDS)


REFUSED = [
    ("ftp://example.com/s3cret", "invalid_url"),
    ("example.com/s3cret", "invalid_url"),
    ("/s3cret", "invalid_url"),
    ("http:///s3cret", "invalid_url"),
    ("http://[::1/s3cret", "invalid_url"),
    ("http://][v1.a]1@s3cret", "invalid_url"),
    ("http://example.com:0/s3cret", "invalid_url"),
    ("http://example.com/s3cret and more", "invalid_url"),
    ("http://user:s3cret@example.com/", "invalid_url"),
    ("http://127.0.0.1/?s3cret", "blocked_address"),
    ("http://127.1/?s3cret", "blocked_address"),
    ("http://[::1]/s3cret", "blocked_address"),
    ("http://[::ffff:10.0.0.1]/s3cret", "blocked_address"),
    ("http://localhost:8188/s3cret", "blocked_address"),
    ("http://169.254.169.254/s3cret", "blocked_address"),
    ("https://192.168.1.1/s3cret", "blocked_address"),
]


@pytest.mark.parametrize(("url", "code"), REFUSED)
async def test_a_url_that_can_never_be_called_is_422_and_nothing_is_stored(
    edge: Edge, url: str, code: str
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [
        ("/api/tasks", {"json": {"workflow": GRAPH, "webhook_url": url}}),
        ("/api/tasks", {"json": {"workflow": GRAPH, "callbackUrl": url}}),
        ("/api/workflows/noise-image/run", {"params": {"webhook_url": url}}),
    ]
    with captured_logs() as lines:
        for path, facts in calls:
            status, answer = await edge.call("POST", path, **facts)
            assert (status, answer["error"]["code"]) == (422, code), answer
            assert answer["error"]["details"]["field"] == "webhook_url"
            assert answer["error"]["message"].startswith("webhook_url: ")
            assert "s3cret" not in str(answer)
    assert "s3cret" not in str(lines)
    assert await nothing_stored(edge)


async def test_a_url_is_judged_before_the_graph_is_looked_at(edge: Edge) -> None:
    body = {"workflow": "no-such-template", "webhook_url": "http://10.0.0.1/"}
    status, answer = await edge.call("POST", "/api/tasks", json=body)
    assert (status, answer["error"]["code"]) == (422, "blocked_address")


async def test_another_webhook_under_the_same_key_is_another_request(edge: Edge) -> None:
    async def sent(path: str, **facts: Any) -> int:
        status, _ = await edge.call("POST", path, headers={"Idempotency-Key": path}, **facts)
        return status

    for url, expected in ((URL, 202), (URL, 202), ("https://example.com/other", 422)):
        assert await sent("/api/tasks", json={"workflow": GRAPH, "webhook_url": url}) == expected
        assert await sent("/api/workflows/noise-image/run", params={"webhook_url": url}) == expected
