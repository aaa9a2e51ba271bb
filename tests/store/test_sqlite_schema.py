"""The task machine as SQLite itself holds it, whoever writes; and the plans of the statements."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest

from comfyd.store import queries, transitions
from comfyd.store.sqlite import SqliteStore
from comfyd.tasks import IdempotencyKey, Status, Step, TaskFilter
from tests.store.samples import NOW, added, again, artefact, claimed, ended, failed, new_id, submitting
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
}


@pytest.mark.parametrize("statement", ILLEGAL.values(), ids=ILLEGAL.keys())
async def test_illegal_row_is_refused_by_the_database_itself(
    sqlite: SqliteStore, raw: sqlite3.Connection, statement: str
) -> None:
    tasks = {
        "queued": (await added(sqlite)).id,
        "running": (await claimed(sqlite)).task.id,
        "ended": (await ended(sqlite)).id,
    }
    used = {name: task_id for name, task_id in tasks.items() if f":{name}" in statement}
    with pytest.raises(sqlite3.IntegrityError):
        raw.execute(statement, used)


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

    run(Explaining())
    return lines


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
    second = await added(sqlite, priority=5)
    filters = [
        TaskFilter(),
        TaskFilter(status=Status.QUEUED),
        TaskFilter(workflow="w"),
        TaskFilter(key_id="k"),
        TaskFilter(metadata={"a": "b", "c": "d"}, status=Status.QUEUED),
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
