"""What is wrong with a submission has the contract's own code, and makes no job."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec

from comfyd.config import Config, LimitsConfig
from comfyd.tasks import Status
from tests.api.conftest import Edge, serving
from tests.support.comfy_v2 import check_error, check_job
from tests.support.values import GRAPH

JOBS = "/api/v2/jobs"
UI = {"nodes": [], "links": [], "last_node_id": 0}


async def refused(edge: Edge, body: Any, **facts: Any) -> tuple[int, str, str]:
    """Status, code and message; nothing was made."""
    status, answer = await edge.call("POST", JOBS, json=body, **facts)
    assert (await edge.state.store.counts())[Status.QUEUED] == 0
    return status, *check_error(answer)


WRONG: Final[list[tuple[Any, ...]]] = [
    ({}, 422, "invalid_workflow"),
    ({"workflow": None}, 422, "invalid_workflow"),
    ({"workflow": []}, 422, "invalid_workflow"),
    ({"workflow": "text-to-image"}, 422, "invalid_workflow"),
    ({"workflow": {}}, 422, "invalid_workflow"),
    ({"workflow": {"1": {"inputs": {}}}}, 422, "invalid_workflow"),
    ({"workflow": UI}, 422, "workflow_format_ui"),
    ({"workflow": GRAPH, "template": "text-to-image"}, 422, "invalid_request"),
    ({"template": "nothing"}, 422, "invalid_workflow"),
    ({"template": 1}, 422, "invalid_request"),
    ({"template": ""}, 422, "invalid_request"),
    ({"template": "text-to-image", "inputs": {"nothing": 1}}, 422, "invalid_inputs"),
    ({"workflow": GRAPH, "inputs": {"9.nothing": 1}}, 422, "invalid_inputs"),
    ({"workflow": GRAPH, "inputs": []}, 422, "invalid_request"),
    ({"workflow": GRAPH, "priority": "urgent"}, 422, "invalid_request"),
    ({"workflow": GRAPH, "priority": 1001}, 422, "invalid_request"),
    ({"workflow": GRAPH, "priority": None}, 422, "invalid_request"),
    ({"workflow": GRAPH, "webhook_url": 1}, 422, "invalid_request"),
    ({"workflow": GRAPH, "webhook_url": "ftp://h/x"}, 422, "invalid_url"),
    ({"workflow": GRAPH, "webhook_url": "http://127.0.0.1/"}, 422, "blocked_address"),
    ({"workflow": GRAPH, "extra_data": {"x": "y"}}, 400, "invalid_request"),
    ({"workflow": GRAPH, "extra_data": {"api_key_comfy_org": 1}}, 400, "invalid_request"),
    ({"workflow": GRAPH, "extra_data": {"api_key_comfy_org": None}}, 400, "invalid_request"),
    ({"workflow": GRAPH, "extra_data": {"api_key_comfy_org": ""}}, 400, "invalid_request"),
    ({"workflow": GRAPH, "extra_data": {"api_key_comfy_org": "a\nb"}}, 400, "invalid_request"),
    ({"workflow": GRAPH, "extra_data": None}, 400, "invalid_request"),
    ({"workflow": GRAPH, "extra_data": []}, 400, "invalid_request"),
    ([], 400, "invalid_request"),
    ("x", 400, "invalid_request"),
    (None, 400, "invalid_request"),
]


async def test_wrong_fields_have_the_codes_of_the_contract(edge: Edge) -> None:
    for body, status, code in WRONG:
        assert (await refused(edge, body))[:2] == (status, code), body


BAD_LABELS: Final[list[tuple[Any, ...]]] = [
    ("x", "object"),
    (["x"], "object"),
    (None, "object"),
    ({str(number): "" for number in range(17)}, "17"),
    ({"": "x"}, "''"),
    ({"k" * 41: "x"}, "k" * 40),
    ({"a b": "x"}, "'a b'"),
    ({"ключ": "x"}, "ключ"),
    ({"key": 1}, "'key'"),
    ({"key": None}, "'key'"),
    ({"key": "é" * 129}, "'key'"),
    ({"key": "a\nb"}, "'key'"),
    ({"key": "a\x85b"}, "'key'"),
    ({"key": "a\u202eb"}, "'key'"),
    ({"key": "a\u2066b"}, "'key'"),
]


async def test_bad_labels_are_named(edge: Edge) -> None:
    for labels, named in BAD_LABELS:
        status, code, message = await refused(edge, {"workflow": GRAPH, "metadata": labels})
        assert (status, code) == (422, "metadata_invalid"), labels
        assert named in message


async def test_extra_data_that_is_wrong_is_not_repeated(edge: Edge) -> None:
    secret = "comfyui-" + "0123456789abcdef"
    wrong = [{secret: 1}, {secret + "x" * 9000: secret}, {"api_key_comfy_org": [secret]}, [secret], secret]
    wrong += [{"api_key_comfy_org": secret + "\n"}, {"api_key_comfy_org": secret * 1000}]
    for extra_data in wrong:
        async with edge.http.post(
            f"{edge.base}{JOBS}", json={"workflow": GRAPH, "extra_data": extra_data}
        ) as response:
            body = await response.text()
            assert (response.status, secret in body, len(body) < 300) == (400, False, True), body


async def test_labels_of_the_largest_size_are_kept(edge: Edge) -> None:
    labels = {f"{number:02}" + "k" * 38: "é" * 128 for number in range(16)}
    status, job = await edge.call("POST", JOBS, json={"workflow": GRAPH, "metadata": labels})
    assert (status, check_job(job)["metadata"]) == (201, labels)


NO_JSON: Final[list[tuple[Any, ...]]] = [
    (b"", "application/json"),
    (b"{", "application/json"),
    (b'{"workflow": NaN}', "application/json"),
    (b'{"workflow": {}}', "text/plain"),
    (b"a=b", "application/x-www-form-urlencoded"),
    (b"\xff\xfe{\x00", "application/json"),
]


async def test_what_is_no_json_is_400(edge: Edge) -> None:
    for content, kind in NO_JSON:
        status, answer = await edge.call("POST", JOBS, data=content, headers={"Content-Type": kind})
        assert (status, check_error(answer)[0]) == (400, "invalid_request"), content


async def test_unknown_fields_are_ignored(edge: Edge) -> None:
    body = {"workflow": GRAPH, "client_id": "x", "prompt": {}, "template": None, "webhook_url": None}
    status, job = await edge.call("POST", JOBS, json=body)
    assert (status, check_job(job)["status"]) == (201, "queued")


async def test_template_with_inputs_stands_for_a_graph(edge: Edge) -> None:
    body = {"template": "noise-image", "priority": "high", "workflow": None}
    status, job = await edge.call("POST", JOBS, json=body)
    assert (status, check_job(job)["priority"]) == (201, 10)
    _, task = await edge.call("GET", f"/api/tasks/{job['id']}")
    assert (task["workflow"], task["priority"]) == ("noise-image", 10)


async def test_webhook_is_told_of_the_end(edge: Edge) -> None:
    body = {"workflow": GRAPH, "webhook_url": "https://8.8.8.8/hook"}
    _, job = await edge.call("POST", JOBS, json=body)
    webhook = (await edge.bench.task(job["id"])).webhook
    assert webhook is not None
    assert webhook.url == "https://8.8.8.8/hook"


async def submit(edge: Edge, key: str, body: Any = None, path: str = JOBS) -> tuple[int, str | None]:
    headers = {"Idempotency-Key": key}
    wanted = {"workflow": GRAPH} if body is None else body
    status, answer = await edge.call("POST", path, json=wanted, headers=headers)
    return status, (answer["error"] or {}).get("code")


async def test_key_is_good_for_one_job(edge: Edge) -> None:
    assert await submit(edge, "k") == (201, None)
    bodies: tuple[Any, ...] = ({"workflow": GRAPH}, {"workflow": GRAPH, "priority": 1}, {"workflow": {}}, [])
    for body in bodies:
        assert await submit(edge, "k", body) == (422, "idempotency_key_reuse")
    assert (await edge.state.store.counts())[Status.QUEUED] == 1


async def test_key_of_either_face_is_used_on_both(edge: Edge) -> None:
    assert await submit(edge, "a", path="/api/tasks") == (202, None)
    assert await submit(edge, "a") == (422, "idempotency_key_reuse")
    assert await submit(edge, "b") == (201, None)
    assert await submit(edge, "b", path="/api/tasks") == (422, "idempotency_key_reuse")


async def test_key_of_a_refused_submission_is_free_again(edge: Edge) -> None:
    assert await submit(edge, "k", {"workflow": {}}) == (422, "invalid_workflow")
    assert await submit(edge, "k", {"template": "nothing"}) == (422, "invalid_workflow")
    assert await submit(edge, "k") == (201, None)


async def test_of_many_at_once_with_one_key_one_makes_a_job(edge: Edge) -> None:
    answers = await asyncio.gather(*(submit(edge, "k") for _ in range(12)))
    assert sorted(answers, key=str) == sorted([(201, None), *[(422, "idempotency_key_reuse")] * 11], key=str)
    assert (await edge.state.store.counts())[Status.QUEUED] == 1


async def test_bad_key_is_400(edge: Edge) -> None:
    for key in ("", "x" * 256):
        assert await submit(edge, key) == (400, "invalid_request")


async def test_full_queue_says_when_to_come_again_and_frees_the_key(config: Config) -> None:
    full = msgspec.structs.replace(config, limits=LimitsConfig(queued_tasks=1))
    async with serving(full) as edge:
        assert await submit(edge, "first") == (201, None)
        body: dict[str, Any] = {"workflow": GRAPH}
        headers = {"Idempotency-Key": "second"}
        async with edge.http.post(f"{edge.base}{JOBS}", json=body, headers=headers) as response:
            assert response.status == 429
            assert int(response.headers["Retry-After"]) > 0
            assert check_error(await response.json())[0] == "queue_full"
        (first,) = (await edge.call("GET", JOBS))[1]["jobs"]
        await edge.call("POST", f"{JOBS}/{first['id']}/cancel")
        assert await submit(edge, "second") == (201, None)


async def test_body_that_is_too_large_is_413(config: Config) -> None:
    small = msgspec.structs.replace(config, limits=LimitsConfig(body_bytes=1024))

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b" " * 500

    async with serving(small) as edge:
        for body in (b"{" + b" " * 2000, endless()):
            headers = {"Content-Type": "application/json"}
            status, answer = await edge.call("POST", JOBS, data=body, headers=headers)
            assert (status, check_error(answer)[0]) == (413, "payload_too_large")
