"""Every write of tasks and attempts as one plain function on a database; never commits, waits or decides.

What they owe to webhooks is written by `outbox.py` inside the same savepoint.

Each runs alone on the one writing connection, inside its own savepoint: what it reads stays as it is,
and an exception undoes all of it.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from comfyd.errors import Conflict, StaleClaim
from comfyd.store import outbox
from comfyd.store.rows import (
    Database,
    claim_of,
    error_text,
    insert_artefacts,
    kept_under,
    task_of,
    text_of,
)
from comfyd.tasks import (
    Added,
    Attempt,
    CancelResult,
    Claim,
    IdempotencyKey,
    NewTask,
    Settlement,
    Status,
    Task,
    TaskError,
)

LATEST_WEIGHT: Final = 0.3
"""How much the latest run counts in the mean of its shape, once there are more than three."""


class Payload(msgspec.Struct, frozen=True, kw_only=True):
    """The large parts of a new task, encoded before the write begins so that it stays short."""

    inputs: bytes | None
    extra_data: bytes
    graph: bytes

    @classmethod
    def of(cls, new: NewTask) -> "Payload":
        """Encode."""
        encode = msgspec.json.encode
        return cls(
            inputs=None if new.inputs is None else encode(new.inputs),
            extra_data=encode(new.extra_data),
            graph=encode(new.graph),
        )


def add(db: Database, new: NewTask, payload: Payload, key: IdempotencyKey | None, now: int) -> Added:
    """See `Store.add`."""
    if key is not None:
        known = kept_under(db, key)
        if known is not None:
            return Added(task=known, replayed=True)
    number = _next_seq(db)
    _insert_task(db, number, new, now)
    db.execute(
        "INSERT INTO payloads (task, inputs, extra_data, graph) VALUES (?, ?, ?, ?)",
        (number, payload.inputs, payload.extra_data, payload.graph),
    )
    if new.metadata:
        db.executemany(
            "INSERT INTO metadata (task, key, value) VALUES (?, ?, ?)",
            [(number, name, value) for name, value in new.metadata.items()],
        )
    if new.uploads:
        db.executemany(
            "INSERT INTO task_uploads (task, file) VALUES (?, ?)", [(number, file) for file in new.uploads]
        )
    if key is not None:
        db.execute(
            "INSERT INTO idempotency (owner, key, body_sha256, task, created_at) VALUES (?, ?, ?, ?, ?)",
            (key.key_id or "", key.key, key.body_sha256, number, now),
        )
    task = Task(
        id=new.id,
        seq=number,
        priority=new.priority,
        workflow=new.workflow,
        shape=new.shape,
        nodes_total=new.nodes_total,
        inputs=new.inputs,
        metadata=new.metadata,
        policy=new.policy,
        output=new.output,
        key_id=new.key_id,
        created_at=now,
        available_at=now,
        webhook=new.webhook,
        credentials=new.credentials,
    )
    return Added(task=task, replayed=False)


def _insert_task(db: Database, number: int, new: NewTask, now: int) -> None:
    db.execute(
        """
        INSERT INTO tasks (number, id, seq, status, priority, workflow, shape, nodes_total, policy, output,
                           key_id, created_at, available_at, webhook, credentials)
        VALUES (?, ?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        """,
        (
            number,
            new.id,
            number,
            new.priority,
            new.workflow,
            new.shape,
            new.nodes_total,
            text_of(new.policy),
            text_of(new.output),
            new.key_id,
            now,
            now,
            None if new.webhook is None else text_of(new.webhook),
            new.credentials,
        ),
    )


def _next_seq(db: Database) -> int:
    row = db.execute("UPDATE sequence SET last = last + 1 WHERE one = 1 RETURNING last").fetchone()
    return int(row[0])


def make_due(db: Database, after: int, now: int, limit: int) -> int:
    """See `Store.make_due`."""
    return db.execute(
        """
        UPDATE tasks SET available_at = ? WHERE number IN (
            SELECT number FROM tasks INDEXED BY tasks_due
            WHERE status = 'queued' AND available_at > ? LIMIT ?)
        """,
        (now, after, limit),
    ).rowcount


def claim(db: Database, task_id: str, attempt_id: str, now: int) -> Claim | None:
    """See `Store.claim`."""
    row = db.execute(
        """
        SELECT number, attempt_count, started_at FROM tasks
        WHERE id = ? AND status = 'queued' AND available_at <= ?
        """,
        (task_id, now),
    ).fetchone()
    if row is None:
        return None
    number, attempt_count, started_at = row
    db.execute(
        "INSERT INTO attempts (id, task, number, step, claimed_at) VALUES (?, ?, ?, 'claimed', ?)",
        (attempt_id, number, attempt_count + 1, now),
    )
    db.execute(
        """
        UPDATE tasks SET status = 'running', attempt_count = attempt_count + 1,
                         started_at = coalesce(started_at, ?)
        WHERE number = ?
        """,
        (now, number),
    )
    claimed = claim_of(db, number)
    if started_at is None:
        outbox.owe(db, number, claimed.task, now)
    return claimed


def record(db: Database, attempt: Attempt) -> None:
    """See `Store.record`. How an attempt ends is `settle`'s to write, not this one's."""
    changed = db.execute(
        """
        UPDATE attempts SET step = ?, backend = ?, client_id = ?, intent_at = ?, accepted_at = ?,
                            seen_running_at = ?, executed_at = ?, execution_ms = ?, collected = ?
        WHERE id = ? AND ended_at IS NULL
        """,
        (
            attempt.step.value,
            attempt.backend,
            attempt.client_id,
            attempt.intent_at,
            attempt.accepted_at,
            attempt.seen_running_at,
            attempt.executed_at,
            attempt.execution_ms,
            text_of(attempt.collected),
            attempt.id,
        ),
    ).rowcount
    if changed != 1:
        raise _stale(attempt.id)


def _stale(attempt_id: str) -> StaleClaim:
    return StaleClaim(f"attempt {attempt_id} is not the live attempt of its task")


def settle(db: Database, attempt_id: str, settlement: Settlement, now: int) -> Task:
    """See `Store.settle`."""
    row = db.execute(
        """
        SELECT t.number, t.shape, a.execution_ms, t.cancel_requested_at
        FROM attempts AS a JOIN tasks AS t ON t.number = a.task
        WHERE a.id = ? AND a.ended_at IS NULL
        """,
        (attempt_id,),
    ).fetchone()
    if row is None:
        raise _stale(attempt_id)
    number, shape, execution_ms, cancel_requested_at = row
    db.execute(
        "UPDATE attempts SET step = 'settled', ended_at = ?, outcome = ?, error = ? WHERE id = ?",
        (now, settlement.outcome, error_text(settlement.error), attempt_id),
    )
    # A cancel between the decision and this write had already been promised to the client.
    status = settlement.status if cancel_requested_at is None else Status.CANCELED
    db.execute(
        "UPDATE tasks SET failures = ?, suspects = ?, strays = ? WHERE number = ?",
        (settlement.failures, settlement.suspects, settlement.strays, number),
    )
    if status is Status.QUEUED:
        return _requeue(db, number, settlement.available_at)
    if status is Status.SUCCEEDED:
        insert_artefacts(db, number, settlement.artefacts)
        if execution_ms is not None:
            _learn(db, shape, execution_ms)
    return _end(db, number, status, settlement.error, now)


def _requeue(db: Database, number: int, available_at: int | None) -> Task:
    """Bring a running task back to the queue, where it keeps its place."""
    db.execute(
        "UPDATE tasks SET status = 'queued', available_at = ? WHERE number = ?", (available_at, number)
    )
    return task_of(db, number)


def _end(
    db: Database,
    number: int,
    status: Status,
    error: TaskError | None,
    now: int,
    *,
    asked_at: int | None = None,
) -> Task:
    """End a task, and owe its webhook what that wants to hear: every end of every task is written here.

    `error` stays with a failed task only; `asked_at` is when a cancel came, if that is not on record yet.
    """
    db.execute(
        """
        UPDATE tasks SET status = ?, completed_at = ?, error = ?,
                         cancel_requested_at = coalesce(cancel_requested_at, ?)
        WHERE number = ?
        """,
        (status.value, now, error_text(error) if status is Status.FAILED else None, asked_at, number),
    )
    task = task_of(db, number)
    outbox.owe(db, number, task, now)
    return task


def _learn(db: Database, shape: str, execution_ms: int) -> None:
    """Move the mean of this shape towards its latest run: a plain mean first, exponential later."""
    row = db.execute("SELECT runs, mean_ms FROM run_times WHERE shape = ?", (shape,)).fetchone()
    before, mean = (0, 0.0) if row is None else row
    runs = before + 1
    moved = mean + max(LATEST_WEIGHT, 1 / runs) * (execution_ms - mean)
    db.execute("INSERT OR REPLACE INTO run_times VALUES (?, ?, ?)", (shape, runs, moved))
    db.execute(
        "UPDATE run_totals SET runs = runs + 1, weighted_ms = weighted_ms + ? WHERE one = 1",
        (runs * moved - before * mean,),
    )


def cancel(db: Database, task_id: str, now: int) -> CancelResult | None:
    """See `Store.cancel`."""
    row = db.execute("SELECT number, status FROM tasks WHERE id = ?", (task_id,)).fetchone()
    if row is None:
        return None
    number, status = row
    if status == Status.QUEUED:
        return CancelResult(task=_end(db, number, Status.CANCELED, None, now, asked_at=now), ended=True)
    db.execute(
        """
        UPDATE tasks SET cancel_requested_at = ?
        WHERE number = ? AND status = 'running' AND cancel_requested_at IS NULL
        """,
        (now, number),
    )
    return CancelResult(task=task_of(db, number), ended=False)


def retry(db: Database, task_id: str, now: int) -> Task | None:
    """See `Store.retry`."""
    number = _ended(db, task_id, "run again")
    if number is None:
        return None
    db.execute(
        """
        UPDATE tasks SET status = 'queued', seq = ?, available_at = ?, failures = 0, suspects = 0, strays = 0,
                         error = NULL, started_at = NULL, completed_at = NULL, cancel_requested_at = NULL
        WHERE number = ?
        """,
        (_next_seq(db), now, number),
    )
    db.execute("DELETE FROM artefacts WHERE task = ?", (number,))
    return task_of(db, number)


def delete(db: Database, task_id: str, ended_before: int | None = None) -> Task | None:
    """See `Store.delete`. The foreign keys take everything that belongs to the task along."""
    number = _ended(db, task_id, "deleted")
    if number is None:
        return None
    task = task_of(db, number)
    if ended_before is not None and (
        task.completed_at is None or task.completed_at >= ended_before or outbox.owes(db, number)
    ):
        raise Conflict("the task has ended anew since, or owes its webhook something")
    db.execute("DELETE FROM tasks WHERE number = ?", (number,))
    return task


def files_gone(db: Database, files: Sequence[tuple[str, str]]) -> None:
    """See `Store.files_gone`."""
    db.executemany("DELETE FROM unwanted_files WHERE storage = ? AND key = ?", files)


def _ended(db: Database, task_id: str, what: str) -> int | None:
    """The row of a task that has ended; None if there is no such task. Raises `Conflict`."""
    row = db.execute("SELECT number, status FROM tasks WHERE id = ?", (task_id,)).fetchone()
    if row is None:
        return None
    number, status = row
    if not Status(status).terminal:
        raise Conflict(
            f"the task is {status}; only an ended one can be {what}", details={"status": str(status)}
        )
    return int(number)
