"""Steps are repeated, supervised and seen."""

import asyncio

import pytest

from comfyd.loops import BACKOFF_FIRST_MS, BACKOFF_MOST_MS, Crew, Health, Loop, run, stop
from tests.support.clock import HandClock


class Actor:
    """Does as it is told, one word a step; stops the loop when the words are over."""

    def __init__(self, *words: object) -> None:
        self.words = list(words)

    async def step(self) -> int:
        """The next word: an error to raise, or how long to wait."""
        if not self.words:
            raise asyncio.CancelledError
        word = self.words.pop(0)
        if isinstance(word, Exception):
            raise word
        assert isinstance(word, int)
        return word


async def play(actor: Actor, **facts: object) -> tuple[HandClock, Health]:
    clock, health = HandClock(), Health()
    loop = Loop(name="actor", step=actor.step, expected=(ValueError,), jittered=bool(facts.get("jittered")))
    try:
        await run(loop, clock, health)
    except asyncio.CancelledError:
        return clock, health
    raise AssertionError("a loop ends only by cancellation")


async def test_a_step_says_how_long_to_wait() -> None:
    clock, health = await play(Actor(5, 7))
    assert clock.slept == [5, 7]
    assert health.problems() == {}


async def test_a_failing_step_is_tried_again_after_longer_and_longer_pauses() -> None:
    clock, health = await play(Actor(*[ValueError("no")] * 8))
    assert clock.slept[:3] == [BACKOFF_FIRST_MS, 2 * BACKOFF_FIRST_MS, 4 * BACKOFF_FIRST_MS]
    assert clock.slept[-1] == BACKOFF_MOST_MS
    assert health.problems() == {"actor": "no"}


async def test_an_unexpected_error_is_seen_and_survived() -> None:
    clock, health = await play(Actor(KeyError("bug")))
    assert "KeyError" in health.problems()["actor"]
    assert clock.slept == [BACKOFF_FIRST_MS]


async def test_a_good_step_makes_a_loop_well_again_and_its_pause_short() -> None:
    clock, health = await play(Actor(ValueError("no"), ValueError("no"), 1, ValueError("no")))
    assert clock.slept == [BACKOFF_FIRST_MS, 2 * BACKOFF_FIRST_MS, 1, BACKOFF_FIRST_MS]
    assert health.problems() == {"actor": "no"}


async def test_jitter_shortens_the_pause() -> None:
    clock, _ = await play(Actor(ValueError("no")), jittered=True)
    assert clock.slept == [round(BACKOFF_FIRST_MS * 0.75)]


@pytest.mark.parametrize("lost_in", [ValueError("no"), PermissionError("may not kill"), 5])
async def test_a_cancellation_that_got_lost_in_a_step_ends_the_loop_all_the_same(lost_in: object) -> None:
    started, steps = asyncio.Event(), []

    async def step() -> int:
        steps.append(1)
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if isinstance(lost_in, Exception):
                raise lost_in from None
        return 5

    health = Health()
    loop = Loop(name="loses it", step=step, expected=(ValueError,))
    running = asyncio.ensure_future(run(loop, HandClock(), health))
    await started.wait()
    running.cancel()
    await asyncio.wait({running}, timeout=10)
    assert running.cancelled()
    assert steps == [1]
    assert health.problems() == {"loses it": "it was stopped"}  # where nobody wanted that, it is seen


async def test_a_crew_stops_its_loops_when_it_is_left() -> None:
    started = asyncio.Event()

    async def step() -> int:
        started.set()
        await asyncio.Event().wait()
        return 0

    async with Crew([Loop(name="waits", step=step)], HandClock(), Health()) as crew:
        await started.wait()
    assert all(task.done() for task in crew._tasks)  # noqa: SLF001 - the claim is about them


async def test_a_task_that_swallows_a_cancellation_is_stopped_all_the_same() -> None:
    swallowed: list[bool] = []

    async def stubborn() -> None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if swallowed:
                    raise
                swallowed.append(True)

    tasks = [asyncio.create_task(stubborn()), asyncio.create_task(asyncio.sleep(0))]
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await stop(tasks)
    assert tasks[0].cancelled()
    assert swallowed == [True]
