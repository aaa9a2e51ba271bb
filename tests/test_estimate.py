"""Where a task stands and when it may end."""

from typing import Any

from comfyd.estimate import Estimate, Estimator
from comfyd.progress import Board, Progress
from comfyd.store.base import AHEAD_MOST
from comfyd.tasks import RunTimes, Status, Task
from tests.support.clock import HandClock
from tests.support.values import attempt, task


class Past:
    """The part of a store that estimates need."""

    def __init__(self, own: float | None, overall: float | None, ahead: int = 0, running: int = 0) -> None:
        self._own = own
        self._overall = overall
        self._ahead = ahead
        self._running = running

    async def ahead(self, task: Task, now: int) -> int:
        """See `Store`."""
        assert now >= task.created_at
        return self._ahead

    async def run_times(self, shape: str) -> RunTimes | None:
        """See `Store`."""
        assert shape == "s"
        return None if self._own is None else RunTimes(runs=3, mean_ms=self._own)

    async def mean_run_time(self) -> RunTimes | None:
        """See `Store`."""
        return None if self._overall is None else RunTimes(runs=9, mean_ms=self._overall)

    async def counts(self) -> dict[Status, int]:
        """See `Store`."""
        return {Status.RUNNING: self._running}


def estimator(past: Past, board: Board, clock: HandClock, servers: int = 1) -> Estimator:
    return Estimator(past, board, clock, servers)  # type: ignore[arg-type] # the part it uses


def running(clock: HandClock, seen_ms_ago: int | None) -> Task:
    seen = None if seen_ms_ago is None else clock.now() - seen_ms_ago
    return task(status=Status.RUNNING, attempts=(attempt(seen_running_at=seen),))


async def test_a_waiting_task_counts_what_is_before_it() -> None:
    past = Past(own=2_000, overall=1_000, ahead=4, running=2)
    found = await estimator(past, Board(), HandClock()).of(task())
    assert found == Estimate(queue_position=5, eta_seconds=7.0)


async def test_several_servers_share_the_line() -> None:
    past = Past(own=1_000, overall=1_000, ahead=8, running=0)
    found = await estimator(past, Board(), HandClock(), servers=4).of(task())
    assert found == Estimate(queue_position=9, eta_seconds=3.0)


async def test_without_past_runs_only_the_position_is_known() -> None:
    for overall in (None, 1_000):
        found = await estimator(Past(None, overall, ahead=2), Board(), HandClock()).of(task())
        assert found == Estimate(queue_position=3)


async def test_a_task_that_waits_for_a_retry_waits_at_least_that_long() -> None:
    clock = HandClock()
    found = await estimator(Past(1_000, 1_000), Board(), clock).of(task(available_at=clock.now() + 60_000))
    assert found.eta_seconds == 61.0


async def test_a_running_task_has_what_is_left_of_its_mean() -> None:
    clock, board = HandClock(), Board()
    found = await estimator(Past(10_000, 10_000), board, clock).of(running(clock, 4_000))
    assert found == Estimate(eta_seconds=6.0)
    late = await estimator(Past(10_000, 10_000), board, clock).of(running(clock, 60_000))
    assert late.eta_seconds == 1.0


async def test_a_running_task_without_a_past_is_judged_by_its_progress() -> None:
    clock, board = HandClock(), Board()
    row = running(clock, 3_000)
    assert (await estimator(Past(None, None), board, clock).of(row)).eta_seconds is None
    board.report(row.id, Progress(value=0.25))
    assert (await estimator(Past(None, None), board, clock).of(row)).eta_seconds == 9.0


async def test_a_claimed_task_that_does_not_run_yet_takes_its_whole_mean() -> None:
    clock = HandClock()
    assert (await estimator(Past(5_000, 1), Board(), clock).of(running(clock, None))).eta_seconds == 5.0
    assert (await estimator(Past(None, None), Board(), clock).of(running(clock, None))).eta_seconds is None


async def test_an_ended_task_has_no_estimate() -> None:
    found = await estimator(Past(1, 1), Board(), HandClock()).of(task(status=Status.FAILED, completed_at=1))
    assert found == Estimate()


class Line:
    """A store that knows the queue, and nothing of the past."""

    def __init__(self, ahead: int) -> None:
        self._ahead = ahead

    async def ahead(self, task: Task, now: int) -> int:
        """See `Store`."""
        assert now >= task.created_at
        return self._ahead


async def test_a_place_in_the_queue_needs_no_past_runs() -> None:
    for ahead, place in ((0, 1), (4, 5), (AHEAD_MOST, None)):
        line: Any = Line(ahead)
        in_line = Estimator(line, Board(), HandClock(), 1)
        assert await in_line.position(task()) == place
        assert await in_line.position(task(status=Status.RUNNING)) is None


async def test_far_back_in_the_queue_nothing_is_said() -> None:
    found = await estimator(Past(1, 1, ahead=AHEAD_MOST), Board(), HandClock()).of(task())
    assert found == Estimate()
