"""The jobs API of newer servers, and its absence on older ones."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from tests.conformance import graphs
from tests.conformance.raw_client import ends, kind_is

if TYPE_CHECKING:
    from tests.conformance.raw_client import Server


async def another_millisecond() -> None:
    """Wait until the clock shows another one: a list sorts by it, and two of one stand in any order."""
    before = int(time.time() * 1000)
    while int(time.time() * 1000) == before:  # another process works by the same clock
        await asyncio.sleep(0)


async def job(server: Server, prompt_id: str) -> dict[str, Any] | None:
    """The job's detail; None when it is unknown, or always when there is no such route."""
    answer = await server.get(f"/api/jobs/{prompt_id}")
    if answer.status == 404:
        return None
    assert answer.status == 200
    document: dict[str, Any] = answer.json()
    return document


async def test_a_finished_job_tells_its_outputs(server: Server) -> None:
    extra = {"extra_pnginfo": {"workflow": {"id": "my-workflow"}}}
    run = await server.run(graphs.picture(), extra_data=extra)
    found = await job(server, run.prompt_id)
    if not server.facts.modern:
        assert found is None
        return
    assert found is not None
    assert (found["id"], found["status"], found["priority"]) == (
        run.prompt_id,
        "completed",
        run.entry["prompt"][0],
    )
    assert found["create_time"] == run.entry["prompt"][3]["create_time"]
    assert found["create_time"] <= found["execution_start_time"] <= found["execution_end_time"]
    assert (found["outputs_count"], found["previewable_outputs_count"]) == (1, 1)
    assert found["workflow_id"] == "my-workflow"
    (item,) = run.outputs["9"]["images"]
    assert found["preview_output"] == {**item, "nodeId": "9", "mediaType": "images"}
    assert found["outputs"] == run.outputs
    assert found["execution_status"] == run.entry["status"]
    assert found["workflow"]["prompt"] == run.entry["prompt"][2]


async def test_a_failed_job_tells_its_error(server: Server) -> None:
    run = await server.run(graphs.failing())
    found = await job(server, run.prompt_id)
    if not server.facts.modern:
        assert found is None
        return
    assert found is not None
    assert found["status"] == "failed"
    assert found["execution_error"] == run.of_kind("execution_error")[0]


async def test_jobs_are_listed_newest_first_and_by_status(server: Server) -> None:
    await server.post("/history", {"clear": True})
    first = await server.run(graphs.picture())
    second = await server.run(graphs.failing())
    running = await server.submit(graphs.blocker())
    await server.running(running)
    await another_millisecond()
    waiting = await server.submit(graphs.picture())

    async def listed(**parameters: str) -> list[str]:
        answer = await server.get("/api/jobs", params=parameters)
        assert answer.status == 200
        return [item["id"] for item in answer.json()["jobs"]]

    if not server.facts.modern:
        assert (await server.get("/api/jobs")).status == 404
        return
    assert await listed() == [waiting, running, second.prompt_id, first.prompt_id]
    assert await listed(sort_order="asc", limit="2") == [first.prompt_id, second.prompt_id]
    assert await listed(status="completed") == [first.prompt_id]
    assert await listed(status="FAILED,pending") == [waiting, second.prompt_id]
    assert await listed(status="in_progress") == [running]
    for wrong in ({"status": "nope"}, {"limit": "abc"}, {"sort_by": "nope"}, {"sort_order": "nope"}):
        answer = await server.get("/api/jobs", params=wrong)
        assert (answer.status, list(answer.json())) == (400, ["error"])
    pages = (await server.get("/api/jobs", params={"limit": "1", "offset": "1"})).json()
    assert [item["id"] for item in pages["jobs"]] == [running]
    assert pages["pagination"] == {"offset": 1, "limit": 1, "total": 4, "has_more": True}


async def test_cancel_of_a_waiting_job_leaves_no_trace(server: Server) -> None:
    running = await server.submit(graphs.blocker())
    await server.running(running)
    waiting = await server.submit(graphs.picture())
    answer = await server.post(f"/api/jobs/{waiting}/cancel", {})
    if not server.facts.modern:
        assert answer.status == 405
        assert await server.queue() == ([running], [waiting])
        return
    assert (answer.status, answer.json()) == (200, {"cancelled": True})
    assert await server.queue() == ([running], [])
    assert await job(server, waiting) is None
    assert await server.history(waiting) is None


async def test_cancel_of_a_running_job_interrupts_it(server: Server) -> None:
    async with server.socket() as socket:
        prompt_id = await server.submit(graphs.blocker(), client_id=socket.client_id)
        await socket.until(kind_is("progress"))
        answer = await server.post(f"/api/jobs/{prompt_id}/cancel", {})
        if not server.facts.modern:
            assert answer.status == 405
            return
        assert (answer.status, answer.json()) == (200, {"cancelled": True})
        await socket.until(ends(prompt_id))
    found = await job(server, prompt_id)
    assert found is not None
    assert found["status"] == "cancelled"
    assert "execution_error" not in found
    entry = await server.finished(prompt_id)
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"


async def test_cancel_of_what_is_over_or_unknown_says_false(server: Server) -> None:
    prompt_id, _ = await server.run_quietly(graphs.picture())
    for target in (prompt_id, str(uuid.uuid4()), "malformed"):
        answer = await server.post(f"/api/jobs/{target}/cancel", {})
        if server.facts.modern:
            assert (answer.status, answer.json()) == (200, {"cancelled": False})
        else:
            assert answer.status == 405


async def test_cancel_of_several_jobs_says_whether_any_was_hit(server: Server) -> None:
    running = await server.submit(graphs.blocker())
    await server.running(running)
    waiting = await server.submit(graphs.picture())
    answer = await server.post("/api/jobs/cancel", {"job_ids": [waiting, str(uuid.uuid4())]})
    if not server.facts.modern:
        assert answer.status == 405
        return
    assert (answer.status, answer.json()) == (200, {"cancelled": True})
    assert await server.queue() == ([running], [])
    wrong = await server.post("/api/jobs/cancel", {"job_ids": ["abc", running]})
    assert (wrong.status, wrong.json()["invalid_ids"]) == (400, ["abc"])
    assert wrong.json()["error"] == "job_ids contains invalid id(s)"
    assert await server.queue() == ([running], [])


@pytest.mark.parametrize("body", [b"{", b'{"job_ids": "x"}', b"{}"])
async def test_cancel_of_several_jobs_needs_a_list(server: Server, body: bytes) -> None:
    answer = await server.request("POST", "/api/jobs/cancel", data=body)
    assert answer.status == (400 if server.facts.modern else 405)
