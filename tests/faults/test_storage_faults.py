"""A storage that fails, stalls or is down for an hour, behind a whole comfyd whose clock is turned on.

What real storages do to comfyd over a broken network is in `tests/test_storing_faults.py`.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from comfyd.app import open_ground, wire, working
from comfyd.errors import StorageError
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.storage.base import LocalFile
from comfyd.storage.local import LocalStorage, open_local
from comfyd.tasks import Status, Step, Task
from tests.faults.turned_clock import TurnedClock
from tests.support.files import only, read
from tests.support.service import Bench, colored, configuration, until
from tests.test_worker import starts

HOUR_MS = 3_600_000
LONGEST_PAUSE_MS = 30_000


class Fickle:
    """A real folder as a storage, which fails as it is told to. Lives as long as the folder is open."""

    name = "local"

    def __init__(self, folder: LocalStorage) -> None:
        self._folder = folder
        self.down = False
        self.stalls = 0
        self.breaks = 0
        self.tries: dict[str, int] = {}

    async def put(self, key: str, file: LocalFile) -> str | None:
        """See `Storage`."""
        self.tries[key] = self.tries.get(key, 0) + 1
        if self.down:
            raise StorageError("the storage is down")
        if self.stalls:
            self.stalls -= 1
            await asyncio.sleep(1.0)
            raise StorageError("the storage did not answer in time")
        answer = await self._folder.put(key, file)
        if self.breaks:  # it has the file, and the answer is lost
            self.breaks -= 1
            raise StorageError("the connection was lost")
        return answer

    async def delete(self, key: str) -> None:
        """See `Storage`."""
        await self._folder.delete(key)


class Stand:
    """A comfyd whose results go to a fickle storage. Made by `standing`."""

    def __init__(self, made: Bench, storage: Fickle, folder: LocalStorage, clock: TurnedClock) -> None:
        self.made = made
        self.storage = storage
        self.clock = clock
        self._folder = folder

    async def whole(self, row: Task) -> bool:
        """Whether the storage has every file of the task as the row says."""
        assert row.artefacts
        for each in row.artefacts:
            data = await read(self._folder, each.key)
            if (hashlib.sha256(data).hexdigest(), len(data)) != (each.sha256, each.size_bytes):
                return False
        return True


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions(step_seconds=0.01)) as made:
        yield made


@asynccontextmanager
async def standing(simulator: Simulator, data: Path) -> AsyncIterator[Stand]:
    """A comfyd that works on a clock that is turned."""
    clock = TurnedClock()
    async with (
        open_ground(configuration(data, simulator.url), clock) as opened,
        open_local(data / "elsewhere") as folder,
    ):
        storage = Fickle(folder)
        ground = msgspec.structs.replace(opened, storages=only(storage))
        service = wire(ground)
        async with working(service, 200, asyncio.Event()):
            yield Stand(Bench(ground, service), storage, folder, clock)


def is_collected(row: Task) -> bool:
    return row.attempts != () and row.attempts[-1].step == Step.COLLECTED


@pytest.mark.fault(34)
async def test_an_hour_without_storage_costs_no_second_run_and_holds_up_no_gpu(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with standing(simulator, tmp_path / "data") as stand:
        made, storage = stand.made, stand.storage
        storage.down = True
        tasks = [await made.submit(colored(number)) for number in range(12)]
        for each in tasks:  # more than there are workers: the GPU works on
            await made.until(is_collected, each.id)
        await until(lambda: len(storage.tries) == len(tasks))
        await stand.clock.pass_time(HOUR_MS, step=LONGEST_PAUSE_MS // 2)
        for each in tasks:
            row = await made.task(each.id)
            assert (row.status, row.attempt_count) == (Status.RUNNING, 1)
        assert made.ground.slots.used == {"comfyui-0": 0}
        tries = storage.tries.values()
        assert min(tries) >= HOUR_MS // LONGEST_PAUSE_MS  # nobody was forgotten
        assert max(tries) <= 3 * HOUR_MS // LONGEST_PAUSE_MS  # and the storage was not stormed
        storage.down = False
        await stand.clock.pass_time(2 * LONGEST_PAUSE_MS)
        for each in tasks:
            ended = await made.ended(each.id)
            assert (ended.status, ended.attempt_count, ended.failures) == (Status.SUCCEEDED, 1, 0)
            assert await stand.whole(ended)
        assert made.state.health.problems() == {}
    assert len(starts(simulator)) == len(tasks)


@pytest.mark.fault(33)
async def test_a_storage_that_stalls_for_one_file_does_not_hold_up_the_other_tasks(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with standing(simulator, tmp_path / "data") as stand:
        made = stand.made
        stand.storage.stalls = 1
        slow = await made.submit(colored(1))
        await until(lambda: stand.storage.stalls == 0)
        quick = [await made.submit(colored(number)) for number in range(2, 12)]
        for each in quick:
            assert (await made.ended(each.id)).status is Status.SUCCEEDED
        assert (await made.task(slow.id)).status is Status.RUNNING
        ended = await made.ended(slow.id)
        assert (ended.status, ended.attempt_count) == (Status.SUCCEEDED, 1)
        assert await stand.whole(ended)
    assert len(starts(simulator)) == 11


@pytest.mark.fault(32)
async def test_a_storage_whose_answers_are_lost_has_each_file_once_and_whole(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with standing(simulator, tmp_path / "data") as stand:
        stand.storage.breaks = 3
        ended = await stand.made.ended((await stand.made.submit(colored(1, batch_size=3))).id)
        assert (ended.status, ended.attempt_count, len(ended.artefacts)) == (Status.SUCCEEDED, 1, 3)
        assert await stand.whole(ended)
        kept = [path for path in (tmp_path / "data" / "elsewhere").rglob("*.png") if path.is_file()]
        assert len(kept) == 3
        assert sum(stand.storage.tries.values()) == 6
    assert len(starts(simulator)) == 1
