"""The execution log: what the simulated GPU really ran, as the oracle of tests.

Written at the start and at the end of every prompt, flushed each time, appended across restarts; it never
influences what the server does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

import msgspec
import orjson

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

Outcome = Literal["success", "error", "interrupted"]


class Execution(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the log: a prompt began, or ended. `at` is UTC milliseconds.

    `executed` are the nodes that ran to their end, `cached` the ones whose earlier result was used; both
    are filled only at the end, as is `outcome`.
    """

    event: Literal["start", "end"]
    prompt_id: str
    client_id: str | None
    number: float | None  # None: not finite, which JSON cannot say
    at: int
    executed: list[str] = []
    cached: list[str] = []
    outcome: Outcome | None = None


class ExecutionLog:
    """Executions in memory and, if given a path, as JSON lines. Lives through crash and restart."""

    def __init__(self, path: Path | None) -> None:
        self.entries: list[Execution] = []
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.entries.extend(read_log(path))
            torn = path.exists() and path.read_bytes()[-1:] not in {b"", b"\n"}
            self._file = path.open("ab", buffering=0)  # each line reaches the kernel: it survives kill -9
            if torn:
                self._file.write(b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, execution: Execution) -> None:
        """Record one line."""
        self.entries.append(execution)
        if self._file is not None:
            self._file.write(msgspec.json.encode(execution) + b"\n")

    def document(self) -> list[dict[str, Any]]:
        """All entries as JSON objects, oldest first."""
        documents: list[dict[str, Any]] = msgspec.to_builtins(self.entries)
        return documents


def read_log(path: Path) -> list[Execution]:
    """Entries of a log file, oldest first; [] when there is none. A line cut short by a crash is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_bytes().split(b"\n"):
        try:
            document = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        entries.append(msgspec.convert(document, Execution))
    return entries
