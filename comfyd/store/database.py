"""The SQLite file: its lock, opening, checks, migrations and errors; never a verb or a batch.

With `sqlite.py` this module alone speaks to the driver. One connection does every write and every checkpoint,
another one cannot write; each has a thread of its own.
"""

import fcntl
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from importlib import resources
from pathlib import Path
from typing import Final, TypeVar

import aiosqlite

from comfyd.errors import InsufficientStorage, StoreError, StoreUnavailable
from comfyd.tasks import Artefact, OutputType

T = TypeVar("T")

MIGRATIONS: Final = ("schema.sql", "schema_2.sql", "schema_3.sql", "schema_4.sql")
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
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
BROKEN: Final = _DAMAGED | {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY}
"""Result codes after which nothing that SQLite says of this file can be relied on."""


def primary_code(error: BaseException) -> int | None:
    """SQLite's primary result code; None if the error is not SQLite's own."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def translated(error: BaseException) -> BaseException:
    """A driver's error in the words of `errors.py`; a bug, such as a broken constraint, stays as it is."""
    code = primary_code(error)
    told: StoreError
    if code in _FULL:
        told = InsufficientStorage("the disk with the database is full")
    elif code in _BUSY:
        told = StoreUnavailable(f"the database does not answer: {error}")
    elif code in BROKEN:
        told = StoreUnavailable(f"the database is broken: {error}")
    else:
        return error
    told.__cause__ = error
    return told


def damage(path: Path, error: BaseException) -> str | None:
    """What to do about a file whose content is not what SQLite wrote; None for any other error."""
    return _damaged(path, error) if primary_code(error) in _DAMAGED else None


def _damaged(path: Path, reason: object) -> str:
    return (
        f"{path} is damaged ({' '.join(str(reason).split())}); put back a copy, or move it away to begin anew"
    )


class Connection(aiosqlite.Connection):
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


@asynccontextmanager
async def connected(path: Path, connector: Callable[[], sqlite3.Connection]) -> AsyncIterator[Connection]:
    """A connection, closed at the end; an error of opening it in our words."""
    threads: list[threading.Thread] = []

    def connect() -> sqlite3.Connection:
        threads.append(threading.current_thread())
        try:
            return connector()
        except (sqlite3.Error, OSError) as exc:
            kind = InsufficientStorage if primary_code(exc) in _FULL else StoreUnavailable
            raise kind(damage(path, exc) or f"cannot open {path}: {exc}") from exc

    connection = Connection(connect, iter_chunk_size=64)
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
def exclusive(directory: Path) -> Iterator[None]:
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


def open_writer(path: Path, factory: type[sqlite3.Connection]) -> sqlite3.Connection:
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
        connection.create_function("artefact_id", 1, _artefact_id, deterministic=True)
        _migrate(connection, path)
        undo.pop_all()
        return connection


def open_reader(path: Path) -> sqlite3.Connection:
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
        raise StoreUnavailable(_damaged(path, verdict))


def _artefact_id(key: str) -> str:
    """`Artefact.id` of the artefact with this key, for the migration of rows from before they had one."""
    return Artefact(
        node_id="", index=0, name="", type=OutputType.FILE, content_type="", size_bytes=0, sha256="", key=key
    ).id


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
