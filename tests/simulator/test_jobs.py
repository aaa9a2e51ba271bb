"""The jobs API of the modern flavor retells queue and history."""

from __future__ import annotations

import uuid

import pytest

from tests.simulator.rig import MODERN, node, picture, rig, tiles


async def test_a_finished_job_tells_everything() -> None:
    async with rig(flavor=MODERN) as running:
        extra = {"extra_pnginfo": {"workflow": {"id": "wf"}}}
        run = await running.server.run(picture(batch=2), extra_data=extra)
        job = (await running.server.get(f"/api/jobs/{run.prompt_id}")).json()
        assert (job["status"], job["workflow_id"], job["outputs_count"]) == ("completed", "wf", 2)
        assert job["preview_output"]["nodeId"] == "9"
        assert job["workflow"]["prompt"]["9"]["class_type"] == "SaveImage"
        assert job["execution_end_time"] >= job["execution_start_time"]


async def test_jobs_are_listed_filtered_sorted_and_paged() -> None:
    async with rig(flavor=MODERN) as running:
        good = (await running.server.run(picture(color=1))).prompt_id
        bad_graph = {"9": node("PreviewAny", source=["8", 0]), "8": _broken_regex()}
        bad = (await running.server.run(bad_graph)).prompt_id
        running.simulator.faults.worker_dead = True
        waiting = await running.server.submit(picture(color=2))

        async def ids(query: str) -> list[str]:
            answer = await running.server.get(f"/api/jobs?{query}")
            return [job["id"] for job in answer.json()["jobs"]]

        assert set(await ids("")) == {good, bad, waiting}
        assert await ids("status=FAILED") == [bad]
        assert await ids("status=pending,in_progress") == [waiting]
        assert await ids("status=completed") == [good]
        assert len(await ids("sort_by=execution_duration&sort_order=asc")) == 3
        assert len(await ids("limit=1&offset=-4")) == 1
        assert await ids("workflow_id=none") == []
        assert (await running.server.get("/api/jobs?limit=2")).json()["pagination"] == {
            "offset": 0,
            "limit": 2,
            "total": 3,
            "has_more": True,
        }


def _broken_regex() -> dict[str, object]:
    return node("RegexReplace", string="a", regex_pattern="(", replace="b")


@pytest.mark.parametrize(
    "query", ["status=nope", "sort_by=x", "sort_order=x", "limit=0", "limit=x", "offset=x"]
)
async def test_wrong_queries_are_400(query: str) -> None:
    async with rig(flavor=MODERN) as running:
        answer = await running.server.get(f"/api/jobs?{query}")
        assert answer.status == 400
        assert set(answer.json()) == {"error"}


async def test_cancel_removes_what_waits_and_interrupts_what_runs() -> None:
    async with rig(flavor=MODERN, step_seconds=0.02) as running:
        first = await running.server.submit(tiles(size=1024))
        await running.server.running(first)
        second = await running.server.submit(picture())
        third = await running.server.submit(picture())
        assert (await running.server.get(f"/api/jobs/{first}")).json()["status"] == "in_progress"
        assert (await running.server.get(f"/api/jobs/{second}")).json()["status"] == "pending"
        assert (await running.server.post(f"/api/jobs/{second}/cancel")).json() == {"cancelled": True}
        assert (await running.server.get(f"/api/jobs/{second}")).status == 404
        many = {"job_ids": [first, third]}
        assert (await running.server.post("/api/jobs/cancel", many)).json() == {"cancelled": True}
        await running.server.finished(first)
        assert (await running.server.get(f"/api/jobs/{first}")).json()["status"] == "cancelled"
        assert (await running.server.post(f"/api/jobs/{first}/cancel")).json() == {"cancelled": False}
        assert await running.server.queue() == ([], [])


async def test_a_batch_cancel_wants_canonical_ids() -> None:
    async with rig(flavor=MODERN) as running:
        wrong = await running.server.post("/api/jobs/cancel", {"job_ids": ["abc", 5, str(uuid.uuid4())]})
        assert (wrong.status, wrong.json()["invalid_ids"]) == (400, ["abc", "5"])
        assert (await running.server.post("/api/jobs/cancel", {"job_ids": "x"})).status == 400
        assert (await running.server.request("POST", "/api/jobs/cancel", data=b"{")).status == 400


async def test_previews_prefer_outputs_to_temp_files_and_leave_latents_out() -> None:
    async with rig(flavor=MODERN) as running:
        graph = {
            "1": picture()["1"],
            "2": node("EmptyLatentImage", width=64, height=64, batch_size=1),
            "3": node("PreviewImage", images=["1", 0]),
            "4": node("SaveLatent", samples=["2", 0], filename_prefix="x"),
            "5": node("SaveImage", images=["1", 0], filename_prefix="x"),
            "6": node("SaveText", text="hello", filename_prefix="x", format="md"),
        }
        run = await running.server.run(graph)
        job = (await running.server.get(f"/api/jobs/{run.prompt_id}")).json()
        assert (job["outputs_count"], job["previewable_outputs_count"]) == (4, 3)
        assert job["preview_output"]["type"] == "output"


async def test_odd_workflow_data_breaks_the_list() -> None:
    async with rig(flavor=MODERN) as running:
        await running.server.run(picture(), extra_data={"extra_pnginfo": {"workflow": None}})
        assert (await running.server.get("/api/jobs")).status == 500
        assert (await running.server.get("/api/jobs?status=pending")).status == 200


async def test_the_other_modern_routes_answer() -> None:
    async with rig(flavor=MODERN) as running:
        assert (await running.server.get("/node_replacements")).json() == {}
        assert (await running.server.get("/api/assets")).status == 503
        assert (await running.server.get("/api/assets/some-id")).json()["error"]["code"] == "SERVICE_DISABLED"
    async with rig() as running:
        assert (await running.server.get("/api/jobs")).status == 404
        assert (await running.server.post("/api/jobs/cancel", {})).status == 405
