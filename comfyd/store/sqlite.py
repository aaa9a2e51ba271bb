"""The store in one SQLite file: its verbs, batches and snapshots; never a decision.

The statements are in `transitions.py` and `outbox.py` (writes), `queries.py` (reads) and `assets.py` (both),
the gathering of writes is in `writer.py`, the file and its connections are `database.py`'s. Writes go through
one connection, each batch as one transaction in one visit to that connection's thread. Reads go through
another connection that cannot write, one visit per verb; they see all that was committed before they began.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from comfyd.assets import Asset, OutputAsset
from comfyd.deliveries import (
    Delivery,
    DeliveryFilter,
    DeliveryPage,
    DeliveryStatus,
    DeliveryTry,
    DueDeliveries,
)
from comfyd.errors import ComfydError, StoreUnavailable
from comfyd.store import assets, outbox, queries, transitions
from comfyd.store.database import (
    BROKEN,
    Connection,
    connected,
    damage,
    exclusive,
    open_reader,
    open_writer,
    primary_code,
    translated,
)
from comfyd.store.rows import Database
from comfyd.store.writer import GroupCommit, Operation, Result
from comfyd.tasks import (
    Added,
    Attempt,
    CancelResult,
    Claim,
    Graph,
    IdempotencyKey,
    NewTask,
    ReadyPage,
    RunTimes,
    Settlement,
    Status,
    Task,
    TaskFilter,
    TaskPage,
)

T = TypeVar("T")

_OF_THE_OPERATION: Final = (ComfydError, sqlite3.Error, ValueError, OverflowError, msgspec.MsgspecError)
"""What an operation may raise without harm to its batch: a refusal, a constraint, an unfit value."""


class SqliteStore:
    """A `Store` in one SQLite file; made by `open_sqlite` and open as long as that is entered.

    A disk error or a damaged file breaks it for good: what SQLite has in memory then proves nothing about the
    disk. `broken` says why, and every later write is refused.
    """

    def __init__(self, path: Path, writer: Connection, reader: Connection) -> None:
        self._path = path
        self._writer = writer
        self._reader = reader
        self._commits = GroupCommit[Database](self._apply)
        self._counts: dict[Status, int] = {}
        self._breakage = asyncio.Event()
        self.broken: str | None = None
        """Why nothing is written any more, for whoever runs comfyd; None while all is well."""

    async def wait_broken(self) -> str:
        """Wait until the store is broken, if ever, and say why. The process should end then."""
        await self._breakage.wait()
        return str(self.broken)

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        """Take writes while this is entered; leaving it applies what still waits."""
        self._counts = await self._read(queries.counts)
        async with self._commits:
            yield

    async def add(self, new: NewTask, key: IdempotencyKey | None, now: int) -> Added:
        """See `Store.add`."""
        payload = transitions.Payload.of(new)
        return await self._commits.submit(lambda db: transitions.add(db, new, payload, key, now))

    async def ping(self) -> None:
        """See `Store.ping`."""
        if self.broken is not None:
            raise _refusal()
        await self._read(lambda db: db.execute("SELECT 1").fetchone())

    async def replay(self, key: IdempotencyKey) -> Task | None:
        """See `Store.replay`."""
        return await self._read(lambda db: queries.replay(db, key))

    async def get(self, task_id: str) -> Task | None:
        """See `Store.get`."""
        return await self._read(lambda db: queries.get(db, task_id))

    async def graph(self, task_id: str) -> Graph | None:
        """See `Store.graph`."""
        return await self._read(lambda db: queries.graph(db, task_id))

    async def list_tasks(self, wanted: TaskFilter, cursor: str | None, limit: int) -> TaskPage:
        """See `Store.list_tasks`."""
        before = queries.task_cursor(cursor)
        return await self._read(lambda db: queries.list_tasks(db, wanted, before, limit))

    async def ready(self, now: int, limit: int) -> ReadyPage:
        """See `Store.ready`."""
        return await self._read(lambda db: queries.ready(db, now, limit))

    async def make_due(self, after: int, now: int, limit: int) -> int:
        """See `Store.make_due`."""
        return await self._commits.submit(lambda db: transitions.make_due(db, after, now, limit))

    async def claim(self, task_id: str, attempt_id: str, now: int) -> Claim | None:
        """See `Store.claim`."""
        return await self._commits.submit(lambda db: transitions.claim(db, task_id, attempt_id, now))

    async def record(self, attempt: Attempt) -> None:
        """See `Store.record`."""
        await self._commits.submit(lambda db: transitions.record(db, attempt))

    async def settle(self, attempt_id: str, settlement: Settlement, now: int) -> Task:
        """See `Store.settle`."""
        return await self._commits.submit(lambda db: transitions.settle(db, attempt_id, settlement, now))

    async def cancel(self, task_id: str, now: int) -> CancelResult | None:
        """See `Store.cancel`."""
        return await self._commits.submit(lambda db: transitions.cancel(db, task_id, now))

    async def retry(self, task_id: str, now: int) -> Task | None:
        """See `Store.retry`."""
        return await self._commits.submit(lambda db: transitions.retry(db, task_id, now))

    async def delete(self, task_id: str, *, ended_before: int | None = None) -> Task | None:
        """See `Store.delete`."""
        return await self._commits.submit(lambda db: transitions.delete(db, task_id, ended_before))

    async def live(self) -> tuple[Claim, ...]:
        """See `Store.live`."""
        return await self._read(queries.live)

    async def counts(self) -> dict[Status, int]:
        """See `Store.counts`. Known without asking the database: each batch brings the figures along."""
        return dict(self._counts)

    async def ahead(self, task: Task, now: int) -> int:
        """See `Store.ahead`."""
        return await self._read(lambda db: queries.ahead(db, task.priority, task.seq, now))

    async def ended_before(self, moment: int, limit: int) -> tuple[str, ...]:
        """See `Store.ended_before`."""
        return await self._read(lambda db: queries.ended_before(db, moment, limit))

    async def ended_attempts(self, attempt_ids: Sequence[str]) -> tuple[str, ...]:
        """See `Store.ended_attempts`."""
        return await self._read(lambda db: queries.ended_attempts(db, attempt_ids))

    async def due_deliveries(self, now: int, limit: int, busy: Sequence[str]) -> DueDeliveries:
        """See `Store.due_deliveries`."""
        return await self._read(lambda db: queries.due_deliveries(db, now, limit, busy))

    async def record_try(
        self, taken: Delivery, made: DeliveryTry, status: DeliveryStatus, next_at: int | None, now: int
    ) -> None:
        """See `Store.record_try`."""
        await self._commits.submit(lambda db: outbox.record_try(db, taken, made, status, next_at, now))

    async def make_deliveries_due(self, after: int, now: int, limit: int) -> int:
        """See `Store.make_deliveries_due`."""
        return await self._commits.submit(lambda db: outbox.make_deliveries_due(db, after, now, limit))

    async def delivery(self, delivery_id: str) -> Delivery | None:
        """See `Store.delivery`."""
        return await self._read(lambda db: queries.delivery(db, delivery_id))

    async def list_deliveries(self, wanted: DeliveryFilter, cursor: str | None, limit: int) -> DeliveryPage:
        """See `Store.list_deliveries`."""
        before = queries.delivery_cursor(cursor)
        return await self._read(lambda db: queries.list_deliveries(db, wanted, before, limit))

    async def redeliver(self, delivery_id: str, now: int) -> Delivery | None:
        """See `Store.redeliver`."""
        return await self._commits.submit(lambda db: outbox.redeliver(db, delivery_id, now))

    async def add_asset(self, asset: Asset) -> bool:
        """See `Store.add_asset`."""
        return await self._commits.submit(lambda db: assets.add(db, asset))

    async def asset(self, asset_id: str, now: int) -> Asset | None:
        """See `Store.asset`."""
        return await self._read(lambda db: assets.get(db, asset_id, now))

    async def asset_of_bytes(
        self, blake3: str, key_id: str | None, now: int, file_path: str | None = None
    ) -> Asset | None:
        """See `Store.asset_of_bytes`."""
        return await self._read(lambda db: assets.of_bytes(db, blake3, key_id, now, file_path))

    async def output_asset(self, asset_id: str) -> OutputAsset | None:
        """See `Store.output_asset`."""
        return await self._read(lambda db: assets.output(db, asset_id))

    async def extend_asset(self, asset_id: str, expires_at: int) -> Asset | None:
        """See `Store.extend_asset`."""
        return await self._commits.submit(lambda db: assets.extend(db, asset_id, expires_at))

    async def delete_asset(self, asset_id: str, now: int) -> Asset | None:
        """See `Store.delete_asset`."""
        return await self._commits.submit(lambda db: assets.delete(db, asset_id, now))

    async def expire_assets(self, now: int, limit: int) -> tuple[Asset, ...]:
        """See `Store.expire_assets`."""
        return await self._commits.submit(lambda db: assets.expire(db, now, limit))

    async def uploads(self, task_id: str) -> tuple[str, ...]:
        """See `Store.uploads`."""
        return await self._read(lambda db: queries.uploads(db, task_id))

    async def unused_uploads(self, files: Sequence[str]) -> tuple[str, ...]:
        """See `Store.unused_uploads`."""
        return await self._read(lambda db: queries.unused_uploads(db, files))

    async def artefact_bytes(self) -> int:
        """See `Store.artefact_bytes`."""
        return await self._read(queries.artefact_bytes)

    async def unwanted_files(self, limit: int) -> tuple[tuple[str, str], ...]:
        """See `Store.unwanted_files`."""
        return await self._read(lambda db: queries.unwanted_files(db, limit))

    async def files_gone(self, files: Sequence[tuple[str, str]]) -> None:
        """See `Store.files_gone`."""
        await self._commits.submit(lambda db: transitions.files_gone(db, files))

    async def run_times(self, shape: str) -> RunTimes | None:
        """See `Store.run_times`."""
        return await self._read(lambda db: queries.run_times(db, shape))

    async def mean_run_time(self) -> RunTimes | None:
        """See `Store.mean_run_time`."""
        return await self._read(queries.mean_run_time)

    async def _read(self, query: Callable[[Database], T]) -> T:
        """Run a query at one moment of the database."""
        try:
            return await self._reader.call(lambda connection: _snapshot(connection, query))
        except sqlite3.Error as exc:
            noted = self._noted(exc)
            if noted is exc:
                raise
            raise noted from exc

    async def _apply(self, operations: Sequence[Operation[Database]]) -> Sequence[Result]:
        """One batch as one transaction. A bug in one operation undoes the batch; then each is tried alone."""
        if self.broken is not None:
            return [Result(error=_refusal()) for _ in operations]
        call = asyncio.ensure_future(
            self._writer.call(lambda connection: _transaction(connection, operations))
        )
        await asyncio.wait((call,))
        error = call.exception()
        if error is None:
            batch = call.result()
            self._counts = batch.counts or self._counts
            return [
                result if result.error is None else Result(error=self._noted(result.error))
                for result in batch.results
            ]
        noted = [self._noted(error) for _ in operations]
        if len(operations) == 1 or isinstance(noted[0], StoreUnavailable):
            return [Result(error=each) for each in noted]
        return [result for operation in operations for result in await self._apply((operation,))]

    def _noted(self, error: BaseException) -> BaseException:
        """The error in our words; one that breaks the store is remembered."""
        told = translated(error)
        if primary_code(error) in BROKEN and self.broken is None:
            self.broken = damage(self._path, error) or str(told)
            self._breakage.set()
        return told


def _refusal() -> StoreUnavailable:
    """What everybody hears once the store is broken: without the path, which is no client's business."""
    return StoreUnavailable("the database was broken by an earlier error")


class _Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A transaction that has ended: what became of each operation and, if it was committed, the counts."""

    results: Sequence[Result]
    counts: dict[Status, int] | None = None


def _transaction(connection: sqlite3.Connection, operations: Sequence[Operation[Database]]) -> _Batch:
    """Apply the operations in one transaction, each inside a savepoint, and commit; in the writer's thread.

    Raises what undid the whole batch before its commit. A failed commit is everybody's error and is not tried
    again: an error of fsync must never be followed by a success.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        results = [_savepoint(connection, operation) for operation in operations]
        counts = queries.counts(connection)
        try:
            connection.execute("COMMIT")
        except sqlite3.Error as exc:
            return _Batch(results=[Result(error=exc) for _ in operations])
        return _Batch(results=results, counts=counts)
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _savepoint(connection: sqlite3.Connection, operation: Operation[Database]) -> Result:
    """Apply one operation; if it fails it alone is undone. Raises where SQLite has undone everything."""
    connection.execute("SAVEPOINT operation")
    try:
        value = operation(connection)
    except _OF_THE_OPERATION as exc:
        if primary_code(exc) in BROKEN or not connection.in_transaction:
            raise
        connection.execute("ROLLBACK TO operation")
        connection.execute("RELEASE operation")
        return Result(error=exc)
    connection.execute("RELEASE operation")
    return Result(value=value)


def _snapshot(connection: sqlite3.Connection, query: Callable[[Database], T]) -> T:
    """Run a query inside a read transaction; in the reader's thread."""
    connection.execute("BEGIN")
    try:
        return query(connection)
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


@asynccontextmanager
async def open_sqlite(
    path: Path, *, factory: type[sqlite3.Connection] = sqlite3.Connection
) -> AsyncIterator[SqliteStore]:
    """Open the database file, or make it, in a directory that is there and that is ours alone until the end.

    `factory` makes the writing connection; a test passes one whose disk is full or fails. Raises
    `StoreUnavailable` if another comfyd uses the directory, if the file is newer than this comfyd, damaged or
    not a database, and `InsufficientStorage`.
    """
    with exclusive(path.parent):
        async with (
            connected(path, lambda: open_writer(path, factory)) as writer,
            connected(path, lambda: open_reader(path)) as reader,
        ):
            store = SqliteStore(path, writer, reader)
            async with store._running():  # noqa: SLF001 # the store is made here and only here
                yield store
