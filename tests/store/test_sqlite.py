"""What the SQLite store promises of its disk: durability, errors of every kind, whole batches."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import comfyd
from comfyd.errors import InsufficientStorage, StoreUnavailable
from comfyd.store.sqlite import SqliteStore, open_sqlite
from comfyd.tasks import Claim, EventType, Settlement, Status
from tests.store.disks import failing
from tests.store.samples import (
    HOOK,
    NOW,
    added,
    again,
    artefact,
    claim,
    claimed,
    failed,
    new_id,
    new_task,
    owed,
    succeeded,
)

ROOT = Path(comfyd.__file__).parents[1]

# durability

ADDER = """
import asyncio, sys
from functools import partial
from pathlib import Path
from comfyd.store.sqlite import open_sqlite
from tests.store.samples import NOW, new_task

async def main():
    async with open_sqlite(Path(sys.argv[1])) as store:
        async def adds():
            while True:
                answer = await store.add(new_task(), None, NOW)
                print(answer.task.id, flush=True)
        await asyncio.gather(*(adds() for _ in range(8)))

asyncio.run(main())
"""

LIMITED = """
import asyncio, resource, sys
from functools import partial
from pathlib import Path
from comfyd.errors import StoreUnavailable
from comfyd.store.sqlite import open_sqlite
from tests.store.samples import NOW, new_task

async def main():
    async with open_sqlite(Path(sys.argv[1])) as store:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
        answered = 0
        try:
            while answered < 1000:
                await store.add(new_task(), None, NOW)
                answered += 1
        except StoreUnavailable as exc:
            assert "I/O" in exc.message, exc.message
        assert await asyncio.wait_for(store.wait_broken(), 5) == store.broken
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        try:
            await store.add(new_task(), None, NOW)
        except StoreUnavailable:
            print(answered, flush=True)

asyncio.run(main())
"""


async def start(script: str, path: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, str(path)),
        stdout=asyncio.subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT)},
    )


async def test_every_answered_add_survives_a_kill(path: Path) -> None:
    process = await start(ADDER, path)
    assert process.stdout is not None
    answered = [await asyncio.wait_for(process.stdout.readline(), 30) for _ in range(100)]
    process.kill()
    answered += (await asyncio.wait_for(process.stdout.read(), 30)).splitlines(keepends=True)
    assert await process.wait() == -9
    ids = [line.decode().strip() for line in answered if line.endswith(b"\n")]
    assert len(ids) >= 100
    async with open_sqlite(path) as store:
        page = await store.ready(NOW, len(ids) + 1000)
        there = {entry.task_id for entry in page.entries}
        assert [task_id for task_id in ids if task_id not in there] == []
        assert (await store.counts())[Status.QUEUED] == len(there)


@pytest.mark.fault(24)
async def test_after_a_real_disk_error_no_write_ever_succeeds(path: Path) -> None:
    process = await start(LIMITED, path)
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    answered = int(output)
    assert answered > 0
    async with open_sqlite(path) as store:
        assert (await store.counts())[Status.QUEUED] >= answered


# errors


@pytest.mark.fault(24)
async def test_failed_sync_is_never_followed_by_a_success(path: Path) -> None:
    armed: list[bool] = []
    async with open_sqlite(path, factory=failing("COMMIT", sqlite3.SQLITE_IOERR_FSYNC, armed)) as store:
        task = await added(store)
        armed.append(True)
        results = await asyncio.gather(*(added(store) for _ in range(10)), return_exceptions=True)
        assert [type(result) for result in results] == [StoreUnavailable] * 10
        armed.clear()
        with pytest.raises(StoreUnavailable, match="broken"):
            await store.cancel(task.id, NOW)
        assert store.broken is not None
        assert await asyncio.wait_for(store.wait_broken(), 5) == store.broken
        assert (await store.counts())[Status.QUEUED] == 1
        assert await store.get(task.id) == task


async def test_disk_error_inside_one_operation_breaks_the_store(path: Path) -> None:
    armed: list[bool] = []
    async with open_sqlite(path, factory=failing("INTO payloads", sqlite3.SQLITE_IOERR_READ, armed)) as store:
        task = await added(store)
        armed.append(True)
        results = await asyncio.gather(store.cancel(task.id, NOW), added(store), return_exceptions=True)
        assert [type(result) for result in results] == [StoreUnavailable] * 2
        assert store.broken is not None
        assert await store.get(task.id) == task


async def test_healthy_store_is_not_broken(sqlite: SqliteStore) -> None:
    await added(sqlite)
    assert sqlite.broken is None
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(sqlite.wait_broken(), 0.01)


@pytest.mark.fault(23)
async def test_full_disk_refuses_what_does_not_fit_and_that_alone(path: Path) -> None:
    class Small(sqlite3.Connection):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.execute("PRAGMA max_page_count = 80")

    huge = {"1": {"class_type": "Text", "inputs": {"text": "x" * 1_000_000}}}
    async with open_sqlite(path, factory=Small) as store:
        results = await asyncio.gather(
            added(store), added(store, graph=huge), added(store), return_exceptions=True
        )
        assert isinstance(results[1], InsufficientStorage)
        assert not isinstance(results[0], BaseException)
        assert not isinstance(results[2], BaseException)
        assert (await store.counts())[Status.QUEUED] == 2
        assert store.broken is None
        assert (await added(store)).status is Status.QUEUED


async def test_file_too_full_for_the_schema_is_insufficient_storage(path: Path) -> None:
    class Tiny(sqlite3.Connection):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.execute("PRAGMA max_page_count = 5")

    with pytest.raises(InsufficientStorage):
        async with open_sqlite(path, factory=Tiny):
            pass


@pytest.mark.fault(25)
async def test_foreign_lock_is_a_retryable_refusal(path: Path) -> None:
    class Impatient(sqlite3.Connection):
        def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
            return super().execute(sql.replace("busy_timeout = 5000", "busy_timeout = 20"), parameters)

    async with open_sqlite(path, factory=Impatient) as store:
        foreign = sqlite3.connect(path, isolation_level=None)
        foreign.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable) as refused:
            await added(store)
        assert refused.value.retryable
        foreign.execute("ROLLBACK")
        foreign.close()
        assert store.broken is None
        assert (await added(store)).status is Status.QUEUED


async def test_query_that_is_wrong_surfaces_as_it_is(sqlite: SqliteStore, raw: sqlite3.Connection) -> None:
    raw.execute("DROP INDEX tasks_ended")
    with pytest.raises(sqlite3.OperationalError, match="tasks_ended"):
        await sqlite.ended_before(NOW, 1)
    assert sqlite.broken is None


# the outbox and the transaction of its task

ENDS: dict[str, Callable[[SqliteStore, Claim], Awaitable[object]]] = {
    "success": lambda store, taken: store.settle(taken.attempt.id, succeeded(artefact()), NOW),
    "failure": lambda store, taken: store.settle(taken.attempt.id, failed(), NOW),
    "cancel": lambda store, taken: store.settle(
        taken.attempt.id, Settlement(status=Status.CANCELED, outcome="canceled"), NOW
    ),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
async def test_end_that_cannot_be_announced_is_no_end(
    sqlite: SqliteStore, raw: sqlite3.Connection, end: Callable[[SqliteStore, Claim], Awaitable[object]]
) -> None:
    taken = await claimed(sqlite, webhook=HOOK)
    raw.execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON deliveries WHEN NEW.type <> 'task.output' "
        "BEGIN SELECT RAISE(ABORT, 'refused'); END"
    )
    before = await owed(sqlite)
    with pytest.raises(sqlite3.IntegrityError, match="refused"):
        await end(sqlite, taken)
    assert await sqlite.get(taken.task.id) == taken.task
    assert await owed(sqlite) == before
    assert raw.execute("SELECT count(*) FROM subjects").fetchone() == (1,)
    raw.execute("DROP TRIGGER refuse")
    await end(sqlite, taken)
    assert len(await owed(sqlite)) > len(before)


async def test_start_and_cancel_that_cannot_be_announced_are_undone(
    sqlite: SqliteStore, raw: sqlite3.Connection
) -> None:
    task = await added(sqlite, webhook=HOOK)
    raw.execute("CREATE TRIGGER refuse BEFORE INSERT ON deliveries BEGIN SELECT RAISE(ABORT, 'refused'); END")
    with pytest.raises(sqlite3.IntegrityError, match="refused"):
        await sqlite.claim(task.id, new_id(), NOW)
    with pytest.raises(sqlite3.IntegrityError, match="refused"):
        await sqlite.cancel(task.id, NOW)
    assert await sqlite.get(task.id) == task


async def test_transition_that_fails_after_it_owed_something_owes_nothing(path: Path) -> None:
    armed: list[bool] = []
    async with open_sqlite(path, factory=failing("COMMIT", sqlite3.SQLITE_IOERR_FSYNC, armed)) as store:
        taken = await claimed(store, webhook=HOOK)
        queued = await added(store, webhook=HOOK)
        before = await owed(store)
        armed.append(True)
        results = await asyncio.gather(
            store.settle(taken.attempt.id, succeeded(artefact()), NOW),
            store.cancel(queued.id, NOW),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [StoreUnavailable] * 2
    async with open_sqlite(path) as store:
        assert await owed(store) == before
        assert await store.live() == (taken,)
        assert await store.get(queued.id) == queued


async def test_settlements_of_one_batch_owe_each_for_itself(sqlite: SqliteStore) -> None:
    claims = [await claimed(sqlite, webhook=HOOK) for _ in range(3)]
    results = await asyncio.gather(
        sqlite.settle(claims[0].attempt.id, succeeded(artefact()), NOW),
        sqlite.settle(claims[1].attempt.id, succeeded(artefact(), artefact()), NOW),  # twice the same place
        sqlite.settle(claims[2].attempt.id, failed(), NOW),
        return_exceptions=True,
    )
    assert [type(result).__name__ for result in results] == ["Task", "IntegrityError", "Task"]
    owes = [[delivery.type for delivery in await owed(sqlite, taken.task.id)] for taken in claims]
    start = EventType.STARTED
    assert owes == [[start, EventType.OUTPUT, EventType.COMPLETED], [start], [start, EventType.FAILED]]


async def test_one_subject_serves_every_delivery_of_a_transition(
    sqlite: SqliteStore, raw: sqlite3.Connection
) -> None:
    first = await claimed(sqlite, webhook=HOOK)
    await sqlite.settle(first.attempt.id, again(NOW), NOW)
    second = await claim(sqlite, first.task.id)
    task = await sqlite.settle(second.attempt.id, succeeded(artefact()), NOW)
    assert len(await owed(sqlite)) == 3
    assert raw.execute("SELECT count(*) FROM subjects").fetchone() == (2,)
    await sqlite.delete(task.id)
    for table in ("subjects", "deliveries", "delivery_tries"):
        assert raw.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)  # noqa: S608 # a fixed word


# batches


async def test_refused_operations_of_a_batch_are_undone_alone(sqlite: SqliteStore) -> None:
    twin = new_task()
    results = await asyncio.gather(
        sqlite.add(twin, None, NOW),
        sqlite.add(twin, None, NOW),
        sqlite.add(new_task(priority=1001), None, NOW),
        sqlite.add(new_task(metadata={"a": "\ud800"}), None, NOW),
        sqlite.add(new_task(nodes_total=2**70), None, NOW),
        sqlite.add(new_task(), None, NOW),
        return_exceptions=True,
    )
    kinds = [type(result).__name__ for result in results]
    assert kinds == [
        "Added",
        "IntegrityError",
        "IntegrityError",
        "UnicodeEncodeError",
        "OverflowError",
        "Added",
    ]
    assert (await sqlite.counts())[Status.QUEUED] == 2


async def test_bug_in_one_operation_does_not_reach_the_others(sqlite: SqliteStore) -> None:
    taken = await claimed(sqlite)
    nonsense: Any = "no step"
    results = await asyncio.gather(
        added(sqlite),
        sqlite.record(msgspec.structs.replace(taken.attempt, step=nonsense)),
        added(sqlite),
        return_exceptions=True,
    )
    assert [type(result).__name__ for result in results] == ["Task", "AttributeError", "Task"]
    assert (await sqlite.counts())[Status.QUEUED] == 2
    with pytest.raises(AttributeError):
        await sqlite.record(msgspec.structs.replace(taken.attempt, step=nonsense))
