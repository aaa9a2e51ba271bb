"""The chores, one step at a time."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from comfyd.catalog import Catalog
from comfyd.config import InputsConfig
from comfyd.control import Control
from comfyd.errors import FileNotFound, StorageError
from comfyd.forgetting import Forgetter
from comfyd.maintenance import BATCH, RETENTION_EVERY_MS, Leftovers, Retention, Templates
from comfyd.metrics import Metrics
from comfyd.progress import Board
from comfyd.queue import TaskQueue
from comfyd.simulator import Simulator
from comfyd.storage.local import LocalStorage, open_local
from comfyd.store.base import Store
from comfyd.store.sqlite import open_sqlite
from comfyd.tasks import Settlement, Status
from comfyd.uploads import open_uploads
from tests.support.clock import HandClock
from tests.support.files import local_file, only
from tests.support.logs import captured_logs
from tests.support.service import bench, configuration, until
from tests.support.values import artefact, new_task


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_sqlite(tmp_path / "comfyd.db") as opened:
        yield opened


@pytest.fixture
async def files(tmp_path: Path) -> AsyncIterator[LocalStorage]:
    async with open_local(tmp_path / "files") as opened:
        yield opened


@pytest.fixture
async def forgetter(store: Store, files: LocalStorage, tmp_path: Path) -> AsyncIterator[Forgetter]:
    async with open_uploads(tmp_path / "inputs", InputsConfig(), HandClock()) as uploads:
        yield Forgetter(store, only(files), uploads)


async def end_one(store: Store, files: LocalStorage, clock: HandClock, number: int) -> str:
    """A task that succeeded with one file of one byte."""
    task_id = f"5e1f6c1e-0000-4000-8000-{number:012}"
    await store.add(new_task(task_id), None, clock.now())
    claim = await store.claim(task_id, clock.new_id(), clock.now())
    assert claim is not None
    key = f"{task_id}/1/a.png"
    with TemporaryDirectory() as folder:
        await files.put(key, local_file(Path(folder), b"x"))
    kept = artefact(key=key, size_bytes=1)
    await store.settle(
        claim.attempt.id,
        Settlement(status=Status.SUCCEEDED, outcome="succeeded", artefacts=(kept,)),
        clock.now(),
    )
    return task_id


def chores(
    store: Store, forgetter: Forgetter, clock: HandClock, keep_ms: int, keep_bytes: int = 0
) -> Retention:
    control = Control(store, forgetter, TaskQueue(store, clock), Board(), Metrics(), clock)
    return Retention(store, control, clock, keep_ms, keep_bytes)


async def test_ended_tasks_and_their_files_are_forgotten_when_they_are_old(
    store: Store, files: LocalStorage, forgetter: Forgetter, tmp_path: Path
) -> None:
    clock = HandClock()
    old = await end_one(store, files, clock, 1)
    clock.advance(10_000)
    young = await end_one(store, files, clock, 2)
    clock.advance(5_000)
    assert await chores(store, forgetter, clock, 10_000).step() == RETENTION_EVERY_MS
    assert await store.get(old) is None
    assert await store.get(young) is not None
    assert not (tmp_path / "files" / old).exists()
    assert (tmp_path / "files" / young / "1" / "a.png").exists()


async def test_a_full_batch_is_followed_by_the_next_at_once(
    store: Store, files: LocalStorage, forgetter: Forgetter
) -> None:
    clock = HandClock()
    for number in range(BATCH):
        await end_one(store, files, clock, number)
    clock.advance(10_000)
    assert await chores(store, forgetter, clock, 1_000).step() == 0
    assert await chores(store, forgetter, clock, 1_000).step() == RETENTION_EVERY_MS


async def test_retention_may_be_off(store: Store, files: LocalStorage, forgetter: Forgetter) -> None:
    clock = HandClock()
    kept = await end_one(store, files, clock, 1)
    clock.advance(10**12)
    assert await chores(store, forgetter, clock, 0).step() == RETENTION_EVERY_MS
    assert await store.get(kept) is not None


async def test_the_oldest_go_when_there_are_too_many_bytes(
    store: Store, files: LocalStorage, forgetter: Forgetter
) -> None:
    clock = HandClock()
    tasks = []
    for number in range(5):
        tasks.append(await end_one(store, files, clock, number))
        clock.advance(1_000)
    assert await store.artefact_bytes() == 5
    assert await chores(store, forgetter, clock, 0, keep_bytes=2).step() == RETENTION_EVERY_MS
    assert await store.artefact_bytes() == 2
    assert [await store.get(task_id) is None for task_id in tasks] == [True, True, True, False, False]


async def test_files_whose_storage_was_down_at_their_deletion_go_later(
    store: Store, files: LocalStorage, forgetter: Forgetter
) -> None:
    clock = HandClock()
    task_id = await end_one(store, files, clock, 1)
    away = Forgetter(store, only(Away()), forgetter._uploads)  # noqa: SLF001 - the same uploads
    await Control(store, away, TaskQueue(store, clock), Board(), Metrics(), clock).delete(task_id)
    key = f"{task_id}/1/a.png"
    assert await store.unwanted_files(10) == (("local", key),)
    assert await Leftovers(away).step() == RETENTION_EVERY_MS
    assert await exists(files, key)
    assert await Leftovers(forgetter).step() == RETENTION_EVERY_MS
    assert not await exists(files, key)
    assert await store.unwanted_files(10) == ()


class Away:
    """A storage that is down."""

    async def delete(self, key: str) -> None:
        """See `Storage`."""
        raise StorageError(f"cannot reach it to delete {key}")


async def exists(files: LocalStorage, key: str) -> bool:
    try:
        async with files.open(key):
            return True
    except FileNotFound:
        return False


async def test_what_was_deleted_at_once_is_not_tried_again(
    store: Store, files: LocalStorage, forgetter: Forgetter
) -> None:
    clock = HandClock()
    task_id = await end_one(store, files, clock, 1)
    await Control(store, forgetter, TaskQueue(store, clock), Board(), Metrics(), clock).delete(task_id)
    assert await store.unwanted_files(10) == ()


async def test_a_task_that_cannot_be_forgotten_does_not_stop_the_others(
    store: Store, files: LocalStorage, forgetter: Forgetter, tmp_path: Path
) -> None:
    clock = HandClock()
    stuck, loose = [await end_one(store, files, clock, number) for number in (1, 2)]
    broken = tmp_path / "files" / stuck / "1" / "a.png"
    broken.unlink()
    broken.mkdir()
    clock.advance(10_000)
    await chores(store, forgetter, clock, 1_000).step()
    assert await store.get(loose) is None


async def test_changed_templates_are_read_again(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    templates = Templates(catalog)
    await templates.step()
    assert catalog.list() == ()
    (tmp_path / "one.json").write_text('{"1": {"class_type": "SaveImage", "inputs": {}}}')
    await templates.step()
    assert [template.name for template in catalog.list()] == ["one"]


async def test_a_comfyui_that_comes_back_is_noticed_soon(tmp_path: Path) -> None:
    async with Simulator() as simulator, bench(configuration(tmp_path / "data", simulator.url)) as made:
        backend = made.ground.backends[0]
        await until(lambda: backend.state.ready)
        await simulator.crash()
        await until(lambda: not backend.state.ready)
        await simulator.restart()
        began = asyncio.get_running_loop().time()
        await until(lambda: backend.state.ready)
        assert asyncio.get_running_loop().time() - began < 4


async def test_a_template_that_breaks_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text("{")
    with captured_logs() as lines:
        await Templates(Catalog(tmp_path)).step()
    assert [(line["log_level"], line["kind"]) for line in lines] == [("warning", "broken")]
