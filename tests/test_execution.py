"""A claim becomes an outcome: every way a prompt can go, against a simulated ComfyUI and a real database."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.simulator.options import FlavorName
from comfyd.tasks import OutputOptions, OutputType, Status
from tests.support.service import Bench, bench, colored, configuration, sampled, simulator_of, until

GRAPHS = Path(__file__).parent / "graphs"


def shipped(name: str) -> dict[str, Any]:
    graph = json.loads((GRAPHS / f"{name}.json").read_text())
    assert isinstance(graph, dict)
    return graph


@pytest.fixture
async def simulator(request: pytest.FixtureRequest) -> AsyncIterator[Simulator]:
    flavor: FlavorName = getattr(request, "param", "0.3.75")
    async with Simulator(SimulatorOptions(step_seconds=0.01, flavor=flavor)) as made:
        yield made


both_flavors = pytest.mark.parametrize("simulator", ["0.3.75", "0.33"], indirect=True)
"""Where the two ComfyUIs differ in what they can do or how they say it."""


@pytest.fixture
async def made(simulator: Simulator, tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(configuration(tmp_path / "data", simulator.url)) as running:
        yield running


@both_flavors
async def test_a_workflow_goes_in_and_a_stored_result_comes_out(made: Bench, tmp_path: Path) -> None:
    task = await made.ended((await made.submit(shipped("image-generate"))).id)
    assert task.status is Status.SUCCEEDED
    (picture,) = task.artefacts
    data = (tmp_path / "data" / "files" / picture.key).read_bytes()
    assert data.startswith(b"\x89PNG")
    assert hashlib.sha256(data).hexdigest() == picture.sha256
    assert (len(data), picture.width, picture.height) == (picture.size_bytes, 512, 512)
    assert (picture.name, picture.type) == ("generate_00001_.png", OutputType.IMAGE)
    (attempt,) = task.attempts
    assert (attempt.number, attempt.outcome, attempt.backend) == (1, "succeeded", "comfyui-0")
    assert attempt.execution_ms is not None
    assert task.started_at is not None
    assert task.completed_at is not None


@both_flavors
async def test_every_kind_of_output_arrives(made: Bench) -> None:
    task = await made.ended((await made.submit(shipped("multi-output"))).id)
    kinds = sorted((output.node_id, output.type) for output in task.artefacts)
    assert kinds == [("10", "image")] * 2 + [("11", "image")] * 2 + [("14", "text"), ("15", "latent")]
    text = next(output for output in task.artefacts if output.type is OutputType.TEXT)
    assert (text.text, text.content_type) == ("hello comfyd", "text/plain; charset=utf-8")


async def test_temp_pictures_come_when_asked_for_and_when_they_are_all_there_is(made: Bench) -> None:
    asked = await made.submit(shipped("multi-output"), output=OutputOptions(include_temp=True))
    assert {output.node_id for output in (await made.ended(asked.id)).artefacts} >= {"12", "13"}
    graph = colored(5)
    graph["2"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    assert len((await made.ended((await made.submit(graph)).id)).artefacts) == 1


@both_flavors
async def test_images_that_come_over_the_socket_are_outputs(made: Bench) -> None:
    task = await made.ended((await made.submit(shipped("websocket-image"))).id)
    assert [(output.name, output.width) for output in task.artefacts] == [
        ("websocket_00001.png", 64),
        ("websocket_00002.png", 64),
    ]


async def test_lost_socket_images_are_made_again(made: Bench, simulator: Simulator) -> None:
    await until(lambda: made.ground.backends[0].state.socket)
    simulator.faults.sockets = "deaf"
    task = await made.submit(shipped("websocket-image"))
    await made.until(lambda row: row.attempt_count > 1, task.id)
    simulator.faults.sockets = "none"
    simulator.drop_sockets()
    ended = await made.ended(task.id)
    assert ended.status is Status.SUCCEEDED
    assert ended.failures == 0
    assert ended.attempts[0].outcome == "lost"


@both_flavors
async def test_the_same_prompt_twice_gives_two_results(made: Bench, simulator: Simulator) -> None:
    first = await made.ended((await made.submit(colored(77))).id)
    await made.state.control.delete(first.id)
    second = await made.ended((await made.submit(colored(77))).id)
    third = await made.ended((await made.submit(colored(77))).id)
    assert second.status is third.status is Status.SUCCEEDED
    assert len({first.artefacts[0].key, second.artefacts[0].key, third.artefacts[0].key}) == 3
    assert simulator.executions[-1].cached == ["1"]


@both_flavors
async def test_a_node_that_raises_fails_the_task_and_is_named(made: Bench) -> None:
    task = await made.ended((await made.submit(shipped("fail-at-runtime"))).id)
    assert task.status is Status.FAILED
    assert task.error is not None
    assert task.error.code == "execution_error"
    assert task.error.details["node_id"] == "3"
    assert task.error.details["class_type"] == "RegexReplace"
    assert "unterminated subpattern" in task.error.message
    assert task.attempt_count == 1


@both_flavors
async def test_what_comfyui_refuses_is_told_node_by_node(made: Bench) -> None:
    task = await made.ended((await made.submit(shipped("image-to-image"))).id)
    assert task.error is not None
    assert task.error.code == "invalid_workflow"
    assert "1" in task.error.details["node_errors"]
    assert task.attempt_count == 1


@both_flavors
async def test_a_graph_of_which_only_a_part_would_run_is_not_run(made: Bench) -> None:
    graph = colored(3)
    graph["7"] = {"class_type": "LoadImage", "inputs": {"image": "not-there.png"}}
    graph["8"] = {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "x"}}
    task = await made.ended((await made.submit(graph)).id)
    assert task.error is not None
    assert task.error.code == "partial_validation"
    assert task.artefacts == ()


async def test_a_part_that_ran_because_the_answer_was_lost_is_no_success(
    made: Bench, simulator: Simulator
) -> None:
    simulator.faults.prompt_answers_cut = 1
    graph = colored(4)
    graph["7"] = {"class_type": "LoadImage", "inputs": {"image": "not-there.png"}}
    graph["8"] = {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "x"}}
    task = await made.ended((await made.submit(graph)).id)
    assert task.error is not None
    assert task.error.code == "partial_validation"
    assert "8" in task.error.message
    assert task.artefacts == ()


@both_flavors
async def test_progress_rises_and_names_node_and_step(made: Bench) -> None:
    task = await made.submit(sampled(1))
    events = await made.events(task.id)
    progress = [msgspec.json.decode(event.data) for event in events if event.name == "progress"]
    values = [entry["value"] for entry in progress]
    assert values == sorted(values)
    assert values[-1] == 1.0
    sampling = [entry for entry in progress if entry["current_node_class"] == "KSampler" and entry["step"]]
    assert len({entry["step"] for entry in sampling}) >= 3
    assert sampling[-1]["steps"] == 20
    assert {entry["nodes_total"] for entry in progress} == {7}
    previews = [event for event in events if event.name == "preview"]
    assert previews
    assert previews[0].picture is not None
    assert [event.name for event in events if event.name == "output"] == ["output"]
    assert events[-1].final


async def test_cached_nodes_count_as_done(made: Bench) -> None:
    await made.ended((await made.submit(colored(9))).id)
    task = await made.submit(colored(9))
    progress = [
        msgspec.json.decode(event.data) for event in await made.events(task.id) if event.name == "progress"
    ]
    assert progress[-1]["nodes_done"] == progress[-1]["nodes_total"] == 2


@both_flavors
async def test_a_running_prompt_is_cancelled_and_nothing_else(made: Bench, simulator: Simulator) -> None:
    victim, bystander = await made.submit(sampled(1, 2_000)), await made.submit(sampled(2, 5))
    await made.until(
        lambda row: row.attempts != () and row.attempts[0].seen_running_at is not None, victim.id
    )
    asked = await made.state.control.cancel(victim.id)
    assert asked.cancel_requested_at is not None
    assert (await made.ended(victim.id)).status is Status.CANCELED
    assert (await made.ended(bystander.id)).status is Status.SUCCEEDED
    outcomes = {entry.prompt_id: entry.outcome for entry in simulator.executions if entry.event == "end"}
    assert sorted(outcomes.values(), key=str) == ["interrupted", "success"]


@pytest.mark.fault(15)
async def test_a_cancel_is_repeated_until_it_is_true(made: Bench, simulator: Simulator) -> None:
    simulator.faults.interrupts_ignored = 3
    task = await made.submit(sampled(3, 2_000))
    await made.until(lambda row: row.attempts != () and row.attempts[0].seen_running_at is not None, task.id)
    await made.state.control.cancel(task.id)
    assert (await made.ended(task.id)).status is Status.CANCELED
    assert simulator.faults.interrupts_ignored == 0


@both_flavors
async def test_waiting_tasks_are_cancelled_wherever_they_wait(made: Bench, simulator: Simulator) -> None:
    running = await made.submit(sampled(1, 400))
    tasks = [await made.submit(sampled(seed, 1)) for seed in range(2, 8)]
    await made.until(lambda row: row.attempts != () and row.attempts[0].step == "submitted", tasks[0].id)
    for task in tasks:
        await made.state.control.cancel(task.id)
    for task in tasks:
        assert (await made.ended(task.id)).status is Status.CANCELED
    await made.state.control.cancel(running.id)
    await made.ended(running.id)
    assert len({entry.prompt_id for entry in simulator.executions}) == 1


async def test_a_prompt_that_had_finished_before_its_cancel_is_canceled_and_says_so(
    made: Bench, simulator: Simulator, tmp_path: Path
) -> None:
    simulator.faults.uninterruptible = {"EmptyImage"}
    simulator.faults.class_seconds = {"EmptyImage": 0.5}
    graph = colored(123)
    graph["2"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    simulator.faults.interrupts_ignored = -1
    task = await made.submit(graph)
    await made.until(lambda row: row.attempts != () and row.attempts[0].seen_running_at is not None, task.id)
    await made.state.control.cancel(task.id)
    ended = await made.ended(task.id)
    assert ended.status is Status.CANCELED
    assert ended.artefacts == ()
    assert not (tmp_path / "data" / "files" / task.id).exists()


@pytest.mark.fault(14)
async def test_somebody_elses_interrupt_is_forgiven(made: Bench) -> None:
    task = await made.submit(sampled(4, 100))
    row = await made.until(
        lambda row: row.attempts != () and row.attempts[0].seen_running_at is not None, task.id
    )
    await made.ground.backends[0].cancel(row.attempts[0].id)
    ended = await made.ended(task.id)
    assert ended.status is Status.SUCCEEDED
    assert [attempt.outcome for attempt in ended.attempts] == ["stray", "succeeded"]
    assert (ended.failures, ended.strays) == (0, 1)


@pytest.mark.parametrize("fault", ["prompt_answers_lost", "prompt_answers_cut"])
@pytest.mark.fault(7)
async def test_a_post_of_unknown_fate_runs_once(made: Bench, simulator: Simulator, fault: str) -> None:
    setattr(simulator.faults, fault, 1)
    task = await made.ended((await made.submit(colored(31))).id)
    assert task.status is Status.SUCCEEDED
    assert len([entry for entry in simulator.executions if entry.event == "start"]) == 1
    assert task.attempt_count == 1


@pytest.mark.fault(13)
async def test_a_prompt_cleared_from_the_queue_is_given_again_for_free(made: Bench) -> None:
    blocking, task = await made.submit(sampled(5, 60)), await made.submit(sampled(6, 1))
    row = await made.until(lambda row: row.attempts != () and row.attempts[0].step == "submitted", task.id)
    await made.ground.backends[0].cancel(row.attempts[0].id)
    ended = await made.ended(task.id)
    assert [attempt.outcome for attempt in ended.attempts] == ["lost", "succeeded"]
    assert ended.failures == 0
    assert (await made.ended(blocking.id)).status is Status.SUCCEEDED


@pytest.mark.fault(3, 4)
async def test_a_comfyui_that_dies_and_comes_back_loses_nothing(made: Bench, simulator: Simulator) -> None:
    tasks = [await made.submit(sampled(seed, 40)) for seed in range(5)]
    await made.until(
        lambda row: row.attempts != () and row.attempts[0].seen_running_at is not None, tasks[0].id
    )
    await simulator.crash()
    await until(lambda: not made.ground.backends[0].state.ready)
    waiting = await made.submit(sampled(99, 1))
    await simulator.restart()
    for task in (*tasks, waiting):
        ended = await made.ended(task.id)
        assert ended.status is Status.SUCCEEDED
        assert ended.failures == 0
    first = await made.task(tasks[0].id)
    assert [attempt.outcome for attempt in first.attempts] == ["suspect", "succeeded"]


@pytest.mark.fault(18)
async def test_a_prompt_that_kills_comfyui_each_time_is_stopped(made: Bench, simulator: Simulator) -> None:
    simulator.faults.poison = {"RegexReplace"}

    async def revive() -> None:
        while True:
            await simulator.crashed.wait()
            await simulator.restart()

    reviving = asyncio.ensure_future(revive())
    try:
        poisoned = await made.submit(shipped("fail-at-runtime"))
        ended = await made.ended(poisoned.id)
        good = await made.ended((await made.submit(colored(41))).id)
    finally:
        assert not reviving.done()
        reviving.cancel()
    assert ended.error is not None
    assert ended.error.code == "backend_crashed"
    # an attempt whose POST met a closed door is lost, which costs nothing and proves nothing
    assert [attempt.outcome for attempt in ended.attempts if attempt.outcome != "lost"] == ["suspect"] * 3
    assert good.status is Status.SUCCEEDED


@pytest.mark.fault(10)
async def test_the_socket_is_one_and_its_loss_delays_nothing(made: Bench, simulator: Simulator) -> None:
    tasks = [await made.submit(colored(1_000 + n)) for n in range(100)]
    for _ in range(5):
        await until(lambda: made.ground.backends[0].state.socket)
        simulator.drop_sockets()
        await asyncio.sleep(0.03)
    for task in tasks:
        assert (await made.ended(task.id)).status is Status.SUCCEEDED
    assert simulator.sockets.peak == 1
    assert len(set(simulator_of(simulator))) == 100


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.2, 0.35, 0.48])
@pytest.mark.fault(10)
async def test_a_prompt_whose_socket_was_dropped_is_not_late(
    made: Bench, simulator: Simulator, seconds: float
) -> None:
    await until(lambda: made.ground.backends[0].state.socket)
    task = await made.submit(sampled(8, 50))
    await asyncio.sleep(seconds)
    simulator.drop_sockets()
    ended = await made.ended(task.id)
    assert ended.status is Status.SUCCEEDED
    assert ended.attempt_count == 1
    ran_until = next(entry.at for entry in simulator.executions if entry.event == "end")
    assert ended.completed_at is not None
    assert ended.completed_at - ran_until < 1_500


@pytest.mark.fault(9)
async def test_a_deaf_socket_is_noticed_and_replaced(made: Bench, simulator: Simulator) -> None:
    await until(lambda: made.ground.backends[0].state.socket)
    simulator.faults.sockets = "deaf"
    task = await made.ended((await made.submit(colored(51))).id)
    assert task.status is Status.SUCCEEDED
    simulator.faults.sockets = "none"
    await until(lambda: made.ground.backends[0].connections >= 2)


@pytest.mark.fault(22)
async def test_a_short_file_is_read_again_and_never_delivered_short(
    made: Bench, simulator: Simulator
) -> None:
    simulator.faults.view = "cut"
    simulator.faults.view_faults_left = 2
    task = await made.ended((await made.submit(colored(61, width=256, height=256))).id)
    assert task.status is Status.SUCCEEDED
    assert simulator.faults.view_faults_left == 0
    assert len([entry for entry in simulator.executions if entry.event == "start"]) == 1


@pytest.mark.fault(22)
async def test_a_file_that_is_gone_fails_the_attempt_and_leaves_no_half(
    made: Bench, simulator: Simulator, tmp_path: Path
) -> None:
    simulator.faults.view = "missing"
    task = await made.ended((await made.submit(colored(71), max_attempts=2)).id)
    assert task.error is not None
    assert task.error.code == "output_unavailable"
    assert task.attempt_count == 2
    assert not (tmp_path / "data" / "files" / task.id).exists()


async def test_a_task_that_takes_too_long_is_stopped(made: Bench, simulator: Simulator) -> None:
    task = await made.ended((await made.submit(sampled(81, 2_000), timeout=0.3)).id)
    assert task.error is not None
    assert task.error.code == "execution_timeout"
    assert simulator.executions[-1].outcome == "interrupted"


async def test_a_task_that_does_not_start_in_time_is_taken_back(made: Bench) -> None:
    blocking = await made.submit(sampled(82, 250))
    task = await made.ended((await made.submit(sampled(83, 1), start_timeout=0.2, max_attempts=1)).id)
    assert task.error is not None
    assert task.error.code == "start_timeout"
    assert (await made.ended(blocking.id)).status is Status.SUCCEEDED


async def test_a_prompt_without_a_sign_of_life_is_stopped(simulator: Simulator, tmp_path: Path) -> None:
    simulator.faults.class_seconds = {"EmptyImage": 3.0}
    settings = configuration(tmp_path / "data", simulator.url, stall_timeout=0.3, max_attempts=1)
    async with bench(settings) as made:
        task = await made.ended((await made.submit(colored(91))).id)
    assert task.error is not None
    assert task.error.code == "stalled"


async def test_300_tasks_run_in_strict_order_of_priority_then_of_coming(
    simulator: Simulator, tmp_path: Path
) -> None:
    settings = configuration(tmp_path / "data", simulator.url)
    wanted: dict[int, list[str]] = {10: [], 0: [], -10: []}
    async with bench(settings, works=False) as made:
        for number in range(300):
            priority = (0, 10, -10)[number % 3]
            task = await made.submit(colored(2_000 + number), priority=priority)
            wanted[priority].append(task.id)
    async with bench(settings) as made:
        await made.all_ended(300)
        rows = {task_id: await made.task(task_id) for ids in wanted.values() for task_id in ids}
    owner = {attempt.id: row.id for row in rows.values() for attempt in row.attempts}
    ran = [owner[entry.prompt_id] for entry in simulator.executions if entry.event == "start"]
    assert ran == [*wanted[10], *wanted[0], *wanted[-10]]


async def test_an_urgent_task_overtakes_what_is_prepared(made: Bench, simulator: Simulator) -> None:
    tasks = [await made.submit(sampled(seed, 15)) for seed in range(6)]
    await made.until(
        lambda row: row.attempts != () and row.attempts[0].seen_running_at is not None, tasks[0].id
    )
    urgent = await made.submit(sampled(50, 1), priority=100)
    for task in (*tasks, urgent):
        await made.ended(task.id)
    row = await made.task(urgent.id)
    ran = [entry.prompt_id for entry in simulator.executions if entry.event == "start"]
    assert ran.index(row.attempts[0].id) == 2  # only what was in ComfyUI already came before it


async def test_never_more_than_in_flight_prompts_are_in_comfyui(made: Bench) -> None:
    backend = made.ground.backends[0]
    tasks = [await made.submit(sampled(seed, 5)) for seed in range(8)]
    deepest = 0
    while (await made.task(tasks[-1].id)).status is not Status.SUCCEEDED:
        status = await backend.queue_status()
        deepest = max(deepest, len(status["queue_running"]) + len(status["queue_pending"]))
    assert deepest == backend.in_flight


async def test_the_first_prompt_waits_a_moment_for_the_socket_and_has_progress(
    simulator: Simulator, tmp_path: Path
) -> None:
    await simulator.stop_listening()
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        await until(lambda: made.ground.backends[0].state.reason is not None)
        task = await made.submit(sampled(1, 10))
        await simulator.start_listening()
        events = await made.events(task.id)
    values = {msgspec.json.decode(event.data)["value"] for event in events if event.name == "progress"}
    assert len(values) >= 4


@pytest.mark.fault(8)
async def test_a_socket_that_never_opens_holds_nobody_up(simulator: Simulator, tmp_path: Path) -> None:
    simulator.faults.sockets = "refuse"
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        for number in range(3):
            ended = await made.ended((await made.submit(colored(700 + number))).id)
            assert ended.status is Status.SUCCEEDED


async def test_waiting_is_counted_until_the_first_execution(made: Bench) -> None:
    tasks = [await made.submit(sampled(seed, 20)) for seed in range(3)]
    for task in tasks:
        await made.ended(task.id)
    registry = made.state.metrics.registry
    waited = registry.get_sample_value("comfyd_task_waiting_seconds_sum")
    executed = registry.get_sample_value("comfyd_task_executing_seconds_sum")
    assert registry.get_sample_value("comfyd_task_waiting_seconds_count") == 3
    assert waited is not None
    assert executed is not None
    assert waited > executed / 3  # the second waited for the first, the third for both
