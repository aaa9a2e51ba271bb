"""The store under test: every implementation through one parameter, opened in a directory of its own."""

import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from comfyd.store.base import Store
from comfyd.store.sqlite import SqliteStore, open_sqlite
from tests.store.samples import Opener

IMPLEMENTATIONS: dict[str, Callable[[Path], AbstractAsyncContextManager[Store]]] = {
    "sqlite": lambda directory: open_sqlite(directory / "comfyd.db"),
}


@pytest.fixture(params=list(IMPLEMENTATIONS))
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens the same store again and again."""
    implementation = IMPLEMENTATIONS[request.param]
    return lambda: implementation(tmp_path)


@pytest.fixture
async def store(opener: Opener) -> AsyncIterator[Store]:
    """An empty store."""
    async with opener() as opened:
        yield opened


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a database file may be made."""
    return tmp_path / "comfyd.db"


@pytest.fixture
async def sqlite(path: Path) -> AsyncIterator[SqliteStore]:
    """An empty store in SQLite, for what is promised by this one alone."""
    async with open_sqlite(path) as opened:
        yield opened


@pytest.fixture
def raw(sqlite: SqliteStore, path: Path) -> Iterator[sqlite3.Connection]:
    """A connection of somebody else, who knows the schema, to the file of `sqlite`."""
    assert sqlite.broken is None
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    yield connection
    connection.close()
