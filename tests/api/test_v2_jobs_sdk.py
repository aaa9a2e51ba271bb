"""The official SDK, unmodified, against a comfyd that works, in front of a simulated ComfyUI."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from comfy_sdk import AsyncComfy
from comfy_sdk.events import OutputReady, Preview, Progress, StatusChange
from comfy_sdk.exceptions import IdempotencyKeyReuse, InvalidWorkflow, JobFailed, NotFound

from comfyd.simulator import Simulator, SimulatorOptions
from tests.api.conftest import Edge, serving, until
from tests.support.comfy_v2 import check_job
from tests.support.service import colored, configuration, sampled

UNKNOWN = "5e1f6c1e-0000-4000-8000-00000000dead"


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions(step_seconds=0.02)) as made:
        yield made


@pytest.fixture
async def worked(simulator: Simulator, tmp_path: Path) -> AsyncIterator[Edge]:
    async with serving(configuration(tmp_path / "data", simulator.url), works=True) as edge:
        yield edge


@pytest.fixture
async def sdk(worked: Edge, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AsyncComfy]:
    monkeypatch.setenv("COMFY_BASE_URL", worked.base)
    async with AsyncComfy() as client:
        yield client


async def test_job_is_run_and_its_picture_fetched(sdk: AsyncComfy, worked: Edge) -> None:
    job = await sdk.submit(sdk.workflows.from_json(sampled(1, 8)), metadata={"client": "acme"})
    events = [event async for event in job.events()]
    assert isinstance(events[-1], StatusChange)
    assert events[-1].status == "succeeded"
    assert isinstance(events[-2], OutputReady)
    values = [event.value for event in events if isinstance(event, Progress)]
    assert values == sorted(values)
    assert any(isinstance(event, Preview) for event in events)
    await job.result()
    assert (await job.outputs[0].to_bytes()).startswith(b"\x89PNG")
    assert (await job.outputs[0].to_bytes(range=(1, 3))) == b"PNG"
    workflow = await job.get_workflow()
    assert (workflow.format, workflow.graph["3"]["inputs"]["steps"]) == ("api", 8)
    assert [summary.id async for summary in sdk.list_jobs(metadata={"client": "acme"})] == [job.id]
    _, answer = await worked.call("GET", f"/api/v2/jobs/{job.id}")
    check_job(answer)
    assert answer["metrics"]["execution_ms"] >= 0
    assert answer["metrics"]["queue_ms"] >= 0
    assert answer["outputs"][0]["hash"].startswith("blake3:")


async def test_running_job_is_canceled(sdk: AsyncComfy, simulator: Simulator) -> None:
    job = await sdk.submit(sdk.workflows.from_json(sampled(2, 2_000)))
    await until(lambda: len(simulator.executions) == 1)
    await job.cancel()
    assert job.status == "canceling"
    async with asyncio.timeout(20):
        with pytest.raises(JobFailed) as caught:
            await job.result()
    assert caught.value.code == "canceled"


async def test_errors_are_those_of_the_sdk(sdk: AsyncComfy) -> None:
    with pytest.raises(NotFound):
        await sdk.jobs.get(UNKNOWN)
    with pytest.raises(InvalidWorkflow):
        await sdk.submit(sdk.workflows.from_json({"1": {"class_type": "Nothing", "inputs": {}}}))
    workflow = sdk.workflows.from_json(colored(7))
    await sdk.submit(workflow, idempotency_key="k")
    with pytest.raises(IdempotencyKeyReuse):
        await sdk.submit(workflow, idempotency_key="k")
