"""Jobs through the official SDK: submitting, waiting, failing, and what a server refuses."""

import asyncio
import contextlib
import hashlib
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from comfy_low.errors import ApiError
from comfy_low.transport import ComfyLow
from comfy_sdk import (
    AsyncComfy,
    Comfy,
    ComfyError,
    IdempotencyKeyReuse,
    InvalidWorkflow,
    JobFailed,
    MissingAsset,
    NotFound,
    QueueFull,
    Workflow,
    WorkflowFormatUi,
)

from tests.conformance import graphs
from tests.sdk.stage import (
    PATIENCE,
    REAL_ONLY,
    Stage,
    async_finished,
    busy,
    finished,
    new_client,
    pointed_at,
    seen,
)

CANARY = "comfyui-canary-7d1f0e"
UNKNOWN = "5e1f6c1e-0000-4000-8000-00000000dead"


def picture() -> Workflow:
    return Workflow(graphs.picture())


def test_run_gives_the_finished_job(client: Comfy) -> None:
    job = client.run(picture(), timeout=PATIENCE)
    assert job.status == "succeeded"
    assert [output.node_id for output in job.outputs] == ["9"]
    assert job.error is None


async def test_run_gives_the_finished_job_asynchronously(async_client: AsyncComfy) -> None:
    job = await async_client.run(picture(), timeout=PATIENCE)
    assert (job.status, len(job.outputs)) == ("succeeded", 1)


def test_a_workflow_comes_from_a_file_and_from_text(client: Comfy, tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_text('{"1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16}}}')
    for made in (client.workflows.from_file(path), client.workflows.from_str(path.read_text())):
        made.set_input("1", "batch_size", 2)
        made.set_input("1", "color", graphs.color())
        made.json["9"] = graphs.node("SaveImage", images=["1", 0], filename_prefix=graphs.prefix())
        assert len(finished(client.submit(made)).outputs) == 2


def test_submit_wait_and_result_are_one_job_known_by_its_id(client: Comfy) -> None:
    submitted = client.submit(picture())
    assert submitted.status in {"queued", "running", "succeeded"}
    assert submitted.wait(PATIENCE).status == "succeeded"
    assert submitted.result().outputs[0].job_id == submitted.id
    again = client.jobs.get(submitted.id)
    assert (again.id, again.status) == (submitted.id, "succeeded")
    assert [output.id for output in again.outputs] == [output.id for output in submitted.outputs]


def test_wait_tells_when_its_patience_is_over(client: Comfy) -> None:
    with busy(client) as jobs:
        with pytest.raises(TimeoutError):
            jobs[-1].wait(0.1)
        with pytest.raises(TimeoutError):
            client.run(picture(), timeout=0.1)
        (orphan, *_) = client.list_jobs(limit=1)
        client.jobs.get(orphan.id).cancel()


def test_a_failure_names_the_node_and_no_path(client: Comfy) -> None:
    job = client.submit(Workflow(graphs.failing()))
    assert finished(job).status == "failed"
    with pytest.raises(JobFailed) as caught:
        job.result()
    error = caught.value.error
    assert error is not None
    assert caught.value.code == error.code != "job_failed"
    assert (error.node_id, error.class_type) == ("2", "RegexReplace")
    assert "unterminated subpattern" in error.message
    assert "/" not in error.message


def test_run_raises_what_failed(client: Comfy) -> None:
    with pytest.raises(JobFailed, match="failed"):
        client.run(Workflow(graphs.failing()), timeout=PATIENCE)


def test_the_workflow_of_a_job_is_what_was_submitted(client: Comfy) -> None:
    sent = graphs.picture()
    job = client.submit(Workflow(sent))
    found = client.jobs.get(job.id).get_workflow()
    assert found.format == "api"
    assert {key: node["inputs"] for key, node in found.graph.items()} == {
        key: node["inputs"] for key, node in sent.items()
    }
    finished(job)


@pytest.mark.parametrize(
    ("change", "node"),
    [
        ({"9": {"class_type": "NoSuchClass", "inputs": {"images": ["1", 0]}}}, "9"),
        ({"1": {"class_type": "EmptyImage", "inputs": {"width": -5, "height": 16, "batch_size": 1}}}, "1"),
        ({"9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}, "9"),
    ],
    ids=["unknown class", "value out of range", "input missing"],
)
def test_an_invalid_workflow_is_refused_at_once_and_says_where(
    client: Comfy, change: dict[str, Any], node: str
) -> None:
    with pytest.raises(InvalidWorkflow) as caught:
        client.submit(Workflow({**graphs.picture(), **change}))
    assert (caught.value.http_status, caught.value.code) == (422, "invalid_workflow")
    assert caught.value.details is not None
    assert node in caught.value.details["node_errors"]


@pytest.mark.parametrize("graph", [{}, {"1": 5}, {"1": {"class_type": "EmptyImage"}}])
def test_what_is_no_workflow_is_refused(client: Comfy, graph: dict[str, Any]) -> None:
    with pytest.raises(InvalidWorkflow):
        client.submit(Workflow(graph))


def test_an_export_of_the_editor_is_refused_here_and_there(client: Comfy) -> None:
    export: dict[str, Any] = {"nodes": [{"id": 1, "type": "EmptyImage"}], "links": [], "version": 0.4}
    with pytest.raises(WorkflowFormatUi) as there:  # by the server: the SDK looks for one key more
        client.submit(Workflow(export))
    assert (there.value.http_status, there.value.idempotency_key is None) == (422, False)
    with pytest.raises(WorkflowFormatUi) as here:
        client.submit(Workflow({**export, "last_node_id": 1}))
    assert here.value.idempotency_key is None


@pytest.mark.parametrize("info", [{"id": UNKNOWN}, {"id": 5}, {"hash": "blake3:00"}, None])
def test_a_reference_to_no_asset_is_refused(client: Comfy, info: dict[str, Any] | None) -> None:
    graph = graphs.chain()
    graph["1"] = graphs.node("LoadImage", image={"__type": "core/ASSET", "info": info})
    with pytest.raises(MissingAsset) as caught:
        client.submit(Workflow(graph))
    assert caught.value.http_status == 422


def test_the_id_of_an_unknown_asset_is_told(client: Comfy) -> None:
    graph = graphs.chain()
    graph["1"] = graphs.node("LoadImage", image={"__type": "core/ASSET", "info": {"id": UNKNOWN}})
    with pytest.raises(MissingAsset) as caught:
        client.submit(Workflow(graph))
    assert caught.value.details is not None
    assert caught.value.details["missing_ids"] == [UNKNOWN]


@pytest.mark.parametrize("job_id", [UNKNOWN, "none", "7", "a.b-c_d"])
def test_an_unknown_job_is_not_found(client: Comfy, job_id: str) -> None:
    with pytest.raises(NotFound) as caught:
        client.jobs.get(job_id)
    assert caught.value.http_status == 404


def test_a_key_is_good_for_one_job_which_the_list_has(client: Comfy) -> None:
    key = str(uuid.uuid4())
    first = client.submit(picture(), idempotency_key=key)
    for again in (picture(), Workflow(graphs.chain())):
        with pytest.raises(IdempotencyKeyReuse) as caught:
            client.submit(again, idempotency_key=key)
        assert (caught.value.http_status, caught.value.idempotency_key) == (422, key)
    assert first.id in {item.id for item in client.list_jobs(limit=3)}
    assert finished(first).status == "succeeded"
    with pytest.raises(IdempotencyKeyReuse):
        client.submit(picture(), idempotency_key=key)


def test_a_refused_submit_gives_its_key_back(client: Comfy) -> None:
    key = str(uuid.uuid4())
    with pytest.raises(InvalidWorkflow):
        client.submit(Workflow({"1": graphs.node("NoSuchClass")}), idempotency_key=key)
    assetless = {**graphs.chain(), "1": graphs.node("LoadImage", image={"__type": "core/ASSET"})}
    with pytest.raises(MissingAsset):
        client.submit(Workflow(assetless), idempotency_key=key)
    with pytest.raises(ComfyError) as caught:
        client.submit(picture(), idempotency_key=key, metadata={"not a key": "x"})
    assert caught.value.code == "metadata_invalid"
    assert finished(client.submit(picture(), idempotency_key=key)).status == "succeeded"


async def test_of_many_submits_with_one_key_one_is_a_job(async_client: AsyncComfy) -> None:
    key = str(uuid.uuid4())

    async def one() -> str:
        try:
            job = await async_client.submit(picture(), idempotency_key=key)
        except IdempotencyKeyReuse:
            return "refused"
        return (await async_finished(job)).status

    assert Counter(await asyncio.gather(*(one() for _ in range(12)))) == {"succeeded": 1, "refused": 11}


def test_a_waiting_job_is_canceled_at_once(client: Comfy) -> None:
    with busy(client):
        waiting = client.submit(picture())
        assert waiting.status == "queued"
        assert waiting.cancel().status == "canceled"
        assert client.jobs.get(waiting.id).status == "canceled"
        assert waiting.cancel().status == "canceled"
        with pytest.raises(JobFailed):
            waiting.result()


def test_a_running_job_is_canceled_and_no_other(client: Comfy) -> None:
    with busy(client) as jobs:
        bystander = client.submit(picture())
        assert jobs[0].cancel().status in {"canceling", "canceled"}
        assert finished(jobs[0]).status == "canceled"
        assert jobs[0].outputs == []
        for job in jobs[1:]:
            assert job.refresh().status not in {"canceled", "failed"}
            assert job.cancel().status in {"canceling", "canceled"}
            assert finished(job).status == "canceled"
        assert finished(bystander).status == "succeeded"


def test_a_cancel_that_comes_too_late_changes_nothing(client: Comfy) -> None:
    job = finished(client.submit(picture()))
    assert job.cancel().status == "succeeded"
    assert len(job.outputs) == 1


def test_a_waiting_job_says_how_many_are_before_it(client: Comfy) -> None:
    with busy(client):
        first, second = client.submit(picture()), client.submit(picture())
        places = {item.id: item.data["queue_position"] for item in client.list_jobs(limit=2)}
        assert places[second.id] == places[first.id] + 1 >= 2
        for job in (second, first):
            job.cancel()


def test_times_and_metrics_are_told(stage: Stage, client: Comfy) -> None:
    job = finished(client.submit(Workflow(stage.sketching(5))))
    (data,) = [item.data for item in client.list_jobs(limit=5) if item.id == job.id]
    assert data["created_at"] <= data["started_at"] <= data["completed_at"] < data["expires_at"]
    assert data["metrics"]["queue_ms"] >= 0
    assert data["metrics"]["execution_ms"] > 0
    assert data["progress"]["value"] == 1


def test_a_full_queue_says_when_to_come_again(narrow: Stage) -> None:
    low = ComfyLow(narrow.comfyd.url)
    with new_client(narrow.comfyd.url) as client, low, busy(client):
        waiting = [client.submit(picture()), client.submit(picture())]
        key = str(uuid.uuid4())
        with pytest.raises(ApiError) as caught:  # `client.submit` would try for a minute
            low.post_jobs(graphs.picture(), idempotency_key=key)
        assert (caught.value.http_status, caught.value.code) == (429, "queue_full")
        assert isinstance(caught.value.retry_after, int)
        assert caught.value.retry_after >= 1
        waiting[0].cancel()
        late = low.post_jobs(graphs.picture(), idempotency_key=key)
        assert client.jobs.get(late.id).cancel().status == "canceled"
        waiting[1].cancel()


@REAL_ONLY
def test_a_submit_waits_for_room_in_the_queue(narrow: Stage) -> None:
    with new_client(narrow.comfyd.url) as client, ThreadPoolExecutor(1) as threads, busy(client):
        waiting = [client.submit(picture()), client.submit(picture())]
        late = threads.submit(client.submit, picture())
        waiting[0].cancel()
        assert late.result(PATIENCE).cancel().status == "canceled"
        waiting[1].cancel()


@REAL_ONLY
def test_a_queue_that_stays_full_is_told_after_a_minute(narrow: Stage) -> None:
    with new_client(narrow.comfyd.url) as client:
        long = [client.submit(Workflow(narrow.sketching(400, 0.5))) for _ in range(4)]
        seen(long[0], lambda job: job.status == "running")
        waiting = [client.submit(picture()), client.submit(picture())]
        with pytest.raises(QueueFull) as caught:
            client.submit(picture())
        assert isinstance(caught.value.retry_after, int)
        assert caught.value.retry_after >= 1
        for job in (*waiting, *reversed(long)):
            job.cancel()
        for job in long:
            job.wait(PATIENCE)


@pytest.mark.chaos
def test_a_wait_across_a_crash_may_fail_but_the_job_is_there(stage: Stage, client: Comfy) -> None:
    jobs = [client.submit(Workflow(stage.sketching(30))) for _ in range(3)]
    seen(jobs[0], lambda job: job.status == "running")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(jobs[0].wait, PATIENCE)
        stage.comfyd.kill()
        stage.comfyd.start()
        # the SDK gives up at the first connection that fails
        with contextlib.suppress(httpx.HTTPError, ComfyError):
            waiting.result(PATIENCE)
    for job in jobs:
        found = finished(client.jobs.get(job.id))
        assert (found.status, len(found.outputs)) == ("succeeded", 1)


def test_a_key_for_partner_nodes_is_taken_and_shown_nowhere(stage: Stage, client: Comfy) -> None:
    job = finished(client.submit(picture(), api_key=CANARY))
    assert job.status == "succeeded"
    assert CANARY not in str(client.jobs.get(job.id).get_workflow())
    assert CANARY not in str([item.data for item in client.list_jobs(limit=3)])
    assert_kept_nowhere(stage, CANARY)


def test_the_key_of_a_client_is_sent_for_nothing_and_kept_nowhere(stage: Stage) -> None:
    with pointed_at(stage.comfyd.url), Comfy(api_key=CANARY, client_info="tests/1") as client:
        job = finished(client.submit(picture()))
        assert job.outputs[0].to_bytes(range=(0, 3)) == b"\x89PNG"
    assert_kept_nowhere(stage, CANARY)


@REAL_ONLY
def test_a_key_reaches_the_node_that_asks_for_it(stage: Stage, client: Comfy) -> None:
    salt = uuid.uuid4().hex
    job = client.submit(Workflow({"1": graphs.node("KeyDigest", salt=salt)}), api_key=CANARY)
    (output,) = finished(job).outputs
    assert output.to_bytes().decode() == hashlib.sha256(f"{salt}{CANARY}".encode()).hexdigest()
    assert_kept_nowhere(stage, CANARY)


def assert_kept_nowhere(stage: Stage, secret: str) -> None:
    """No file of comfyd's, its log and its database included, has it."""
    files = [path for path in stage.comfyd.folder.rglob("*") if path.is_file()]
    assert files
    assert [path.name for path in files if secret.encode() in path.read_bytes()] == []
