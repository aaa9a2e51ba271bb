"""The chores, one step at a time."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import msgspec
import pytest

from comfyd.catalog import Catalog
from comfyd.clock import SystemClock
from comfyd.comfy.health import SILENT_PROBES
from comfyd.comfy.health import Health as ComfyUIHealth
from comfyd.config import InputsConfig
from comfyd.control import Control
from comfyd.deliveries import Delivery, DeliveryFilter, DeliveryStatus, DeliveryTry
from comfyd.errors import Conflict, FileNotFound, StorageError
from comfyd.forgetting import Forgetter
from comfyd.maintenance import (
    BATCH,
    RESTART_FIRST_MS,
    RESTART_MOST_MS,
    RETENTION_EVERY_MS,
    Leftovers,
    Restarts,
    Retention,
    Templates,
)
from comfyd.metrics import Metrics
from comfyd.progress import Board
from comfyd.queue import TaskQueue
from comfyd.simulator import Simulator
from comfyd.storage.local import LocalStorage, open_local
from comfyd.store.base import Store
from comfyd.store.sqlite import open_sqlite
from comfyd.tasks import EventType, Settlement, Status, Webhook
from comfyd.uploads import open_uploads
from tests.support.clock import HandClock
from tests.support.files import local_file, only
from tests.support.logs import captured_logs
from tests.support.service import bench, colored, configuration, until
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


async def end_one(store: Store, files: LocalStorage, clock: HandClock, number: int, **facts: Any) -> str:
    """A task that succeeded with one file of one byte."""
    task_id = f"5e1f6c1e-0000-4000-8000-{number:012}"
    await store.add(new_task(task_id, **facts), None, clock.now())
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


class Wanting(Control):
    """While the first task is forgotten, somebody asks for a redelivery of this one."""

    wanted: str
    store: Store
    promised: Delivery | None = None

    async def delete(self, task_id: str, *, ended_before: int | None = None) -> None:
        """See `Control.delete`."""
        await super().delete(task_id, ended_before=ended_before)
        if self.promised is None:
            self.promised = await self.store.redeliver(self.wanted, SystemClock().now())


@pytest.mark.parametrize("keep", [{"keep_ms": 1_000}, {"keep_ms": 0, "keep_bytes": 1}], ids=["age", "bytes"])
async def test_what_became_owed_since_retention_looked_is_not_forgotten(
    store: Store, files: LocalStorage, forgetter: Forgetter, keep: dict[str, int]
) -> None:
    clock = HandClock()
    webhook = Webhook(url="https://example.com/hook", events=(EventType.COMPLETED,))
    tasks = [await end_one(store, files, clock, number, webhook=webhook) for number in range(4)]
    rows = (await store.list_deliveries(DeliveryFilter(), None, 10)).deliveries[::-1]
    for row in rows:
        tried = DeliveryTry(number=1, at=1, duration_ms=1, status=410, error="it answered 410")
        await store.record_try(row, tried, DeliveryStatus.GONE, None, clock.now())
    control = Wanting(store, forgetter, TaskQueue(store, clock), Board(), Metrics(), clock)
    control.store, control.wanted = store, rows[1].id
    clock.advance(10_000)
    with captured_logs() as lines:
        await Retention(store, control, clock, **keep).step()
    assert control.promised is not None
    assert await store.delivery(rows[1].id) == control.promised
    assert [await store.get(task_id) is None for task_id in tasks][:3] == [True, False, True]
    assert [line["task_id"] for line in lines if line["event"] == "retention.skipped"] == [tasks[1]]
    async with files.open(f"{tasks[1]}/1/a.png"):
        pass


async def test_a_task_that_ended_anew_since_retention_looked_is_not_forgotten(
    store: Store, files: LocalStorage, forgetter: Forgetter
) -> None:
    clock = HandClock()
    task_id = await end_one(store, files, clock, 1)
    control = Control(store, forgetter, TaskQueue(store, clock), Board(), Metrics(), clock)
    with pytest.raises(Conflict):
        await control.delete(task_id, ended_before=clock.now())
    await control.delete(task_id, ended_before=clock.now() + 1)
    assert await store.get(task_id) is None


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


class SickBackend:
    """A backend that is sick as long as the test says so."""

    name = "c"

    def __init__(self) -> None:
        self.state: Any = SimpleNamespace(sick=True, reason="r")


class CountedCommand:
    """A command that only counts."""

    def __init__(self) -> None:
        self.runs = 0

    async def run(self) -> str:
        """See `RestartCommand`."""
        self.runs += 1
        return "failed"


class LongCommand:
    """A command that takes until the test says what came of it."""

    def __init__(self) -> None:
        self.runs = 0
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self) -> str:
        """See `RestartCommand`."""
        self.runs += 1
        return await asyncio.shield(self.over)


class Supervised:
    """What has a ComfyUI started anew, and what the test turns."""

    def __init__(self, command: LongCommand | None = None) -> None:
        self.backend = SickBackend()
        self.command = command or CountedCommand()
        self.metrics = Metrics()
        self.clock = HandClock()
        self.closing = asyncio.Event()
        self.restarts = Restarts(
            cast("Any", self.backend),
            cast("Any", self.command),
            self.metrics,
            self.clock,
            self.closing,
        )

    async def pass_time(self, milliseconds: int) -> int:
        """Let so much time pass; how often the command ran in all."""
        self.clock.advance(milliseconds)
        while True:
            runs = self.command.runs
            step = asyncio.ensure_future(self.restarts.step())
            await asyncio.sleep(0)
            self.restarts.wake()
            await step
            if self.command.runs == runs:
                return runs


async def test_a_sick_comfyui_is_started_anew_at_once_and_then_ever_later() -> None:
    made = Supervised()
    assert await made.pass_time(0) == 1
    for number, minutes in enumerate((1, 2, 4, 8, 15, 15), 2):
        assert await made.pass_time(minutes * 60_000 - 1) == number - 1
        assert await made.pass_time(1) == number
    text = made.metrics.render()[0].decode()
    assert 'comfyd_backend_restarts_total{backend="c",result="failed"} 7.0' in text


async def test_the_pauses_begin_anew_when_it_was_well_for_long() -> None:
    made = Supervised()
    await made.pass_time(0)
    await made.pass_time(60_000)
    made.backend.state.sick = False
    assert await made.pass_time(RESTART_MOST_MS * 2) == 2
    made.backend.state.sick = True
    assert await made.pass_time(0) == 3
    assert await made.pass_time(59_999) == 3
    assert await made.pass_time(1) == 4


async def test_one_that_waits_for_the_next_time_comes_by_itself() -> None:
    made = Supervised()
    await made.pass_time(0)
    made.clock.advance(RESTART_FIRST_MS - 20)
    async with asyncio.timeout(5):
        await made.restarts.step()  # nobody wakes it
    assert made.command.runs == 1
    assert await made.pass_time(20) == 2


async def test_no_restart_is_begun_while_comfyd_stops_or_comfyui_is_merely_down() -> None:
    made = Supervised()
    made.backend.state.sick = False
    assert await made.pass_time(10**9) == 0
    made.backend.state.sick = True
    made.closing.set()
    assert await made.pass_time(10**9) == 0


async def test_a_restart_that_broke_is_not_begun_again_at_once() -> None:
    made = Supervised(LongCommand())
    cast("LongCommand", made.command).over.set_exception(RuntimeError("a bug"))
    with pytest.raises(RuntimeError):
        await made.restarts.step()
    assert await made.pass_time(RESTART_FIRST_MS - 1) == 1


async def test_a_restart_that_was_broken_off_is_over() -> None:
    made = Supervised(LongCommand())
    step = asyncio.ensure_future(made.restarts.step())
    await until(lambda: made.command.runs == 1)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    async with asyncio.timeout(5):
        await made.restarts.drain(60_000, asyncio.Event())
    assert await made.pass_time(RESTART_FIRST_MS - 1) == 1


@pytest.mark.parametrize("ended_by", ["its end", "the grace", "a hurry"])
async def test_who_leaves_waits_for_a_restart_that_was_begun_within_bounds(ended_by: str) -> None:
    command, hurry = LongCommand(), asyncio.Event()
    made = Supervised(command)
    async with asyncio.timeout(10):
        await made.restarts.drain(60_000, hurry)  # nothing was begun
        step = asyncio.ensure_future(made.restarts.step())
        await until(lambda: command.runs == 1)
        grace_ms = 20 if ended_by == "the grace" else 60_000
        leaving = asyncio.ensure_future(made.restarts.drain(grace_ms, hurry))
        await asyncio.sleep(0)
        assert not leaving.done()
        if ended_by == "its end":
            command.over.set_result("ok")
        elif ended_by == "a hurry":
            hurry.set()
        await leaving
        if ended_by != "its end":
            assert not step.done()
            command.over.set_result("ok")
        await step


async def test_a_comfyui_that_was_down_for_a_moment_and_is_still_sick_is_restarted_again() -> None:
    """Neither going down nor coming back sick changes whether it is ready."""
    made = Supervised()
    health = ComfyUIHealth(made.clock, made.restarts.wake)
    made.backend.state = health
    health.passed("0.3.75")
    health.diagnosed("sick: nothing runs")
    assert await made.pass_time(0) == 1
    for _ in range(SILENT_PROBES):
        health.silent("no answer")
    assert await made.pass_time(RESTART_FIRST_MS) == 1
    waiting = asyncio.ensure_future(made.restarts.step())  # with no reason to run, until it is woken
    await asyncio.sleep(0)
    health.passed("0.3.75")
    async with asyncio.timeout(5):
        await waiting
        await made.restarts.step()
    assert made.command.runs == 2


async def test_a_restart_that_was_begun_may_end_within_the_grace(tmp_path: Path) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    command = ("sh", "-c", f"touch {begun}; sleep 0.5; touch {ended}")
    async with Simulator() as simulator, aiohttp.ClientSession() as session:
        simulator.faults.worker_dead = True
        async with session.post(f"{simulator.url}/prompt", json={"prompt": colored(1)}) as answer:
            assert answer.status == 200  # somebody else's
        config = configuration(tmp_path / "data", simulator.url)
        server = msgspec.structs.replace(config.comfyui[0], stuck_after=0.3, restart=command)
        config = msgspec.structs.replace(config, comfyui=(server,))
        async with bench(config, grace_ms=20_000):
            await until(begun.exists)
            leaving = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - leaving < 10
    assert ended.exists()
