"""Submitting, reading, listing, canceling, retrying and forgetting tasks over HTTP."""

import asyncio
import re
from typing import Any

import msgspec
import pytest

from comfyd.config import Config, LimitsConfig, ServerConfig
from comfyd.tasks import Status
from tests.api.conftest import Edge, serving
from tests.support.values import GRAPH, artefact

KEYS = {
    "task_id",
    "status",
    "workflow",
    "inputs",
    "priority",
    "created_at",
    "started_at",
    "completed_at",
    "cancel_requested",
    "queue_position",
    "eta_seconds",
    "progress",
    "outputs",
    "error",
    "attempts",
    "metadata",
    "urls",
}
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
UNKNOWN = "5e1f6c1e-0000-4000-8000-00000000dead"


async def submitted(edge: Edge, **facts: Any) -> Any:
    status, task = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH, **facts})
    assert status == 202, task
    return task


@pytest.mark.parametrize("path", ["/api/tasks", "/api/tasks/create"])
async def test_accepted_task_is_durable_and_has_every_key(edge: Edge, path: str) -> None:
    body = {"workflow": GRAPH, "priority": "high", "metadata": {"customer": "42"}, "inputs": {"1.width": 32}}
    async with edge.http.post(f"{edge.base}{path}", json=body) as response:
        task = await response.json()
        assert response.status == 202
        assert response.headers["Location"] == task["urls"]["self"]
        assert "Idempotent-Replayed" not in response.headers
    assert set(task) == KEYS
    assert task["status"] == "PENDING"
    assert task["priority"] == 10
    assert task["metadata"] == {"customer": "42"}
    assert task["inputs"] == {"1.width": 32}
    assert task["workflow"] is None
    assert task["queue_position"] == 1
    assert task["progress"]["value"] == 0
    assert task["progress"]["nodes_total"] == 2
    assert MOMENT.fullmatch(task["created_at"])
    assert task["started_at"] is None
    assert task["urls"] == {
        "self": f"{edge.base}/api/tasks/{task['task_id']}",
        "events": f"{edge.base}/api/tasks/{task['task_id']}/events",
        "ws": f"ws{edge.base[4:]}/api/tasks/{task['task_id']}/ws",
        "cancel": f"{edge.base}/api/tasks/{task['task_id']}/cancel",
        "retry": f"{edge.base}/api/tasks/{task['task_id']}/retry",
        "deliveries": f"{edge.base}/api/deliveries?task_id={task['task_id']}",
    }
    row = await edge.bench.task(task["task_id"])
    assert row.status is Status.QUEUED
    graph = await edge.state.store.graph(row.id)
    assert graph is not None
    assert graph["1"]["inputs"]["width"] == 32
    assert b"comfyd_tasks_submitted_total 1.0" in edge.state.metrics.render()[0]


async def test_options_of_the_body_reach_the_row(edge: Edge) -> None:
    task = await submitted(
        edge, max_attempts=7, timeout=1.5, start_timeout=60, priority=-3, output={"include_temp": True}
    )
    row = await edge.bench.task(task["task_id"])
    assert row.policy.max_attempts == 7
    assert row.policy.timeout_ms == 1500
    assert row.policy.start_timeout_ms == 60_000
    assert row.priority == -3
    assert row.output.include_temp


async def test_running_task_shows_its_progress_and_attempt(edge: Edge) -> None:
    task = await submitted(edge)
    claim = await edge.claim(task["task_id"])
    edge.report(task["task_id"], 0.25, nodes_done=1, current_node="2", current_node_class="SaveImage")
    _, read = await edge.call("GET", f"/api/tasks/{task['task_id']}")
    assert read["status"] == "PROCESSING"
    assert read["queue_position"] is None
    assert read["progress"] == {
        "value": 0.25,
        "nodes_done": 1,
        "nodes_total": 2,
        "current_node": "2",
        "current_node_class": "SaveImage",
        "step": None,
        "steps": None,
        "message": None,
    }
    (attempt,) = read["attempts"]
    assert attempt["id"] == claim.attempt.id
    assert attempt["number"] == 1
    assert attempt["ended_at"] is None
    assert attempt["outcome"] is None
    assert MOMENT.fullmatch(attempt["started_at"])


async def test_finished_task_is_whole_and_its_progress_is_one(edge: Edge) -> None:
    task = await submitted(edge)
    claim = await edge.claim(task["task_id"])
    stored = artefact(key=f"{task['task_id']}/1/2_0_a b.png", width=16, height=16)
    await edge.succeed(claim, stored)
    status, read = await edge.call("GET", f"/api/tasks/{task['task_id'].upper()}")
    assert status == 200
    assert read["status"] == "COMPLETED"
    assert read["progress"]["value"] == 1.0
    assert read["progress"]["nodes_done"] == read["progress"]["nodes_total"] == 2
    assert read["outputs"] == [
        {
            "node_id": "2",
            "name": "t_00001_.png",
            "type": "image",
            "content_type": "image/png",
            "size_bytes": 3,
            "sha256": "0" * 64,
            "width": 16,
            "height": 16,
            "duration": None,
            "url": f"{edge.base}/api/files/{task['task_id']}/1/2_0_a%20b.png",
            "storage": "local",
            "text": None,
            "data": None,
        }
    ]
    assert read["attempts"][0]["outcome"] == "succeeded"
    assert MOMENT.fullmatch(read["completed_at"])
    assert read["eta_seconds"] is None


async def test_failed_task_says_why_and_its_progress_is_not_known(edge: Edge) -> None:
    task = await submitted(edge)
    await edge.fail(await edge.claim(task["task_id"]))
    _, read = await edge.call("GET", f"/api/tasks/{task['task_id']}")
    assert read["status"] == "FAILED"
    assert read["error"] == {
        "code": "node_failed",
        "message": "KSampler: it broke",
        "details": {"node_id": "3"},
        "retryable": False,
    }
    assert read["attempts"][0]["error"]["code"] == "node_failed"
    assert read["progress"]["value"] is None
    assert read["progress"]["nodes_total"] == 2


async def test_unknown_task_is_404_on_every_route(edge: Edge) -> None:
    routes = [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("POST", "/retry"), ("GET", "/events")]
    for task_id in ("nothing", UNKNOWN, "{" + UNKNOWN + "}"):
        for method, suffix in routes:
            status, answer = await edge.call(method, f"/api/tasks/{task_id}{suffix}")
            assert (status, answer["error"]["code"]) == (404, "task_not_found"), (method, task_id, suffix)


async def test_long_poll_answers_as_soon_as_the_task_ends(edge: Edge) -> None:
    task = await submitted(edge)
    claim = await edge.claim(task["task_id"])
    waiting = asyncio.create_task(edge.call("GET", f"/api/tasks/{task['task_id']}?wait=15"))
    await edge.watched(task["task_id"])
    edge.report(task["task_id"], 0.5)
    await edge.succeed(claim)
    async with asyncio.timeout(5):
        status, read = await waiting
    assert status == 200
    assert read["status"] == "COMPLETED"
    assert edge.state.board.watchers == 0


async def test_long_poll_gives_the_task_as_it_is_when_the_time_is_up(edge: Edge) -> None:
    task = await submitted(edge)
    status, read = await edge.call("GET", f"/api/tasks/{task['task_id']}?wait=0.05")
    assert status == 200
    assert read["status"] == "PENDING"


async def test_long_poll_of_a_finished_task_does_not_wait(edge: Edge) -> None:
    task = await submitted(edge)
    await edge.succeed(await edge.claim(task["task_id"]))
    async with asyncio.timeout(5):
        _, read = await edge.call("GET", f"/api/tasks/{task['task_id']}?wait=15")
    assert read["status"] == "COMPLETED"


async def test_long_poll_is_404_when_the_task_is_forgotten_meanwhile(edge: Edge) -> None:
    task = await submitted(edge)
    waiting = asyncio.create_task(edge.call("GET", f"/api/tasks/{task['task_id']}?wait=15"))
    await edge.watched(task["task_id"])
    await edge.state.store.cancel(task["task_id"], edge.state.clock.now())
    await edge.state.store.delete(task["task_id"])
    edge.state.board.status(task["task_id"], Status.CANCELED)
    status, answer = await waiting
    assert status == 404
    assert answer["error"]["code"] == "task_not_found"


async def test_wait_is_cut_to_the_limit(config: Config) -> None:
    short = msgspec.structs.replace(config, limits=LimitsConfig(wait=0.05))
    async with serving(short) as edge:
        task = await submitted(edge)
        async with asyncio.timeout(5):
            status, _ = await edge.call("GET", f"/api/tasks/{task['task_id']}?wait=3600")
    assert status == 200


async def test_wait_that_is_no_time_is_refused(edge: Edge) -> None:
    task = await submitted(edge)
    for wait in ("soon", "-1", "nan", "inf", "1e999"):
        status, answer = await edge.call("GET", f"/api/tasks/{task['task_id']}?wait={wait}")
        assert (status, answer["error"]["details"]) == (400, {"parameter": "wait"}), wait


async def test_prefer_wait_answers_200_with_the_finished_task(edge: Edge) -> None:
    async def post() -> tuple[int, str | None, Any]:
        headers = {"Prefer": "respond-async, wait=15"}
        async with edge.http.post(f"{edge.base}/api/tasks", json={"workflow": GRAPH}, headers=headers) as got:
            return got.status, got.headers.get("Preference-Applied"), await got.json()

    posting = asyncio.create_task(post())
    await until_tasks(edge, 1)
    (queued,) = (await edge.call("GET", "/api/tasks"))[1]["tasks"]
    await edge.watched(queued["task_id"])
    await edge.succeed(await edge.claim(queued["task_id"]))
    status, applied, task = await posting
    assert (status, applied, task["status"]) == (200, "wait=15", "COMPLETED")


async def until_tasks(edge: Edge, count: int) -> None:
    async with asyncio.timeout(10):
        while sum((await edge.state.store.counts()).values()) < count:
            await asyncio.sleep(0.005)


async def test_prefer_wait_answers_202_when_the_time_is_up(edge: Edge) -> None:
    status, task = await edge.call("POST", "/api/tasks?wait=0.05", json={"workflow": GRAPH})
    assert status == 202
    assert task["status"] == "PENDING"


async def test_malformed_preference_is_ignored(edge: Edge) -> None:
    headers = {"Prefer": "wait=soon"}
    status, _ = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH}, headers=headers)
    assert status == 202


async def test_client_that_leaves_frees_its_watcher_at_once(edge: Edge) -> None:
    task = await submitted(edge)
    waiting = asyncio.create_task(edge.call("GET", f"/api/tasks/{task['task_id']}?wait=15"))
    await edge.watched(task["task_id"])
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(5):
        while edge.state.board.watchers:
            await asyncio.sleep(0.005)


async def test_stop_ends_what_waits(edge: Edge) -> None:
    task = await submitted(edge)
    waiting = asyncio.create_task(edge.call("GET", f"/api/tasks/{task['task_id']}?wait=15"))
    await edge.watched(task["task_id"])
    edge.state.closing.set()
    async with asyncio.timeout(5):
        status, read = await waiting
    assert (status, read["status"]) == (200, "PENDING")


async def test_same_key_and_body_is_one_task(edge: Edge) -> None:
    headers = {"Idempotency-Key": "order 42"}
    first = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH}, headers=headers)
    async with edge.http.post(
        f"{edge.base}/api/tasks/create", json={"workflow": GRAPH}, headers=headers
    ) as response:
        second = await response.json()
        assert response.status == 202
        assert response.headers["Idempotent-Replayed"] == "true"
    assert second["task_id"] == first[1]["task_id"]
    assert sum((await edge.state.store.counts()).values()) == 1
    assert b"comfyd_tasks_submitted_total 1.0" in edge.state.metrics.render()[0]


async def test_same_key_in_parallel_is_one_task(edge: Edge) -> None:
    headers = {"Idempotency-Key": "race"}
    answers = await asyncio.gather(
        *(edge.call("POST", "/api/tasks", json={"workflow": GRAPH}, headers=headers) for _ in range(8))
    )
    assert {status for status, _ in answers} == {202}
    assert len({task["task_id"] for _, task in answers}) == 1


async def test_replay_comes_before_validation(config: Config) -> None:
    """What was right when it was sent is answered, whatever the limits have become since."""
    headers = {"Idempotency-Key": "k"}
    async with serving(config) as edge:
        _, first = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH}, headers=headers)
        await edge.succeed(await edge.claim(first["task_id"]))
    stricter = msgspec.structs.replace(config, limits=LimitsConfig(nodes=1))
    async with serving(stricter) as edge:
        status, _ = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH})
        assert status == 422
        status, again = await edge.call(
            "POST", "/api/tasks?wait=1", json={"workflow": GRAPH}, headers=headers
        )
    assert status == 200
    assert again["task_id"] == first["task_id"]
    assert again["status"] == "COMPLETED"


async def test_same_key_with_another_body_is_422(edge: Edge) -> None:
    headers = {"Idempotency-Key": "k"}
    await edge.call("POST", "/api/tasks", json={"workflow": GRAPH}, headers=headers)
    status, answer = await edge.call(
        "POST", "/api/tasks", json={"workflow": GRAPH, "priority": 1}, headers=headers
    )
    assert status == 422
    assert answer["error"]["code"] == "idempotency_key_reuse"


async def test_malformed_idempotency_key_is_400(edge: Edge) -> None:
    for key in ("", "x" * 256, "caf\u00e9", "tab\tkey"):
        headers = {"Idempotency-Key": key}
        status, answer = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH}, headers=headers)
        assert (status, answer["error"]["details"]) == (400, {"header": "Idempotency-Key"}), key


async def test_list_pages_newest_first_and_filters(edge: Edge) -> None:
    made = [await submitted(edge, metadata={"n": str(number)}) for number in range(3)]
    await edge.succeed(await edge.claim(made[0]["task_id"]))
    _, first = await edge.call("GET", "/api/tasks?limit=2")
    assert [task["task_id"] for task in first["tasks"]] == [made[2]["task_id"], made[1]["task_id"]]
    assert set(first["tasks"][0]) == KEYS
    _, rest = await edge.call("GET", f"/api/tasks?limit=2&cursor={first['next_cursor']}")
    assert [task["task_id"] for task in rest["tasks"]] == [made[0]["task_id"]]
    assert rest["next_cursor"] is None
    _, done = await edge.call("GET", "/api/tasks?status=completed")
    assert [task["task_id"] for task in done["tasks"]] == [made[0]["task_id"]]
    _, second = await edge.call("GET", "/api/tasks?metadata[n]=1")
    assert [task["task_id"] for task in second["tasks"]] == [made[1]["task_id"]]
    _, none = await edge.call("GET", "/api/tasks?workflow=other")
    assert none == {"tasks": [], "next_cursor": None}


async def test_list_refuses_what_it_does_not_understand(edge: Edge) -> None:
    long_key = "metadata[" + "k" * 65 + "]"
    wrong = {
        "status=queued": "status",
        "limit=0": "limit",
        "limit=101": "limit",
        "limit=many": "limit",
        "metadata[]=x": "metadata[]",
        f"{long_key}=x": long_key,
        f"metadata[k]={'v' * 513}": "metadata[k]",
        "&".join(f"metadata[{n}]=x" for n in range(17)): "metadata",
    }
    for query, parameter in wrong.items():
        status, answer = await edge.call("GET", f"/api/tasks?{query}")
        assert (status, answer["error"]["details"]) == (400, {"parameter": parameter}), query


async def test_foreign_cursor_is_400(edge: Edge) -> None:
    status, answer = await edge.call("GET", "/api/tasks?cursor=%00nonsense")
    assert status == 400
    assert answer["error"]["code"] == "invalid_cursor"


async def test_cancel_ends_a_waiting_task_at_once(edge: Edge) -> None:
    task = await submitted(edge)
    status, canceled = await edge.call("POST", f"/api/tasks/{task['task_id']}/cancel")
    assert status == 200
    assert canceled["status"] == "CANCELED"
    assert canceled["cancel_requested"] is True
    again, _ = await edge.call("POST", f"/api/tasks/{task['task_id']}/cancel")
    assert again == 200


async def test_cancel_of_a_running_task_is_a_request(edge: Edge) -> None:
    task = await submitted(edge)
    await edge.claim(task["task_id"])
    status, canceled = await edge.call("POST", f"/api/tasks/{task['task_id']}/cancel")
    assert status == 200
    assert canceled["status"] == "PROCESSING"
    assert canceled["cancel_requested"] is True


async def test_retry_queues_an_ended_task_again_and_refuses_a_live_one(edge: Edge) -> None:
    task = await submitted(edge)
    status, answer = await edge.call("POST", f"/api/tasks/{task['task_id']}/retry")
    assert status == 409
    assert answer["error"]["code"] == "conflict"
    assert answer["error"]["details"]["status"] == "PENDING"
    await edge.fail(await edge.claim(task["task_id"]))
    async with edge.http.post(f"{edge.base}/api/tasks/{task['task_id']}/retry") as response:
        again = await response.json()
        assert response.status == 202
        assert response.headers["Location"] == task["urls"]["self"]
    assert again["status"] == "PENDING"
    assert again["error"] is None
    assert len(again["attempts"]) == 1


async def test_delete_forgets_an_ended_task_and_refuses_a_live_one(edge: Edge) -> None:
    task = await submitted(edge)
    status, _ = await edge.call("DELETE", f"/api/tasks/{task['task_id']}")
    assert status == 409
    await edge.call("POST", f"/api/tasks/{task['task_id']}/cancel")
    assert await edge.call("DELETE", f"/api/tasks/{task['task_id']}") == (204, None)
    status, _ = await edge.call("GET", f"/api/tasks/{task['task_id']}")
    assert status == 404


async def test_full_queue_is_429_with_retry_after(config: Config) -> None:
    small = msgspec.structs.replace(config, limits=LimitsConfig(queued_tasks=1))
    async with serving(small) as edge:
        await submitted(edge)
        async with edge.http.post(f"{edge.base}/api/tasks", json={"workflow": GRAPH}) as response:
            assert response.status == 429
            assert int(response.headers["Retry-After"]) > 0
            assert (await response.json())["error"]["code"] == "queue_full"


async def test_urls_are_those_of_the_public_address(config: Config) -> None:
    public = msgspec.structs.replace(config, server=ServerConfig(public_url="https://comfy.example/x/"))
    async with serving(public) as edge:
        task = await submitted(edge)
    assert task["urls"]["self"] == f"https://comfy.example/x/api/tasks/{task['task_id']}"
    assert task["urls"]["ws"].startswith("wss://comfy.example/x/api/tasks/")


async def test_host_header_that_is_none_is_not_repeated(edge: Edge) -> None:
    headers = {"Host": 'evil"><script>'}
    _, task = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH}, headers=headers)
    assert task["urls"]["self"].startswith(f"{edge.base}/api/")


@pytest.mark.parametrize("query", ["bogus=1", "metadata=x", "metadata[a=x", "status=FAILED&status=COMPLETED"])
async def test_a_filter_that_would_not_filter_is_refused(edge: Edge, query: str) -> None:
    status, answer = await edge.call("GET", f"/api/tasks?{query}")
    assert (status, answer["error"]["code"]) == (400, "invalid_request")
    assert "parameter" in answer["error"]["details"]


async def test_a_graph_under_comfyuis_own_name_is_pointed_to_ours(edge: Edge) -> None:
    status, answer = await edge.call("POST", "/api/tasks", json={"workflow": "x", "prompt": {}})
    assert status == 400
    assert "`workflow`" in answer["error"]["message"]


async def test_canceling_a_waiting_task_is_counted_once(edge: Edge) -> None:
    task = await submitted(edge)
    for _ in range(2):
        await edge.call("POST", f"/api/tasks/{task['task_id']}/cancel")
    registry = edge.state.metrics.registry
    assert registry.get_sample_value("comfyd_tasks_finished_total", {"status": "canceled"}) == 1
