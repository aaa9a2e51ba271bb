"""What the database promises of its file: one owner, versions, and a line that helps where it is damaged."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
from importlib import resources
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from comfyd.deliveries import DeliveryFilter
from comfyd.errors import StoreUnavailable
from comfyd.store.database import MIGRATIONS
from comfyd.store.sqlite import SqliteStore, open_sqlite
from comfyd.tasks import Status, Step, Webhook
from tests.store.disks import damage
from tests.store.samples import NOW, added, artefact, asset, claim, claimed, ended, succeeded

PRAGMAS: Final[dict[str, Any]] = {
    "journal_mode": "wal",
    "synchronous": 2,
    "busy_timeout": 5000,
    "foreign_keys": 1,
    "temp_store": 2,
    "mmap_size": 0,
    "trusted_schema": 0,
}


HELP: Final = "; put back a copy, or move it away to begin anew"


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


async def test_file_that_is_no_database_is_refused_with_what_to_do(path: Path) -> None:
    damage(path, b"no database " * 1000, [0])
    with pytest.raises(StoreUnavailable) as refused:
        async with open_sqlite(path):
            pass
    assert refused.value.message == (
        f"{path} is damaged (file is not a database); put back a copy, or move it away to begin anew"
    )


async def test_damaged_file_is_found_at_the_start(path: Path) -> None:
    async with open_sqlite(path) as store:
        for _ in range(50):
            await added(store)
    damage(path, b"\xff" * 64, range(5 * 4096, 50 * 4096, 4096))
    with pytest.raises(StoreUnavailable) as refused:
        async with open_sqlite(path):
            pass
    assert refused.value.message.startswith(f"{path} is damaged (")
    assert refused.value.message.endswith(HELP)
    assert "\n" not in refused.value.message


async def test_header_of_nonsense_is_refused_with_what_to_do(path: Path) -> None:
    async with open_sqlite(path) as store:
        await added(store)
    damage(path, b"\x7f" * 30, [16])
    with pytest.raises(StoreUnavailable) as refused:
        async with open_sqlite(path):
            pass
    assert refused.value.message.startswith(f"{path} is damaged (")
    assert refused.value.message.endswith(HELP)


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
DROP TABLE assets; DROP INDEX artefacts_id;
ALTER TABLE artefacts DROP COLUMN id;
ALTER TABLE artefacts DROP COLUMN blake3;
ALTER TABLE tasks DROP COLUMN credentials;
DROP TABLE delivery_tries; DROP TABLE deliveries; DROP TABLE subjects;
ALTER TABLE tasks DROP COLUMN webhook;
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


def script_of(version: int) -> str:
    """What leads to this version from the one before."""
    return resources.files("comfyd.store").joinpath(MIGRATIONS[version - 1]).read_text(encoding="utf-8")


def take_back_to_1(path: Path) -> None:
    """Make a database what an earlier comfyd would have left: exactly of version 1."""
    old = sqlite3.connect(":memory:")
    old.executescript(script_of(1))
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


VERSION_2 = """
INSERT INTO tasks (number, id, seq, status, priority, workflow, shape, nodes_total, policy, output, key_id,
                   created_at, available_at)
VALUES (1, 'ended', 1, 'queued', 0, 'portrait', 's', 1, '{"max_attempts":2}', '{}', 'k', 1, 1),
       (2, 'running', 2, 'queued', 5, NULL, 's', 1, '{}', '{}', NULL, 2, 2),
       (3, 'queued', 3, 'queued', 5, NULL, 's', 1, '{}', '{}', NULL, 3, 3);
UPDATE sequence SET last = 3;
INSERT INTO payloads SELECT number, NULL, CAST('{}' AS BLOB), CAST('{"1":{}}' AS BLOB) FROM tasks;
INSERT INTO attempts (id, task, number, step, claimed_at)
VALUES ('attempt-1', 1, 1, 'claimed', 5), ('attempt-2', 2, 1, 'claimed', 6);
UPDATE tasks SET status = 'running', attempt_count = 1, started_at = 5 WHERE number < 3;
UPDATE attempts SET step = 'settled', ended_at = 9, outcome = 'succeeded' WHERE id = 'attempt-1';
INSERT INTO artefacts (task, position, node_id, "index", name, type, content_type, size_bytes, sha256, key,
                       storage)
VALUES (1, 0, '9', 0, 'a.png', 'image', 'image/png', 7, hex(zeroblob(32)), 'a', 'local');
UPDATE tasks SET status = 'succeeded', completed_at = 9 WHERE number = 1;
INSERT INTO task_uploads VALUES (3, 'cat.png');
"""


def make_version_2(path: Path) -> None:
    """A database as the second schema left it: an ended, a running and a queued task."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    connection.executescript(f"{script_of(1)}{script_of(2)}{VERSION_2}PRAGMA user_version = 2;")
    connection.close()


async def test_a_database_of_version_2_is_taken_over_with_all_that_is_in_it(path: Path) -> None:
    make_version_2(path)
    for _ in range(2):  # the second time there is nothing to do
        async with open_sqlite(path) as store:
            done, queued = await store.get("ended"), await store.get("queued")
            assert done is not None
            assert queued is not None
            assert (done.status, done.webhook, done.workflow) == (Status.SUCCEEDED, None, "portrait")
            assert [(made.name, made.size_bytes) for made in done.artefacts] == [("a.png", 7)]
            assert (queued.status, queued.webhook, queued.seq) == (Status.QUEUED, None, 3)
            assert await store.uploads("queued") == ("cat.png",)
            (live,) = await store.live()
            assert (live.task.id, live.attempt.id, live.graph) == ("running", "attempt-2", {"1": {}})
            assert (await store.list_deliveries(DeliveryFilter(), None, 10)).deliveries == ()


async def test_tasks_of_version_2_go_on_beside_new_ones_that_have_webhooks(path: Path) -> None:
    make_version_2(path)
    async with open_sqlite(path) as store:
        await store.settle("attempt-2", succeeded(artefact()), NOW)
        assert await store.ended_before(NOW + 1, 10) == ("ended", "running")
        task = await ended(store, webhook=Webhook(url="https://example.com/hook"))
        assert task.seq == 4
        (owed,) = (await store.list_deliveries(DeliveryFilter(), None, 10)).deliveries
        assert owed.task_id == task.id
        retried = await store.retry("ended", NOW)
        assert retried is not None
        assert (await claim(store, "ended")).attempt.step is Step.CLAIMED
        await store.delete("running")
        assert await store.get("running") is None


VERSION_3 = """
UPDATE tasks SET webhook = '{"url":"https://example.com/hook"}' WHERE number = 1;
INSERT INTO artefacts (task, position, node_id, "index", name, type, content_type, size_bytes, sha256, key,
                       storage)
VALUES (1, 1, '9', 1, 'b.png', 'image', 'image/png', 8, hex(zeroblob(32)), 'Grüße/it''s "b".png', 's3'),
       (1, 2, '10', 0, 'c.png', 'image', 'image/png', 9, hex(zeroblob(32)), 'a', 'local');
INSERT INTO subjects VALUES (1, 1, CAST('{subject}' AS BLOB));
INSERT INTO deliveries (id, task, key_id, type, url, endpoint, subject, created_at, next_at)
VALUES ('msg_1', 1, 'k', 'task.completed', 'https://example.com/hook', 'https://example.com:443', 1, 9, 9);
"""

SUBJECT: Final = (
    '{"id":"ended","seq":1,"status":"succeeded","priority":0,"workflow":"portrait","shape":"s",'
    '"nodes_total":1,"inputs":null,"metadata":{},"policy":{"max_attempts":2,"timeout_ms":null,'
    '"start_timeout_ms":null,"stall_timeout_ms":null},"output":{},"key_id":"k","created_at":1,'
    '"available_at":1,"started_at":5,"completed_at":9,"cancel_requested_at":null,"attempt_count":1,'
    '"failures":0,"suspects":0,"strays":0,"error":null,"artefacts":[{"node_id":"9","index":0,'
    '"name":"a.png","type":"image","content_type":"image/png","size_bytes":7,"sha256":"00","key":"a",'
    '"storage":"local","location":null,"width":null,"height":null,"duration":null,"text":null,'
    '"data":null}],"attempts":[],"webhook":{"url":"https://example.com/hook","events":["task.completed"]}}'
)
"""A task as version 3 wrote it for its webhook."""


def make_version_3(path: Path) -> None:
    """A database as the third schema left it: three artefacts, two of one key, and an event that is owed."""
    make_version_2(path)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    connection.executescript(f"{script_of(3)}{VERSION_3.replace('{subject}', SUBJECT)}")
    connection.execute("PRAGMA user_version = 3")
    connection.close()


async def test_a_database_of_version_3_is_taken_over_with_all_that_is_in_it(path: Path) -> None:
    make_version_3(path)
    for _ in range(2):  # the second time there is nothing to do
        async with open_sqlite(path) as store:
            for name in ("ended", "running", "queued"):
                task = await store.get(name)
                assert task is not None
                assert task.credentials is False
            assert (await store.counts())[Status.RUNNING] == 1
            assert await store.unused_uploads(("cat.png", "dog.png")) == ("dog.png",)
            assert await store.artefact_bytes() == 7 + 8 + 9
            assert await store.expire_assets(2**60, 10) == ()


async def test_artefacts_of_version_3_get_the_ids_that_they_would_have_now(path: Path) -> None:
    make_version_3(path)
    async with open_sqlite(path) as store:
        task = await store.get("ended")
        assert task is not None
        first, second, twin = task.artefacts
        assert [each.blake3 for each in task.artefacts] == [None] * 3
        for each in (first, second):
            found = await store.output_asset(each.id)
            assert found is not None
            assert (found.task_id, found.artefact, found.ended_at) == ("ended", each, 9)
        assert twin.id == first.id  # of the same file, which the earlier row names
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT id FROM artefacts ORDER BY position").fetchall()
    connection.close()
    assert rows == [(first.id,), (second.id,), (None,)]


async def test_event_that_version_3_owed_is_still_told_of_the_task_as_it_was(path: Path) -> None:
    make_version_3(path)
    async with open_sqlite(path) as store:
        (owed,) = (await store.due_deliveries(NOW, 10, ())).entries
        assert (owed.id, owed.subject.id, owed.subject.status) == ("msg_1", "ended", Status.SUCCEEDED)
        assert owed.subject.credentials is False
        assert [(each.key, each.blake3) for each in owed.subject.artefacts] == [("a", None)]


async def test_tasks_of_version_3_go_on_beside_assets_and_credentials(path: Path) -> None:
    make_version_3(path)
    async with open_sqlite(path) as store:
        hashed = msgspec.structs.replace(artefact(), blake3="ab" * 32)
        await store.settle("attempt-2", succeeded(hashed), NOW)
        assert (await added(store, credentials=True)).credentials
        assert await store.add_asset(asset(file="dog.png"))
        found = await store.output_asset(hashed.id)
        assert found is not None
        assert (found.task_id, found.artefact) == ("running", hashed)
        assert await store.unused_uploads(("cat.png", "dog.png")) == ()
        await store.delete("running")
        assert await store.output_asset(hashed.id) is None


async def test_every_version_leads_to_the_same_schema(path: Path) -> None:
    make_version_2(path)
    async with open_sqlite(path):
        pass
    async with open_sqlite(path.with_name("new.db")):
        pass
    old, new = sqlite3.connect(path), sqlite3.connect(path.with_name("new.db"))
    assert shape(old) == shape(new)
    for connection in (old, new):
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        connection.close()


# damage


async def test_damage_found_while_reading_breaks_the_store(sqlite: SqliteStore, path: Path) -> None:
    tasks = [await added(sqlite, inputs={"text": "x" * 20_000}) for _ in range(20)]
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    damage(path, b"\xff" * 16, range(4096, 100 * 4096, 4096))
    with pytest.raises(StoreUnavailable):
        await asyncio.gather(*(sqlite.get(task.id) for task in tasks))
    with pytest.raises(StoreUnavailable, match="broken") as refused:
        await added(sqlite)
    assert path.name not in refused.value.message  # a client hears this one
    with pytest.raises(StoreUnavailable, match="broken"):
        await sqlite.ping()
    why = await asyncio.wait_for(sqlite.wait_broken(), 5)
    assert why.startswith(f"{path} is damaged (")
    assert why.endswith(HELP)
