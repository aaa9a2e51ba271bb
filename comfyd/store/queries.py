"""Every read of the SQLite store as one plain function on a database; never writes.

Each runs inside one read transaction: what it reads in several statements is one moment of the database.
"""

import base64
import binascii
from collections.abc import Sequence
from typing import Any, Final

from comfyd.deliveries import Delivery, DeliveryFilter, DeliveryPage, DueDeliveries
from comfyd.errors import InvalidCursor
from comfyd.store.base import AHEAD_MOST
from comfyd.store.rows import (
    Database,
    claim_of,
    deliveries_of,
    delivery_number_of,
    delivery_of,
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

LOOKED_THROUGH: Final = 1000
"""How many due deliveries are looked through in order of time before they are sought endpoint by endpoint."""

_OF_TASKS: Final = b"n"
_OF_DELIVERIES: Final = b"d"
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
    page, last = _page(db, sql, parameters, limit)
    return TaskPage(
        tasks=tasks_of(db, page, data=False),
        next_cursor=None if last is None else _encode_cursor(_OF_TASKS, last),
    )


def _page(db: Database, sql: str, parameters: Sequence[Any], limit: int) -> tuple[Sequence[int], int | None]:
    """The first `limit` rows that the statement gives, and the last of them if more rows follow."""
    numbers = [row[0] for row in db.execute(sql, (*parameters, limit + 1)).fetchall()]
    page = numbers[:limit]
    return page, page[-1] if page and len(numbers) > limit else None


def _list_statement(wanted: TaskFilter, before: int | None) -> tuple[str, list[Any]]:
    """The statement that walks tasks newest first; put together from fixed words, all values bound.

    One walk for each wanted status: each finds its own in the order of an index, and SQLite merges them as
    far as the page goes. So nothing is sorted, and rare statuses are found without a walk over the table.
    """
    walks: list[str] = []
    parameters: list[Any] = []
    for status in sorted(wanted.statuses) or (None,):
        words, values = _walk(wanted, status, before)
        walks.append(words)
        parameters += values
    return f"{' UNION ALL '.join(walks)} ORDER BY number DESC LIMIT ?", parameters


def _walk(wanted: TaskFilter, status: Status | None, before: int | None) -> tuple[str, list[Any]]:
    """The tasks of one status, or of all.

    A metadata pair leads where there is one: its index gives the tasks in order too, so a rare pair is found
    without a walk over the table.
    """
    pairs = list(wanted.metadata.items())
    parameters: list[Any] = []
    if pairs:
        words = [
            "SELECT m.task AS number FROM metadata AS m CROSS JOIN tasks AS t ON t.number = m.task",
            "WHERE m.key = ? AND m.value = ?",
        ]
        parameters += pairs[0]
    else:
        words = ["SELECT t.number AS number FROM tasks AS t WHERE true"]
    for pair in pairs[1:]:
        words.append("AND EXISTS (SELECT 1 FROM metadata WHERE task = t.number AND key = ? AND value = ?)")
        parameters += pair
    for condition, value in (
        ("t.status = ?", status),
        ("t.workflow = ?", wanted.workflow),
        ("t.key_id = ?", wanted.key_id),
        ("m.task < ?" if pairs else "t.number < ?", before),
    ):
        if value is not None:
            words.append(f"AND {condition}")
            parameters.append(value if isinstance(value, int) else str(value))
    return " ".join(words), parameters


def _encode_cursor(prefix: bytes, number: int) -> str:
    """The place after this row as a word that a client hands back."""
    return base64.urlsafe_b64encode(prefix + str(number).encode()).decode().rstrip("=")


def task_cursor(cursor: str | None) -> int | None:
    """The task that the cursor stands after. Raises `InvalidCursor` for a foreign cursor."""
    return _decode_cursor(_OF_TASKS, cursor)


def delivery_cursor(cursor: str | None) -> int | None:
    """The delivery that the cursor stands after. Raises `InvalidCursor` for a foreign cursor."""
    return _decode_cursor(_OF_DELIVERIES, cursor)


def _decode_cursor(prefix: bytes, cursor: str | None) -> int | None:
    if cursor is None:
        return None
    try:
        word = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as exc:
        raise _not_a_cursor() from exc
    digits = word.removeprefix(prefix)
    if digits == word or not digits.isdigit() or len(digits) > len(str(_LARGEST)) or int(digits) > _LARGEST:
        raise _not_a_cursor()
    return int(digits)


def _not_a_cursor() -> InvalidCursor:
    return InvalidCursor("the cursor is not one that this list gave; leave it out to begin at the newest")


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
        SELECT id FROM tasks AS t INDEXED BY tasks_ended
        WHERE completed_at IS NOT NULL AND completed_at < ?
            AND NOT EXISTS (SELECT 1 FROM deliveries INDEXED BY deliveries_task
                            WHERE task = t.number AND status = 'pending')
        ORDER BY completed_at, number LIMIT ?
        """,
        (moment, limit),
    ).fetchall()
    return tuple(task_id for (task_id,) in rows)


def ended_attempts(db: Database, attempt_ids: Sequence[str]) -> tuple[str, ...]:
    """See `Store.ended_attempts`."""
    rows = db.execute(
        """
        SELECT a.id FROM json_each(?) AS wanted CROSS JOIN attempts AS a ON a.id = wanted.value
        WHERE a.ended_at IS NOT NULL ORDER BY wanted.key
        """,
        (text_of(attempt_ids),),
    ).fetchall()
    return tuple(attempt_id for (attempt_id,) in rows)


def due_deliveries(db: Database, now: int, limit: int, busy: Sequence[str]) -> DueDeliveries:
    """See `Store.due_deliveries`; `next_due` looks at every endpoint, so that one may turn out to be busy.

    In order of time first, which finds at once what is due at many endpoints. Where thousands wait for the
    busy ones, what stands behind them is sought endpoint by endpoint instead.
    """
    looked_through = max(LOOKED_THROUGH, limit)
    rows = db.execute(
        """
        SELECT number, endpoint FROM deliveries INDEXED BY deliveries_due
        WHERE status = 'pending' AND next_at <= ? ORDER BY next_at, number LIMIT ?
        """,
        (now, looked_through),
    ).fetchall()
    passed = frozenset(busy)
    numbers = [number for number, endpoint in rows if endpoint not in passed][:limit]
    if len(numbers) < limit and len(rows) == looked_through:
        numbers = _due_by_endpoint(db, now, limit, busy)
    (next_due,) = db.execute(
        """
        SELECT min(next_at) FROM deliveries INDEXED BY deliveries_due
        WHERE status = 'pending' AND next_at > ?
        """,
        (now,),
    ).fetchone()
    return DueDeliveries(entries=deliveries_of(db, numbers), next_due=next_due)


def _due_by_endpoint(db: Database, now: int, limit: int, busy: Sequence[str]) -> list[int]:
    """Rows that are due, the longest waiting first, without a step onto any row of a busy endpoint.

    One leap in the index leads from each endpoint to the next. The `limit` longest waiting deliveries belong
    to the `limit` endpoints whose first one has waited longest.
    """
    endpoints = db.execute(
        """
        WITH RECURSIVE endpoints (endpoint) AS (
            SELECT min(endpoint) FROM deliveries INDEXED BY deliveries_endpoint WHERE status = 'pending'
            UNION ALL
            SELECT (SELECT min(d.endpoint) FROM deliveries AS d INDEXED BY deliveries_endpoint
                    WHERE d.status = 'pending' AND d.endpoint > endpoints.endpoint)
            FROM endpoints WHERE endpoints.endpoint IS NOT NULL)
        SELECT e.endpoint FROM endpoints AS e CROSS JOIN deliveries AS first ON first.number = (
            SELECT d.number FROM deliveries AS d INDEXED BY deliveries_endpoint
            WHERE d.status = 'pending' AND d.endpoint = e.endpoint ORDER BY d.next_at, d.number LIMIT 1)
        WHERE e.endpoint NOT IN (SELECT value FROM json_each(?)) AND first.next_at <= ?
        ORDER BY first.next_at, first.number LIMIT ?
        """,
        (text_of(busy), now, limit),
    ).fetchall()
    due = [
        row
        for (endpoint,) in endpoints
        for row in db.execute(
            """
            SELECT next_at, number FROM deliveries INDEXED BY deliveries_endpoint
            WHERE status = 'pending' AND endpoint = ? AND next_at <= ? ORDER BY next_at, number LIMIT ?
            """,
            (endpoint, now, limit),
        ).fetchall()
    ]
    return [number for _, number in sorted(due)[:limit]]


def delivery(db: Database, delivery_id: str) -> Delivery | None:
    """See `Store.delivery`."""
    number = delivery_number_of(db, delivery_id)
    return None if number is None else delivery_of(db, number)


def list_deliveries(db: Database, wanted: DeliveryFilter, before: int | None, limit: int) -> DeliveryPage:
    """See `Store.list_deliveries`; `before` is the decoded cursor."""
    words = ["SELECT number FROM deliveries WHERE true"]
    parameters: list[Any] = []
    for condition, value in (
        ("task = (SELECT number FROM tasks WHERE id = ?)", wanted.task_id),
        ("status = ?", wanted.status),
        ("key_id = ?", wanted.key_id),
        ("number < ?", before),
    ):
        if value is not None:
            words.append(f"AND {condition}")
            parameters.append(value if isinstance(value, int) else str(value))
    words.append("ORDER BY number DESC LIMIT ?")
    page, last = _page(db, " ".join(words), parameters, limit)
    return DeliveryPage(
        deliveries=deliveries_of(db, page),
        next_cursor=None if last is None else _encode_cursor(_OF_DELIVERIES, last),
    )


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
        SELECT wanted.value FROM json_each(?) AS wanted
        WHERE NOT EXISTS (SELECT 1 FROM task_uploads WHERE file = wanted.value)
            AND NOT EXISTS (SELECT 1 FROM assets WHERE file = wanted.value)
        ORDER BY wanted.key
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
