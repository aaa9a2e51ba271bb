"""Rows of the SQLite schema as values of `tasks`, and back; never a transition, never a driver.

Every function takes the database as its first argument and runs inside a transaction that its caller opened.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol

import msgspec

from comfyd.deliveries import Delivery, DeliveryStatus, DeliveryTry
from comfyd.errors import IdempotencyKeyReuse
from comfyd.tasks import (
    Artefact,
    Attempt,
    Claim,
    EventType,
    IdempotencyKey,
    JsonObject,
    OutputFile,
    OutputOptions,
    OutputType,
    Policy,
    Status,
    Step,
    Task,
    TaskError,
    Webhook,
)


class Cursor(Protocol):
    """What one statement gave."""

    @property
    def rowcount(self) -> int:
        """How many rows it changed."""

    def fetchone(self) -> Any:
        """The next row as a tuple, or None."""

    def fetchall(self) -> list[Any]:
        """The rest of the rows."""


class Database(Protocol):
    """What of a connection is used: statements with bound parameters. Values never become SQL text."""

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Cursor:
        """Run one statement."""

    def executemany(self, sql: str, parameters: Iterable[Sequence[Any]], /) -> Cursor:
        """Run one statement for each row of parameters."""


_POLICY: Final = msgspec.json.Decoder(Policy)
_OUTPUT: Final = msgspec.json.Decoder(OutputOptions)
_ERROR: Final = msgspec.json.Decoder(TaskError)
_COLLECTED: Final = msgspec.json.Decoder(tuple[OutputFile, ...])
_OBJECT: Final = msgspec.json.Decoder(dict[str, Any])
_WEBHOOK: Final = msgspec.json.Decoder(Webhook)
_SUBJECT: Final = msgspec.json.Decoder(Task)


def text_of(value: Any) -> str:
    """A small value as JSON text."""
    return msgspec.json.encode(value).decode()


def error_text(error: TaskError | None) -> str | None:
    """An error as JSON text, or NULL."""
    return None if error is None else text_of(error)


def object_of(blob: bytes) -> JsonObject:
    """A payload column as the object that was stored."""
    return _OBJECT.decode(blob)


def number_of(db: Database, task_id: str) -> int | None:
    """The row of a task."""
    row = db.execute("SELECT number FROM tasks WHERE id = ?", (task_id,)).fetchone()
    return None if row is None else int(row[0])


def tasks_of(db: Database, numbers: Sequence[int], *, data: bool = True) -> tuple[Task, ...]:
    """The tasks of these rows in this order, with metadata, artefacts and attempts; `data` too or not."""
    wanted = text_of(numbers)
    rows = db.execute(
        """
        SELECT t.number, t.id, t.seq, t.status, t.priority, t.workflow, t.shape, t.nodes_total, t.policy,
               t.output, t.key_id, t.created_at, t.available_at, t.started_at, t.completed_at,
               t.cancel_requested_at, t.attempt_count, t.failures, t.suspects, t.strays, t.error, p.inputs,
               t.webhook, t.credentials
        FROM json_each(?) AS wanted
        CROSS JOIN tasks AS t ON t.number = wanted.value
        JOIN payloads AS p ON p.task = t.number
        ORDER BY wanted.key
        """,
        (wanted,),
    ).fetchall()
    metadata = _metadata_of(db, wanted)
    artefacts = _artefacts_of(db, wanted, data=data)
    attempts = _attempts_of(db, wanted, {row[0]: row[1] for row in rows})
    return tuple(
        _task(row, metadata.get(row[0], {}), artefacts.get(row[0], ()), attempts.get(row[0], ()))
        for row in rows
    )


def task_of(db: Database, number: int) -> Task:
    """The task of a row that is there."""
    (task,) = tasks_of(db, (number,))
    return task


def _task(
    row: Any, metadata: dict[str, str], artefacts: Sequence[Artefact], attempts: Sequence[Attempt]
) -> Task:
    return Task(
        id=row[1],
        seq=row[2],
        status=Status(row[3]),
        priority=row[4],
        workflow=row[5],
        shape=row[6],
        nodes_total=row[7],
        policy=_POLICY.decode(row[8]),
        output=_OUTPUT.decode(row[9]),
        key_id=row[10],
        created_at=row[11],
        available_at=row[12],
        started_at=row[13],
        completed_at=row[14],
        cancel_requested_at=row[15],
        attempt_count=row[16],
        failures=row[17],
        suspects=row[18],
        strays=row[19],
        error=_error(row[20]),
        inputs=None if row[21] is None else object_of(row[21]),
        webhook=None if row[22] is None else _WEBHOOK.decode(row[22]),
        credentials=bool(row[23]),
        metadata=metadata,
        artefacts=tuple(artefacts),
        attempts=tuple(attempts),
    )


def _error(text: str | None) -> TaskError | None:
    return None if text is None else _ERROR.decode(text)


def _metadata_of(db: Database, wanted: str) -> dict[int, dict[str, str]]:
    found: dict[int, dict[str, str]] = {}
    for number, key, value in db.execute(
        "SELECT task, key, value FROM metadata WHERE task IN (SELECT value FROM json_each(?))", (wanted,)
    ).fetchall():
        found.setdefault(number, {})[key] = value
    return found


def _artefacts_of(db: Database, wanted: str, *, data: bool) -> dict[int, list[Artefact]]:
    found: dict[int, list[Artefact]] = {}
    for row in db.execute(
        """
        SELECT task, node_id, "index", name, type, content_type, size_bytes, sha256, key, storage, width,
               height, duration, text, location, blake3, CASE WHEN ? THEN data END
        FROM artefacts WHERE task IN (SELECT value FROM json_each(?)) ORDER BY task, position
        """,
        (data, wanted),
    ).fetchall():
        found.setdefault(row[0], []).append(_artefact(row))
    return found


def artefact_with_id(db: Database, artefact_id: str) -> tuple[int, Artefact] | None:
    """The artefact of this id, without `data`, and the row of its task."""
    row = db.execute(
        """
        SELECT task, node_id, "index", name, type, content_type, size_bytes, sha256, key, storage, width,
               height, duration, text, location, blake3, NULL
        FROM artefacts WHERE id = ?
        """,
        (artefact_id,),
    ).fetchone()
    return None if row is None else (row[0], _artefact(row))


def _artefact(row: Any) -> Artefact:
    return Artefact(
        node_id=row[1],
        index=row[2],
        name=row[3],
        type=OutputType(row[4]),
        content_type=row[5],
        size_bytes=row[6],
        sha256=row[7],
        key=row[8],
        storage=row[9],
        width=row[10],
        height=row[11],
        duration=row[12],
        text=row[13],
        location=row[14],
        blake3=row[15],
        data=row[16],
    )


def _attempts_of(db: Database, wanted: str, task_ids: dict[int, str]) -> dict[int, list[Attempt]]:
    found: dict[int, list[Attempt]] = {}
    for row in db.execute(
        """
        SELECT task, id, number, step, claimed_at, backend, client_id, intent_at, accepted_at,
               seen_running_at, executed_at, execution_ms, collected, ended_at, outcome, error
        FROM attempts WHERE task IN (SELECT value FROM json_each(?)) ORDER BY task, number
        """,
        (wanted,),
    ).fetchall():
        attempt = Attempt(
            id=row[1],
            task_id=task_ids[row[0]],
            number=row[2],
            step=Step(row[3]),
            claimed_at=row[4],
            backend=row[5],
            client_id=row[6],
            intent_at=row[7],
            accepted_at=row[8],
            seen_running_at=row[9],
            executed_at=row[10],
            execution_ms=row[11],
            collected=_COLLECTED.decode(row[12]),
            ended_at=row[13],
            outcome=row[14],
            error=_error(row[15]),
        )
        found.setdefault(row[0], []).append(attempt)
    return found


def insert_artefacts(db: Database, number: int, artefacts: Sequence[Artefact]) -> None:
    """Keep a task's artefacts in their order. One whose key another row has already gets no id of its own."""
    db.executemany(
        """
        INSERT INTO artefacts (task, position, node_id, "index", name, type, content_type, size_bytes, sha256,
                               key, storage, width, height, duration, text, location, data, blake3, id)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?,
                CASE WHEN NOT EXISTS (SELECT 1 FROM artefacts WHERE id = ?) THEN ? END)
        """,
        [
            (
                number,
                position,
                artefact.node_id,
                artefact.index,
                artefact.name,
                artefact.type.value,
                artefact.content_type,
                artefact.size_bytes,
                artefact.sha256,
                artefact.key,
                artefact.storage,
                artefact.width,
                artefact.height,
                artefact.duration,
                artefact.text,
                artefact.location,
                artefact.data,
                artefact.blake3,
                artefact.id,
                artefact.id,
            )
            for position, artefact in enumerate(artefacts)
        ],
    )


def claim_of(db: Database, number: int) -> Claim:
    """A running task with its live attempt, which is its last one, and its graph."""
    task = task_of(db, number)
    graph, extra_data = db.execute(
        "SELECT graph, extra_data FROM payloads WHERE task = ?", (number,)
    ).fetchone()
    return Claim(
        task=task, attempt=task.attempts[-1], graph=object_of(graph), extra_data=object_of(extra_data)
    )


def kept_under(db: Database, key: IdempotencyKey) -> Task | None:
    """The task that was made under this key. Raises `IdempotencyKeyReuse` if its body was another one."""
    row = db.execute(
        "SELECT task, body_sha256 FROM idempotency WHERE owner = ? AND key = ?", (key.key_id or "", key.key)
    ).fetchone()
    if row is None:
        return None
    if row[1] != key.body_sha256:
        raise IdempotencyKeyReuse("this idempotency key was used before for another request")
    return task_of(db, row[0])


def delivery_number_of(db: Database, delivery_id: str) -> int | None:
    """The row of a delivery."""
    row = db.execute("SELECT number FROM deliveries WHERE id = ?", (delivery_id,)).fetchone()
    return None if row is None else int(row[0])


def deliveries_of(db: Database, numbers: Sequence[int]) -> tuple[Delivery, ...]:
    """The deliveries of these rows in this order, with their tries."""
    wanted = text_of(numbers)
    rows = db.execute(
        """
        SELECT d.number, d.subject, d.id, d.type, d.output, d.url, d.endpoint, d.created_at, d.status,
               d.next_at, d.round, d.ended_at
        FROM json_each(?) AS wanted CROSS JOIN deliveries AS d ON d.number = wanted.value
        ORDER BY wanted.key
        """,
        (wanted,),
    ).fetchall()
    subjects = _subjects_of(db, {row[1] for row in rows})
    tries = _tries_of(db, wanted)
    return tuple(_delivery(row, subjects[row[1]], tries.get(row[0], ())) for row in rows)


def delivery_of(db: Database, number: int) -> Delivery:
    """The delivery of a row that is there."""
    (delivery,) = deliveries_of(db, (number,))
    return delivery


def _delivery(row: Any, subject: Task, tries: Sequence[DeliveryTry]) -> Delivery:
    return Delivery(
        id=row[2],
        task_id=subject.id,
        type=EventType(row[3]),
        output=row[4],
        url=row[5],
        endpoint=row[6],
        created_at=row[7],
        status=DeliveryStatus(row[8]),
        next_at=row[9],
        round=row[10],
        ended_at=row[11],
        subject=subject,
        tries=tuple(tries),
    )


def _subjects_of(db: Database, numbers: Iterable[int]) -> dict[int, Task]:
    """Each is read once, however many deliveries share it."""
    rows = db.execute(
        "SELECT number, value FROM subjects WHERE number IN (SELECT value FROM json_each(?))",
        (text_of(list(numbers)),),
    ).fetchall()
    return {number: _SUBJECT.decode(value) for number, value in rows}


def _tries_of(db: Database, wanted: str) -> dict[int, list[DeliveryTry]]:
    found: dict[int, list[DeliveryTry]] = {}
    for row in db.execute(
        """
        SELECT delivery, number, at, duration_ms, status, error FROM delivery_tries
        WHERE delivery IN (SELECT value FROM json_each(?)) ORDER BY delivery, number
        """,
        (wanted,),
    ).fetchall():
        made = DeliveryTry(number=row[1], at=row[2], duration_ms=row[3], status=row[4], error=row[5])
        found.setdefault(row[0], []).append(made)
    return found
