"""What the SQLite store promises of its file: one owner, versions, durability, sick disks, whole batches."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

import comfyd
from comfyd.errors import InsufficientStorage, StoreUnavailable
from comfyd.store.sqlite import MIGRATIONS, SqliteStore, open_sqlite
from comfyd.tasks import Status
from tests.store.samples import NOW, added, artefact, claimed, ended, new_task

ROOT = Path(comfyd.__file__).parents[1]

PRAGMAS: Final[dict[str, Any]] = {
    "journal_mode": "wal",
    "synchronous": 2,
    "busy_timeout": 5000,
    "foreign_keys": 1,
    "temp_store": 2,
    "mmap_size": 0,
    "trusted_schema": 0,
}


def damage(path: Path, content: bytes, places: Iterable[int]) -> None:
    """Write over the file at these offsets, as a sick disk would."""
    path.touch()
    size = path.stat().st_size
    with path.open("r+b") as file:
        for place in places:
            if place <= size:
                file.seek(place)
                file.write(content)


def modes(directory: Path) -> set[int]:
    """The permissions of the files there."""
    return {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


# the file


async def test_file_is_as_the_design_says(path: Path) -> None:
    seen: dict[str, Any] = {}

    class Watched(sqlite3.Connection):
        def close(self) -> None:
            for name in PRAGMAS:
                (seen[name],) = self.execute(f"PRAGMA {name}").fetchone() or (0,)
            super().close()

    async with open_sqlite(path, factory=Watched):
        assert modes(path.parent) == {0o600}
    assert seen == PRAGMAS


async def test_every_table_is_strict(raw: sqlite3.Connection) -> None:
    tables = raw.execute("SELECT name, strict FROM pragma_table_list WHERE schema = 'main'").fetchall()
    lax = [name for name, strict in tables if not strict and not name.startswith("sqlite_")]
    assert len(tables) > 8
    assert lax == []


async def test_second_opener_is_refused_in_one_line_that_helps(sqlite: SqliteStore, path: Path) -> None:
    with pytest.raises(StoreUnavailable) as refused:
        async with open_sqlite(path):
            pass
    assert str(path.parent) in refused.value.message
    assert "\n" not in refused.value.message
    assert (await added(sqlite)).status is Status.QUEUED


async def test_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(StoreUnavailable, match="missing"):
        async with open_sqlite(missing / "comfyd.db"):
            pass


async def test_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    async with open_sqlite(path):
        pass
    newer = len(MIGRATIONS) + 1
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {newer}")
    connection.close()
    with pytest.raises(StoreUnavailable, match=f"schema version {newer}"):
        async with open_sqlite(path):
            pass
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (newer,)
    connection.close()


async def test_migration_that_fails_leaves_nothing(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE run_totals (x)")  # in the way of the schema, near its end
    connection.close()
    with pytest.raises(StoreUnavailable, match="run_totals"):
        async with open_sqlite(path):
            pass
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT name FROM sqlite_schema").fetchall() == [("run_totals",)]
    assert connection.execute("PRAGMA user_version").fetchone() == (0,)
    connection.close()


async def test_file_that_is_no_database_is_refused_by_name(path: Path) -> None:
    damage(path, b"no database " * 1000, [0])
    with pytest.raises(StoreUnavailable, match=r"comfyd\.db"):
        async with open_sqlite(path):
            pass


async def test_damaged_file_is_found_at_the_start(path: Path) -> None:
    async with open_sqlite(path) as store:
        for _ in range(50):
            await added(store)
    damage(path, b"\xff" * 64, range(5 * 4096, 50 * 4096, 4096))
    with pytest.raises(StoreUnavailable, match=r"damaged|malformed"):
        async with open_sqlite(path):
            pass


async def test_directory_in_the_place_of_the_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=tmp_path.name):
        async with open_sqlite(tmp_path):
            pass


async def test_disk_without_write_ahead_log_is_refused(path: Path) -> None:
    class Unable(sqlite3.Connection):
        def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
            return super().execute(sql.replace("journal_mode = WAL", "journal_mode"), parameters)

    with pytest.raises(StoreUnavailable, match="write-ahead log"):
        async with open_sqlite(path, factory=Unable):
            pass


# migrations

BACK_TO_1 = """
DROP TRIGGER artefacts_counted_in;
DROP TRIGGER artefacts_counted_out;
DROP TABLE artefact_bytes; DROP TRIGGER artefacts_unwanted; DROP TABLE unwanted_files;
DROP TABLE task_uploads;
ALTER TABLE artefacts DROP COLUMN location;
ALTER TABLE artefacts DROP COLUMN data;
PRAGMA user_version = 1;
"""


def shape(connection: sqlite3.Connection) -> set[tuple[Any, ...]]:
    """Every column, index and trigger."""
    columns = connection.execute(
        """
        SELECT t.name, c.name, c.type, c."notnull", c.dflt_value, c.pk
        FROM pragma_table_list AS t, pragma_table_info(t.name) AS c WHERE t.schema = 'main'
        """
    ).fetchall()
    others = connection.execute("SELECT type, name, sql FROM sqlite_schema WHERE type <> 'table'").fetchall()
    return {*columns, *others}


def take_back_to_1(path: Path) -> None:
    """Make a database what an earlier comfyd would have left: exactly of version 1."""
    old = sqlite3.connect(":memory:")
    old.executescript((ROOT / "comfyd/store" / MIGRATIONS[0]).read_text())
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(BACK_TO_1)
    assert shape(connection) == shape(old)
    connection.close()
    old.close()


async def test_a_database_of_version_1_is_taken_over_with_all_that_is_in_it(path: Path) -> None:
    async with open_sqlite(path) as store:
        done = [await ended(store, metadata={"n": str(number)}) for number in range(3)]
        busy = [await added(store), (await claimed(store)).task]
    take_back_to_1(path)
    for _ in range(2):  # the second time there is nothing to do
        async with open_sqlite(path) as store:
            for task in done:
                assert await store.get(task.id) == task
            for task in busy:
                there = await store.get(task.id)
                assert there is not None
                assert (there.status, await store.uploads(task.id)) == (task.status, ())
            assert await store.artefact_bytes() == 3 * artefact().size_bytes
    async with open_sqlite(path) as store:
        await store.delete(done[0].id)
        await ended(store, uploads=("a.png",))
        await store.retry(done[1].id, NOW)
        assert await store.artefact_bytes() == 2 * artefact().size_bytes
        assert await store.unused_uploads(("a.png", "b.png")) == ("b.png",)


async def test_a_version_1_without_any_artefact_has_no_bytes(path: Path) -> None:
    async with open_sqlite(path):
        pass
    take_back_to_1(path)
    async with open_sqlite(path) as store:
        assert await store.artefact_bytes() == 0
        await ended(store)
        assert await store.artefact_bytes() == artefact().size_bytes


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


async def test_after_a_real_disk_error_no_write_ever_succeeds(path: Path) -> None:
    process = await start(LIMITED, path)
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    answered = int(output)
    assert answered > 0
    async with open_sqlite(path) as store:
        assert (await store.counts())[Status.QUEUED] >= answered


# errors


def failing(at: str, code: int, armed: list[bool]) -> type[sqlite3.Connection]:
    """A connection whose disk fails at one statement, once it is armed."""

    class Failing(sqlite3.Connection):
        def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
            if armed and at in sql:
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = code
                raise error
            return super().execute(sql, parameters)

    return Failing


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


async def test_damage_found_while_reading_breaks_the_store(sqlite: SqliteStore, path: Path) -> None:
    tasks = [await added(sqlite, inputs={"text": "x" * 20_000}) for _ in range(20)]
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    damage(path, b"\xff" * 16, range(4096, 100 * 4096, 4096))
    with pytest.raises(StoreUnavailable):
        await asyncio.gather(*(sqlite.get(task.id) for task in tasks))
    with pytest.raises(StoreUnavailable, match="broken"):
        await added(sqlite)


async def test_query_that_is_wrong_surfaces_as_it_is(sqlite: SqliteStore, raw: sqlite3.Connection) -> None:
    raw.execute("DROP INDEX tasks_ended")
    with pytest.raises(sqlite3.OperationalError, match="tasks_ended"):
        await sqlite.ended_before(NOW, 1)
    assert sqlite.broken is None


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
