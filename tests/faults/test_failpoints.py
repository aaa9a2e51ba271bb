"""kill -9 of comfyd at every failpoint: nothing lost, nothing twice, and back at work at once."""

import re
from pathlib import Path

import pytest

import comfyd
from comfyd.failpoints import NAMES
from tests.faults import scenes
from tests.faults.rig import RECOVERED_SECONDS

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180), pytest.mark.fault(1)]

REACHED = re.compile(r'failpoints\.reach\("([a-z.]+)"\)')


def test_the_code_passes_every_failpoint_and_no_other() -> None:
    source = "".join(file.read_text() for file in Path(comfyd.__file__).parent.rglob("*.py"))
    assert sorted(set(REACHED.findall(source))) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
async def test_nothing_is_lost_or_done_twice_when_comfyd_dies_here(tmp_path: Path, name: str) -> None:
    outcome = await scenes.failpoint(tmp_path / "world", name, f"short-{name}")
    assert outcome.reached, outcome.told()
    assert outcome.verdict.clean, outcome.told()
    assert outcome.verdict.second_runs == 0, outcome.told()
    assert max(outcome.recoveries) <= RECOVERED_SECONDS, outcome.told()
