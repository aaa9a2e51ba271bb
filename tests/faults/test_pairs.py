"""kill -9 of comfyd while ComfyUI has its own trouble: a sample of the pairs; chaos takes every one."""

import random
from pathlib import Path

import pytest

from comfyd.failpoints import NAMES
from tests.faults import scenes
from tests.faults.rig import SLOW_RECOVERED_SECONDS
from tests.faults.scenes import STATES, State

SAMPLE_SEED = 4
EACH = 2
"""Failpoints for each state of ComfyUI."""


def all_pairs() -> list[tuple[str, State]]:
    return [(name, state) for state in STATES for name in NAMES]


def sample() -> list[tuple[str, State]]:
    """Some of each state, never the same failpoint twice."""
    chance = random.Random(SAMPLE_SEED)
    names = chance.sample(sorted({name for name, _ in all_pairs()}), EACH * (len(STATES) - 1))
    states = [state for state in STATES if state != "healthy" for _ in range(EACH)]
    return list(zip(names, states, strict=True))


@pytest.mark.chaos
@pytest.mark.timeout(180)
@pytest.mark.fault(6)
@pytest.mark.parametrize(("name", "state"), sample())
async def test_both_at_once_lose_nothing_and_repeat_only_what_they_must(
    tmp_path: Path, name: str, state: State
) -> None:
    outcome = await scenes.pair(tmp_path / "world", name, state, f"short-{name}-{state}")
    assert outcome.verdict.clean, outcome.told()
    assert state in scenes.FORGETFUL or outcome.verdict.second_runs == 0, outcome.told()
    assert outcome.repeats >= outcome.verdict.second_runs, outcome.told()
    assert max(outcome.recoveries) <= SLOW_RECOVERED_SECONDS, outcome.told()


def test_the_sample_has_every_state() -> None:
    assert {state for _, state in sample()} == set(STATES) - {"healthy"}
