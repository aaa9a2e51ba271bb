"""Workflow templates over HTTP: what they take, and running them."""

from pathlib import Path
from typing import Any

import msgspec
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it has no types

from comfyd.config import Config, WorkflowsConfig
from tests.api.conftest import Edge, serving
from tests.support.values import GRAPH


async def test_templates_are_listed_with_their_inputs(edge: Edge) -> None:
    status, answer = await edge.call("GET", "/api/workflows")
    assert status == 200
    assert answer["problems"] == []
    names = [template["name"] for template in answer["workflows"]]
    assert names == ["image-to-image", "noise-image", "text-to-image"]
    for template in answer["workflows"]:
        assert template["title"]
        assert template["run"] == f"{edge.base}/api/workflows/{template['name']}/run"
        Draft202012Validator.check_schema(template["input_schema"])
        assert [spec["name"] for spec in template["inputs"]] == [*template["input_schema"]["properties"]]


async def test_one_template_is_read_and_an_unknown_one_is_404(edge: Edge) -> None:
    status, template = await edge.call("GET", "/api/workflows/text-to-image")
    assert (status, template["name"], template["problem"]) == (200, "text-to-image", None)
    prompt = next(spec for spec in template["inputs"] if spec["name"] == "prompt")
    assert prompt["type"] == "text"
    status, answer = await edge.call("GET", "/api/workflows/text-to-imag")
    assert (status, answer["error"]["code"]) == (404, "workflow_not_found")
    assert "text-to-image" in answer["error"]["message"]


async def test_broken_file_is_reported_beside_the_good_ones(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "workflows"
    folder.mkdir()
    (folder / "good.json").write_bytes(msgspec.json.encode(GRAPH))
    (folder / "bad.json").write_text('{"1": ')
    async with serving(msgspec.structs.replace(config, workflows=WorkflowsConfig(dir=str(folder)))) as edge:
        _, answer = await edge.call("GET", "/api/workflows")
        assert [template["name"] for template in answer["workflows"]] == ["good"]
        (problem,) = answer["problems"]
        assert (problem["name"], problem["file"], problem["line"]) == ("bad", "workflows/bad.json", 1)
        # A file that breaks later leaves the last good version in place, and says so.
        (folder / "good.json").write_text("{")
        edge.state.catalog.refresh()
        status, good = await edge.call("GET", "/api/workflows/good")
        assert status == 200
        assert "workflows/good.json" in good["problem"]


async def run(edge: Edge, query: str = "", body: Any = None, **headers: str) -> tuple[int, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    facts: dict[str, Any] = {} if body is None else {"json": body}
    return await edge.call("POST", f"/api/workflows/noise-image/run{query}", headers=named, **facts)


async def test_run_takes_the_inputs_as_its_body_and_the_rest_as_parameters(edge: Edge) -> None:
    query = (
        "?priority=high&max_attempts=2&timeout=5&start_timeout=7.5&include_temp=true&metadata[customer]=42"
    )
    template = (await edge.call("GET", "/api/workflows/noise-image"))[1]
    width = next(spec["name"] for spec in template["inputs"] if spec["name"] == "width")
    status, task = await run(edge, query, {width: 128})
    assert status == 202, task
    assert task["workflow"] == "noise-image"
    assert task["priority"] == 10
    assert task["metadata"] == {"customer": "42"}
    assert task["inputs"]["width"] == 128
    row = await edge.bench.task(task["task_id"])
    assert row.policy.max_attempts == 2
    assert row.policy.timeout_ms == 5_000
    assert row.policy.start_timeout_ms == 7_500
    assert row.output.include_temp
    status, task = await run(edge, "?priority=-7")
    assert (status, task["priority"]) == (202, -7)


async def test_run_without_a_body_takes_the_defaults(edge: Edge) -> None:
    status, task = await run(edge)
    assert status == 202
    assert task["inputs"]


async def test_run_refuses_what_is_wrong(edge: Edge) -> None:
    status, answer = await run(edge, body={"no-such-input": 1})
    assert (status, answer["error"]["code"]) == (422, "invalid_inputs")
    assert "no-such-input" in answer["error"]["details"]["inputs"]
    status, answer = await run(edge, body=[1])
    assert (status, answer["error"]["details"]) == (400, {"path": "$.inputs"})
    wrong = {
        "priority=urgent": {"parameter": "priority"},
        "priority=1001": {"parameter": "priority"},
        "max_attempts=0": {"parameter": "max_attempts"},
        "timeout=-1": {"parameter": "timeout"},
        "timeout=0": {"path": "$.timeout"},
        "include_temp=perhaps": {"parameter": "include_temp"},
        "webhook_url=": {"path": "$.webhook_url"},
        "webhook_events=task.failed": {"path": "$.webhook_events"},
        "webhook_url=http://x/&webhook_events=": {"path": "$.webhook_events[0]"},
        "webhook_url=http://x/&webhook_events=task.failed,done": {"path": "$.webhook_events[1]"},
        "webhook_url=http://x/&webhook_events=task.failed,task.failed": {"path": "$.webhook_events"},
        "webhook_url=http://x/&webhook_url=http://y/": {"parameter": "webhook_url"},
        "prioritty=1": {"parameter": "prioritty"},
        "output.colour=red": {"parameter": "output.colour"},
        "metadata=x": {"parameter": "metadata"},
    }
    for query, details in wrong.items():
        status, answer = await run(edge, f"?{query}")
        assert (status, answer["error"]["details"]) == (400, details), query
    status, answer = await edge.call("POST", "/api/workflows/nothing/run")
    assert (status, answer["error"]["code"]) == (404, "workflow_not_found")
    assert sum((await edge.state.store.counts()).values()) == 0


async def test_key_covers_the_template_and_the_options(edge: Edge) -> None:
    _, first = await run(edge, "?priority=1", {}, Idempotency_Key="k")
    status, again = await run(edge, "?priority=1&wait=0.01", {}, Idempotency_Key="k")
    assert (status, again["task_id"]) == (202, first["task_id"])
    status, answer = await run(edge, "?priority=2", {}, Idempotency_Key="k")
    assert (status, answer["error"]["code"]) == (422, "idempotency_key_reuse")
    status, _ = await edge.call(
        "POST", "/api/workflows/text-to-image/run?priority=1", json={}, headers={"Idempotency-Key": "k"}
    )
    assert status == 422
