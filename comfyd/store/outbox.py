"""Every write of the outbox as one plain function on a database: owe, try, owe again; never sends.

Each runs inside the savepoint of the transition that it belongs to, so that a task and what is owed for it
cannot disagree.
"""

from collections.abc import Iterator

import msgspec
from yarl import URL

from comfyd.deliveries import Delivery, DeliveryStatus, DeliveryTry
from comfyd.store.rows import Database, delivery_number_of, delivery_of
from comfyd.tasks import TERMINAL_EVENTS, EventType, Status, Task


def owe(db: Database, number: int, task: Task, now: int) -> None:
    """Owe the task's webhook what that wants to hear of the status to which the task has just come."""
    if task.webhook is None:
        return
    owed = [(event, output) for event, output in _events(task) if event in task.webhook.events]
    if not owed:
        return
    endpoint = endpoint_of(task.webhook.url)
    subject = db.execute(
        "INSERT INTO subjects (task, value) VALUES (?, ?) RETURNING number", (number, _encoded(task))
    ).fetchone()[0]
    # The id is made from what has happened: the same event is never owed a second time.
    db.executemany(
        """
        INSERT INTO deliveries (id, task, key_id, type, output, url, endpoint, subject, created_at, next_at)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING
        """,
        [
            (
                _message_id(task, event, output),
                number,
                task.key_id,
                event.value,
                output,
                task.webhook.url,
                endpoint,
                subject,
                now,
                now,
            )
            for event, output in owed
        ],
    )


def _events(task: Task) -> Iterator[tuple[EventType, int | None]]:
    """What there is to tell, in order; for `task.output` with the place of the artefact."""
    if not task.status.terminal:
        yield EventType.STARTED, None
        return
    if task.status is Status.SUCCEEDED:
        for position in range(len(task.artefacts)):
            yield EventType.OUTPUT, position
    yield TERMINAL_EVENTS[task.status], None


def _message_id(task: Task, event: EventType, output: int | None) -> str:
    """The `webhook-id`. A task that is run again by its user has a new `seq`, and so new ids."""
    word = event.value.removeprefix("task.")
    return (
        f"msg_{task.id}_{task.seq}_{word}" if output is None else f"msg_{task.id}_{task.seq}_{word}_{output}"
    )


def _encoded(task: Task) -> bytes:
    artefacts = tuple(msgspec.structs.replace(artefact, data=None) for artefact in task.artefacts)
    return msgspec.json.encode(msgspec.structs.replace(task, inputs=None, attempts=(), artefacts=artefacts))


def endpoint_of(url: str) -> str:
    """Scheme, host and port of a url: what is slow or down together. One that is no url stands for itself.

    It must not raise: a task whose webhook cannot be reached ends all the same.
    """
    try:
        parsed = URL(url)
    except (ValueError, IndexError):  # yarl raises the second one for some hosts in brackets
        return url
    return f"{parsed.scheme}://{parsed.host_subcomponent}:{parsed.port}" if parsed.absolute else url


def record_try(
    db: Database,
    taken: Delivery,
    made: DeliveryTry,
    status: DeliveryStatus,
    next_at: int | None,
    now: int,
) -> None:
    """See `Store.record_try`. A try that is recorded late undoes no end and no redelivery."""
    number = delivery_number_of(db, taken.id)
    if number is None:
        return
    db.execute(
        """
        INSERT INTO delivery_tries (delivery, number, at, duration_ms, status, error)
        SELECT ?, coalesce(max(number), 0) + 1, ?, ?, ?, ? FROM delivery_tries WHERE delivery = ?
        """,
        (number, made.at, made.duration_ms, made.status, made.error, number),
    )
    db.execute(
        """
        UPDATE deliveries SET status = ?, next_at = ?, round = round + 1, ended_at = ?
        WHERE number = ? AND status = 'pending' AND next_at = ? AND round = ?
        """,
        (
            status.value,
            next_at,
            None if status is DeliveryStatus.PENDING else now,
            number,
            taken.next_at,
            taken.round,
        ),
    )


def make_deliveries_due(db: Database, after: int, now: int, limit: int) -> int:
    """See `Store.make_deliveries_due`."""
    return db.execute(
        """
        UPDATE deliveries SET next_at = ? WHERE number IN (
            SELECT number FROM deliveries INDEXED BY deliveries_due
            WHERE status = 'pending' AND next_at > ? LIMIT ?)
        """,
        (now, after, limit),
    ).rowcount


def owes(db: Database, number: int) -> bool:
    """Whether something that the task in this row owes its webhook is still to be delivered."""
    (owed,) = db.execute(
        """
        SELECT EXISTS (SELECT 1 FROM deliveries INDEXED BY deliveries_task
                       WHERE task = ? AND status = 'pending')
        """,
        (number,),
    ).fetchone()
    return bool(owed)


def redeliver(db: Database, delivery_id: str, now: int) -> Delivery | None:
    """See `Store.redeliver`."""
    number = delivery_number_of(db, delivery_id)
    if number is None:
        return None
    db.execute(
        "UPDATE deliveries SET status = 'pending', next_at = ?, round = 0, ended_at = NULL WHERE number = ?",
        (now, number),
    )
    return delivery_of(db, number)
