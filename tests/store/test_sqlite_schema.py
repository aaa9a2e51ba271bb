"""The task machine as SQLite itself holds it, whoever writes; and the plans of the statements."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest

from comfyd.deliveries import Delivery, DeliveryFilter, DeliveryStatus
from comfyd.store import assets, outbox, queries, transitions
from comfyd.store.rows import insert_artefacts
from comfyd.store.sqlite import SqliteStore
from comfyd.tasks import IdempotencyKey, Status, Step, TaskFilter
from tests.store.samples import (
    HOOK,
    NOW,
    added,
    again,
    artefact,
    asset,
    claimed,
    ended,
    failed,
    made,
    new_id,
    owed,
    submitting,
)
from tests.store.samples import succeeded as success

# the machine, as SQLite itself holds it


async def test_step_never_goes_back(sqlite: SqliteStore) -> None:
    taken = await claimed(sqlite)
    attempt = submitting(taken.attempt)
    await sqlite.record(msgspec.structs.replace(attempt, step=Step.SUBMITTED))
    with pytest.raises(sqlite3.IntegrityError, match="never goes back"):
        await sqlite.record(attempt)


async def test_record_cannot_settle_and_submitting_needs_its_intent(sqlite: SqliteStore) -> None:
    taken = await claimed(sqlite)
    for step in (Step.SETTLED, Step.SUBMITTING):
        with pytest.raises(sqlite3.IntegrityError):
            await sqlite.record(msgspec.structs.replace(taken.attempt, step=step))


async def test_settlement_that_is_no_transition_is_refused_whole(sqlite: SqliteStore) -> None:
    taken = await claimed(sqlite)
    wrong = [
        failed(error=None),
        failed(status=Status.RUNNING),
        again(None),
        success(artefact(0), artefact(0)),
        success(msgspec.structs.replace(artefact(), sha256="short")),
        success(msgspec.structs.replace(artefact(), blake3="short")),
        success(msgspec.structs.replace(artefact(), blake3="X" * 64)),
        failed(failures=-1),
    ]
    for settlement in wrong:
        with pytest.raises(sqlite3.IntegrityError):
            await sqlite.settle(taken.attempt.id, settlement, NOW)
        assert await sqlite.get(taken.task.id) == taken.task


ILLEGAL = {
    "a status that does not exist": "UPDATE tasks SET status = 'paused' WHERE id = :queued",
    "queued to succeeded": "UPDATE tasks SET status = 'succeeded', completed_at = 1, started_at = 1, "
    "attempt_count = 1 WHERE id = :queued",
    "running without an attempt": "UPDATE tasks SET status = 'running', started_at = 1, attempt_count = 1 "
    "WHERE id = :queued",
    "ended to ended": "UPDATE tasks SET status = 'canceled' WHERE id = :ended",
    "ended to running": "UPDATE tasks SET status = 'running', completed_at = NULL WHERE id = :ended",
    "queued while its attempt lives": "UPDATE tasks SET status = 'queued' WHERE id = :running",
    "ended without a moment": "UPDATE tasks SET completed_at = NULL WHERE id = :ended",
    "a moment of the end without the end": "UPDATE tasks SET completed_at = 1 WHERE id = :queued",
    "an error without a failure": "UPDATE tasks SET error = '{}' WHERE id = :ended",
    "queued and asked to cancel": "UPDATE tasks SET cancel_requested_at = 1 WHERE id = :queued",
    "running without a start": "UPDATE tasks SET started_at = NULL WHERE id = :running",
    "a priority out of range": "UPDATE tasks SET priority = -1001 WHERE id = :queued",
    "a place that is taken": "UPDATE tasks SET seq = (SELECT seq FROM tasks WHERE id = :ended) "
    "WHERE id = :queued",
    "text for a number": "UPDATE tasks SET created_at = 'now' WHERE id = :queued",
    "a policy that is no object": "UPDATE tasks SET policy = '3' WHERE id = :queued",
    "an owner without a name": "UPDATE tasks SET key_id = '' WHERE id = :queued",
    "a live task deleted": "DELETE FROM tasks WHERE id = :running",
    "a sequence that falls": "UPDATE sequence SET last = last - 1 WHERE :queued <> ''",
    "a second live attempt": "INSERT INTO attempts (id, task, number, step, claimed_at) "
    "SELECT 'x', number, 2, 'claimed', 1 FROM tasks WHERE id = :running",
    "an attempt on an ended task": "INSERT INTO attempts (id, task, number, step, claimed_at) "
    "SELECT 'x', number, 2, 'claimed', 1 FROM tasks WHERE id = :ended",
    "an attempt that begins late": "INSERT INTO attempts (id, task, number, step, claimed_at, "
    "intent_at, backend, client_id) SELECT 'x', number, 2, 'submitted', 1, 1, 'b', 'c' FROM tasks "
    "WHERE id = :queued",
    "an attempt of nobody": "INSERT INTO attempts (id, task, number, step, claimed_at) "
    "VALUES ('x', -1, 1, 'claimed', 1 + 0 * length(:queued))",
    "an ended attempt changed": "UPDATE attempts SET outcome = 'failed' "
    "WHERE task = (SELECT number FROM tasks WHERE id = :ended)",
    "an end without an outcome": "UPDATE attempts SET step = 'settled', ended_at = 1 "
    "WHERE task = (SELECT number FROM tasks WHERE id = :running)",
    "settled without an end": "UPDATE attempts SET step = 'settled' "
    "WHERE task = (SELECT number FROM tasks WHERE id = :running)",
    "an artefact of a kind that does not exist": "UPDATE artefacts SET type = 'smell' "
    "WHERE task = (SELECT number FROM tasks WHERE id = :ended)",
    "a hash that is none": "UPDATE artefacts SET blake3 = upper(hex(zeroblob(31)) || 'AB') "
    "WHERE task = (SELECT number FROM tasks WHERE id = :ended)",
    "an id of an artefact that is none": "UPDATE artefacts SET id = 'x' "
    "WHERE task = (SELECT number FROM tasks WHERE id = :ended)",
    "half a flag": "UPDATE tasks SET credentials = 2 WHERE id = :queued",
    "a flag that is unknown": "UPDATE tasks SET credentials = NULL WHERE id = :queued",
    "an asset without a file": "UPDATE assets SET file = '' WHERE id = :asset",
    "an asset without bytes": "UPDATE assets SET size_bytes = -1 WHERE id = :asset",
    "an asset of no known bytes": "UPDATE assets SET blake3 = 'blake3:' || substr(blake3, 8) "
    "WHERE id = :asset",
    "an asset of no kind": "UPDATE assets SET content_type = '' WHERE id = :asset",
    "an asset for ever": "UPDATE assets SET expires_at = NULL WHERE id = :asset",
    "an asset of an owner without a name": "UPDATE assets SET key_id = '' WHERE id = :asset",
    "two assets of one id": "INSERT INTO assets (id, file, blake3, size_bytes, content_type, file_path, "
    "created_at, expires_at) SELECT id, file, blake3, 1, 'a/b', '', 1, 1 FROM assets WHERE id = :asset",
    "a webhook that is no object": "UPDATE tasks SET webhook = '3' WHERE id = :queued",
    "a delivery in no known state": "UPDATE deliveries SET status = 'lost' WHERE id = :owed",
    "a pending delivery without a moment": "UPDATE deliveries SET next_at = NULL WHERE id = :owed",
    "a delivery that ended and is due": "UPDATE deliveries SET status = 'gone', ended_at = 1 "
    "WHERE id = :owed",
    "a delivery that ended at no moment": "UPDATE deliveries SET status = 'gone', next_at = NULL "
    "WHERE id = :owed",
    "a pending delivery that has ended": "UPDATE deliveries SET ended_at = 1 WHERE id = :owed",
    "a delivery of no event": "UPDATE deliveries SET type = 'task.paused' WHERE id = :owed",
    "an output that is no event's": "UPDATE deliveries SET output = 0 WHERE id = :owed",
    "an output event without its place": "UPDATE deliveries SET type = 'task.output' WHERE id = :owed",
    "a delivery to nowhere": "UPDATE deliveries SET endpoint = '' WHERE id = :owed",
    "a delivery of nothing": "UPDATE deliveries SET subject = -1 WHERE id = :owed",
    "a delivery of no task": "UPDATE deliveries SET task = -1 WHERE id = :owed",
    "an event owed twice": "INSERT INTO deliveries (id, task, type, url, endpoint, subject, created_at, "
    "next_at) SELECT id, task, type, url, endpoint, subject, 1, 1 FROM deliveries WHERE id = :owed",
    "a subject that is still needed": "DELETE FROM subjects WHERE number = "
    "(SELECT subject FROM deliveries WHERE id = :owed)",
    "a try that says nothing": "INSERT INTO delivery_tries (delivery, number, at, duration_ms) "
    "SELECT number, 1, 1, 1 FROM deliveries WHERE id = :owed",
    "a try of no delivery": "INSERT INTO delivery_tries (delivery, number, at, duration_ms, status) "
    "VALUES (-1, 1, 1, 1, 200 + 0 * length(:queued))",
}


async def owed_one(sqlite: SqliteStore) -> Delivery:
    """A pending delivery, that of a cancel."""
    task = await added(sqlite, webhook=HOOK)
    await sqlite.cancel(task.id, NOW)
    (delivery,) = await owed(sqlite, task.id)
    return delivery


async def owed_id(sqlite: SqliteStore) -> str:
    """Its id."""
    return (await owed_one(sqlite)).id


@pytest.mark.parametrize("statement", ILLEGAL.values(), ids=ILLEGAL.keys())
async def test_illegal_row_is_refused_by_the_database_itself(
    sqlite: SqliteStore, raw: sqlite3.Connection, statement: str
) -> None:
    tasks = {
        "queued": (await added(sqlite)).id,
        "running": (await claimed(sqlite)).task.id,
        "ended": (await ended(sqlite)).id,
        "owed": await owed_id(sqlite),
        "asset": (kept := asset()).id,
    }
    await sqlite.add_asset(kept)
    used = {name: task_id for name, task_id in tasks.items() if f":{name}" in statement}
    with pytest.raises(sqlite3.IntegrityError):
        raw.execute(statement, used)


async def test_ended_delivery_becomes_nothing_but_pending(
    sqlite: SqliteStore, raw: sqlite3.Connection
) -> None:
    delivery = await owed_one(sqlite)
    delivery_id = delivery.id
    await sqlite.record_try(delivery, made(), DeliveryStatus.DELIVERED, None, NOW)
    with pytest.raises(sqlite3.IntegrityError, match="pending again"):
        raw.execute("UPDATE deliveries SET status = 'gone' WHERE id = ?", (delivery_id,))
    assert await sqlite.redeliver(delivery_id, NOW) is not None


async def test_try_is_refused_whole_where_it_does_not_fit_its_end(sqlite: SqliteStore) -> None:
    delivery = await owed_one(sqlite)
    wrong = [
        (made(), DeliveryStatus.PENDING, None),
        (made(), DeliveryStatus.DELIVERED, NOW),
        (made(None, None), DeliveryStatus.FAILED, None),
    ]
    for attempt, status, next_at in wrong:
        with pytest.raises(sqlite3.IntegrityError):
            await sqlite.record_try(delivery, attempt, status, next_at, NOW)
    there = await sqlite.delivery(delivery.id)
    assert there is not None
    assert (there.status, there.round, there.tries) == (DeliveryStatus.PENDING, 0, ())


def test_task_begins_queued(raw: sqlite3.Connection) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="begins queued"):
        raw.execute(
            """
            INSERT INTO tasks (number, id, seq, status, priority, shape, nodes_total, policy, output,
                               created_at, available_at, completed_at)
            VALUES (1, 'x', 1, 'canceled', 0, 's', 1, '{}', '{}', 1, 1, 1)
            """
        )


# plans


def plan(raw: sqlite3.Connection, run: Callable[[Any], Any]) -> list[str]:
    """How SQLite goes about the statements of a query, in its own words."""
    lines: list[str] = []

    class Explaining:
        def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
            lines.extend(row[3] for row in raw.execute(f"EXPLAIN QUERY PLAN {sql}", parameters))
            return raw.execute(sql, parameters)

        def executemany(self, sql: str, parameters: Any) -> sqlite3.Cursor:
            rows = list(parameters)
            lines.extend(row[3] for row in raw.execute(f"EXPLAIN QUERY PLAN {sql}", rows[0]))
            return raw.executemany(sql, rows)

    run(Explaining())
    return lines


def steps_of(raw: sqlite3.Connection, run: Callable[[Any], Any]) -> int:
    """How many hundreds of steps SQLite needs: time itself says little on a loaded machine."""
    steps = 0

    def stepped() -> None:
        nonlocal steps
        steps += 1

    raw.set_progress_handler(stepped, 100)
    run(raw)
    raw.set_progress_handler(None, 0)
    return steps


MANY_TASKS = """
WITH RECURSIVE n (n) AS (SELECT 10 UNION ALL SELECT n + 1 FROM n WHERE n < 50000)
INSERT INTO tasks (number, id, seq, status, priority, shape, nodes_total, policy, output, created_at,
                   available_at)
SELECT n, 't' || n, n, 'queued', 0, 's', 1, '{}', '{}', 1, 1 FROM n
"""


async def test_list_of_rare_statuses_among_50_000_tasks_touches_few_of_them(
    sqlite: SqliteStore, raw: sqlite3.Connection
) -> None:
    task, other = (await claimed(sqlite)).task, await ended(sqlite)
    raw.execute(MANY_TASKS)
    wanted = TaskFilter(statuses=frozenset(Status) - {Status.QUEUED})
    page = queries.list_tasks(raw, wanted, None, 20)
    assert [each.id for each in page.tasks] == [other.id, task.id]
    assert steps_of(raw, lambda db: queries.list_tasks(db, wanted, None, 20)) < 100
    everything = TaskFilter(statuses=frozenset(Status))
    assert steps_of(raw, lambda db: queries.list_tasks(db, everything, 40_000, 20)) < 100


async def test_next_tasks_come_from_one_index_in_its_own_order(
    sqlite: SqliteStore, raw: sqlite3.Connection
) -> None:
    await added(sqlite)
    assert plan(raw, lambda db: queries.ready(db, NOW, 5)) == [
        "SCAN tasks USING COVERING INDEX tasks_queue",
        "SEARCH tasks USING COVERING INDEX tasks_due (available_at>?)",
    ]


async def test_no_verb_that_runs_often_walks_a_table_or_sorts(
    sqlite: SqliteStore, raw: sqlite3.Connection
) -> None:
    first = await added(sqlite, priority=5)
    second = await added(sqlite, priority=5, webhook=HOOK)
    delivery = await owed_one(sqlite)
    record = asset()
    await sqlite.add_asset(record)
    (output,) = (await ended(sqlite)).artefacts
    listings = [
        DeliveryFilter(),
        DeliveryFilter(task_id=first.id),
        DeliveryFilter(status=DeliveryStatus.PENDING),
        DeliveryFilter(key_id="k", status=DeliveryStatus.GONE),
    ]
    filters = [
        TaskFilter(),
        TaskFilter(statuses=frozenset({Status.QUEUED})),
        TaskFilter(statuses=frozenset({Status.QUEUED, Status.RUNNING})),
        TaskFilter(statuses=frozenset(Status), key_id="k"),
        TaskFilter(workflow="w"),
        TaskFilter(key_id="k"),
        TaskFilter(metadata={"a": "b", "c": "d"}, statuses=frozenset({Status.QUEUED})),
        TaskFilter(metadata={"a": "b"}, statuses=frozenset({Status.QUEUED, Status.FAILED})),
    ]
    runs: list[Callable[[Any], Any]] = [
        lambda db: queries.get(db, first.id),
        lambda db: queries.graph(db, first.id),
        lambda db: queries.ahead(db, 5, second.seq, NOW),
        lambda db: queries.ended_before(db, NOW, 5),
        lambda db: queries.run_times(db, "s"),
        lambda db: queries.replay(db, IdempotencyKey(key="a", body_sha256="b")),
        lambda db: transitions.claim(db, first.id, new_id(), NOW),
        lambda db: transitions.cancel(db, second.id, NOW),
        lambda db: transitions.retry(db, second.id, NOW),
        lambda db: queries.ended_attempts(db, ["a", "b"]),
        lambda db: queries.due_deliveries(db, NOW, 5, ["https://example.com:443"]),
        lambda db: queries.delivery(db, delivery.id),
        lambda db: outbox.record_try(db, delivery, made(), DeliveryStatus.PENDING, NOW, NOW),
        lambda db: outbox.redeliver(db, delivery.id, NOW),
        lambda db: outbox.make_deliveries_due(db, NOW, NOW, 5),
        lambda db: outbox.owes(db, 1),
        lambda db: assets.add(db, asset()),
        lambda db: assets.get(db, record.id, NOW),
        *(partial(assets.of_bytes, blake3=record.blake3, key_id=owner, now=NOW) for owner in (None, "k")),
        lambda db: assets.of_bytes(db, record.blake3, None, NOW, record.file_path),
        lambda db: assets.output(db, output.id),
        lambda db: assets.extend(db, record.id, NOW + 9999),
        lambda db: assets.delete(db, record.id, NOW),
        lambda db: assets.expire(db, NOW, 5),
        lambda db: queries.unused_uploads(db, ["a.png"]),
        lambda db: insert_artefacts(db, 2, [artefact()]),
        *(partial(queries.list_deliveries, wanted=each, before=9, limit=5) for each in listings),
        *(partial(queries.list_tasks, wanted=wanted, before=9, limit=5) for wanted in filters),
    ]
    lines = [line for run in runs for line in plan(raw, run)]
    # Sorting the few tasks of one page into the order that was asked for is not a walk.
    pages = sum("SCAN wanted VIRTUAL TABLE" in line for line in lines)
    sorts = sum(line.startswith("USE TEMP B-TREE") for line in lines)
    # A subquery that is walked was searched with a bound.
    walked = [line for line in lines if line.startswith("SCAN") and "(subquery" not in line]
    walks = {line for line in walked if "VIRTUAL TABLE" not in line}
    assert sorts <= pages
    assert walks <= {"SCAN CONSTANT ROW"}


MANY_DELIVERIES = """
WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 100000)
INSERT INTO deliveries (id, task, type, url, endpoint, subject, created_at, next_at)
SELECT 'msg_' || n, d.task, d.type, d.url, {endpoint}, d.subject, 1, n FROM n, deliveries AS d
"""


@pytest.mark.parametrize("endpoint", ["'https://busy'", "'https://e' || n", "'https://e' || n % 100"])
async def test_due_scan_of_100_000_pending_deliveries_touches_few_of_them(
    sqlite: SqliteStore, raw: sqlite3.Connection, endpoint: str
) -> None:
    last = await owed_id(sqlite)
    raw.execute(MANY_DELIVERIES.format(endpoint=endpoint))
    busy = ["https://busy", *(f"https://e{number}" for number in range(99))]
    due = queries.due_deliveries(raw, NOW, 20, busy)
    assert due.next_due is None
    assert due.entries
    assert all(delivery.endpoint not in busy for delivery in due.entries)
    assert (due.entries[-1].id == last) == ("busy" in endpoint)
    # A walk over all of them takes thousands.
    assert steps_of(raw, lambda db: queries.due_deliveries(db, NOW, 20, busy)) < 200


async def test_due_scan_goes_by_indexes_alone(sqlite: SqliteStore, raw: sqlite3.Connection) -> None:
    await owed_id(sqlite)
    raw.execute(MANY_DELIVERIES.format(endpoint="'https://busy'"))
    lines = plan(raw, lambda db: queries.due_deliveries(db, NOW, 20, ["https://busy"]))
    assert lines[0] == "SEARCH deliveries USING COVERING INDEX deliveries_due (next_at<?)"
    searched = [line for line in lines if "deliver" in line]
    assert len(searched) > 6
    by_number = {
        "SEARCH first USING INTEGER PRIMARY KEY (rowid=?)",
        "SEARCH d USING INTEGER PRIMARY KEY (rowid=?)",
        "SEARCH delivery_tries USING PRIMARY KEY (delivery=?)",
    }
    assert {line for line in searched if "COVERING INDEX" not in line} <= by_number
    assert not [line for line in searched if line.startswith("SCAN")]
