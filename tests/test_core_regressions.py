"""Defects of the execution core that once were there: each test failed before its mend."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import msgspec
import pytest

from comfyd.app import open_ground, wire, working
from comfyd.artefacts import ArtefactWriter, StoringTerms, text_source
from comfyd.clock import Clock, SystemClock
from comfyd.comfy import messages
from comfyd.config import Config, ServerConfig
from comfyd.control import Control
from comfyd.disk import write_stream
from comfyd.errors import InsufficientStorage, StorageError, StoreUnavailable
from comfyd.forgetting import Forgetter
from comfyd.lifecycle import RetryPolicy
from comfyd.listener import Listener
from comfyd.loops import Health
from comfyd.metrics import Metrics
from comfyd.progress import Board
from comfyd.queue import TaskQueue
from comfyd.scratch import open_scratch
from comfyd.serving import listen, serve
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.slots import Slots
from comfyd.storage.local import open_local
from comfyd.storage.opening import open_storages
from comfyd.tasks import (
    Artefact,
    OutputFile,
    OutputOptions,
    OutputType,
    Ready,
    ReadyPage,
    Settlement,
    Status,
    Succeeded,
    Task,
)
from comfyd.worker import Settler
from tests.support.clock import HandClock, JumpingClock
from tests.support.files import local_file, only, read, small_disk
from tests.support.service import PATIENCE, Bench, bench, colored, configuration, sampled, until
from tests.support.values import artefact, attempt, task
from tests.test_execution import shipped
from tests.test_worker import claimed, left_behind, starts


class Faltering:
    """Some other object, of which one verb fails as often as told."""

    def __init__(self, real: Any, verb: str, error: Exception, times: int = 1) -> None:
        self.left = times
        self._real, self._verb, self._error = real, verb, error

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if name != self._verb:
            return real

        async def faltering(*values: Any) -> Any:
            if self.left:
                self.left -= 1
                raise self._error
            return await real(*values)

        return faltering


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions(step_seconds=0.01)) as made:
        yield made


@asynccontextmanager
async def bench_with(
    config: Config,
    *,
    clock: Clock | None = None,
    verb: str = "",
    error: Exception | None = None,
    times: int = 1,
) -> AsyncIterator[Bench]:
    """A comfyd whose clock is another one, or whose database refuses one verb for a while."""
    async with open_ground(config, clock or SystemClock()) as opened:
        ground = opened
        if error is not None:
            ground = msgspec.structs.replace(opened, store=Faltering(opened.store, verb, error, times))
        service = wire(ground)
        async with working(service, 200, asyncio.Event()):
            yield Bench(ground, service)


def executing(row: Task) -> bool:
    """Whether its first attempt was seen to run."""
    return row.attempts != () and row.attempts[0].seen_running_at is not None


# the database refuses for a moment


@pytest.mark.parametrize("error", [InsufficientStorage("full"), StoreUnavailable("locked")])
async def test_a_step_that_the_database_refuses_for_a_moment_does_not_orphan_the_task(
    simulator: Simulator, tmp_path: Path, error: Exception
) -> None:
    settings = configuration(tmp_path / "data", simulator.url)
    async with bench_with(settings, verb="record", error=error, times=2) as made:
        ended = await made.ended((await made.submit(colored(1))).id)
    assert ended.status is Status.SUCCEEDED
    assert len(starts(simulator)) == 1


class Table:
    """The part of a store that the queue reads; its first reads may fail."""

    def __init__(self, *rows: Task, failures: int = 0) -> None:
        self.rows = list(rows)
        self.failures = failures
        self.reads = 0

    async def ready(self, now: int, limit: int) -> ReadyPage:
        """See `Store`."""
        self.reads += 1
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("locked")
        due = [
            Ready(rank=-row.priority, seq=row.seq, task_id=row.id)
            for row in self.rows
            if row.available_at <= now
        ]
        later = [row.available_at for row in self.rows if row.available_at > now]
        return ReadyPage(entries=tuple(sorted(due)[:limit]), next_due=min(later, default=None))

    async def make_due(self, after: int, now: int, limit: int) -> int:
        """See `Store`."""
        late = [row for row in self.rows if row.available_at > after][:limit]
        self.rows = [
            msgspec.structs.replace(row, available_at=now) if row in late else row for row in self.rows
        ]
        return len(late)


def queue_before(table: Table, clock: Clock) -> TaskQueue:
    return TaskQueue(table, clock)  # type: ignore[arg-type] # only the queue's verbs are asked for


async def test_a_failed_read_of_the_head_is_read_again() -> None:
    queue = queue_before(Table(task(id="t1"), failures=1), HandClock())
    with pytest.raises(StoreUnavailable):
        await queue.refill()
    async with asyncio.timeout(2):
        await queue.refill()
        assert (await queue.take()).task_id == "t1"


async def test_many_reads_do_not_leave_many_alarms() -> None:
    clock = SystemClock()
    table = Table(task(id="t1", available_at=clock.now() + 3_600_000))
    queue = queue_before(table, clock)
    loop = asyncio.get_running_loop()
    before = len(loop._scheduled)  # type: ignore[attr-defined] # noqa: SLF001 - there is no other count of timers
    for _ in range(50):
        queue.look_again()
        await queue.refill()
    live = [handle for handle in loop._scheduled if not handle.cancelled()]  # type: ignore[attr-defined] # noqa: SLF001
    assert table.reads == 50
    assert len(live) <= before + 1


# order


async def test_an_urgent_task_overtakes_also_when_all_workers_hold_others(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with bench(configuration(tmp_path / "data", simulator.url, workers=6)) as made:
        tasks = [await made.submit(sampled(seed, 15)) for seed in range(12)]
        await made.until(executing, tasks[0].id)
        urgent = await made.submit(sampled(50, 1), priority=100)
        await made.ended(urgent.id)
        row = await made.task(urgent.id)
        assert starts(simulator).index(row.attempts[0].id) == 2  # what was in ComfyUI already came before it
        for each in tasks:
            await made.ended(each.id)


async def test_a_canceled_task_that_is_run_again_goes_behind_its_equals(
    simulator: Simulator, tmp_path: Path
) -> None:
    await simulator.crash()
    async with bench(configuration(tmp_path / "data", simulator.url, workers=2)) as made:
        tasks = [await made.submit(colored(seed)) for seed in range(4)]
        await asyncio.sleep(0.05)
        await made.state.control.cancel(tasks[0].id)
        await made.state.control.retry(tasks[0].id)
        await simulator.restart()
        rows = {row.attempts[0].id: row.id for row in [await made.ended(each.id) for each in tasks]}
    assert [rows[prompt] for prompt in starts(simulator)] == [each.id for each in (*tasks[1:], tasks[0])]


class AlwaysReady:
    """A backend, as far as slots know one."""

    name = "a"
    in_flight = 1

    @property
    def state(self) -> "AlwaysReady":
        """Itself."""
        return self

    ready = True


async def test_two_places_of_one_task_do_not_take_each_other_away() -> None:
    slots = Slots([AlwaysReady()], 1)
    same = Ready(rank=0, seq=1, task_id="t1")
    first, second = slots.admit(same), slots.admit(same)
    async with asyncio.timeout(2):
        async with first as place:
            await place.acquire()
            late = await second.__aenter__()
        assert await late.acquire() == "a"
        await second.__aexit__(None, None, None)
    assert slots.used == {"a": 0}


# cancel


async def test_a_task_left_claimed_is_canceled_although_comfyui_is_down(
    simulator: Simulator, tmp_path: Path
) -> None:
    settings = configuration(tmp_path / "data", simulator.url)
    async with bench(settings, works=False) as made:
        claim = await left_behind(made, colored(1))
    await simulator.crash()
    async with bench(settings) as made:
        await until(lambda: made.ground.backends[0].state.reason != "not asked yet")
        await made.state.control.cancel(claim.task.id)
        async with asyncio.timeout(3):
            assert (await made.ended(claim.task.id)).status is Status.CANCELED
        await simulator.restart()
    assert starts(simulator) == []


async def test_a_cancel_does_not_wait_for_files_that_do_not_come(
    simulator: Simulator, tmp_path: Path
) -> None:
    simulator.faults.view = "stall"
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        row = await made.submit(colored(1))
        await made.until(lambda row: row.attempts != () and row.attempts[0].step == "collected", row.id)
        await made.state.control.cancel(row.id)
        async with asyncio.timeout(3):
            assert (await made.ended(row.id)).status is Status.CANCELED
        simulator.faults.view = "none"
    assert not (tmp_path / "data" / "files" / row.id).exists()


# ComfyUI goes away, or answers strangely


@pytest.mark.fault(5)
async def test_files_are_fetched_when_comfyui_is_back_and_nothing_runs_again(
    simulator: Simulator, tmp_path: Path
) -> None:
    simulator.faults.view = "stall"
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        row = await made.submit(colored(1))
        await made.until(lambda row: row.attempts != () and row.attempts[0].step == "collected", row.id)
        await simulator.crash()
        simulator.faults.view = "none"
        await until(lambda: not made.ground.backends[0].state.ready)
        await asyncio.sleep(1.0)
        await simulator.restart()
        ended = await made.ended(row.id)
    assert ended.status is Status.SUCCEEDED
    assert (ended.attempt_count, ended.failures) == (1, 0)
    assert len(starts(simulator)) == 1


@pytest.mark.parametrize("asked", ["to end", "to cancel"])
async def test_a_history_that_cannot_be_read_does_not_hold_its_task_for_ever(
    simulator: Simulator, tmp_path: Path, asked: str
) -> None:
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        row = await made.submit(sampled(1, 30))
        row = await made.until(executing, row.id)
        simulator.faults.http_statuses = {f"/history/{row.attempts[0].id}": 500}
        if asked == "to cancel":
            await made.state.control.cancel(row.id)
        async with asyncio.timeout(15):
            ended = await made.ended(row.id)
        assert ended.status is (Status.CANCELED if asked == "to cancel" else Status.FAILED)
        assert made.ground.slots.used == {"comfyui-0": 0}
    assert len(starts(simulator)) == 1


@pytest.mark.fault(8)
async def test_images_of_the_socket_are_not_made_while_there_is_no_socket(
    simulator: Simulator, tmp_path: Path
) -> None:
    simulator.faults.sockets = "refuse"
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        row = await made.submit(shipped("websocket-image"))
        await made.until(lambda row: row.attempt_count > 0, row.id)
        await asyncio.sleep(0.5)
        assert starts(simulator) == []
        simulator.faults.sockets = "none"
        ended = await made.ended(row.id)
    assert ended.status is Status.SUCCEEDED
    assert len(starts(simulator)) == 1


@pytest.mark.fault(10)
async def test_images_that_are_lost_each_time_are_not_made_for_ever(
    simulator: Simulator, tmp_path: Path
) -> None:
    simulator.faults.class_seconds = {"SaveImageWebsocket": 0.3}
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        row = await made.submit(shipped("websocket-image"))
        async with asyncio.timeout(20):
            seen = 0
            while not (await made.task(row.id)).status.terminal:
                if len(starts(simulator)) > seen:
                    seen = len(starts(simulator))
                    simulator.drop_sockets()
                await asyncio.sleep(0.01)
        ended = await made.task(row.id)
    assert ended.status is Status.FAILED
    assert ended.error is not None
    assert "socket" in ended.error.message
    assert len(starts(simulator)) <= 4


def test_an_image_node_that_made_nothing_is_no_loss_while_the_socket_held() -> None:
    listener = Listener("t", {"9": "SaveImageWebsocket"}, frozenset({"9"}), Board(), HandClock())
    listener(messages.ExecutionSuccess(prompt_id="p"))
    assert listener.whole(intact=True)
    assert not listener.whole(intact=False)
    listener(messages.NodeProgress(prompt_id="p", node="9", value=0, maximum=2))
    assert not listener.whole(intact=True)


# clocks


async def test_silence_of_a_lost_socket_is_no_stall(simulator: Simulator, tmp_path: Path) -> None:
    settings = configuration(tmp_path / "data", simulator.url, stall_timeout=0.6, max_attempts=1)
    async with bench(settings) as made:
        row = await made.submit(sampled(1, 200))
        await made.until(executing, row.id)
        simulator.drop_sockets()
        ended = await made.ended(row.id)
    assert ended.error is None
    assert ended.status is Status.SUCCEEDED


@pytest.mark.fault(15)
async def test_a_prompt_that_succeeds_while_it_is_stopped_is_not_run_again(
    simulator: Simulator, tmp_path: Path
) -> None:
    simulator.faults.class_seconds = {"EmptyImage": 2.0}
    simulator.faults.interrupts_ignored = -1
    settings = configuration(tmp_path / "data", simulator.url, stall_timeout=0.3)
    async with bench(settings) as made:
        ended = await made.ended((await made.submit(colored(1))).id)
    assert ended.status is Status.SUCCEEDED
    assert len(starts(simulator)) == 1


@pytest.mark.fault(27)
@pytest.mark.parametrize("hours", [1, -1])
async def test_a_wall_clock_that_is_set_does_not_end_or_free_a_running_prompt(
    simulator: Simulator, tmp_path: Path, hours: int
) -> None:
    clock = JumpingClock()
    async with bench_with(configuration(tmp_path / "data", simulator.url), clock=clock) as made:
        short = await made.submit(sampled(1, 60), timeout=30.0)
        await made.until(executing, short.id)
        clock.shift = hours * 3_600_000
        assert (await made.ended(short.id)).status is Status.SUCCEEDED
        long = await made.submit(sampled(2, 3_000), timeout=0.5)
        await made.until(executing, long.id)
        clock.shift = 0
        async with asyncio.timeout(5):
            error = (await made.ended(long.id)).error
    assert error is not None
    assert error.code == "execution_timeout"


async def test_a_task_that_was_due_stays_due_when_the_wall_clock_is_set_back(
    simulator: Simulator, tmp_path: Path
) -> None:
    clock = JumpingClock()
    await simulator.crash()
    async with bench_with(configuration(tmp_path / "data", simulator.url), clock=clock) as made:
        before = [await made.submit(colored(number)) for number in range(20)]
        await until(lambda: made.ground.backends[0].state.reason != "not asked yet")
        clock.shift = -3_600_000
        after = await made.submit(colored(99))
        await simulator.restart()
        for each in (*before, after):
            assert (await made.ended(each.id)).status is Status.SUCCEEDED


# files


class ReadOnly:
    """A storage of which only `delete` is asked for, in vain."""

    async def delete(self, key: str) -> None:
        """See `Storage`."""
        raise StorageError(f"the disk is read-only: {key}")


def undeletable() -> Any:
    return only(ReadOnly())


async def test_a_task_is_run_again_although_its_old_files_cannot_be_deleted(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        row = await made.ended((await made.submit(colored(1))).id)
        control = Control(
            made.store,
            Forgetter(made.store, undeletable(), made.state.uploads),
            made.service.workers._queue,  # noqa: SLF001 - the queue that the workers take from
            made.state.board,
            made.state.metrics,
            made.state.clock,
        )
        assert (await control.retry(row.id)).status is Status.QUEUED
        async with asyncio.timeout(5):
            ended = await made.until(lambda row: row.attempt_count == 2 and row.status.terminal, row.id)
        assert ended.status is Status.SUCCEEDED
        await control.delete(row.id)
        assert await made.store.get(row.id) is None


async def test_a_settled_task_is_told_although_its_files_cannot_be_deleted() -> None:
    row, board = task(cancel_requested_at=1), Board()

    class Rows:
        async def get(self, _: str) -> Task:
            return row

        async def settle(self, _: str, settlement: Settlement, now: int) -> Task:
            return msgspec.structs.replace(row, status=settlement.status, completed_at=now)

    policy = RetryPolicy(first_ms=1, most_ms=1)
    rows: Any = Rows()
    forgetter = Forgetter(rows, undeletable(), cast("Any", None))
    settler = Settler(rows, forgetter, board, Metrics(), HandClock(), policy)
    with board.watch(row.id) as watcher:
        settled = await settler.settle(
            claimed(row, attempt(task_id=row.id)), Succeeded(artefacts=(artefact(key="k"),))
        )
        told = await watcher.next(timeout=1)
    assert settled.status is Status.CANCELED
    assert told is not None
    assert told.final


async def test_outputs_of_nodes_with_similar_ids_do_not_share_a_file(tmp_path: Path) -> None:
    ids = ("1:2", "1.2", "x" * 70 + "a", "x" * 70 + "b")
    files = [
        OutputFile(node_id=node, index=0, kind="text", type=OutputType.TEXT, filename="text.txt", text=node)
        for node in ids
    ]
    config = configuration(tmp_path / "data")
    clock = SystemClock()
    async with open_storages(config, clock) as storages, open_scratch(config.temporary) as scratch:
        terms = StoringTerms(retry_ms=0, inline_bytes=0)
        writer = ArtefactWriter(storages, scratch, Health(), Metrics(), clock, terms)
        stored: list[Artefact] = []
        for _ in range(2):  # the keys are the same on a repeat
            stored = [await writer.write("t/1", file, OutputOptions(), text_source) for file in files]
            assert len({each.key for each in stored}) == len(ids)
        for each in stored:
            assert (await read(await storages.get("local"), each.key)).decode() == each.node_id


@pytest.mark.parametrize("size", [3_000, 9_000, 3_000_000])
async def test_a_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path: Path, size: int) -> None:
    async with open_scratch(tmp_path / "tmp") as scratch:
        with small_disk(2_000), pytest.raises(StorageError):
            async with scratch.file() as path:
                await write_stream("cannot write", path, parts(size))
    assert list((tmp_path / "tmp").iterdir()) == []


async def parts(size: int) -> AsyncIterator[bytes]:
    yield bytes(size)


async def test_deleting_one_attempts_files_does_not_disturb_the_next_ones(tmp_path: Path) -> None:
    file = local_file(tmp_path / "source", b"x")
    async with open_local(tmp_path / "files") as storage:

        async def come_and_go(number: int) -> None:
            for _ in range(150):
                await storage.put(f"t/{number}/a", file)
                await storage.delete(f"t/{number}/a")

        await asyncio.gather(*[come_and_go(number) for number in range(4)])
    assert not (tmp_path / "files" / "t").exists()


async def test_a_file_whose_storing_was_canceled_leaves_nothing(tmp_path: Path) -> None:
    file = local_file(tmp_path / "source", b"x")
    async with open_local(tmp_path / "files") as storage:
        for turns in range(80):
            putting = asyncio.ensure_future(storage.put(f"t/{turns}/a", file))
            for _ in range(turns % 20):
                await asyncio.sleep(0)
            putting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await putting
            await storage.delete(f"t/{turns}/a")
            assert list((tmp_path / "files" / ".unfinished").iterdir()) == []
    assert not (tmp_path / "files" / "t").exists()


# the end


async def test_a_stop_gives_comfyui_nothing_new(simulator: Simulator, tmp_path: Path) -> None:
    settings = configuration(tmp_path / "data", simulator.url)
    async with bench(settings, grace_ms=3_000) as made:
        tasks = [await made.submit(sampled(seed, 40)) for seed in range(4)]
        await made.until(executing, tasks[0].id)
        await made.until(lambda row: row.attempt_count == 1, tasks[3].id)
    assert len(starts(simulator)) == 2
    async with bench(settings) as made:
        rows = [await made.ended(each.id) for each in tasks]
    assert [(row.status, row.attempt_count) for row in rows] == [(Status.SUCCEEDED, 1)] * 4
    assert len(starts(simulator)) == 4


async def test_a_request_that_is_under_way_is_answered_after_a_stop(tmp_path: Path) -> None:
    async with Simulator() as simulator:
        config = msgspec.structs.replace(
            configuration(tmp_path / "data", simulator.url), server=ServerConfig(port=0, grace=5.0)
        )
        listening = listen(config)
        port = listening.getsockname()[1]
        serving = asyncio.ensure_future(serve(config, listening))
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            async with asyncio.timeout(PATIENCE), session.get("/api/health") as answer:
                assert answer.status == 200
            halted = asyncio.Event()

            async def body() -> AsyncIterator[bytes]:
                document = msgspec.json.encode({"workflow": colored(1)})
                yield document[:20]
                await halted.wait()
                yield document[20:]

            async def post() -> int:
                async with session.post(
                    "/api/tasks", data=body(), headers={"Content-Type": "application/json"}
                ) as answer:
                    await answer.read()
                    return answer.status

            posting = asyncio.ensure_future(post())
            await asyncio.sleep(0.3)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.5)
            halted.set()
            assert await posting == 202
        async with asyncio.timeout(PATIENCE):
            await serving
