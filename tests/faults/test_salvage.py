"""A prompt that ComfyUI forgot: what it saved is not made again, and what comes late is taken back."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from comfyd.config import Config
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.tasks import Status, Step
from tests.support.service import Bench, bench, colored, configuration, until
from tests.support.sources import color_of, png


@pytest.fixture
async def simulator(tmp_path: Path) -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions(directory=tmp_path / "comfyui")) as simulator:
        yield simulator


@pytest.fixture
def config(simulator: Simulator, tmp_path: Path) -> Config:
    return configuration(tmp_path / "data", simulator.url)


FAILING = json.loads((Path(__file__).parents[1] / "graphs" / "fail-at-runtime.json").read_text())


def starts(simulator: Simulator) -> list[str]:
    return [execution.prompt_id for execution in simulator.executions if execution.event == "start"]


def ends(simulator: Simulator) -> list[Any]:
    return [execution for execution in simulator.executions if execution.event == "end"]


async def heard_to_its_end(made: Bench, task_id: str) -> None:
    """Until the socket has told everything: a ComfyUI that dies before may take the last words along."""

    def heard() -> bool:
        progress = made.state.board.progress(task_id)
        return progress is not None and progress.value == 1.0

    await until(heard)


@pytest.mark.fault(5)
async def test_a_comfyui_that_dies_after_saving_need_not_run_it_again(
    simulator: Simulator, config: Config
) -> None:
    simulator.faults.history_delay_seconds = 60
    async with bench(config) as made:
        task = await made.submit(colored(1))
        await heard_to_its_end(made, task.id)
        await simulator.crash()
        await simulator.restart()
        done = await made.ended(task.id)
    assert done.status is Status.SUCCEEDED
    assert done.artefacts[0].size_bytes > 0
    assert len(starts(simulator)) == 1
    assert (done.suspects, len(done.attempts)) == (0, 1)


@pytest.mark.fault(5)
async def test_what_it_saved_and_lost_is_made_again(
    simulator: Simulator, config: Config, tmp_path: Path
) -> None:
    simulator.faults.history_delay_seconds = 60
    simulator.faults.view = "stall"
    async with bench(config) as made:
        task = await made.submit(colored(2))
        await heard_to_its_end(made, task.id)
        await simulator.crash()
        for file in (tmp_path / "comfyui" / "output").rglob("*.png"):
            file.unlink()
        simulator.faults.view = "none"
        simulator.faults.history_delay_seconds = 0
        await simulator.restart()
        done = await made.ended(task.id)
    assert done.status is Status.SUCCEEDED
    assert len(starts(simulator)) == 2
    assert [attempt.outcome for attempt in done.attempts] == ["suspect", "succeeded"]


@pytest.mark.fault(12)
async def test_a_history_that_forgets_at_once_costs_no_second_run(
    simulator: Simulator, config: Config
) -> None:
    simulator.faults.history_limit = 0
    async with bench(config) as made:
        tasks = [await made.submit(colored(number)) for number in range(5)]
        done = [await made.ended(task.id) for task in tasks]
    assert {task.status for task in done} == {Status.SUCCEEDED}
    assert len(starts(simulator)) == 5


@pytest.mark.fault(4)
async def test_a_part_of_the_outputs_is_not_salvaged(
    simulator: Simulator, config: Config, tmp_path: Path
) -> None:
    graph = colored(9)
    graph["3"] = {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}}
    graph["4"] = {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}
    simulator.faults.class_seconds = {"ImageInvert": 60.0}
    async with bench(config) as made:
        task = await made.submit(graph)
        await until(lambda: bool(list((tmp_path / "comfyui" / "output").rglob("*.png"))))
        await made.until(lambda row: row.attempts[-1].seen_running_at is not None, task.id)
        await simulator.crash()
        simulator.faults.class_seconds = {}
        await simulator.restart()
        done = await made.ended(task.id)
    assert [attempt.outcome for attempt in done.attempts] == ["suspect", "succeeded"]


@pytest.mark.fault(5)
async def test_a_file_that_another_prompt_may_have_made_since_is_not_the_result(
    simulator: Simulator, config: Config, tmp_path: Path
) -> None:
    """A ComfyUI in a container loses its output folder: then its numbers begin anew."""
    graph = colored(0xFF0000)
    graph["3"] = {"class_type": "PrimitiveString", "inputs": {"value": "shared"}}
    graph["2"]["inputs"]["filename_prefix"] = ["3", 0]
    simulator.faults.history_delay_seconds = 60
    simulator.faults.view = "stall"
    async with bench(config) as made:
        task = await made.submit(graph)
        await heard_to_its_end(made, task.id)
        await simulator.crash()
        (file,) = (tmp_path / "comfyui" / "output").rglob("*.png")
        assert file.name == "shared_00001_.png"
        file.write_bytes(png(0x0000FF))  # of somebody else
        simulator.faults.view = "none"
        simulator.faults.history_delay_seconds = 0
        await simulator.restart()
        done = await made.ended(task.id)
    assert color_of((tmp_path / "data" / "files" / done.artefacts[0].key).read_bytes()) == 0xFF0000


@pytest.mark.fault(6)
async def test_a_salvage_that_a_restart_of_comfyd_cuts_in_two_costs_no_failure(
    simulator: Simulator, config: Config, tmp_path: Path
) -> None:
    simulator.faults.history_delay_seconds = 60
    simulator.faults.view = "stall"
    async with bench(config) as made:
        task = await made.submit(colored(3))
        await heard_to_its_end(made, task.id)
        await simulator.crash()
        for file in (tmp_path / "comfyui" / "output").rglob("*.png"):
            file.unlink()
        simulator.faults.http_statuses = {"/view": 503}
        await simulator.restart()
        await made.until(lambda row: row.attempts[-1].step is Step.COLLECTED, task.id)
    simulator.faults.http_statuses = {}
    simulator.faults.view = "none"
    simulator.faults.history_delay_seconds = 0
    async with bench(config) as made:
        done = await made.ended(task.id)
    assert done.status is Status.SUCCEEDED
    assert [attempt.outcome for attempt in done.attempts] == ["suspect", "succeeded"]


@pytest.mark.fault(7, 12)
async def test_a_prompt_that_was_heard_although_its_answer_was_lost_is_not_run_again(
    simulator: Simulator, config: Config
) -> None:
    simulator.faults.prompt_answers_cut = 1
    simulator.faults.history_limit = 0
    async with bench(config) as made:
        done = await made.ended((await made.submit(colored(8))).id)
    assert done.status is Status.SUCCEEDED
    assert len(starts(simulator)) == 1


@pytest.mark.fault(12)
async def test_an_error_that_the_history_forgot_is_still_the_error(
    simulator: Simulator, config: Config
) -> None:
    simulator.faults.history_limit = 0
    async with bench(config) as made:
        done = await made.ended((await made.submit(FAILING)).id)
    assert done.status is Status.FAILED
    assert done.error is not None
    assert done.error.code == "execution_error"
    assert done.error.details["class_type"] == "RegexReplace"
    assert len(starts(simulator)) == 1


@pytest.mark.fault(7)
async def test_a_post_that_arrives_after_it_counted_as_lost_is_taken_back(
    simulator: Simulator, tmp_path: Path
) -> None:
    usual = configuration(tmp_path / "data", simulator.url)
    config = msgspec.structs.replace(
        usual, comfyui=(msgspec.structs.replace(usual.comfyui[0], request_timeout=0.3),)
    )
    simulator.faults.prompt_stall_seconds = 7.0
    simulator.faults.class_seconds = {"EmptyImage": 10.0}
    async with bench(config) as made:
        task = await made.submit(colored(4))
        first = await made.until(lambda task: any(attempt.ended_at for attempt in task.attempts), task.id)
        ghost = first.attempts[0].id
        simulator.faults.prompt_stall_seconds = 0.0
        await until(lambda: orphans(made) > 0, patience=15)
        simulator.faults.class_seconds = {}
        done = await made.ended(task.id)
    assert done.status is Status.SUCCEEDED
    *lost, last = done.attempts  # the second POST may have been read late, too
    assert {attempt.outcome for attempt in lost} == {"lost"}
    outcomes = {execution.prompt_id: execution.outcome for execution in ends(simulator)}
    assert outcomes.get(ghost) in {None, "interrupted"}  # taken back before it ran, or in the middle
    assert [prompt_id for prompt_id, outcome in outcomes.items() if outcome == "success"] == [last.id]


def orphans(made: Bench) -> float:
    labels = {"backend": "comfyui-0"}
    registry = made.state.metrics.registry
    return registry.get_sample_value("comfyd_orphaned_prompts_total", labels) or 0.0
