"""The wall clock is set, by a day or to 1970: no task is lost or waits for it, and no time-out follows it."""

import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.tasks import Status, Task
from tests.support.clock import JumpingClock
from tests.support.service import bench, colored, configuration, sampled, until

DAY_MS: Final = 86_400_000
TO_1970: Final = pytest.param(3_600_000 - time.time_ns() // 1_000_000, id="to 1970")
FORWARD: Final = pytest.param(DAY_MS, id="forward")
BACK: Final = pytest.param(-DAY_MS, id="back")


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions(step_seconds=0.01)) as made:
        yield made


def runs(simulator: Simulator) -> Counter[str]:
    """How often each prompt was started on the simulated GPU."""
    return Counter(entry.prompt_id for entry in simulator.executions if entry.event == "start")


def succeeded(task: Task) -> bool:
    return task.status is Status.SUCCEEDED and len(task.attempts) == 1


@pytest.mark.fault(27)
@pytest.mark.parametrize("jump", [FORWARD, BACK, TO_1970])
async def test_a_wall_clock_that_jumps_loses_stops_and_hurries_nothing(
    tmp_path: Path, simulator: Simulator, jump: int
) -> None:
    clock = JumpingClock()
    settings = configuration(
        tmp_path / "data", simulator.url, timeout=60.0, start_timeout=60.0, stall_timeout=60.0
    )
    async with bench(settings, clock=clock) as made:
        tasks = [await made.submit(sampled(1, 60))]
        await until(lambda: len(simulator.executions) == 1)
        tasks += [await made.submit(colored(number)) for number in range(20)]
        clock.shift = jump
        tasks += [await made.submit(colored(100 + number)) for number in range(5)]
        for task in tasks:
            assert succeeded(await made.ended(task.id))
        clock.shift = 0
        assert succeeded(await made.ended((await made.submit(colored(200))).id))
        slow = await made.submit(sampled(2, 5_000), timeout=0.5)
        clock.shift = jump
        ended = await made.ended(slow.id)
    assert ended.error is not None
    assert ended.error.code == "execution_timeout"
    assert set(runs(simulator).values()) == {1}


@pytest.mark.fault(27)
@pytest.mark.parametrize("jump", [BACK, TO_1970])
async def test_a_retry_does_not_wait_for_a_time_that_the_clock_has_left(
    tmp_path: Path, simulator: Simulator, jump: int
) -> None:
    clock = JumpingClock()
    simulator.faults.view = "missing"
    settings = configuration(tmp_path / "data", simulator.url, retry_delay=2.0, retry_delay_max=2.0)
    async with bench(settings, clock=clock) as made:
        task = await made.submit(colored(1))
        retrying = await made.until(lambda row: bool(row.failures), task.id)
        assert retrying.status is Status.QUEUED
        simulator.faults.view = "none"
        clock.shift = jump
        ended = await made.ended(task.id)
    assert (ended.status, len(ended.attempts)) == (Status.SUCCEEDED, 2)


@pytest.mark.fault(27)
@pytest.mark.parametrize("jump", [FORWARD, BACK, TO_1970])
async def test_a_clock_that_was_set_while_comfyd_was_away_keeps_no_task_waiting(
    tmp_path: Path, simulator: Simulator, jump: int
) -> None:
    settings = configuration(tmp_path / "data", simulator.url)
    async with bench(settings, works=False) as made:
        tasks = [await made.submit(colored(number)) for number in range(10)]
    async with bench(settings, clock=JumpingClock(jump)) as made:
        for task in tasks:
            assert succeeded(await made.ended(task.id))


@pytest.mark.fault(8, 27)
async def test_a_clock_that_is_set_back_makes_no_prompt_wait_for_a_socket_that_never_opens(
    tmp_path: Path, simulator: Simulator
) -> None:
    clock = JumpingClock()
    simulator.faults.sockets = "refuse"
    async with bench(configuration(tmp_path / "data", simulator.url), clock=clock) as made:
        await until(lambda: made.ground.backends[0].state.ready)
        clock.shift = -DAY_MS
        assert succeeded(await made.ended((await made.submit(colored(1))).id))
