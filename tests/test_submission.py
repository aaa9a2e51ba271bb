"""Leg 1: what is accepted is on disk, what is wrong leaves no trace."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from comfyd.catalog import Catalog
from comfyd.clock import SystemClock
from comfyd.config import LimitsConfig, QueueConfig, StorageConfig
from comfyd.disk import Room
from comfyd.errors import (
    InvalidInputs,
    InvalidWorkflow,
    MissingAsset,
    QueueFull,
    StorageNotConfigured,
    UnknownWorkflow,
    WorkflowFormatUi,
)
from comfyd.graphs import GraphLimits
from comfyd.intake import GraphChecker
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.submission import Renderer, SubmitRequest, Terms
from comfyd.tasks import IdempotencyKey, OutputOptions, Policy, Status
from tests.support.service import Bench, bench, colored, configuration
from tests.support.sources import data_uri, png
from tests.support.values import GRAPH


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions()) as made:
        yield made


@pytest.fixture
async def made(simulator: Simulator, tmp_path: Path) -> AsyncIterator[Bench]:
    settings = configuration(tmp_path / "data", simulator.url)
    settings = msgspec.structs.replace(settings, limits=LimitsConfig(queued_tasks=3))
    async with bench(settings, works=False) as idle:
        await idle.ground.backends[0].probe()
        yield idle


async def chunked(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def queued(made: Bench) -> int:
    return (await made.store.counts())[Status.QUEUED]


async def test_a_graph_is_queued_with_what_will_run(made: Bench) -> None:
    graph = colored(1)
    graph["9"] = {"class_type": "EmptyImage", "inputs": {}}
    row = await made.submit(graph, priority=7, metadata={"user": "me"}, max_attempts=5, timeout=2.5)
    assert (row.status, row.priority, row.nodes_total) == (Status.QUEUED, 7, 2)
    assert row.policy.max_attempts == 5
    assert row.policy.timeout_ms == 2_500
    assert row.metadata == {"user": "me"}
    assert await made.store.graph(row.id) is not None


async def test_inputs_of_a_raw_graph_are_set_by_address(made: Bench) -> None:
    row = await made.submit(GRAPH, inputs={"1.width": 32, "SaveImage.filename_prefix": "mine"})
    graph = await made.store.graph(row.id)
    assert graph is not None
    assert graph["1"]["inputs"]["width"] == 32
    assert graph["2"]["inputs"]["filename_prefix"] == "mine"
    assert row.inputs == {"1.width": 32, "SaveImage.filename_prefix": "mine"}


async def test_a_template_is_rendered_and_its_values_are_kept(made: Bench) -> None:
    row = await made.submit("text-to-image", inputs={"prompt": "a cat"})
    assert row.workflow == "text-to-image"
    assert row.inputs is not None
    assert row.inputs["prompt"] == "a cat"
    assert isinstance(row.inputs["seed"], int)


async def test_the_same_shape_is_the_same_workflow_whatever_its_values(made: Bench) -> None:
    first, second = await made.submit(colored(1)), await made.submit(colored(2))
    assert first.shape == second.shape


async def test_a_key_that_is_repeated_gives_the_first_task(made: Bench) -> None:
    key = IdempotencyKey(key="k", body_sha256="d")
    request = SubmitRequest(workflow=GRAPH)
    first = await made.state.submission.submit(request, key)
    again = await made.state.submission.submit(request, key)
    assert (first.replayed, again.replayed) == (False, True)
    assert first.task.id == again.task.id
    assert await queued(made) == 1


async def test_a_full_queue_refuses(made: Bench) -> None:
    for number in range(3):
        await made.submit(colored(number))
    with pytest.raises(QueueFull) as refusal:
        await made.submit("no-such-template")  # before anything is worked out
    assert refusal.value.details["retry_after"] > 0
    assert await queued(made) == 3


async def test_what_is_wrong_is_refused_and_leaves_no_trace(made: Bench, simulator: Simulator) -> None:
    with pytest.raises(UnknownWorkflow):
        await made.submit("no-such-template")
    with pytest.raises(InvalidInputs):
        await made.submit("text-to-image", inputs={"steps": "many", "nonsense": 1})
    with pytest.raises(WorkflowFormatUi):
        await made.submit({"nodes": [], "links": [], "last_node_id": 1})
    with pytest.raises(InvalidWorkflow) as refusal:
        await made.submit({"1": {"class_type": "NoSuchClass", "inputs": {}}})
    assert "1" in refusal.value.details["node_errors"]
    assert await queued(made) == 0
    assert simulator.executions == []


async def test_without_a_comfyui_that_answers_tasks_are_accepted(made: Bench, simulator: Simulator) -> None:
    await simulator.crash()
    row = await made.submit({"1": {"class_type": "WhoKnows", "inputs": {}}})
    assert (row.status, row.nodes_total) == (Status.QUEUED, 1)


async def test_a_refusal_asks_comfyui_anew_but_not_every_time(made: Bench, simulator: Simulator) -> None:
    wrong = {"1": {"class_type": "NoSuchClass", "inputs": {}}}
    with pytest.raises(InvalidWorkflow):
        await made.submit(wrong)
    await simulator.crash()
    # what is known is believed for a while: nobody is asked, so nobody's absence is noticed
    with pytest.raises(InvalidWorkflow):
        await made.submit(wrong)


async def test_a_comfyui_that_does_not_answer_keeps_nobody_waiting(made: Bench, simulator: Simulator) -> None:
    simulator.faults.http_delay_seconds = 60
    checker = GraphChecker(made.ground.backends, SystemClock(), patience=0.05)
    async with asyncio.timeout(10):
        assert await checker.needed_nodes({"1": {"class_type": "WhoKnows", "inputs": {}}}) == 1


def test_a_tiny_time_out_is_not_none() -> None:
    terms = Terms.of(QueueConfig(), LimitsConfig(), StorageConfig(), Room(Path(), 0))
    assert terms.policy_of(SubmitRequest(workflow="w", timeout=0.0001)).timeout_ms == 1


def test_terms_fill_in_what_a_request_leaves_open() -> None:
    terms = Terms.of(
        QueueConfig(timeout=60, start_timeout=0, stall_timeout=1.5),
        LimitsConfig(),
        StorageConfig(),
        Room(Path(), 0),
    )
    assert terms.policy == Policy(
        max_attempts=3, timeout_ms=60_000, start_timeout_ms=None, stall_timeout_ms=1_500
    )
    asked = terms.policy_of(SubmitRequest(workflow="w", start_timeout=5, max_attempts=1))
    assert asked == Policy(max_attempts=1, timeout_ms=60_000, start_timeout_ms=5_000, stall_timeout_ms=1_500)


def renderer(**limits: int) -> Renderer:
    return Renderer(Catalog(Path("none"), GraphLimits()), random.Random(1), GraphLimits(**limits))


def test_a_data_uri_may_be_longer_than_a_text_until_its_length_is_checked() -> None:
    small = renderer(string_length=100, data_uri_length=200)
    for word in ("data:", "DATA:"):
        graph = {"1": {"class_type": "A", "inputs": {"x": word + "a" * 150}}}
        checked = small.render(SubmitRequest(workflow=graph)).graph
        with pytest.raises(InvalidWorkflow) as caught:
            small.check_lengths(checked)
        assert caught.value.details["errors"][0]["type"] == "string_too_long"
    for text in ("data:" + "a" * 200, "a" * 150):
        with pytest.raises(InvalidWorkflow):
            small.render(SubmitRequest(workflow={"1": {"class_type": "A", "inputs": {"x": text}}}))
    small.check_lengths({"1": {"class_type": "A", "inputs": {"x": "data:a"}, "_meta": {}}})


async def test_a_storage_that_cannot_be_used_is_refused_before_anything_is_looked_at(made: Bench) -> None:
    with pytest.raises(StorageNotConfigured):
        await made.submit("no-such-template", output=OutputOptions(storage="s3"))
    assert await queued(made) == 0


async def test_the_uploads_of_a_graph_are_in_its_row(made: Bench) -> None:
    upload = await made.state.uploads.add_data_uri(data_uri(png()))
    graph = colored(1)
    graph["5"] = {"class_type": "LoadImage", "inputs": {"image": upload.reference}}
    assert await made.store.uploads((await made.submit(graph)).id) == (upload.file,)
    assert await made.store.uploads((await made.submit(colored(2))).id) == ()


async def test_assets_in_graph_and_inputs_become_uploads_of_the_task(made: Bench) -> None:
    async with made.state.uploads.receive(chunked(png())) as received:
        asset, _ = await made.state.library.add(received, content_type="image/png", file_path="a.png")
    named = {"__type": "core/ASSET", "info": {"id": asset.id}}
    graph = {**GRAPH, "5": {"class_type": "LoadImage", "inputs": {"image": named}}}
    direct = await made.submit(graph)
    graph = {**GRAPH, "5": {"class_type": "LoadImage", "inputs": {"image": "x.png"}}}
    as_input = await made.submit(graph, inputs={"5.image": named})
    for row in (direct, as_input):
        assert await made.store.uploads(row.id) == (asset.file,)
        rendered = await made.store.graph(row.id)
        assert rendered is not None
        assert rendered["5"]["inputs"]["image"] == f"upload:{asset.file}"


async def test_an_asset_that_is_none_is_refused(made: Bench) -> None:
    named = {"__type": "core/ASSET", "info": {"id": "5e1f6c1e-0000-4000-8000-00000000dead"}}
    with pytest.raises(MissingAsset):
        await made.submit({"5": {"class_type": "LoadImage", "inputs": {"image": named}}})
    assert await queued(made) == 0
