"""Defects of inputs and outputs that once were there: each test failed before its mend."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from comfyd.app import open_ground, wire, working
from comfyd.clock import SystemClock
from comfyd.config import Config
from comfyd.control import Control
from comfyd.errors import Conflict, StorageError, StoreUnavailable
from comfyd.forgetting import Forgetter
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.slots import Slots
from comfyd.tasks import Attempt, OutputType, Ready, Settlement, Status, Step, Task, TaskFilter
from comfyd.worker import UNATTENDED
from tests.support.files import local_file, only
from tests.support.service import Bench, bench, colored, configuration, sampled, until
from tests.support.sources import data_uri
from tests.support.sources import png as picture
from tests.support.values import artefact, task
from tests.test_artefacts import Backend, Failing, output_file, png, writing
from tests.test_core_regressions import bench_with
from tests.test_inputs_pipeline import loading, named
from tests.test_intake import left
from tests.test_staging import Desk, desk
from tests.test_storing import begin
from tests.test_worker import left_behind, starts

__all__ = ["desk"]


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions(step_seconds=0.01)) as made:
        yield made


class Instead:
    """Some other object, of which one verb is another one."""

    def __init__(self, real: Any, verb: str, other: Any) -> None:
        self._real, self._verb, self._other = real, verb, other

    def __getattr__(self, name: str) -> Any:
        return self._other if name == self._verb else getattr(self._real, name)


@asynccontextmanager
async def bench_in_front_of(
    config: Config, storage: Any, unattended: int = UNATTENDED
) -> AsyncIterator[Bench]:
    """A comfyd that works, with this as its only storage."""
    async with open_ground(config, SystemClock()) as opened:
        ground = msgspec.structs.replace(opened, storages=only(storage))
        service = wire(ground)
        service.workers.unattended_most = unattended
        async with working(service, 200, asyncio.Event()):
            yield Bench(ground, service)


# leg 1: rows and the files that they name


async def test_what_goes_wrong_after_a_task_is_on_disk_does_not_lose_it(
    simulator: Simulator, tmp_path: Path
) -> None:
    settings = configuration(tmp_path / "data", simulator.url)
    async with bench_with(settings, verb="unused_uploads", error=StoreUnavailable("locked")) as made:
        row = await made.submit(loading(data_uri(picture(1))))
        assert (await made.ended(row.id)).status is Status.SUCCEEDED


async def test_a_request_that_is_dropped_while_its_task_is_written_keeps_its_files(
    simulator: Simulator, tmp_path: Path
) -> None:
    config = configuration(tmp_path / "data", simulator.url)
    async with open_ground(config, SystemClock()) as opened:
        asked, gate = asyncio.Event(), asyncio.Event()
        writing: list[asyncio.Future[Any]] = []

        async def late(*values: Any) -> Any:
            asked.set()
            await gate.wait()
            return await opened.store.add(*values)

        async def add(*values: Any) -> Any:
            writing.append(asyncio.ensure_future(late(*values)))
            return await asyncio.shield(writing[0])  # a write that began is not stopped by who waits for it

        ground = msgspec.structs.replace(opened, store=Instead(opened.store, "add", add))
        made = Bench(ground, wire(ground))
        await ground.backends[0].probe()
        queue = made.service.workers._queue  # noqa: SLF001 - what a worker would be given
        await queue.refill()
        submitting = asyncio.ensure_future(made.submit(loading(data_uri(picture(1)))))
        await asked.wait()
        submitting.cancel()
        await asyncio.wait([submitting], timeout=0.2)
        gate.set()
        await asyncio.wait([submitting, *writing])
        (row,) = (await opened.store.list_tasks(TaskFilter(), None, 9)).tasks
        assert await opened.store.uploads(row.id) == (named(picture(1)),)
        assert left(made) == [named(picture(1))]
        async with asyncio.timeout(5):
            assert (await queue.take()).task_id == row.id


async def test_an_upload_that_nobody_could_judge_is_kept_for_its_task(
    simulator: Simulator, tmp_path: Path
) -> None:
    await simulator.crash()
    async with bench(configuration(tmp_path / "data", simulator.url), works=False) as made:
        upload = await made.state.uploads.add_data_uri(data_uri(picture(1)))
        inputs = {"picture": upload.reference, "text": "a", "list": {"__value__": [1]}}
        row = await made.submit({"1": {"class_type": "SomebodysLoader", "inputs": inputs}})
        assert await made.store.uploads(row.id) == (upload.file,)


async def test_a_file_on_its_way_to_comfyui_is_not_forgotten_with_somebody_elses_task(desk: Desk) -> None:
    async def all_of(files: Any) -> Any:
        return files

    source = data_uri(picture(1))
    async with desk.staging(loading(source), None) as staging:
        await staging.fetch()
        await desk.uploads.forget([named(picture(1))], all_of)
        await staging.deliver(desk.comfyui.real)
    assert desk.comfyui.files == {named(picture(1)): picture(1)}
    assert await desk.uploads.forget([named(picture(1))], all_of) == 1


# leg 2: outputs


class Reluctant(Failing):
    """A storage that does not delete before it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.may = asyncio.Event(), asyncio.Event()

    async def delete(self, key: str) -> None:
        """See `Storage`."""
        self.asked.set()
        await self.may.wait()
        await super().delete(key)


async def test_the_gpu_does_not_wait_for_files_that_are_being_forgotten(
    simulator: Simulator, tmp_path: Path
) -> None:
    config = configuration(tmp_path / "data", simulator.url)
    one = tuple(msgspec.structs.replace(each, in_flight=1) for each in config.comfyui)
    storage = Reluctant()
    async with bench_in_front_of(msgspec.structs.replace(config, comfyui=one), storage) as made:
        await until(lambda: made.ground.backends[0].state.socket)
        first = await made.submit({**colored(1), **sampled(1, 500)})
        await until(lambda: storage.kept != {})
        second = await made.submit(colored(2))
        await made.state.control.cancel(first.id)
        await storage.asked.wait()
        assert (await made.ended(second.id)).status is Status.SUCCEEDED
        assert not (await made.task(first.id)).status.terminal
        storage.may.set()
        assert (await made.ended(first.id)).status is Status.CANCELED
    assert len(storage.kept) == 1
    assert len(starts(simulator)) == 2


async def test_a_retry_at_the_moment_of_success_leaves_no_file_behind(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with bench(configuration(tmp_path / "data", simulator.url), works=False) as made:
        claim = await left_behind(made, colored(1))
        storage = await made.ground.storages.get("local")
        made_file = local_file(tmp_path / "made", b"abc")
        result = artefact(sha256=made_file.sha256)
        await storage.put(result.key, made_file)

        async def get(task_id: str) -> Task | None:
            found = await made.store.get(task_id)
            if found is not None and not found.status.terminal:
                settled = Settlement(status=Status.SUCCEEDED, outcome="succeeded", artefacts=(result,))
                await made.store.settle(claim.attempt.id, settled, made.state.clock.now())
            return found

        store: Any = Instead(made.store, "get", get)
        state = made.state
        forgetter = Forgetter(store, made.ground.storages, made.ground.uploads)
        queue = made.service.workers._queue  # noqa: SLF001 - its own
        control = Control(store, forgetter, queue, state.board, state.metrics, state.clock)
        with contextlib.suppress(Conflict):
            await control.retry(claim.task.id)
        row = await made.task(claim.task.id)
        files = [path for path in made.ground.config.files.rglob("*") if path.is_file()]
        assert len(files) == len(row.artefacts)


async def test_what_an_earlier_process_began_under_the_same_key_is_not_forgotten(tmp_path: Path) -> None:
    row, source = task(), Backend(png())
    before, now = output_file(subfolder="before"), output_file(subfolder="now")
    async with writing(tmp_path, storage := Failing()) as parts, parts.storing(row, before) as storing:
        begin(storing, now, source)
        await until(lambda: parts.board.artefacts(row.id) != ())
        (result,) = await storing.finish([now], source)
        assert parts.board.artefacts(row.id) == (result,)
    assert list(storage.kept) == [result.key]


async def test_nothing_begins_early_after_the_prompt_has_ended(tmp_path: Path) -> None:
    async with writing(tmp_path, storage := Failing()) as parts, parts.storing(task()) as storing:
        others = len(asyncio.all_tasks())
        await storing.no_more_early()
        assert await storing.finish([], Backend(png())) == ()
        begin(storing, output_file(), Backend(png()))  # what the socket's reader had not read by then
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == others
    assert (storage.puts, storage.kept) == (0, {})


async def test_a_storage_that_nobody_waits_for_any_more_is_not_called_sick(tmp_path: Path) -> None:
    async with writing(
        tmp_path, storage := Failing(*[StorageError("away")] * 10_000), SystemClock()
    ) as parts:

        async def one(name: str) -> None:
            async with parts.storing(task(id=name)) as storing:
                await storing.finish([output_file()], Backend(png()))

        first, second = asyncio.ensure_future(one("a")), asyncio.ensure_future(one("b"))
        await until(lambda: storage.puts >= 4)
        first.cancel()
        await asyncio.wait([first])
        assert parts.health.problems() == {"storage:local": "away"}  # the other one still waits
        second.cancel()
        await asyncio.wait([second])
        assert parts.health.problems() == {}


async def test_a_cancel_is_heard_while_comfyui_is_asked_for_its_classes(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        await until(lambda: made.ground.backends[0].state.ready)
        never = asyncio.Event()

        async def object_info(*_: Any) -> Any:
            await never.wait()

        executor = made.service.workers._executor  # noqa: SLF001 - a ComfyUI that is slow from now on
        (real,) = made.ground.backends
        executor._backends = {real.name: Instead(real, "object_info", object_info)}  # type: ignore[dict-item] # noqa: SLF001
        row = await made.submit(loading(data_uri(picture(1))))
        await made.until(lambda found: found.status is Status.RUNNING, row.id)
        await made.state.control.cancel(row.id)
        async with asyncio.timeout(3):
            assert (await made.ended(row.id)).status is Status.CANCELED


async def test_a_task_that_is_run_again_while_its_old_files_go_can_be_canceled(
    simulator: Simulator, tmp_path: Path
) -> None:
    storage = Reluctant()
    async with open_ground(configuration(tmp_path / "data", simulator.url), SystemClock()) as opened:

        async def record(attempt: Attempt) -> None:
            await opened.store.record(attempt)
            if (
                attempt.step is Step.COLLECTED and attempt.number == 1
            ):  # a cancel that comes too late to be heard
                await opened.store.cancel(attempt.task_id, attempt.claimed_at)

        ground = msgspec.structs.replace(
            opened, store=Instead(opened.store, "record", record), storages=only(storage)
        )
        service = wire(ground)
        async with working(service, 200, asyncio.Event()):
            made = Bench(ground, service)
            await until(lambda: ground.backends[0].state.socket)
            row = await made.submit(colored(1))
            with made.state.board.watch(row.id) as watcher:
                await storage.asked.wait()
                while (event := await watcher.next(1)) is not None and not event.final:
                    pass
                assert event is not None  # nobody has to wait for the files to go
            simulator.faults.class_seconds = {"EmptyImage": 1.0, "SaveImage": 1.0}
            await made.state.control.retry(row.id)
            await made.until(lambda found: found.status is Status.RUNNING, row.id)
            storage.may.set()
            await until(lambda: storage.kept == {})
            await made.until(lambda found: found.attempts[1].seen_running_at is not None, row.id)
            await made.state.control.cancel(row.id)
            assert (await made.ended(row.id)).status is Status.CANCELED
            assert made.state.health.problems() == {}
    assert len(starts(simulator)) == 2


async def test_who_asks_for_a_slot_after_the_last_was_given_does_not_wait_for_one() -> None:
    slots = Slots([], prefetch=1)
    async with slots.readmit(Ready(rank=0, seq=1, task_id="a")) as place:
        slots.close()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(5):
                await place.acquire()


async def test_a_restart_does_not_let_more_tasks_wait_for_a_storage_than_may(
    simulator: Simulator, tmp_path: Path
) -> None:
    config = configuration(tmp_path / "data", simulator.url, workers=1)
    text = output_file("text.txt", type=OutputType.TEXT, text="a")
    async with bench(config, works=False) as made:
        claim = await left_behind(made, colored(1), step=Step.COLLECTED, collected=(text,))
    storage = Failing(*[StorageError("away")] * 1_000)
    async with bench_in_front_of(config, storage, unattended=1) as made:
        await until(lambda: made.ground.backends[0].state.ready)
        row = await made.submit(colored(2))
        await until(lambda: storage.puts >= 4)
        assert starts(simulator) == []
        storage.errors.clear()
        assert (await made.ended(claim.task.id)).status is Status.SUCCEEDED
        assert (await made.ended(row.id)).status is Status.SUCCEEDED
    assert len(storage.kept) == 2


async def test_a_storage_that_is_down_keeps_no_worker(simulator: Simulator, tmp_path: Path) -> None:
    config = configuration(tmp_path / "data", simulator.url, workers=1)
    storage = Failing(*[StorageError("away")] * 10_000)
    async with bench_in_front_of(config, storage, unattended=3) as made:
        rows = [await made.submit(colored(number)) for number in range(5)]
        await until(lambda: len(starts(simulator)) == 3)
        await until(lambda: storage.puts >= 12)
        assert len(starts(simulator)) == 3  # so many may wait, and no more
        storage.errors.clear()
        for row in rows:
            assert (await made.ended(row.id)).status is Status.SUCCEEDED
    assert len(starts(simulator)) == 5
