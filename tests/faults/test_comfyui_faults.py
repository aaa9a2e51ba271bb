"""A ComfyUI that goes wrong in every way it can: nothing lost, no GPU run too many, nobody else touched.

Against a simulated ComfyUI in the test's own loop, whose execution log says what the GPU really ran. More of
the same faults, injected for other reasons, are in `tests/test_execution.py` and beside it.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from comfyd.config import Config
from comfyd.prompt import SOCKET_GRACE_MS
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.simulator.faults import SocketFault, ViewFault
from comfyd.tasks import Status, Task
from tests.faults.turned_clock import TurnedClock
from tests.support.service import Bench, bench, colored, configuration, sampled, until
from tests.test_core_regressions import bench_with, executing
from tests.test_execution import shipped
from tests.test_worker import starts

MINUTE_MS = 60_000


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions(step_seconds=0.01)) as made:
        yield made


@pytest.fixture
async def somebody(simulator: Simulator) -> AsyncIterator[aiohttp.ClientSession]:
    """Another client of the same ComfyUI."""
    async with aiohttp.ClientSession(simulator.url) as http:
        yield http


def patient_for(seconds: float, config: Config) -> Config:
    """The configuration, but a request to ComfyUI may take no longer than this."""
    servers = tuple(msgspec.structs.replace(server, request_timeout=seconds) for server in config.comfyui)
    return msgspec.structs.replace(config, comfyui=servers)


def runs(simulator: Simulator, row: Task) -> int:
    """How often the GPU began with some attempt of this task."""
    ours = {attempt.id for attempt in row.attempts}
    return sum(prompt_id in ours for prompt_id in starts(simulator))


def outcomes(row: Task) -> list[str | None]:
    return [attempt.outcome for attempt in row.attempts]


def submitted(row: Task) -> bool:
    return row.attempts != () and row.attempts[-1].step == "submitted"


async def post(somebody: aiohttp.ClientSession, path: str, body: Any = None) -> Any:
    """A request of the other client, which is answered well."""
    async with somebody.post(path, json=body) as answer:
        assert answer.status == 200
        text = await answer.text()
    return msgspec.json.decode(text) if text else None


async def foreign_prompt(somebody: aiohttp.ClientSession, graph: dict[str, Any]) -> str:
    """A prompt of the other client; its id."""
    answer = await post(somebody, "/prompt", {"prompt": graph, "client_id": "somebody"})
    return str(answer["prompt_id"])


def fate(simulator: Simulator, prompt_id: str) -> list[str | None]:
    """How the GPU's runs of one prompt ended; None for one that did not."""
    begun = starts(simulator).count(prompt_id)
    ends = [entry.outcome for entry in simulator.executions if entry.event == "end"]
    ids = [entry.prompt_id for entry in simulator.executions if entry.event == "end"]
    ended: list[str | None] = [end for end, owner in zip(ends, ids, strict=True) if owner == prompt_id]
    return [*ended, *[None] * (begun - len(ended))]


@asynccontextmanager
async def without_socket(config: Config) -> AsyncIterator[Bench]:
    """A comfyd whose socket does not come about, and which has given up waiting for it."""
    clock = TurnedClock()
    async with bench_with(config, clock=clock) as made:
        await until(lambda: made.ground.backends[0].state.ready)
        clock.turn(SOCKET_GRACE_MS)
        yield made


@asynccontextmanager
async def reviving(simulator: Simulator) -> AsyncIterator[None]:
    """Somebody starts ComfyUI again each time it dies."""

    async def revive() -> None:
        while True:
            await simulator.crashed.wait()
            await simulator.restart()

    work = asyncio.ensure_future(revive())
    try:
        yield
        assert not work.done()
    finally:
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work


# the POST


@pytest.mark.fault(7)
@pytest.mark.parametrize("fault", ["prompt_stall_seconds", "prompt_answer_seconds"])
async def test_a_post_that_times_out_here_and_runs_there_is_not_sent_again(
    simulator: Simulator, tmp_path: Path, fault: str
) -> None:
    setattr(simulator.faults, fault, 0.9)
    config = patient_for(0.4, configuration(tmp_path / "data", simulator.url))
    async with bench(config) as made:
        ended = await made.ended((await made.submit(colored(1))).id)
    assert (ended.status, ended.attempt_count, ended.failures) == (Status.SUCCEEDED, 1, 0)
    assert starts(simulator) == [ended.attempts[0].id]


@pytest.mark.fault(7)
async def test_a_post_that_comes_after_it_was_given_up_is_taken_back(
    simulator: Simulator, tmp_path: Path, somebody: aiohttp.ClientSession
) -> None:
    clock = TurnedClock()
    simulator.faults.prompt_stall_seconds = 1.2
    config = patient_for(0.4, configuration(tmp_path / "data", simulator.url))
    async with bench_with(config, clock=clock) as made:
        task = await made.submit(sampled(1, 250))
        await made.until(lambda row: row.attempts != () and row.attempts[0].step == "submitting", task.id)
        await asyncio.sleep(0.2)  # ComfyUI has read the request, and does nothing with it yet
        simulator.faults.prompt_stall_seconds = 0.0
        async with asyncio.timeout(20):
            while not submitted(row := await made.task(task.id)):
                clock.turn(500)
                await asyncio.sleep(0.02)
        assert outcomes(row) == ["lost", None]
        bystander = await foreign_prompt(somebody, colored(2))
        ghost = row.attempts[0].id
        backend = made.ground.backends[0]
        async with asyncio.timeout(20):
            while ghost not in (await backend.queue()).pending:
                await asyncio.sleep(0.01)
            while ghost in (await backend.queue()).pending:
                clock.turn(200)
                await asyncio.sleep(0.02)
        ended = await made.ended(task.id)
        await until(lambda: fate(simulator, bystander) == ["success"])
    assert (ended.status, outcomes(ended), ended.failures) == (Status.SUCCEEDED, ["lost", "succeeded"], 0)
    assert runs(simulator, ended) == 1
    assert fate(simulator, ghost) == []


# the socket


@pytest.mark.fault(8)
@pytest.mark.parametrize("fault", ["hang", "deaf"])
async def test_a_socket_that_never_comes_about_costs_no_run(
    simulator: Simulator, tmp_path: Path, fault: SocketFault
) -> None:
    simulator.faults.sockets = fault
    config = patient_for(0.5, configuration(tmp_path / "data", simulator.url))
    async with without_socket(config) as made:
        tasks = [await made.submit(colored(number)) for number in range(4)]
        for each in tasks:
            ended = await made.ended(each.id)
            assert (ended.status, runs(simulator, ended)) == (Status.SUCCEEDED, 1)
    assert len(starts(simulator)) == len(tasks)


@pytest.mark.fault(9)
async def test_a_socket_that_dies_silently_in_mid_run_makes_nobody_late(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        await until(lambda: made.ground.backends[0].state.socket)
        task = await made.submit(sampled(1, 60))
        await made.until(executing, task.id)
        simulator.faults.sockets = "deaf"
        following = await made.submit(colored(2))
        ended = await made.ended(task.id)
        assert ended.status is Status.SUCCEEDED
        stopped = next(entry.at for entry in simulator.executions if entry.event == "end")
        assert ended.completed_at is not None
        assert ended.completed_at - stopped < 2_000
        assert (await made.ended(following.id)).status is Status.SUCCEEDED
        simulator.faults.sockets = "none"
        await until(lambda: made.ground.backends[0].connections >= 2)
    assert len(starts(simulator)) == 2


# history


@pytest.mark.fault(11)
@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
async def test_a_success_long_before_its_history_is_neither_lost_nor_repeated(
    simulator: Simulator, tmp_path: Path, told: bool
) -> None:
    simulator.faults.sockets = "none" if told else "refuse"
    simulator.faults.history_delay_seconds = 0.6
    config = configuration(tmp_path / "data", simulator.url)
    async with bench(config) if told else without_socket(config) as made:
        tasks = [await made.submit(colored(number)) for number in range(2)]
        for each in tasks:
            ended = await made.ended(each.id)
            assert (ended.status, ended.attempt_count) == (Status.SUCCEEDED, 1)
    assert len(starts(simulator)) == len(tasks)


@pytest.mark.fault(12)
async def test_what_was_heard_of_a_prompt_is_kept_although_history_has_evicted_it(
    simulator: Simulator, tmp_path: Path
) -> None:
    simulator.faults.history_limit = 0
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        await until(lambda: made.ground.backends[0].state.socket)
        ended = await made.ended((await made.submit(shipped("multi-output"))).id)
    assert (ended.status, ended.attempt_count, ended.suspects) == (Status.SUCCEEDED, 1, 0)
    kinds = sorted((output.node_id, output.type) for output in ended.artefacts)
    assert kinds == [("10", "image")] * 2 + [("11", "image")] * 2 + [("14", "text"), ("15", "latent")]
    assert len(starts(simulator)) == 1


@pytest.mark.fault(12)
async def test_a_history_that_somebody_clears_at_once_costs_no_second_run(
    simulator: Simulator, tmp_path: Path, somebody: aiohttp.ClientSession
) -> None:
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        await until(lambda: made.ground.backends[0].state.socket)

        async def clear() -> None:
            while True:
                await post(somebody, "/history", {"clear": True})
                await asyncio.sleep(0)

        clearing = asyncio.ensure_future(clear())
        tasks = [await made.submit(colored(number)) for number in range(5)]
        rows = [await made.ended(each.id) for each in tasks]
        clearing.cancel()
        with suppress(asyncio.CancelledError):
            await clearing
    assert [(row.status, row.attempt_count) for row in rows] == [(Status.SUCCEEDED, 1)] * len(tasks)
    assert len(starts(simulator)) == len(tasks)


@pytest.mark.fault(12)
async def test_a_prompt_of_which_nothing_was_heard_and_nothing_is_kept_is_not_run_for_ever(
    simulator: Simulator, tmp_path: Path
) -> None:
    """It may be what kills ComfyUI, for all that can be known: two free runs more, then it has failed."""
    simulator.faults.history_limit = 0
    simulator.faults.sockets = "refuse"
    simulator.faults.class_seconds = {"SaveImage": 0.6}  # long enough to be seen running
    async with without_socket(configuration(tmp_path / "data", simulator.url)) as made:
        ended = await made.ended((await made.submit(colored(1))).id)
    assert ended.status is Status.FAILED
    assert ended.error is not None
    assert ended.error.code == "backend_crashed"
    assert runs(simulator, ended) == len(ended.attempts) == 3


@pytest.mark.fault(12)
async def test_a_quick_prompt_that_is_never_seen_and_never_kept_is_not_run_for_ever(
    simulator: Simulator, tmp_path: Path
) -> None:
    simulator.faults.history_limit = 0
    simulator.faults.sockets = "refuse"
    async with without_socket(configuration(tmp_path / "data", simulator.url)) as made:
        task = await made.submit(colored(1))
        async with asyncio.timeout(20):
            while not (row := await made.task(task.id)).status.terminal and len(starts(simulator)) <= 6:
                await asyncio.sleep(0.02)
    assert row.status is Status.FAILED
    assert len(starts(simulator)) <= 4


# somebody else at the same ComfyUI


@pytest.mark.fault(13)
async def test_a_queue_that_somebody_clears_is_filled_again_and_what_runs_goes_on(
    simulator: Simulator, tmp_path: Path, somebody: aiohttp.ClientSession
) -> None:
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        running = await made.submit(sampled(1, 80))
        await made.until(executing, running.id)
        waiting = [await made.submit(colored(number)) for number in range(4)]
        await made.until(submitted, waiting[0].id)
        await post(somebody, "/queue", {"clear": True})
        first = await made.ended(running.id)
        rows = [await made.ended(each.id) for each in waiting]
    assert outcomes(first) == ["succeeded"]
    assert outcomes(rows[0]) == ["lost", "succeeded"]
    for row in (first, *rows):
        assert (row.status, row.failures, runs(simulator, row)) == (Status.SUCCEEDED, 0, 1)


async def interrupted_globally(
    made: Bench, simulator: Simulator, somebody: aiohttp.ClientSession, times: int
) -> Task:
    """A task that somebody interrupts so often without saying whom; as it ends."""
    task = await made.submit(sampled(1, 40))
    for number in range(times):
        await until(lambda: len(starts(simulator)) == number + 1)  # noqa: B023 - waited for at once
        await post(somebody, "/interrupt")
    return await made.ended(task.id)


@pytest.mark.fault(14)
async def test_global_interrupts_of_others_are_forgiven_three_times(
    simulator: Simulator, tmp_path: Path, somebody: aiohttp.ClientSession
) -> None:
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        ended = await interrupted_globally(made, simulator, somebody, 3)
    assert (ended.status, ended.failures, ended.strays) == (Status.SUCCEEDED, 0, 3)
    assert outcomes(ended) == [*["stray"] * 3, "succeeded"]
    assert runs(simulator, ended) == 4


@pytest.mark.fault(14)
async def test_a_task_that_somebody_interrupts_each_time_fails_and_says_so(
    simulator: Simulator, tmp_path: Path, somebody: aiohttp.ClientSession
) -> None:
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        ended = await interrupted_globally(made, simulator, somebody, 4)
        other = await made.ended((await made.submit(colored(2))).id)
    assert ended.error is not None
    assert (ended.status, ended.error.code, ended.failures) == (Status.FAILED, "interrupted", 0)
    assert "somebody else" in ended.error.message
    assert runs(simulator, ended) == 4
    assert other.status is Status.SUCCEEDED


@pytest.mark.fault(15)
async def test_a_cancel_whose_interrupts_are_lost_hits_its_target_and_nobody_else(
    simulator: Simulator, tmp_path: Path, somebody: aiohttp.ClientSession
) -> None:
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        task = await made.submit(sampled(1, 2_000))
        await made.until(executing, task.id)
        bystander = await foreign_prompt(somebody, sampled(2, 20))
        following = await made.submit(sampled(3, 20))
        simulator.faults.interrupts_ignored = 5
        await made.state.control.cancel(task.id)
        ended = await made.ended(task.id)
        assert (await made.ended(following.id)).status is Status.SUCCEEDED
        await until(lambda: fate(simulator, bystander) == ["success"])
    assert ended.status is Status.CANCELED
    assert simulator.faults.interrupts_ignored == 0
    assert fate(simulator, ended.attempts[0].id) == ["interrupted"]


# ComfyUI dies


@pytest.mark.fault(18)
async def test_a_poison_workflow_ends_failed_and_the_good_ones_around_it_do_not_pay(
    simulator: Simulator, tmp_path: Path
) -> None:
    simulator.faults.poison = {"RegexReplace"}
    async with bench(configuration(tmp_path / "data", simulator.url)) as made, reviving(simulator):
        good = [await made.submit(sampled(number, 5)) for number in range(5)]
        poisoned = await made.submit(shipped("fail-at-runtime"))
        good += [await made.submit(sampled(number, 5)) for number in range(5, 10)]
        ended = await made.ended(poisoned.id)
        rows = [await made.ended(each.id) for each in good]
    assert ended.error is not None
    assert (ended.status, ended.error.code) == (Status.FAILED, "backend_crashed")
    assert [outcome for outcome in outcomes(ended) if outcome != "lost"] == ["suspect"] * 3
    assert runs(simulator, ended) == 3
    for row in rows:
        assert (row.status, row.failures) == (Status.SUCCEEDED, 0)
        assert runs(simulator, row) == 1 + row.suspects  # and those are of one that was running just then
    assert sum(row.suspects for row in rows) <= 1


@pytest.mark.fault(21)
@pytest.mark.parametrize("moment", ["waiting", "running"])
async def test_a_comfyui_that_is_back_before_anybody_looked_has_lost_nothing_of_ours(
    simulator: Simulator, tmp_path: Path, moment: str
) -> None:
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        tasks = [await made.submit(sampled(number, 25)) for number in range(5)]
        await made.until(executing if moment == "running" else submitted, tasks[0].id)
        await simulator.crash()
        await simulator.restart()
        rows = [await made.ended(each.id) for each in tasks]
    for row in rows:
        assert (row.status, row.failures) == (Status.SUCCEEDED, 0)
        assert runs(simulator, row) <= 1 + row.suspects
    assert sum(row.suspects for row in rows) <= 1  # the one that ran
    assert len(starts(simulator)) <= len(tasks) + 1


@pytest.mark.fault(20)
async def test_ten_minutes_without_comfyui_cost_no_attempt_and_no_second_run(
    simulator: Simulator, tmp_path: Path
) -> None:
    clock = TurnedClock()
    async with bench_with(configuration(tmp_path / "data", simulator.url), clock=clock) as made:
        tasks = [await made.submit(sampled(number, 40 if number == 0 else 5)) for number in range(4)]
        await made.until(executing, tasks[0].id)
        await made.until(submitted, tasks[1].id)
        await simulator.crash()
        await until(lambda: not made.ground.backends[0].state.ready)
        for number in range(10):
            await clock.pass_time(MINUTE_MS, step=10_000)
            tasks.append(await made.submit(sampled(100 + number, 2)))
        assert not made.ground.backends[0].state.ready
        counts = await made.store.counts()
        assert counts[Status.QUEUED] + counts[Status.RUNNING] == len(tasks)
        await simulator.restart()
        await clock.pass_time(MINUTE_MS, step=2_000, real=0.02)  # whoever backed off looks again
        rows = [await made.ended(each.id) for each in tasks]
    assert [(row.status, row.failures) for row in rows] == [(Status.SUCCEEDED, 0)] * len(tasks)
    assert outcomes(rows[0]) == ["suspect", "succeeded"]
    assert outcomes(rows[1]) == ["lost", "succeeded"]
    for row in rows[2:]:
        assert [outcome for outcome in outcomes(row) if outcome != "lost"] == ["succeeded"]
        assert len(row.attempts) <= 2
    assert Counter(starts(simulator)).most_common(1)[0][1] == 1
    assert len(starts(simulator)) == len(tasks) + 1


@pytest.mark.fault(20)
async def test_a_comfyui_that_is_back_after_ten_minutes_is_listened_to_as_soon_as_it_works(
    simulator: Simulator, tmp_path: Path
) -> None:
    clock = TurnedClock()
    async with bench_with(configuration(tmp_path / "data", simulator.url), clock=clock) as made:
        backend = made.ground.backends[0]
        await until(lambda: backend.state.socket)
        await simulator.crash()
        await until(lambda: not backend.state.ready)
        await clock.pass_time(10 * MINUTE_MS, step=20_000)
        await simulator.restart()
        await until(lambda: backend.state.ready)
        await until(lambda: backend.state.socket, patience=2.0)  # else prompts run that nobody hears of


# ComfyUI is slow


@pytest.mark.fault(19)
async def test_a_comfyui_that_answers_slowly_only_takes_longer(simulator: Simulator, tmp_path: Path) -> None:
    simulator.faults.http_delay_seconds = 0.15
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        tasks = [await made.submit(colored(number)) for number in range(5)]
        rows = [await made.ended(each.id) for each in tasks]
    assert [(row.status, row.attempt_count) for row in rows] == [(Status.SUCCEEDED, 1)] * len(tasks)
    assert len(starts(simulator)) == len(tasks)


@pytest.mark.fault(19)
async def test_a_comfyui_too_slow_for_any_answer_is_not_dead_and_gets_nothing_twice(
    simulator: Simulator, tmp_path: Path
) -> None:
    config = patient_for(0.3, configuration(tmp_path / "data", simulator.url))
    async with bench(config) as made:
        tasks = [await made.submit(sampled(number, 50)) for number in range(3)]
        await made.until(executing, tasks[0].id)
        simulator.faults.http_delay_seconds = 1.0
        await asyncio.sleep(1.5)  # the running one ends, and nobody can ask for it
        assert (await made.task(tasks[0].id)).status is Status.RUNNING
        simulator.faults.http_delay_seconds = 0.0
        rows = [await made.ended(each.id) for each in tasks]
    for row in rows:
        assert (row.status, row.failures, row.suspects) == (Status.SUCCEEDED, 0, 0)
        assert runs(simulator, row) == 1


# its files


@pytest.mark.fault(22)
@pytest.mark.parametrize("fault", ["cut", "error", "stall"])
async def test_a_file_that_is_served_wrongly_for_a_while_arrives_whole_and_nothing_runs_again(
    simulator: Simulator, tmp_path: Path, fault: ViewFault
) -> None:
    simulator.faults.view = fault
    simulator.faults.view_faults_left = 3
    config = patient_for(0.4, configuration(tmp_path / "data", simulator.url))
    async with bench(config) as made:
        ended = await made.ended((await made.submit(colored(1, width=256, height=256))).id)
        (picture,) = ended.artefacts
        data = (tmp_path / "data" / "files" / picture.key).read_bytes()
    assert (ended.status, ended.attempt_count) == (Status.SUCCEEDED, 1)
    assert len(data) == picture.size_bytes
    (made_by_comfyui,) = simulator.folders.roots["output"].rglob("*.png")
    assert made_by_comfyui.read_bytes() == data
    assert len(starts(simulator)) == 1


@pytest.mark.fault(22)
@pytest.mark.parametrize("fault", ["short", "cut", "error"])
async def test_a_file_that_is_never_served_whole_is_never_delivered(
    simulator: Simulator, tmp_path: Path, fault: ViewFault
) -> None:
    simulator.faults.view = fault
    async with bench_with(configuration(tmp_path / "data", simulator.url), clock=TurnedClock()) as made:
        clock = made.state.clock
        assert isinstance(clock, TurnedClock)
        task = await made.submit(colored(1, width=256, height=256), max_attempts=1)
        async with asyncio.timeout(20):
            while not (await made.task(task.id)).status.terminal:
                clock.turn(200)
                await asyncio.sleep(0.01)
        ended = await made.ended(task.id)
    assert ended.status is Status.FAILED
    assert ended.error is not None
    assert ended.error.code in {"output_unavailable", "backend_unclear"}
    assert ended.artefacts == ()
    assert not (tmp_path / "data" / "files" / task.id).exists()
