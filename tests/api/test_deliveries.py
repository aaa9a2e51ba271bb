"""What webhooks are owed, over HTTP: read, listed, owed once more."""

import dataclasses
import re
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it has no types

from comfyd.api.views import shown_url
from comfyd.config import Config, LimitsConfig
from comfyd.deliveries import DeliveryStatus, DeliveryTry
from tests.api.conftest import Edge, serving
from tests.support.values import GRAPH, artefact

URL = "https://example.com/hook?token=t0ken"
KEYS = ["id", "task_id", "type", "url", "status", "created_at", "next_at", "ended_at", "tries"]
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
UNKNOWN = "5e1f6c1e-0000-4000-8000-00000000dead"


async def ended(edge: Edge, **facts: Any) -> Any:
    """A task that has ended with one output, and owed its webhook that."""
    body = {"workflow": GRAPH, "webhook_url": URL, **facts}
    status, task = await edge.call("POST", "/api/tasks", json=body)
    assert status == 202, task
    await edge.succeed(await edge.claim(task["task_id"]), artefact(key=f"{task['task_id']}/1/2_0_a.png"))
    return task


async def listed(edge: Edge, **query: str) -> list[Any]:
    status, answer = await edge.call("GET", "/api/deliveries", params=query)
    assert status == 200, answer
    assert set(answer) == {"deliveries", "next_cursor"}
    deliveries: list[Any] = answer["deliveries"]
    return deliveries


async def tried(edge: Edge, delivery_id: str, becomes: DeliveryStatus, **facts: Any) -> None:
    """Play the deliverer: one try, and what follows from it."""
    now = edge.state.clock.now()
    made = DeliveryTry(number=1, at=now, duration_ms=12, **facts)
    next_at = now + 5_000 if becomes is DeliveryStatus.PENDING else None
    taken = await edge.state.store.delivery(delivery_id)
    assert taken is not None
    await edge.state.store.record_try(taken, made, becomes, next_at, now)


async def test_an_ended_task_owes_its_webhook_a_delivery(edge: Edge) -> None:
    task = await ended(edge)
    (delivery,) = await listed(edge)
    assert list(delivery) == KEYS
    assert delivery["task_id"] == task["task_id"]
    assert delivery["type"] == "task.completed"
    assert delivery["url"] == "https://example.com/hook?..."
    assert delivery["status"] == "pending"
    assert MOMENT.fullmatch(delivery["created_at"])
    assert MOMENT.fullmatch(delivery["next_at"])
    assert delivery["ended_at"] is None
    assert delivery["tries"] == []
    assert await edge.call("GET", f"/api/deliveries/{delivery['id']}") == (200, delivery)


async def test_each_try_is_shown(edge: Edge) -> None:
    await ended(edge)
    (delivery,) = await listed(edge)
    await tried(edge, delivery["id"], DeliveryStatus.PENDING, error="example.com does not answer")
    await tried(edge, delivery["id"], DeliveryStatus.FAILED, status=500, error="HTTP 500")
    _, read = await edge.call("GET", f"/api/deliveries/{delivery['id']}")
    assert (read["status"], read["next_at"]) == ("failed", None)
    assert MOMENT.fullmatch(read["ended_at"])
    first, second = read["tries"]
    assert MOMENT.fullmatch(first.pop("at"))
    assert first == {
        "number": 1,
        "duration_ms": 12,
        "status": None,
        "error": "example.com does not answer",
    }
    assert (second["number"], second["status"], second["error"]) == (2, 500, "HTTP 500")


async def test_a_task_names_the_list_of_its_deliveries(edge: Edge) -> None:
    wanted = await ended(edge, webhook_events=["task.output", "task.completed", "task.started"])
    await ended(edge)
    path = wanted["urls"]["deliveries"].removeprefix(edge.base)
    _, answer = await edge.call("GET", path)
    assert {delivery["task_id"] for delivery in answer["deliveries"]} == {wanted["task_id"]}
    types = [delivery["type"] for delivery in answer["deliveries"]]
    assert types == ["task.completed", "task.output", "task.started"], "newest first"


async def test_deliveries_are_listed_by_status(edge: Edge) -> None:
    for _ in range(4):
        await ended(edge)
    every = await listed(edge)
    for delivery, status in zip(every, DeliveryStatus, strict=True):
        if status is not DeliveryStatus.PENDING:
            await tried(edge, delivery["id"], status, status=200)
    for delivery, status in zip(every, DeliveryStatus, strict=True):
        for word in (status.value, status.value.upper()):
            (found,) = await listed(edge, status=word)
            assert (found["id"], found["status"]) == (delivery["id"], status.value)
    assert await listed(edge, status="gone", task_id=every[0]["task_id"]) == []


async def test_a_task_without_deliveries_has_an_empty_list(edge: Edge) -> None:
    await ended(edge)
    assert await listed(edge, task_id=UNKNOWN) == []


async def test_pages_hold_each_delivery_once_newest_first(config: Config) -> None:
    config = msgspec.structs.replace(config, limits=LimitsConfig(list_page=3))
    async with serving(config) as edge:
        tasks = [(await ended(edge))["task_id"] for _ in range(5)]
        found: list[str] = []
        query, pages = {"limit": "2"}, 0
        while query.get("cursor") is not None or pages == 0:
            _, answer = await edge.call("GET", "/api/deliveries", params=query)
            found += [delivery["task_id"] for delivery in answer["deliveries"]]
            query["cursor"], pages = answer["next_cursor"], pages + 1
            assert pages <= 3
        assert found == tasks[::-1]
        assert len(await listed(edge)) == 3, "no more than limits.list_page"


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("status=done", "status"),
        ("status=", "status"),
        ("task_id=1", "task_id"),
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("taskid=1", "taskid"),
        ("metadata[a]=b", "metadata[a]"),
        ("status=gone&status=failed", "status"),
    ],
)
async def test_wrong_parameters_are_400_and_named(edge: Edge, query: str, parameter: str) -> None:
    status, answer = await edge.call("GET", f"/api/deliveries?{query}")
    assert (status, answer["error"]["code"]) == (400, "invalid_request")
    assert answer["error"]["details"] == {"parameter": parameter}


async def test_a_foreign_cursor_is_400(edge: Edge) -> None:
    status, answer = await edge.call("GET", "/api/deliveries?cursor=nonsense")
    assert (status, answer["error"]["code"]) == (400, "invalid_cursor")


@pytest.mark.parametrize("status", [each for each in DeliveryStatus if each is not DeliveryStatus.PENDING])
async def test_a_delivery_is_owed_once_more_whatever_became_of_it(
    config: Config, status: DeliveryStatus
) -> None:
    calls: list[str] = []
    wired = {"wake_deliverer": lambda: calls.append("wake")}
    async with serving(config, state=lambda state: dataclasses.replace(state, **wired)) as edge:
        await ended(edge)
        (delivery,) = await listed(edge)
        await tried(edge, delivery["id"], status, status=404, error="HTTP 404")
        calls.clear()
        answered, again = await edge.call("POST", f"/api/deliveries/{delivery['id']}/redeliver")
        assert answered == 202
        assert again["id"] == delivery["id"]
        assert (again["status"], again["ended_at"]) == ("pending", None)
        assert MOMENT.fullmatch(again["next_at"])
        assert len(again["tries"]) == 1, "what was tried stays on record"
        assert calls == ["wake"]
        due = await edge.state.store.due_deliveries(edge.state.clock.now(), 10, ())
        assert [entry.id for entry in due.entries] == [delivery["id"]]


@pytest.mark.parametrize("wanted", ["msg_nothing", UNKNOWN, "a%00b", "%F0%9F%98%80", "x" * 500])
async def test_an_unknown_delivery_is_404(edge: Edge, wanted: str) -> None:
    for method, path in (("GET", ""), ("POST", "/redeliver")):
        status, answer = await edge.call(method, f"/api/deliveries/{wanted}{path}")
        assert (status, answer["error"]["code"]) == (404, "delivery_not_found")
        assert len(answer["error"]["message"]) < 250


async def test_deliveries_go_with_their_task(edge: Edge) -> None:
    task = await ended(edge)
    (delivery,) = await listed(edge)
    assert (await edge.call("DELETE", f"/api/tasks/{task['task_id']}"))[0] == 204
    status, _ = await edge.call("GET", f"/api/deliveries/{delivery['id']}")
    assert status == 404
    assert await listed(edge) == []


async def test_answers_are_what_the_document_says(edge: Edge) -> None:
    _, made = await edge.call("GET", "/openapi.json")
    await ended(edge)

    async def check(method: str, path: str, address: str) -> Any:
        status, answer = await edge.call(method, address)
        response = made["paths"][path][method.lower()]["responses"][str(status)]
        schema = response["content"]["application/json"]["schema"]
        Draft202012Validator({**schema, "components": made["components"]}).validate(answer)
        return answer

    (delivery,) = (await check("GET", "/api/deliveries", "/api/deliveries"))["deliveries"]
    own = f"/api/deliveries/{delivery['id']}"
    await tried(edge, delivery["id"], DeliveryStatus.GONE, status=410, error="HTTP 410")
    await check("GET", "/api/deliveries/{delivery_id}", own)
    await check("POST", "/api/deliveries/{delivery_id}/redeliver", f"{own}/redeliver")
    await check("GET", "/api/deliveries/{delivery_id}", "/api/deliveries/nothing")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://example.com/hook", "https://example.com/hook"),
        ("https://example.com/hook?", "https://example.com/hook?..."),
        ("https://example.com/hook?token=t0ken&a=b#part", "https://example.com/hook?..."),
        ("https://example.com/hook#part?x", "https://example.com/hook"),
        ("https://example.com?t0ken@x", "https://example.com?..."),
        ("https://user:t0ken@example.com/hook", "https://***@example.com/hook"),
    ],
)
def test_a_url_is_shown_without_what_may_be_secret(url: str, shown: str) -> None:
    assert shown_url(url) == shown
