"""Live events of jobs through the official SDK."""

import asyncio
import io
from dataclasses import dataclass, field

import pytest
from comfy_sdk import (
    AsyncComfy,
    AsyncJob,
    Comfy,
    Event,
    Job,
    Output,
    OutputReady,
    Preview,
    Progress,
    Workflow,
)
from comfy_sdk.events import StatusChange
from PIL import Image

from tests.conformance import graphs
from tests.sdk.stage import (
    FILLED,
    PATIENCE,
    REAL_ONLY,
    Stage,
    async_finished,
    busy,
    finished,
    listening,
    seen,
)

WATCHERS = 30


@dataclass(kw_only=True)
class Heard:
    """What one watcher heard, by kind, and the kinds in order."""

    kinds: list[str] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    previews: list[Preview] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def take(self, event: Event) -> None:
        """Note it."""
        self.kinds.append(type(event).__name__)
        match event:
            case StatusChange():
                self.statuses.append(event.status)
            case Progress():
                self.progress.append(event)
            case Preview():
                self.previews.append(event)
            case OutputReady():
                self.outputs.append(event.output.id)

    @property
    def values(self) -> list[float]:
        """Of the progress."""
        return [one.value for one in self.progress]


def hear(job: Job) -> Heard:
    """Everything until the job ends."""
    heard = Heard()
    for event in job.events():
        heard.take(event)
    return heard


async def async_hear(job: AsyncJob) -> Heard:
    """The same, asynchronously."""
    heard = Heard()
    async for event in job.events():
        heard.take(event)
    return heard


def check(heard: Heard, job: Job | AsyncJob) -> None:
    """What holds for every watcher of a job that succeeds."""
    assert heard.statuses[-1] == "succeeded"
    assert heard.kinds[0] == "StatusChange" or len(heard.statuses) == 1  # who comes late hears one
    assert heard.kinds[-1] == "StatusChange"
    assert [status for status in heard.statuses if status != "queued"][:-1] in ([], ["running"])
    assert heard.values == sorted(heard.values)
    assert all(0 <= value <= 1 for value in heard.values)
    assert sorted(heard.outputs) == sorted(output.id for output in job.outputs)


def test_events_have_progress_previews_and_outputs_before_the_end(stage: Stage, client: Comfy) -> None:
    job = client.submit(Workflow(stage.sketching()))
    heard = hear(job)
    check(heard, job.refresh())
    assert len(heard.outputs) == 1
    assert len(set(heard.values)) >= 3
    assert any(one.current_node == "3" and one.steps for one in heard.progress)
    assert {one.nodes_total for one in heard.progress} == {len(job.get_workflow().graph)}
    assert heard.previews
    for preview in heard.previews:
        assert (preview.node_id, preview.content_type) == ("3", "image/jpeg")
        with preview.to_pil() as sketch:
            sketch.load()
            assert sketch.format == "JPEG"


def test_an_output_can_be_taken_as_soon_as_it_is_announced(client: Comfy) -> None:
    job = client.submit(Workflow(graphs.picture()))
    for event in job.events():
        if isinstance(event, OutputReady):
            assert isinstance(event.output, Output)
            with Image.open(io.BytesIO(event.output.to_bytes())) as image:
                assert image.size == (16, 16)
            break
    else:
        pytest.fail("no output was announced")


def test_an_output_is_there_while_the_job_goes_on(stage: Stage, client: Comfy) -> None:
    slow, quick = stage.sketching(40), graphs.picture()
    workflow = Workflow({**slow, "101": quick["1"], "109": quick["9"]})
    workflow.set_input("109", "images", ["101", 0])
    job = client.submit(workflow)
    with listening(job) as events:
        early = next(event.output for event in events if isinstance(event, OutputReady))
        found = client.jobs.get(job.id)
        assert isinstance(early, Output)
        assert (early.node_id, found.status) == ("109", "running")
        assert [output.id for output in found.outputs] == [early.id]
        data = early.to_bytes()
    assert [output.to_bytes() for output in finished(job).get_outputs("109")] == [data]


def test_each_of_several_outputs_is_announced_once(client: Comfy) -> None:
    job = client.submit(Workflow(graphs.named("multi-output")))
    heard = hear(job)
    check(heard, job.refresh())
    assert len(heard.outputs) == len(set(heard.outputs)) == len(job.outputs) >= 6


def test_who_comes_after_the_end_hears_outputs_and_the_end(client: Comfy) -> None:
    job = finished(client.submit(Workflow(graphs.picture())))
    heard = hear(client.jobs.get(job.id))
    assert heard.outputs == [job.outputs[0].id]
    assert heard.statuses[-1] == "succeeded"


def test_who_comes_late_hears_how_far_it_is(stage: Stage, client: Comfy) -> None:
    job = client.submit(Workflow(stage.sketching(60)))
    with listening(job) as events:
        for event in events:
            if isinstance(event, Progress) and event.value > 0.3:
                break
    late = Heard()
    with listening(client.jobs.get(job.id)) as events:
        for event in events:
            late.take(event)
            if late.previews:
                break
    assert late.statuses == ["running"]
    assert late.values[0] > 0.3
    assert finished(job.cancel()).status in {"canceled", "succeeded"}


def test_a_failure_ends_the_events(client: Comfy) -> None:
    heard = hear(client.submit(Workflow(graphs.failing())))
    assert heard.statuses[-1] == "failed"


def test_a_cancel_ends_the_events_of_a_running_job(client: Comfy) -> None:
    job = client.submit(Workflow(graphs.blocker()))
    heard = Heard()
    for event in job.events():
        heard.take(event)
        if isinstance(event, Progress) and event.value > 0 and job.status != "canceling":
            job.cancel()
    assert heard.statuses[-1] == "canceled"
    assert heard.outputs == []


def test_a_waiting_job_says_its_place(client: Comfy) -> None:
    with busy(client):
        job = client.submit(Workflow(graphs.picture()))
        with listening(job) as events:
            first = next(events)
        assert isinstance(first, StatusChange)
        assert (first.status, first.queue_position is None) == ("queued", False)
        job.cancel()


async def test_thirty_watchers_of_one_job_hear_it_to_the_end(stage: Stage, async_client: AsyncComfy) -> None:
    before = [await async_client.submit(Workflow(graphs.blocker())) for _ in range(FILLED)]
    job = await async_client.submit(Workflow(stage.sketching(20)))
    all_here = asyncio.Barrier(WATCHERS + 1)

    async def watch() -> Heard:
        heard = Heard()
        async for event in job.events():
            if not heard.kinds:
                await all_here.wait()
            heard.take(event)
        return heard

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        watching = [group.create_task(watch()) for _ in range(WATCHERS)]
        await all_here.wait()
        for one in before:
            await one.cancel()
    all_heard = [task.result() for task in watching]
    await job.wait(PATIENCE)
    assert len(job.outputs) == 1
    for heard in all_heard:
        check(heard, job)
        assert heard.previews


async def test_many_jobs_are_watched_at_once(async_client: AsyncComfy) -> None:
    async def one() -> None:
        job = await async_client.submit(Workflow(graphs.picture()))
        heard = await async_hear(job)
        check(heard, await async_finished(job))

    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*(one() for _ in range(WATCHERS)))


@REAL_ONLY
def test_progress_rises_over_a_long_graph(client: Comfy) -> None:
    job = client.submit(Workflow(graphs.named("slow-progress")))
    heard = hear(job)
    check(heard, job.refresh())
    assert len(set(heard.values)) >= 10
    seen(job, lambda found: found.status == "succeeded")
