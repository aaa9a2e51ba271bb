"""kill -9 of either side at random under load, and of comfyd in a race for one key: the short form."""

from pathlib import Path

import pytest

from tests.faults import scenes
from tests.faults.rig import RECOVERED_SECONDS
from tests.faults.scenes import Size

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]


@pytest.mark.fault(2)
async def test_random_kills_of_comfyd_under_load_lose_and_repeat_nothing(tmp_path: Path) -> None:
    size = Size(kills=12, tasks=40, clients=4)
    outcome = await scenes.random_kills(tmp_path / "world", "comfyd", "short-comfyd", size)
    assert outcome.kills["comfyd"] >= size.kills, outcome.told()
    assert outcome.verdict.clean, outcome.told()
    assert outcome.verdict.tasks == size.tasks
    assert outcome.verdict.second_runs == 0, outcome.told()
    assert max(outcome.recoveries) <= RECOVERED_SECONDS, outcome.told()


@pytest.mark.fault(3)
@pytest.mark.fault(4)
@pytest.mark.fault(5)
async def test_random_kills_of_comfyui_repeat_only_what_was_running(tmp_path: Path) -> None:
    size = Size(kills=6, tasks=24, clients=4)
    outcome = await scenes.random_kills(tmp_path / "world", "comfyui", "short-comfyui", size)
    assert outcome.kills["comfyui"] == size.kills, outcome.told()
    assert outcome.verdict.clean, outcome.told()
    assert outcome.verdict.tasks == size.tasks
    assert max(outcome.recoveries) <= RECOVERED_SECONDS, outcome.told()


@pytest.mark.fault(38)
@pytest.mark.parametrize("name", ["accept.checked", "accept.committed"])
async def test_many_requests_under_one_key_across_a_crash_are_one_task(tmp_path: Path, name: str) -> None:
    twins = 8
    outcome = await scenes.same_key(tmp_path / "world", name, f"short-{name}", twins)
    assert outcome.reached, outcome.told()
    assert outcome.verdict.clean, outcome.told()
    answered = [submit for submit in outcome.submits if submit.number == 1 and submit.task_id is not None]
    assert len(answered) == twins
    assert len({submit.task_id for submit in answered}) == 1
    assert any(submit.status is None for submit in outcome.submits)  # the crash did hit the race
