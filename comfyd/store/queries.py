"""Every read of the SQLite store as one plain function on a database; never writes.

Each runs inside one read transaction: what it reads in several statements is one moment of the database.
"""

import base64
import binascii
from collections.abc import Sequence
from typing import Any, Final

from comfyd.errors import MalformedRequest
from comfyd.store.base import AHEAD_MOST
from comfyd.store.rows import (
    Database,
    claim_of,
    kept_under,
    number_of,
    object_of,
    task_of,
    tasks_of,
    text_of,
)
from comfyd.tasks import (
    Claim,
    Graph,
    IdempotencyKey,
    Ready,
    ReadyPage,
    RunTimes,
    Status,
    Task,
    TaskFilter,
    TaskPage,
)

_CURSOR_PREFIX: Final = b"n"
_LARGEST: Final = 2**63 - 1


def get(db: Database, task_id: str) -> Task | None:
    """See `Store.get`."""
    number = number_of(db, task_id)
    return None if number is None else task_of(db, number)


def replay(db: Database, key: IdempotencyKey) -> Task | None:
    """See `Store.replay`."""
    return kept_under(db, key)


def graph(db: Database, task_id: str) -> Graph | None:
    """See `Store.graph`."""
    row = db.execute(
        "SELECT p.graph FROM tasks AS t JOIN payloads AS p ON p.task = t.number WHERE t.id = ?", (task_id,)
    ).fetchone()
    return None if row is None else object_of(row[0])


def list_tasks(db: Database, wanted: TaskFilter, before: int | None, limit: int) -> TaskPage:
    """See `Store.list_tasks`; `before` is the decoded cursor."""
    sql, parameters = _list_statement(wanted, before)
    numbers = [row[0] for row in db.execute(sql, (*parameters, limit + 1)).fetchall()]
    page = numbers[:limit]
    more = len(numbers) > limit and bool(page)
    return TaskPage(
        tasks=tasks_of(db, page, data=False), next_cursor=encode_cursor(page[-1]) if more else None
    )


def _list_statement(wanted: TaskFilter, before: int | None) -> tuple[str, list[Any]]:
    """The statement that walks tasks newest first; put together from fixed words, all values bound.

    A metadata pair leads where there is one: its index gives the tasks in order too, so a rare pair is found
    without a walk over the table.
    """
    pairs = list(wanted.metadata.items())
    words = ["SELECT t.number FROM"]
    parameters: list[Any] = []
    if pairs:
        words.append(
            "metadata AS m CROSS JOIN tasks AS t ON t.number = m.task WHERE m.key = ? AND m.value = ?"
        )
        parameters += pairs[0]
    else:
        words.append("tasks AS t WHERE true")
    for pair in pairs[1:]:
        words.append("AND EXISTS (SELECT 1 FROM metadata WHERE task = t.number AND key = ? AND value = ?)")
        parameters += pair
    for column, value in (
        ("t.status", wanted.status),
        ("t.workflow", wanted.workflow),
        ("t.key_id", wanted.key_id),
    ):
        if value is not None:
            words.append(f"AND {column} = ?")
            parameters.append(str(value))
    order = "m.task" if pairs else "t.number"
    if before is not None:
        words.append(f"AND {order} < ?")
        parameters.append(before)
    words.append(f"ORDER BY {order} DESC LIMIT ?")
    return " ".join(words), parameters


def encode_cursor(number: int) -> str:
    """The place after this row as a word that a client hands back."""
    return base64.urlsafe_b64encode(_CURSOR_PREFIX + str(number).encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None) -> int | None:
    """The row that the cursor stands after. Raises `MalformedRequest` if it is not one of ours."""
    if cursor is None:
        return None
    try:
        word = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as exc:
        raise _not_a_cursor() from exc
    digits = word.removeprefix(_CURSOR_PREFIX)
    if digits == word or not digits.isdigit() or len(digits) > len(str(_LARGEST)) or int(digits) > _LARGEST:
        raise _not_a_cursor()
    return int(digits)


def _not_a_cursor() -> MalformedRequest:
    return MalformedRequest(
        "the cursor is not one that a list gave; leave it out to begin at the newest task"
    )


def ready(db: Database, now: int, limit: int) -> ReadyPage:
    """See `Store.ready`."""
    rows = db.execute(
        """
        SELECT -priority, seq, id FROM tasks INDEXED BY tasks_queue
        WHERE status = 'queued' AND available_at <= ? ORDER BY priority DESC, seq LIMIT ?
        """,
        (now, limit),
    ).fetchall()
    (next_due,) = db.execute(
        """
        SELECT min(available_at) FROM tasks INDEXED BY tasks_due
        WHERE status = 'queued' AND available_at > ?
        """,
        (now,),
    ).fetchone()
    entries = tuple(Ready(rank=rank, seq=seq, task_id=task_id) for rank, seq, task_id in rows)
    return ReadyPage(entries=entries, next_due=next_due)


def ahead(db: Database, priority: int, seq: int, now: int) -> int:
    """See `Store.ahead`. Two ranges of one index: the more urgent, and the earlier among the equals."""
    (count,) = db.execute(
        """
        SELECT count(*) FROM (
            SELECT 1 FROM (SELECT 1 FROM tasks INDEXED BY tasks_queue
                           WHERE status = 'queued' AND priority > ? AND available_at <= ? LIMIT ?)
            UNION ALL
            SELECT 1 FROM (SELECT 1 FROM tasks INDEXED BY tasks_queue
                           WHERE status = 'queued' AND priority = ? AND seq < ? AND available_at <= ? LIMIT ?)
            LIMIT ?)
        """,
        (priority, now, AHEAD_MOST, priority, seq, now, AHEAD_MOST, AHEAD_MOST),
    ).fetchone()
    return int(count)


def live(db: Database) -> tuple[Claim, ...]:
    """See `Store.live`."""
    rows = db.execute(
        "SELECT number FROM tasks WHERE status = 'running' ORDER BY priority DESC, seq"
    ).fetchall()
    return tuple(claim_of(db, number) for (number,) in rows)


def counts(db: Database) -> dict[Status, int]:
    """See `Store.counts`."""
    return {Status(status): tasks for status, tasks in db.execute("SELECT * FROM status_counts").fetchall()}


def ended_before(db: Database, moment: int, limit: int) -> tuple[str, ...]:
    """See `Store.ended_before`."""
    rows = db.execute(
        """
        SELECT id FROM tasks INDEXED BY tasks_ended
        WHERE completed_at IS NOT NULL AND completed_at < ? ORDER BY completed_at, number LIMIT ?
        """,
        (moment, limit),
    ).fetchall()
    return tuple(task_id for (task_id,) in rows)


def run_times(db: Database, shape: str) -> RunTimes | None:
    """See `Store.run_times`."""
    row = db.execute("SELECT runs, mean_ms FROM run_times WHERE shape = ?", (shape,)).fetchone()
    return None if row is None else RunTimes(runs=row[0], mean_ms=row[1])


def mean_run_time(db: Database) -> RunTimes | None:
    """See `Store.mean_run_time`."""
    runs, weighted_ms = db.execute("SELECT runs, weighted_ms FROM run_totals WHERE one = 1").fetchone()
    return RunTimes(runs=runs, mean_ms=weighted_ms / runs) if runs else None


def uploads(db: Database, task_id: str) -> tuple[str, ...]:
    """See `Store.uploads`."""
    rows = db.execute(
        """
        SELECT u.file FROM tasks AS t JOIN task_uploads AS u ON u.task = t.number
        WHERE t.id = ? ORDER BY u.file
        """,
        (task_id,),
    ).fetchall()
    return tuple(row[0] for row in rows)


def unused_uploads(db: Database, files: Sequence[str]) -> tuple[str, ...]:
    """See `Store.unused_uploads`."""
    rows = db.execute(
        """
        SELECT value FROM json_each(?)
        WHERE NOT EXISTS (SELECT 1 FROM task_uploads WHERE file = value) ORDER BY key
        """,
        (text_of(files),),
    ).fetchall()
    return tuple(row[0] for row in rows)


def artefact_bytes(db: Database) -> int:
    """See `Store.artefact_bytes`."""
    return int(db.execute("SELECT size_bytes FROM artefact_bytes").fetchone()[0])


def unwanted_files(db: Database, limit: int) -> tuple[tuple[str, str], ...]:
    """See `Store.unwanted_files`. In no order, so that those of a storage that is gone hold up no others."""
    rows = db.execute(
        "SELECT storage, key FROM unwanted_files ORDER BY random() LIMIT ?", (limit,)
    ).fetchall()
    return tuple((row[0], row[1]) for row in rows)
