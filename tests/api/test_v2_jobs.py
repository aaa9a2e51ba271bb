"""Jobs are tasks in the words of the official contract, in every state that a task can be in."""

import asyncio
import dataclasses
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from comfyd.api.links import Link, Links
from comfyd.api.state import State
from comfyd.api.v2.jobs import has_its_turn, is_new
from comfyd.config import Config, ServerConfig
from comfyd.signing import KEY_BYTES, Signer
from comfyd.tasks import Artefact, OutputType, Settlement, Status, Step, TaskError
from tests.api.conftest import GONE, Edge, serving
from tests.support.comfy_v2 import check, check_error, check_job
from tests.support.service import configuration
from tests.support.values import GRAPH, artefact, task

JOBS = "/api/v2/jobs"
UNKNOWN = "5e1f6c1e-0000-4000-8000-00000000dead"
HOUR = 3_600_000
KEYS = {
    "id",
    "status",
    "created_at",
    "started_at",
    "completed_at",
    "expires_at",
    "queue_position",
    "progress",
    "outputs",
    "error",
    "metrics",
    "metadata",
    "priority",
    "urls",
}


async def submitted(edge: Edge, **facts: Any) -> Any:
    status, job = await edge.call("POST", JOBS, json={"workflow": GRAPH, **facts})
    assert status == 201
    return check_job(job)


async def read(edge: Edge, job_id: str) -> Any:
    status, job = await edge.call("GET", f"{JOBS}/{job_id}")
    assert status == 200
    assert set(job) == KEYS
    return check_job(job)


def picture(job_id: str, **facts: Any) -> Artefact:
    return artefact(key=f"{job_id}/1/2_0_x.png", blake3="b" * 64, width=3, height=4, **facts)


async def test_queued_job_says_where_it_stands(edge: Edge) -> None:
    await submitted(edge)
    job = await submitted(edge, priority="low", metadata={"a.b-c_d": "é"})
    again = await read(edge, job["id"])
    assert {**again, "expires_at": job["expires_at"]} == job
    assert job["status"] == "queued"
    assert (job["queue_position"], job["priority"], job["metadata"]) == (2, -10, {"a.b-c_d": "é"})
    assert job["progress"]["value"] == 0
    assert (job["progress"]["nodes_done"], job["progress"]["nodes_total"]) == (0, 2)
    assert (job["started_at"], job["completed_at"], job["error"], job["outputs"]) == (None, None, None, [])
    assert job["metrics"] == {"queue_ms": None, "execution_ms": None}
    assert job["created_at"].endswith("Z")


async def test_job_is_a_task_and_a_task_is_a_job(edge: Edge) -> None:
    job = await submitted(edge, priority=7)
    status, task = await edge.call("GET", f"/api/tasks/{job['id']}")
    assert (status, task["status"], task["priority"]) == (200, "PENDING", 7)
    _, other = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH})
    assert (await read(edge, other["task_id"]))["status"] == "queued"


async def test_job_that_waits_for_another_attempt_is_queued(edge: Edge) -> None:
    job = await submitted(edge)
    claim = await edge.claim(job["id"])
    error = TaskError(code="backend_error", message="ComfyUI was busy", retryable=True)
    later = edge.state.clock.now() + HOUR
    await edge.settle(
        claim,
        Settlement(status=Status.QUEUED, outcome="failed", available_at=later, error=error, failures=1),
    )
    again = await read(edge, job["id"])
    assert (again["status"], again["error"], again["progress"]["value"]) == ("queued", None, 0)
    assert again["queue_position"] == 1


async def test_running_job_says_how_far_it_is(edge: Edge) -> None:
    job = await submitted(edge)
    await edge.claim(job["id"])
    running = await read(edge, job["id"])
    assert (running["status"], running["progress"]["value"], running["queue_position"]) == (
        "running",
        0,
        None,
    )
    edge.report(
        job["id"], 0.5, nodes_done=1, current_node="2", current_node_class="SaveImage", step=3, steps=20
    )
    running = await read(edge, job["id"])
    assert running["started_at"] is not None
    assert running["progress"] == {
        "value": 0.5,
        "nodes_done": 1,
        "nodes_total": 2,
        "current_node": "2",
        "current_node_class": "SaveImage",
        "step": 3,
        "steps": 20,
        "message": None,
    }


async def test_first_look_at_a_new_job_waits_for_its_end(edge: Edge) -> None:
    job = await submitted(edge)
    looking = asyncio.ensure_future(read(edge, job["id"]))
    await edge.watched(job["id"])
    await edge.succeed(await edge.claim(job["id"]), picture(job["id"]))
    assert (await looking)["status"] == "succeeded"


@pytest.mark.parametrize(
    ("age", "new"),
    [
        (0, True),
        (499, True),
        (500, False),
        (-1, False),  # the clock was set back
    ],
)
def test_only_a_job_of_this_moment_is_new(age: int, new: bool) -> None:
    assert is_new(task(created_at=10_000), 10_000 + age) is new


async def test_job_is_waited_for_only_where_its_turn_has_come(edge: Edge) -> None:
    first, second = await submitted(edge), await submitted(edge)
    row = await edge.state.store.get(second["id"])
    assert row is not None
    assert not await has_its_turn(edge.state, row)
    await edge.succeed(await edge.claim(first["id"]))
    assert await has_its_turn(edge.state, row)
    claim = await edge.claim(second["id"])
    assert await has_its_turn(edge.state, claim.task)
    assert not await has_its_turn(edge.state, await edge.succeed(claim))


async def test_outputs_appear_while_the_job_runs(edge: Edge) -> None:
    job = await submitted(edge)
    await edge.claim(job["id"])
    stored = picture(job["id"])
    edge.state.board.stored(job["id"], stored)
    running = await read(edge, job["id"])
    (output,) = running["outputs"]
    assert running["status"] == "running"
    assert output == {
        "node_id": "2",
        "name": "t_00001_.png",
        "type": "image",
        "content_type": "image/png",
        "size_bytes": 3,
        "id": stored.id,
        "hash": f"blake3:{'b' * 64}",
        "url": f"{edge.base}/api/files/{job['id']}/1/2_0_x.png",
        "url_expires_at": running["expires_at"],
        "job_id": job["id"],
        "sha256": "0" * 64,
        "width": 3,
        "height": 4,
    }


async def test_succeeded_job_keeps_every_kind_of_output(edge: Edge) -> None:
    job = await submitted(edge)
    claim = await edge.claim(job["id"])
    kinds = [
        picture(job["id"]),
        artefact(key="t/1/2_1_x.mp4", index=1, type=OutputType.VIDEO, duration=1.5),
        artefact(key="t/1/2_2_x.txt", index=2, type=OutputType.TEXT, text="hello"),
        artefact(key="t/1/2_3_x.glb", index=3, type=OutputType.FILE),
        artefact(key="t/1/2_4_x.latent", index=4, type=OutputType.LATENT),
        artefact(key="t/1/2_5_x.flac", index=5, type=OutputType.AUDIO),
    ]
    now = edge.state.clock.now()
    for step in (Step.SUBMITTING, Step.SUBMITTED, Step.COLLECTED):
        attempt = msgspec.structs.replace(
            claim.attempt,
            step=step,
            intent_at=now,
            backend="b",
            client_id="c",
            accepted_at=now,
            seen_running_at=now + 40,
            executed_at=now + 140,
            execution_ms=100,
        )
        await edge.state.store.record(attempt)
    await edge.succeed(claim, *kinds)
    done = await read(edge, job["id"])
    assert (done["status"], done["error"], done["queue_position"]) == ("succeeded", None, None)
    assert (done["progress"]["value"], done["progress"]["nodes_done"]) == (1, 2)
    assert [output["type"] for output in done["outputs"]] == [
        "image",
        "video",
        "text",
        "file",
        "latent",
        "audio",
    ]
    assert [output.get("hash") for output in done["outputs"][:2]] == [f"blake3:{'b' * 64}", None]
    assert (done["outputs"][1]["duration"], done["outputs"][2]["text"]) == (1.5, "hello")
    assert "duration" not in done["outputs"][0]
    created = (await edge.bench.task(job["id"])).created_at
    assert done["metrics"] == {"queue_ms": now + 40 - created, "execution_ms": 100}


async def test_queue_time_is_reckoned_back_where_no_start_was_seen(edge: Edge) -> None:
    job = await submitted(edge)
    claim = await edge.claim(job["id"])
    now = edge.state.clock.now() + 500
    facts: dict[str, Any] = {"intent_at": now, "backend": "b", "client_id": "c", "accepted_at": now}
    for step in (Step.SUBMITTING, Step.SUBMITTED, Step.COLLECTED):
        attempt = msgspec.structs.replace(
            claim.attempt, step=step, executed_at=now, execution_ms=100, **facts
        )
        await edge.state.store.record(attempt)
    await edge.succeed(claim)
    created = (await edge.bench.task(job["id"])).created_at
    assert (await read(edge, job["id"]))["metrics"] == {
        "queue_ms": now - 100 - created,
        "execution_ms": 100,
    }


async def test_job_that_a_node_failed_names_the_node(edge: Edge) -> None:
    job = await submitted(edge)
    claim = await edge.claim(job["id"])
    error = TaskError(
        code="execution_error",
        message="node 3 (KSampler): it broke",
        details={"node_id": "3", "class_type": "KSampler", "title": None},
    )
    await edge.settle(claim, Settlement(status=Status.FAILED, outcome="failed", error=error, failures=1))
    failed = await read(edge, job["id"])
    assert (failed["status"], failed["progress"]) == ("failed", None)
    assert failed["error"] == {
        "code": "node_execution_error",
        "message": "node 3 (KSampler): it broke",
        "node_id": "3",
        "class_type": "KSampler",
        "traceback": None,
    }
    assert failed["completed_at"] is not None


async def test_job_that_failed_otherwise_keeps_the_code(edge: Edge) -> None:
    for code, details in (("execution_error", {}), ("stalled", {"node_id": 3})):
        job = await submitted(edge)
        error = TaskError(code=code, message="it broke", details=details)
        await edge.settle(
            await edge.claim(job["id"]),
            Settlement(status=Status.FAILED, outcome="failed", error=error, failures=1),
        )
        failed = await read(edge, job["id"])
        assert (failed["error"]["code"], failed["error"]["node_id"]) == (code, None)


async def test_cancel_of_a_queued_job_ends_it(edge: Edge) -> None:
    job = await submitted(edge)
    for _ in range(2):
        status, canceled = await edge.call("POST", job["urls"]["cancel"])
        check_job(canceled)
        assert (status, canceled["status"], canceled["progress"]) == (200, "canceled", None)
        assert canceled["error"]["code"] == "canceled"
    assert (await read(edge, job["id"]))["status"] == "canceled"


async def test_cancel_of_a_running_job_takes_its_time(edge: Edge) -> None:
    job = await submitted(edge)
    claim = await edge.claim(job["id"])
    status, canceling = await edge.call("POST", job["urls"]["cancel"])
    check_job(canceling)
    assert (status, canceling["status"], canceling["error"]) == (200, "canceling", None)
    assert (await read(edge, job["id"]))["status"] == "canceling"
    await edge.settle(claim, Settlement(status=Status.CANCELED, outcome="canceled"))
    canceled = await read(edge, job["id"])
    assert (canceled["status"], canceled["error"]["code"]) == ("canceled", "canceled")


async def test_cancel_of_an_ended_job_changes_nothing(edge: Edge) -> None:
    job = await submitted(edge)
    await edge.succeed(await edge.claim(job["id"]), picture(job["id"]))
    done = await read(edge, job["id"])
    assert await edge.call("POST", job["urls"]["cancel"]) == (200, done)


async def test_workflow_is_the_graph_that_is_run(edge: Edge) -> None:
    facts = {"inputs": {"1.width": 32}, "extra_data": {"api_key_comfy_org": "canary"}}
    job = await submitted(edge, **facts)
    status, answer = await edge.call("GET", f"{JOBS}/{job['id']}/workflow")
    check("JobWorkflowResponse", answer)
    assert (status, answer["format"], set(answer)) == (200, "api", {"workflow", "format"})
    assert answer["workflow"]["1"]["inputs"]["width"] == 32
    assert "canary" not in str(answer)


@pytest.mark.parametrize("wrong", [UNKNOWN, "nothing", "..%2f..", "5E1F6C1E", "%00"])
async def test_what_is_no_job_is_not_found(edge: Edge, wrong: str) -> None:
    for method, path in (("GET", ""), ("GET", "/workflow"), ("GET", "/events"), ("POST", "/cancel")):
        status, answer = await edge.call(method, f"{JOBS}/{wrong}{path}")
        assert (status, check_error(answer)[0]) == (404, "not_found"), path


async def test_id_in_large_letters_is_the_same_id(edge: Edge) -> None:
    job = await submitted(edge)
    assert (await read(edge, job["id"].upper()))["id"] == job["id"]


async def test_job_is_kept_as_long_as_is_configured(edge: Edge, config: Config) -> None:
    job = await submitted(edge)
    row = await edge.bench.task(job["id"])
    created = datetime.fromisoformat(job["created_at"])
    expires = datetime.fromisoformat(job["expires_at"])
    kept = round((expires - created).total_seconds())
    assert abs(kept - config.queue.retention) <= 60
    assert row.status is Status.QUEUED


async def test_job_that_is_kept_for_ever_expires_in_a_hundred_years(tmp_path: Path) -> None:
    async with serving(configuration(tmp_path / "data", GONE, retention=0.0)) as edge:
        job = await submitted(edge)
        await edge.succeed(await edge.claim(job["id"]), picture(job["id"]))
        done = await read(edge, job["id"])
    years = int(done["expires_at"][:4]) - int(done["completed_at"][:4])
    assert years == 100
    assert done["outputs"][0]["url_expires_at"] == done["expires_at"]


async def test_link_that_expires_says_when(config: Config) -> None:
    def signed(state: State) -> State:
        signer = Signer(bytes(KEY_BYTES), HOUR, state.clock)
        return dataclasses.replace(state, links=Links(state.storages, signer))

    async with serving(config, state=signed) as edge:
        job = await submitted(edge)
        await edge.succeed(await edge.claim(job["id"]), picture(job["id"]))
        (output,) = (await read(edge, job["id"]))["outputs"]
    assert "signature=" in output["url"]
    seconds = int(output["url"].partition("expires=")[2].partition("&")[0])
    at = datetime.fromisoformat(output["url_expires_at"])
    assert round(at.timestamp()) == seconds


@pytest.mark.parametrize(
    ("url", "expires_at"),
    [
        ("https://b.example/x?X-Amz-Date=20250102T030405Z&X-Amz-Expires=60&X-Amz-Signature=s", 1735787105000),
        ("https://b.example/x?X-Goog-Date=20250102T030405Z&X-Goog-Expires=1", 1735787046000),
        ("https://b.example/x?X-Goog-Date=tomorrow&X-Goog-Expires=1", None),
        ("https://cdn.example/x.png", None),
        ("https://cdn.example/x.png?expires=12", None),
    ],
)
async def test_url_of_a_storage_says_itself_until_when_it_is_good(
    edge: Edge, url: str, expires_at: int | None
) -> None:
    class Elsewhere(Links):
        """Links to a storage that gives everybody what it has."""

        async def elsewhere(self, artefact: Artefact) -> str | None:
            """The url, whatever the file."""
            return url if artefact.node_id else None

    links = Elsewhere(edge.state.storages, Signer(bytes(KEY_BYTES), 0, edge.state.clock))
    assert await links.link(artefact(), "http://h") == Link(url=url, expires_at=expires_at)


async def test_urls_of_a_job_begin_with_the_path_that_the_service_has_outside(tmp_path: Path) -> None:
    plain = configuration(tmp_path / "data", GONE)
    config = msgspec.structs.replace(plain, server=ServerConfig(public_url="https://x.example/comfy/"))
    async with serving(config) as edge:
        job = await submitted(edge)
        own = f"/comfy{JOBS}/{job['id']}"
        assert job["urls"] == {"self": own, "events": f"{own}/events", "cancel": f"{own}/cancel"}
        await edge.succeed(await edge.claim(job["id"]), picture(job["id"]))
        (output,) = (await read(edge, job["id"]))["outputs"]
        assert output["url"].startswith("https://x.example/comfy/api/files/")


async def test_location_of_a_new_job_is_where_it_is_read(edge: Edge) -> None:
    async with edge.http.post(f"{edge.base}{JOBS}", json={"workflow": GRAPH}) as response:
        job = await response.json()
        assert response.status == 201
        assert response.headers["Location"] == job["urls"]["self"] == f"{JOBS}/{job['id']}"
        assert response.headers["X-Comfy-Request-Id"] == response.headers["X-Request-Id"]
    async with edge.http.get(f"{edge.base}/api/health") as response:
        assert "X-Comfy-Request-Id" not in response.headers


async def test_health_never_fails(edge: Edge) -> None:
    assert await edge.call("GET", "/api/v2/health") == (
        200,
        {"status": "healthy", "upstream": "unreachable"},
    )
