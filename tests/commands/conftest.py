"""What the tests of commands share: a scripted comfyd, a quick clock, a folder to stand in."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from comfyd import log
from comfyd.clock import SystemClock
from tests.commands.fake_comfyd import FakeComfyd, fake_comfyd


class QuickClock(SystemClock):
    """Sleeps next to nothing, and counts what it was asked to sleep as time that has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.slept = 0

    def monotonic(self) -> int:
        return self.slept

    async def sleep(self, milliseconds: int) -> None:
        self.slept += milliseconds
        await asyncio.sleep(0.001)


@pytest.fixture
def clock() -> QuickClock:
    return QuickClock()


@pytest.fixture
def comfyd() -> Iterator[FakeComfyd]:
    with fake_comfyd() as fake:
        yield fake


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands read `comfyd.toml` and `.env` where the process stands, and write there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _log_restored() -> Iterator[None]:
    """A command configures the process's log; the next test finds it as it was."""
    level = logging.getLogger().level
    yield
    log.release()
    logging.getLogger().setLevel(level)
    structlog.reset_defaults()
