"""The store in one SQLite file: opening, one writing and one reading connection, errors; never a decision.

The statements are in `transitions.py` (writes) and `queries.py` (reads), the gathering of writes is in
`writer.py`; this module alone speaks to the driver. Writes go through one connection, each batch as one
transaction in one visit to that connection's thread. Reads go through another connection that cannot write,
one visit per verb; they see all that was committed before they began.
"""

import asyncio
import fcntl
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from importlib import resources
from pathlib import Path
from typing import Final, TypeVar

import aiosqlite
import msgspec

from comfyd.errors import ComfydError, InsufficientStorage, StoreError, StoreUnavailable
from comfyd.store import queries, transitions
from comfyd.store.rows import Database
from comfyd.store.writer import GroupCommit, Operation, Result
from comfyd.tasks import (
    Added,
    Attempt,
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

MIGRATIONS: Final = ("schema.sql", "schema_2.sql")
"""The file that leads from each schema version to the next; new ones go to the end, none is ever changed."""

CHECKED_BYTES: Final = 16 * 1024 * 1024
"""Up to this size a file is checked whole at the start; a large one would delay it by seconds."""

_PRAGMAS: Final = (
    "PRAGMA busy_timeout = 5000",
    "PRAGMA foreign_keys = ON",
    "PRAGMA temp_store = MEMORY",
    "PRAGMA mmap_size = 0",
    "PRAGMA trusted_schema = OFF",
)
_FULL: Final = frozenset({sqlite3.SQLITE_FULL})
_BUSY: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN})
_BROKEN: Final = frozenset(
    {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_READONLY}
)
_OF_THE_OPERATION: Final = (ComfydError, sqlite3.Error, ValueError, OverflowError, msgspec.MsgspecError)
"""What an operation may raise without harm to its batch: a refusal, a constraint, an unfit value."""


def _primary(error: BaseException) -> int | None:
    """SQLite's primary result code; None if the error is not SQLite's own."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _translated(error: BaseException) -> BaseException:
    """A driver's error in the words of `errors.py`; a bug, such as a broken constraint, stays as it is."""
    code = _primary(error)
    translated: StoreError
    if code in _FULL:
        translated = InsufficientStorage("the disk with the database is full")
    elif code in _BUSY:
        translated = StoreUnavailable(f"the database does not answer: {error}")
    elif code in _BROKEN:
        translated = StoreUnavailable(f"the database is broken: {error}")
    else:
        return error
    translated.__cause__ = error
    return translated


class _Connection(aiosqlite.Connection):
    """A connection with a thread of its own, in which whole functions are run.

    aiosqlite's public methods visit the thread once per statement. Its protected `_execute` runs any function
    there; a subclass may use it, and one visit then serves a whole transaction.
    """

    async def call(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run the function in the connection's thread; it runs to its end even if the caller is canceled.

        Pass a closure and not a `partial`: aiosqlite writes its repr, with all arguments, to the debug log.
        """
        result: T = await self._execute(function, self._conn)  # type: ignore[no-untyped-call] # not annotated there
        return result


class SqliteStore:
    """A `Store` in one SQLite file; made by `open_sqlite` and open as long as that is entered.

    A disk error or a damaged file breaks it for good: what SQLite has in memory then proves nothing about the
    disk. `broken` says why, and every later write is refused.
    """

    def __init__(self, writer: _Connection, reader: _Connection) -> None:
        self._writer = writer
        self._reader = reader
        self._commits = GroupCommit[Database](self._apply)
        self._counts: dict[Status, int] = {}
        self._breakage = asyncio.Event()
        self.broken: str | None = None
        """Why nothing is written any more; None while all is well."""

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
            raise StoreUnavailable(self.broken)
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
        before = queries.decode_cursor(cursor)
        return await self._read(lambda db: queries.list_tasks(db, wanted, before, limit))

    async def ready(self, now: int, limit: int) -> ReadyPage:
        """See `Store.ready`."""
        return await self._read(lambda db: queries.ready(db, now, limit))

    async def claim(self, task_id: str, attempt_id: str, now: int) -> Claim | None:
        """See `Store.claim`."""
        return await self._commits.submit(lambda db: transitions.claim(db, task_id, attempt_id, now))

    async def record(self, attempt: Attempt) -> None:
        """See `Store.record`."""
        await self._commits.submit(lambda db: transitions.record(db, attempt))

    async def settle(self, attempt_id: str, settlement: Settlement, now: int) -> Task:
        """See `Store.settle`."""
        return await self._commits.submit(lambda db: transitions.settle(db, attempt_id, settlement, now))

    async def cancel(self, task_id: str, now: int) -> Task | None:
        """See `Store.cancel`."""
        return await self._commits.submit(lambda db: transitions.cancel(db, task_id, now))

    async def retry(self, task_id: str, now: int) -> Task | None:
        """See `Store.retry`."""
        return await self._commits.submit(lambda db: transitions.retry(db, task_id, now))

    async def delete(self, task_id: str) -> Task | None:
        """See `Store.delete`."""
        return await self._commits.submit(lambda db: transitions.delete(db, task_id))

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
            return [Result(error=StoreUnavailable(self.broken)) for _ in operations]
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
        translated = _translated(error)
        if _primary(error) in _BROKEN and self.broken is None:
            self.broken = str(translated)
            self._breakage.set()
        return translated


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
        if _primary(exc) in _BROKEN or not connection.in_transaction:
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
    with _exclusive(path.parent):
        async with (
            _connected(path, lambda: _open_writer(path, factory)) as writer,
            _connected(path, lambda: _open_reader(path)) as reader,
        ):
            store = SqliteStore(writer, reader)
            async with store._running():  # noqa: SLF001 # the store is made here and only here
                yield store


@asynccontextmanager
async def _connected(path: Path, connector: Callable[[], sqlite3.Connection]) -> AsyncIterator[_Connection]:
    """A connection, closed at the end; an error of opening it in our words."""
    threads: list[threading.Thread] = []

    def connect() -> sqlite3.Connection:
        threads.append(threading.current_thread())
        try:
            return connector()
        except (sqlite3.Error, OSError) as exc:
            kind = InsufficientStorage if _primary(exc) in _FULL else StoreUnavailable
            raise kind(f"cannot open {path}: {exc}") from exc

    connection = _Connection(connect, iter_chunk_size=64)
    try:
        await connection
    except StoreError:
        # aiosqlite lets its thread end alone here; one that outlives the event loop ends with a traceback.
        threads[0].join()
        raise
    try:
        yield connection
    finally:
        await connection.close()


@contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """Keep every other process out of the directory. The lock goes with the process, however that ends."""
    try:
        descriptor = os.open(directory / "comfyd.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise StoreUnavailable(
            f"cannot write to the data directory {directory} ({exc.strerror}); set data.dir to one that works"
        ) from exc
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise StoreUnavailable(
                f"another comfyd is using the data directory {directory}; stop it, or set data.dir to another"
            ) from exc
        yield
    finally:
        os.close(descriptor)


def _open_writer(path: Path, factory: type[sqlite3.Connection]) -> sqlite3.Connection:
    """The connection that does every write and every checkpoint, with the schema as this comfyd has it."""
    path.touch(mode=0o600)  # SQLite gives its side files the mode of this one
    with ExitStack() as undo:
        connection = undo.enter_context(
            closing(sqlite3.connect(path, isolation_level=None, factory=factory, cached_statements=256))
        )
        for pragma in _PRAGMAS:
            connection.execute(pragma)
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreUnavailable(f"{path} cannot use a write-ahead log; set data.dir to a local disk")
        connection.execute("PRAGMA synchronous = FULL")
        if path.stat().st_size <= CHECKED_BYTES:
            _check(connection, path)
        _migrate(connection, path)
        undo.pop_all()
        return connection


def _open_reader(path: Path) -> sqlite3.Connection:
    """A connection that cannot write."""
    with ExitStack() as undo:
        uri = f"{path.resolve().as_uri()}?mode=ro"
        connection = undo.enter_context(
            closing(sqlite3.connect(uri, uri=True, isolation_level=None, cached_statements=256))
        )
        for pragma in (*_PRAGMAS, "PRAGMA query_only = ON"):
            connection.execute(pragma)
        undo.pop_all()
        return connection


def _check(connection: sqlite3.Connection, path: Path) -> None:
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise StoreUnavailable(
            f"{path} is damaged ({verdict}); put back a copy, or move it away to begin anew"
        )


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the schema forward, each version in one transaction of its own."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise StoreUnavailable(
            f"{path} has schema version {version} and this comfyd knows only {len(MIGRATIONS)}; "
            "use the newer comfyd that wrote it"
        )
    for reached, name in enumerate(MIGRATIONS[version:], version + 1):
        script = resources.files("comfyd.store").joinpath(name).read_text(encoding="utf-8")
        try:
            connection.executescript(f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version = {reached};\nCOMMIT;")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
