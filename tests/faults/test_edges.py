"""Durability at the edges: disks that fill up or fail, locks, damaged files, signals, a long sleep.

What is accepted is never lost, nothing is said to be done that is not, and comfyd either goes on by itself or
ends with one line that says what to do.
"""

import asyncio
import contextlib
import errno
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import pytest

from comfyd.config import Config, LimitsConfig
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.store.sqlite import open_sqlite
from comfyd.tasks import Status
from tests.api.conftest import serving
from tests.support.comfyd import Client, ComfydProcess
from tests.support.gate import Call, Gate, GatedComfyd
from tests.support.service import bench, colored, configuration, sampled, until

RESERVE: Final = 1_000_000
CLIENTS: Final = 8
NOBODY: Final = "http://127.0.0.1:9"
PATIENCE: Final = 30.0


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions(step_seconds=0.01)) as made:
        yield made


@contextlib.asynccontextmanager
async def client_of(comfyd: ComfydProcess) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(session, comfyd.url)


def runs(simulator: Simulator) -> Counter[str]:
    """How often each prompt was started on the simulated GPU."""
    return Counter(entry.prompt_id for entry in simulator.executions if entry.event == "start")


# a full disk


class Disk:
    """What a disk has free, as the test says it."""

    def __init__(self) -> None:
        self.free = 10 * RESERVE

    def measure(self, folder: Path) -> int:
        """What `os.statvfs` would say of this folder."""
        assert folder.is_dir()
        return self.free


def reserving(folder: Path, url: str) -> Config:
    return msgspec.structs.replace(configuration(folder, url), limits=LimitsConfig(free_bytes=RESERVE))


@pytest.mark.fault(23)
async def test_new_work_is_refused_before_the_disk_is_full_and_taken_again_after(
    tmp_path: Path, simulator: Simulator
) -> None:
    disk = Disk()
    async with serving(reserving(tmp_path / "data", simulator.url), works=True, measure=disk.measure) as edge:

        async def submit() -> tuple[int, Any]:
            headers = {"Idempotency-Key": "k"}
            return await edge.call("POST", "/api/tasks", json={"workflow": sampled(1, 60)}, headers=headers)

        async def ready() -> tuple[int, Any]:
            status, answer = await edge.call("GET", "/api/ready")
            return status, answer["checks"]["disk"]

        status, running = await submit()
        assert status == 202
        _, waiting = await edge.call("POST", "/api/tasks", json={"workflow": sampled(2, 5_000)})
        await until(lambda: len(simulator.executions) == 1)

        disk.free = RESERVE - 1
        async with asyncio.timeout(PATIENCE):
            while (said := await ready())[1]["ok"]:
                await asyncio.sleep(0.05)
        assert said[0] == 503
        assert "limits.free_bytes" in said[1]["reason"]
        ended = await edge.bench.ended(running["task_id"])
        assert ended.status is Status.SUCCEEDED
        status, body = await edge.call("POST", "/api/tasks", json={"workflow": colored(1)})
        assert (status, body["error"]["code"]) == (507, "insufficient_storage")
        assert "limits.free_bytes" in body["error"]["message"]
        for path in ("/api/inputs", f"/api/tasks/{ended.id}/retry"):
            status, body = await edge.call("POST", path, data=b"a file")
            assert (path, status, body["error"]["code"]) == (path, 507, "insufficient_storage")
        status, replayed = await submit()  # the answer to what was accepted before
        assert (status, replayed["task_id"]) == (202, running["task_id"])
        assert (await edge.call("GET", f"/api/tasks/{ended.id}"))[0] == 200
        assert (await edge.call("POST", f"/api/tasks/{waiting['task_id']}/cancel"))[0] in {200, 202}
        assert (await edge.bench.ended(waiting["task_id"])).status is Status.CANCELED
        assert (await edge.call("DELETE", f"/api/tasks/{ended.id}"))[0] == 204

        disk.free = RESERVE
        async with asyncio.timeout(PATIENCE):
            while not (said := await ready())[1]["ok"]:
                await asyncio.sleep(0.05)
        assert said == (200, {"ok": True, "reason": None})
        status, task = await edge.call("POST", "/api/tasks", json={"workflow": colored(2)})
        assert status == 202
        assert (await edge.bench.ended(task["task_id"])).status is Status.SUCCEEDED


@pytest.mark.fault(23)
async def test_without_a_reserve_nobody_looks_at_the_disk(tmp_path: Path) -> None:
    def never(folder: Path) -> int:
        raise AssertionError(f"looked at {folder}")

    config = msgspec.structs.replace(
        configuration(tmp_path / "data", NOBODY), limits=LimitsConfig(free_bytes=0)
    )
    async with bench(config, measure=never) as made:
        assert (await made.submit(colored(1))).status is Status.QUEUED


class FullDisk:
    """Stands at the gate of a comfyd whose disk takes nothing while it is full."""

    def __init__(self, data: Path) -> None:
        self._data = str(data)
        self.full = False
        self.refused = 0

    def decide(self, call: Call) -> int | None:
        """No byte more on that disk."""
        if not self.full or not call.path.startswith(self._data):
            return None
        self.refused += 1
        return errno.ENOSPC


@pytest.mark.fault(23)
async def test_a_disk_that_runs_full_under_load_loses_nothing_and_lies_about_nothing(
    tmp_path: Path, simulator: Simulator
) -> None:
    disk = FullDisk(tmp_path / "data")
    answers: Counter[int] = Counter()
    accepted: list[str] = []
    numbers = iter(range(1_000_000))
    stop = asyncio.Event()

    async def load(client: Client) -> None:
        while not stop.is_set():
            status, body = await client.call("POST", "/api/tasks", json={"workflow": colored(next(numbers))})
            answers[status] += 1
            if status == 202:
                accepted.append(body["task_id"])
            else:
                assert (status, body["error"]["code"]) == (507, "insufficient_storage")
            await asyncio.sleep(0.02)

    with (
        Gate(("write", "pwrite64"), disk.decide) as gate,
        GatedComfyd(gate, tmp_path, simulator.url) as comfyd,
    ):
        async with client_of(comfyd) as client:
            clients = [asyncio.ensure_future(load(client)) for _ in range(CLIENTS)]
            await until(lambda: len(accepted) >= 20)
            disk.full = True
            await until(lambda: answers[507] >= 40)
            assert (await client.task(accepted[0]))["task_id"] == accepted[0]
            before, answers[202] = answers[202], 0
            disk.full = False
            await until(lambda: answers[202] >= 20)
            stop.set()
            await asyncio.gather(*clients)
            ended = [await client.ended(task_id) for task_id in accepted]
        assert comfyd.exit_code() is None
    assert before >= 20
    assert disk.refused > 0
    assert {task["status"] for task in ended} == {"COMPLETED"}
    assert len(runs(simulator)) == len(accepted)
    assert set(runs(simulator).values()) == {1}


# a disk that fails


class FailingSync:
    """Stands at the gate of a comfyd whose disk fails to sync the log from some moment on."""

    def __init__(self) -> None:
        self.failing = False
        self.failed_at: float | None = None

    def decide(self, call: Call) -> int | None:
        """What was not synced is lost for good; the kernel says so once."""
        if not call.path.endswith("comfyd.db-wal"):
            return None
        if self.failing and self.failed_at is None:
            self.failed_at = time.monotonic()
            return errno.EIO
        return None


@pytest.mark.fault(24)
async def test_a_failed_sync_ends_the_process_and_is_never_a_2xx(tmp_path: Path) -> None:
    disk = FailingSync()
    accepted: dict[str, float] = {}
    refused: list[tuple[int, str]] = []

    async def load(client: Client, first: int) -> None:
        with contextlib.suppress(aiohttp.ClientError):  # it is gone
            for number in range(first, 1_000_000, CLIENTS):
                sent = time.monotonic()
                status, body = await client.call("POST", "/api/tasks", json={"workflow": colored(number)})
                if status == 202:
                    accepted[body["task_id"]] = sent
                else:
                    refused.append((status, body["error"]["code"]))

    with Gate(("fsync", "fdatasync"), disk.decide) as gate:
        with GatedComfyd(gate, tmp_path, NOBODY) as comfyd:
            async with client_of(comfyd) as client:
                clients = [asyncio.ensure_future(load(client, number)) for number in range(CLIENTS)]
                await until(lambda: len(accepted) >= 20)
                disk.failing = True
                code = await asyncio.to_thread(comfyd.wait)
                await asyncio.gather(*clients)
            log = comfyd.log_text()
        assert code == 69
        assert "Traceback" not in log
        assert "disk I/O error" in log.splitlines()[-1]
        assert disk.failed_at is not None
        assert max(accepted.values()) <= disk.failed_at
        assert set(refused) <= {(503, "store_unavailable")}
    with ComfydProcess(tmp_path, NOBODY) as again:
        async with client_of(again) as client:
            for task_id in accepted:
                assert (await client.task(task_id))["status"] == "PENDING"


# a database that cannot be had

LOCKER: Final = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
"""


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """Within this block another process holds the database's lock for writing."""
    command = [sys.executable, "-c", LOCKER, str(database)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as locker:
        assert locker.stdout is not None
        assert locker.stdout.readline() == b"locked\n"
        try:
            yield
        finally:
            locker.communicate(b"\n", timeout=PATIENCE)


@pytest.mark.fault(25)
async def test_a_database_that_another_locks_is_503_and_work_goes_on_after(
    tmp_path: Path, simulator: Simulator
) -> None:
    with ComfydProcess(tmp_path, simulator.url) as comfyd:
        async with client_of(comfyd) as client, aiohttp.ClientSession() as session:
            running, waiting = await client.submit(sampled(1, 200)), await client.submit(colored(1))
            await until(lambda: len(simulator.executions) == 1)
            await asyncio.sleep(0.3)  # both are in ComfyUI's queue: the next one who writes is this test
            with locked(tmp_path / "data" / "comfyd.db"):
                url = f"{comfyd.url}/api/tasks"
                async with session.post(url, json={"workflow": colored(2)}) as answer:
                    assert answer.status == 503
                    assert int(answer.headers["Retry-After"]) > 0
                    assert (await answer.json())["error"]["code"] == "store_unavailable"
                assert (await client.task(running["task_id"]))["status"] == "PROCESSING"
                await until(lambda: simulator.executions[1:2] != [])
            accepted = await client.submit(colored(3))
            for task in (running, waiting, accepted):
                ended = await client.ended(task["task_id"])
                assert (ended["status"], len(ended["attempts"])) == ("COMPLETED", 1)
            status, listed = await client.call("GET", "/api/tasks")
    assert status == 200
    assert len(listed["tasks"]) == 3  # what was refused is not there
    assert set(runs(simulator).values()) == {1}


def no_database(database: Path) -> None:
    database.write_bytes(b"these are not the bytes of a database" * 1_000)


def damaged(database: Path) -> None:
    content = bytearray(database.read_bytes())
    content[4_096:12_288] = b"x" * 8_192
    database.write_bytes(content)


def newer(database: Path) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    ("harm", "advice"),
    [(no_database, "move it away"), (damaged, "move it away"), (newer, "use the newer comfyd")],
)
async def test_a_database_that_cannot_be_used_is_refused_in_one_line_and_left_alone(
    tmp_path: Path, harm: Any, advice: str
) -> None:
    database = tmp_path / "data" / "comfyd.db"
    database.parent.mkdir()
    async with open_sqlite(database):
        pass
    harm(database)
    before = database.read_bytes()
    comfyd = ComfydProcess(tmp_path, NOBODY)
    await asyncio.to_thread(comfyd.spawn)
    assert await asyncio.to_thread(comfyd.wait) == 69
    said = [line for line in comfyd.log_text().splitlines() if not line.startswith("{")]
    assert len(said) == 1, said
    assert str(database) in said[0]
    assert advice in said[0]
    assert database.read_bytes() == before


# signals


@pytest.mark.fault(37)
async def test_sigterm_under_load_loses_nothing_and_runs_nothing_twice(
    tmp_path: Path, simulator: Simulator
) -> None:
    accepted: list[str] = []
    numbers = iter(range(1_000_000))

    async def load(client: Client) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError):  # it is gone, or going
            while True:
                number = next(numbers)
                graph = sampled(number, 30) if number % 10 == 0 else colored(number)
                status, body = await client.call("POST", "/api/tasks", json={"workflow": graph})
                assert status == 202
                accepted.append(body["task_id"])
                await asyncio.sleep(0.05)

    with ComfydProcess(tmp_path, simulator.url) as comfyd:
        async with client_of(comfyd) as client:
            clients = [asyncio.ensure_future(load(client)) for _ in range(CLIENTS)]
            await until(lambda: len(accepted) >= 40 and len(simulator.executions) >= 8)
            began = time.monotonic()
            code = await asyncio.to_thread(comfyd.terminate)
            took = time.monotonic() - began
            await asyncio.gather(*clients)
        assert code == 0
        assert took < 1 + 5  # the grace that `ComfydProcess` sets, and a little
        assert "Traceback" not in comfyd.log_text()
        await asyncio.to_thread(comfyd.start)
        async with client_of(comfyd) as client:
            ended = [await client.ended(task_id) for task_id in accepted]
    assert {(task["status"], len(task["attempts"])) for task in ended} == {("COMPLETED", 1)}
    assert len(runs(simulator)) == len(accepted)
    assert set(runs(simulator).values()) == {1}


FROZEN_SECONDS: Final = 4.0


@pytest.mark.fault(39)
async def test_a_process_that_was_frozen_takes_up_what_went_on_without_it(
    tmp_path: Path, simulator: Simulator
) -> None:
    """Four seconds stand for a minute: every time-out here is shorter, and the monotonic clock runs on.

    What a longer sleep adds is that ComfyUI gives up the socket, which the test does itself.
    """
    limits = {"COMFYD__QUEUE__TIMEOUT": "3", "COMFYD__QUEUE__STALL_TIMEOUT": "3"}
    with ComfydProcess(tmp_path, simulator.url, **limits) as comfyd:
        async with client_of(comfyd) as client:
            tasks = [await client.submit(sampled(1, 60))]
            await until(lambda: len(simulator.executions) == 1)
            tasks += [await client.submit(colored(number)) for number in range(10)]
            await asyncio.to_thread(comfyd.send_signal, signal.SIGSTOP)
            await asyncio.sleep(FROZEN_SECONDS / 2)
            simulator.drop_sockets()
            await asyncio.sleep(FROZEN_SECONDS / 2)
            await asyncio.to_thread(comfyd.send_signal, signal.SIGCONT)
            ended = [await client.ended(task["task_id"]) for task in tasks]
            await until(lambda: simulator.sockets.total == 2)
            assert (await client.call("GET", "/api/ready"))[0] == 200
        log = comfyd.log_text()
    assert [(task["status"], len(task["attempts"])) for task in ended] == [("COMPLETED", 1)] * len(tasks)
    assert set(runs(simulator).values()) == {1}
    assert "process.stood_still" in log
    assert "loop.blocked" not in log
