"""The watchdog speaks once when the loop hangs, says where, and keeps apart what stopped all of comfyd."""

import asyncio
import threading
import time
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest

from comfyd.clock import SystemClock
from comfyd.loops import Crew, Health, Loop
from comfyd.metrics import Metrics
from comfyd.watchdog import FEED_MS, Watchdog
from tests.support.clock import HandClock
from tests.support.logs import captured_logs

LOOK_MS = 250


@pytest.fixture
def lines() -> Iterator[list[MutableMapping[str, Any]]]:
    with captured_logs() as said:
        yield said


async def test_a_loop_that_hangs_is_named_once_with_its_place_and_when_it_is_back(
    lines: list[MutableMapping[str, Any]],
) -> None:
    late: list[int] = []
    watchdog = Watchdog(SystemClock(), late.append, patience_ms=600)
    loop = Loop(name="watchdog", step=watchdog.step)
    async with Crew([loop], SystemClock(), Health()):
        with watchdog:
            hang(1.5)
            async with asyncio.timeout(10):
                while not any(line["event"] == "loop.back" for line in lines):
                    await asyncio.sleep(0.01)
    assert [line["event"] for line in lines] == ["loop.blocked", "loop.back"]
    blocked, back = lines
    assert "hang" in blocked["stack"][0]
    assert "test_watchdog.py" in blocked["stack"][0]
    assert len(blocked["stack"]) <= 10
    assert 0.6 <= blocked["seconds"] < 1.5 <= back["seconds"]
    assert max(late) >= 1_500 - FEED_MS
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def hang(seconds: float) -> None:
    """What a mistake in the loop does."""
    time.sleep(seconds)


async def test_a_loop_that_answers_is_not_spoken_of(lines: list[MutableMapping[str, Any]]) -> None:
    clock, late = HandClock(), list[int]()
    watchdog = Watchdog(clock, late.append)
    with watchdog:
        for _ in range(40):
            clock.advance(await watchdog.step())
            watchdog.look()
    assert lines == []
    assert late == [0] * 40


async def test_a_process_that_stood_still_blames_no_loop(lines: list[MutableMapping[str, Any]]) -> None:
    clock = HandClock()
    watchdog = Watchdog(clock, list[int]().append)
    await watchdog.step()
    clock.advance(LOOK_MS)
    watchdog.look()
    lines.clear()  # the first look of all has nothing to compare with
    clock.advance(60_000)
    watchdog.look()
    assert [(line["event"], line["seconds"]) for line in lines] == [("process.stood_still", 59.75)]
    for _ in range(7):  # the loop comes back a little later
        clock.advance(LOOK_MS)
        watchdog.look()
    assert len(lines) == 1
    clock.advance(LOOK_MS)
    watchdog.look()
    assert [line["event"] for line in lines] == ["process.stood_still", "loop.blocked"]


async def test_lateness_is_counted_without_the_thread() -> None:
    clock, late = HandClock(), list[int]()
    watchdog = Watchdog(clock, late.append)
    assert await watchdog.step() == FEED_MS
    clock.advance(FEED_MS + 40)
    await watchdog.step()
    clock.advance(FEED_MS - 1)
    await watchdog.step()
    assert late == [40, 0]


def test_lateness_is_a_figure_in_seconds() -> None:
    metrics = Metrics()
    metrics.loop_late(1_500)
    assert metrics.registry.get_sample_value("comfyd_event_loop_lag_seconds_sum") == 1.5
