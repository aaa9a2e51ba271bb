"""No 2xx leaves before its fsync: every sync of the database goes through a gate that knows when it ended.

The kernel stops each sync of comfyd; the test looks at what the write-ahead log holds, waits a moment in
which an answer that did not wait would arrive, syncs in comfyd's place and only then lets it go on. So for
each accepted task it is known when the first sync that covers its row had ended. The long form
(`COMFYD_AUDIT=1000`) only asks for more of the same.
"""

import asyncio
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import aiohttp
import msgspec
import pytest

from tests.support.gate import Call, Gate, GatedComfyd
from tests.support.service import colored

ACCEPTS: Final = int(os.environ.get("COMFYD_AUDIT", "60"))
CLIENTS: Final = 8
HOLD_SECONDS: Final = 0.005
"""How long each sync is held up: ten times what an answer needs."""
NOBODY: Final = "http://127.0.0.1:9"
ID: Final = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class Synced(msgspec.Struct, frozen=True, kw_only=True):
    """A sync that has ended: when, and the ids that the log held for the first time when it began."""

    ended: float
    ids: frozenset[str]


class Auditor:
    """Stands at the gate and writes down what was on disk when. Lives as long as the test's block."""

    def __init__(self) -> None:
        self.trace: list[Synced] = []
        self._known: set[str] = set()

    def decide(self, call: Call) -> int | None:
        """Look, hold up, sync, note."""
        if not call.path.endswith("comfyd.db-wal"):
            return None
        ids = {found.decode() for found in ID.findall(Path(call.path).read_bytes())}
        time.sleep(HOLD_SECONDS)
        call.sync()
        self.trace.append(Synced(ended=time.monotonic(), ids=frozenset(ids - self._known)))
        self._known |= ids
        return 0


def too_early(answers: Mapping[str, float], trace: Sequence[Synced]) -> list[str]:
    """The tasks that were answered before a sync that covers their row had ended."""
    synced = {task_id: sync.ended for sync in trace for task_id in sync.ids}
    return [task_id for task_id, at in answers.items() if at < synced.get(task_id, float("inf"))]


@contextmanager
def audited() -> Iterator[tuple[Auditor, Gate]]:
    auditor = Auditor()
    with Gate(("fsync", "fdatasync"), auditor.decide) as gate:
        yield auditor, gate


async def accepts(url: str, count: int) -> dict[str, float]:
    """Submit so many tasks from several clients at once: each one's id, and when its answer was there."""
    answers: dict[str, float] = {}
    numbers = iter(range(count))

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            async with session.post(f"{url}/api/tasks", json={"workflow": colored(number)}) as answer:
                at = time.monotonic()
                assert answer.status == 202, await answer.text()
                answers[(await answer.json())["task_id"]] = at

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
    return answers


@pytest.mark.timeout(60 + ACCEPTS)
async def test_no_accept_is_answered_before_its_row_is_synced(tmp_path: Path) -> None:
    with audited() as (auditor, gate), GatedComfyd(gate, tmp_path, NOBODY) as comfyd:
        answers = await accepts(comfyd.url, ACCEPTS)
    assert len(answers) == ACCEPTS
    assert too_early(answers, auditor.trace) == []
    assert len(auditor.trace) >= ACCEPTS / CLIENTS  # a client waits for its answer: no sync serves more


ADDER = """
import asyncio, sqlite3, sys
from pathlib import Path
from comfyd.store.sqlite import open_sqlite
from tests.store.samples import NOW, new_task

class Writer(sqlite3.Connection):
    def execute(self, sql, parameters=()):
        return super().execute(sql.replace("synchronous = FULL", f"synchronous = {sys.argv[2]}"), parameters)

async def main():
    async with open_sqlite(Path(sys.argv[1]) / "comfyd.db", factory=Writer) as store:
        for _ in range(5):
            print((await store.add(new_task(), None, NOW)).task.id, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize(("synchronous", "early"), [("FULL", 0), ("NORMAL", 5), ("OFF", 5)])
def test_the_audit_finds_a_database_that_does_not_sync(tmp_path: Path, synchronous: str, early: int) -> None:
    (tmp_path / "adder.py").write_text(ADDER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    answers: dict[str, float] = {}
    with audited() as (auditor, gate):
        process = gate.popen(
            [str(tmp_path / "adder.py"), str(tmp_path), synchronous],
            stdout=subprocess.PIPE,
            env=environment,
        )
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                answers[line.decode().strip()] = time.monotonic()
        assert process.returncode == 0
    assert len(answers) == 5
    assert len(too_early(answers, auditor.trace)) == early


def test_the_audit_finds_an_answer_that_did_not_wait() -> None:
    trace = [Synced(ended=1.0, ids=frozenset({"a"})), Synced(ended=2.0, ids=frozenset({"b"}))]
    assert too_early({"a": 1.1, "b": 2.1}, trace) == []
    assert too_early({"a": 1.1, "b": 1.9}, trace) == ["b"]
    assert too_early({"a": 1.1, "c": 9.0}, trace) == ["c"]
