"""Every write of the SQLite store as one plain function on a database; never commits, waits or decides.

Each runs alone on the one writing connection, inside its own savepoint: what it reads stays as it is,
and an exception undoes all of it.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from comfyd.errors import Conflict, StaleClaim
from comfyd.store.rows import (
    Database,
    claim_of,
    error_text,
    insert_artefacts,
    kept_under,
    number_of,
    task_of,
    text_of,
)
from comfyd.tasks import Added, Attempt, Claim, IdempotencyKey, NewTask, Settlement, Status, Task

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
    )
    return Added(task=task, replayed=False)


def _insert_task(db: Database, number: int, new: NewTask, now: int) -> None:
    db.execute(
        """
        INSERT INTO tasks (number, id, seq, status, priority, workflow, shape, nodes_total, policy, output,
                           key_id, created_at, available_at)
        VALUES (?, ?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?, ?)
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
        ),
    )


def _next_seq(db: Database) -> int:
    row = db.execute("UPDATE sequence SET last = last + 1 WHERE one = 1 RETURNING last").fetchone()
    return int(row[0])


def claim(db: Database, task_id: str, attempt_id: str, now: int) -> Claim | None:
    """See `Store.claim`."""
    row = db.execute(
        "SELECT number, attempt_count FROM tasks WHERE id = ? AND status = 'queued' AND available_at <= ?",
        (task_id, now),
    ).fetchone()
    if row is None:
        return None
    number, attempt_count = row
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
    return claim_of(db, number)


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
    status = settlement.status
    if status is Status.QUEUED and cancel_requested_at is not None:
        # The cancel came between the decision and this write: it had already been promised to the client.
        status = Status.CANCELED
    _apply(db, number, settlement, status, now)
    insert_artefacts(db, number, settlement.artefacts)
    if status is Status.SUCCEEDED and execution_ms is not None:
        _learn(db, shape, execution_ms)
    return task_of(db, number)


def _apply(db: Database, number: int, settlement: Settlement, status: Status, now: int) -> None:
    """Bring the task's row to `status`; one that goes back to the queue keeps its place there."""
    db.execute(
        """
        UPDATE tasks SET status = ?, completed_at = ?, error = ?, failures = ?, suspects = ?, strays = ?
        WHERE number = ?
        """,
        (
            status.value,
            now if status.terminal else None,
            error_text(settlement.error) if status is Status.FAILED else None,
            settlement.failures,
            settlement.suspects,
            settlement.strays,
            number,
        ),
    )
    if status is Status.QUEUED:
        db.execute("UPDATE tasks SET available_at = ? WHERE number = ?", (settlement.available_at, number))


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


def cancel(db: Database, task_id: str, now: int) -> Task | None:
    """See `Store.cancel`."""
    number = number_of(db, task_id)
    if number is None:
        return None
    db.execute(
        """
        UPDATE tasks SET status = 'canceled', cancel_requested_at = ?, completed_at = ?
        WHERE number = ? AND status = 'queued'
        """,
        (now, now, number),
    )
    db.execute(
        """
        UPDATE tasks SET cancel_requested_at = ?
        WHERE number = ? AND status = 'running' AND cancel_requested_at IS NULL
        """,
        (now, number),
    )
    return task_of(db, number)


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


def delete(db: Database, task_id: str) -> Task | None:
    """See `Store.delete`. The foreign keys take everything that belongs to the task along."""
    number = _ended(db, task_id, "deleted")
    if number is None:
        return None
    task = task_of(db, number)
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
