"""Sick disks for the tests of the store: files that are written over, connections that fail."""

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def damage(path: Path, content: bytes, places: Iterable[int]) -> None:
    """Write over the file at these offsets, as a sick disk would."""
    path.touch()
    size = path.stat().st_size
    with path.open("r+b") as file:
        for place in places:
            if place <= size:
                file.seek(place)
                file.write(content)


def failing(at: str, code: int, armed: list[bool]) -> type[sqlite3.Connection]:
    """A connection whose disk fails at one statement, once it is armed."""

    class Failing(sqlite3.Connection):
        def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
            if armed and at in sql:
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = code
                raise error
            return super().execute(sql, parameters)

    return Failing
