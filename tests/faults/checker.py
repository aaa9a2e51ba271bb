"""What a run must not have done, counted from four logs that know nothing of each other; never asks comfyd.

    client log       what clients sent, were answered and shown
    execution log    what the simulated GPU ran
    receiver's log   which webhooks came
    database         tasks, attempts, deliveries, read when comfyd is dead

Each counter is a list of sentences; a run is good when all are empty.
"""

import contextlib
import math
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from comfyd.simulator.executions import Execution
from tests.faults.load import ACCEPTED, MISSING, TERMINAL, ClientLog, Job
from tests.faults.receiver import Received

COUNTERS: Final = ("lost", "dup", "undelivered", "regress", "phantom", "idem_split")
TERMINAL_TYPES: Final = {
    "succeeded": "task.completed",
    "failed": "task.failed",
    "canceled": "task.canceled",
}
FREE_SUSPECTS: Final = 2


class TaskRow(msgspec.Struct, frozen=True, kw_only=True):
    """Of the table `tasks`. `key` is the idempotency key that the client put into the metadata."""

    id: str
    status: str
    error: str | None = None
    key: str | None = None


class AttemptRow(msgspec.Struct, frozen=True, kw_only=True):
    """Of the table `attempts`."""

    id: str
    task_id: str
    number: int
    step: str = "settled"
    outcome: str | None = "succeeded"
    claimed_at: int = 0
    executed_at: int | None = None
    """When comfyd had learned that ComfyUI had finished it."""
    ended_at: int | None = None


class DeliveryRow(msgspec.Struct, frozen=True, kw_only=True):
    """Of the table `deliveries`. `id` is the `webhook-id`."""

    id: str
    task_id: str
    type: str
    status: str


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """What a database holds; `broken` is what is wrong with it as a database."""

    tasks: dict[str, TaskRow] = {}
    attempts: tuple[AttemptRow, ...] = ()
    deliveries: tuple[DeliveryRow, ...] = ()
    broken: tuple[str, ...] = ()


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of a run. `deaths` are the moments at which ComfyUI was killed, UTC milliseconds."""

    log: ClientLog
    executions: Sequence[Execution]
    rows: Rows
    received: Sequence[Received] = ()
    deaths: Sequence[int] = ()
    evicted: bool = False
    """ComfyUI was made to forget its history."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. `second_runs` are GPU runs that the promises allow."""

    found: dict[str, list[str]]
    second_runs: int
    tasks: int

    @property
    def clean(self) -> bool:
        """Nothing at all."""
        return not any(self.found.values())

    def __str__(self) -> str:
        """A table of the counters, and what was counted below it."""
        names = tuple(self.found)
        head = "  ".join(names)
        counts = "  ".join(f"{len(self.found[name]):>{len(name)}}" for name in names)
        lines = [f"{name}: {sentence}" for name in names for sentence in self.found[name]]
        return "\n".join([head, counts, *lines])


def check(evidence: Evidence) -> Verdict:
    """Count."""
    excuses = _Excuses(evidence)
    found = {
        "lost": list(_lost(evidence, excuses)),
        "dup": list(_dup(evidence, excuses)),
        "undelivered": list(_undelivered(evidence)),
        "regress": list(_regress(evidence.log)),
        "phantom": list(_phantom(evidence)),
        "idem_split": list(_idem_split(evidence)),
        "other": [*evidence.rows.broken, *_charged(evidence, excuses)],
    }
    return Verdict(found=found, second_runs=excuses.used, tasks=len(_accepted(evidence.log)))


def _accepted(log: ClientLog) -> dict[str, Job]:
    """Task -> job, of every submit that was answered with 2xx."""
    jobs = {job.number: job for job in log.jobs}
    return {s.task_id: jobs[s.number] for s in log.submits if s.task_id is not None and s.status in ACCEPTED}


def _asked(log: ClientLog, verb: str) -> set[str]:
    """Tasks of which a client asked this, whatever the answer."""
    return {ask.task_id for ask in log.asks if ask.verb == verb}


class _Excuses:
    """Why a prompt may have to be run again. Lives as long as one check; `used` counts them."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self.starts: dict[str, list[Execution]] = defaultdict(list)
        self.ends: dict[str, Execution] = {}
        for each in evidence.executions:
            if each.event == "start":
                self.starts[each.prompt_id].append(each)
            else:
                self.ends[each.prompt_id] = each
        self.used = 0

    def died_running(self, prompt_id: str) -> bool:
        """It began, never ended, and ComfyUI was killed after it had begun."""
        began = self.starts.get(prompt_id, [])
        return prompt_id not in self.ends and any(self._death_after(each.at) for each in began)

    def excused(self, attempt: AttemptRow) -> bool:
        """Whether what this attempt ran may be run once more."""
        if self.died_running(attempt.id):
            return True
        end = self.ends.get(attempt.id)
        if end is None:
            return False
        if end.outcome == "error":  # an ordinary failure, tried again
            return attempt.outcome == "failed"
        forgotten = self._death_after(end.at, attempt.ended_at) or self._evidence.evicted
        return attempt.executed_at is None and forgotten

    def _death_after(self, moment: int, until: int | None = None) -> bool:
        last = math.inf if until is None else until
        return any(moment <= death <= last for death in self._evidence.deaths)


def _lost(evidence: Evidence, excuses: _Excuses) -> Iterator[str]:
    """Acknowledged, and not there, not ended, or ended as nobody asked for."""
    log, rows = evidence.log, evidence.rows
    canceled, deleted = _asked(log, "cancel"), _asked(log, "delete")
    missed = {sighting.task_id for sighting in log.sightings if sighting.word == MISSING}
    for task_id in _accepted(log):
        task = rows.tasks.get(task_id)
        if task is None or task_id in missed:
            if task_id not in deleted:
                yield f"{task_id} was accepted and is not there"
        elif task.status not in TERMINAL_TYPES:
            yield f"{task_id} is still {task.status}"
        elif task.status == "canceled" and task_id not in canceled:
            yield f"{task_id} was canceled by nobody"
        elif task.status == "failed":
            died = sum(excuses.died_running(each.id) for each in rows.attempts if each.task_id == task_id)
            if task.error != "backend_crashed" or died <= FREE_SUSPECTS:
                yield f"{task_id} failed with {task.error} after {died} crashes of ComfyUI"


def _dup(evidence: Evidence, excuses: _Excuses) -> Iterator[str]:
    """GPU runs beyond one for each time that a client wanted the task run, and the excused ones."""
    known = {attempt.id for attempt in evidence.rows.attempts}
    for prompts in evidence.log.prompts.values():  # those of deleted tasks
        known |= prompts
    for prompt_id, runs in excuses.starts.items():
        if prompt_id not in known:
            yield f"prompt {prompt_id} ran, and no attempt shows it"
        if len(runs) > 1:
            yield f"prompt {prompt_id} ran {len(runs)} times"
    wanted = Counter(
        ask.task_id for ask in evidence.log.asks if ask.verb == "retry" and ask.status in {None, 202}
    )
    by_task: dict[str, list[AttemptRow]] = defaultdict(list)
    for attempt in sorted(evidence.rows.attempts, key=lambda attempt: attempt.number):
        if attempt.id in excuses.starts:
            by_task[attempt.task_id].append(attempt)
    for task_id, ran in by_task.items():
        excused = sum(excuses.excused(attempt) for attempt in ran[:-1])
        excuses.used += excused
        beyond = len(ran) - 1 - excused - wanted[task_id]
        if beyond > 0:
            told = ", ".join(f"{each.number} {each.outcome} at {each.step}" for each in ran)
            yield f"{task_id} ran {beyond} times too often: {told}"


def _charged(evidence: Evidence, excuses: _Excuses) -> Iterator[str]:
    """Attempts that are held against a task although ComfyUI did not die while it ran them."""
    for attempt in evidence.rows.attempts:
        ended_unheard = evidence.evicted or attempt.id in excuses.ends
        if attempt.outcome == "suspect" and not excuses.died_running(attempt.id) and not ended_unheard:
            yield f"attempt {attempt.number} of {attempt.task_id} is a suspect, but ComfyUI did not die of it"


def _undelivered(evidence: Evidence) -> Iterator[str]:
    """Terminal events that are owed to a webhook and did not come, came under two ids or badly signed."""
    log = evidence.log
    came: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for each in evidence.received:
        if not each.verified or not each.id:
            yield f"{each.type} of {each.task_id} was badly signed"
        elif each.answered == 200:
            came[each.task_id][each.type].add(each.id)
    owed = {row.id: row for row in evidence.rows.deliveries}
    rounds = Counter(ask.task_id for ask in log.asks if ask.verb == "retry" and ask.status in {None, 202})
    deleted = _asked(log, "delete")
    for task_id in _accepted(log):
        task = evidence.rows.tasks.get(task_id)
        if task is None or task_id in deleted or task.status not in TERMINAL_TYPES:
            continue
        if not came[task_id][TERMINAL_TYPES[task.status]]:
            yield f"{TERMINAL_TYPES[task.status]} of {task_id} did not come"
        ids = {id_ for type_ in TERMINAL_TYPES.values() for id_ in came[task_id][type_]}
        if len(ids) > 1 + rounds[task_id]:
            yield f"{task_id} ended under {len(ids)} webhook ids"
        for id_ in ids - owed.keys():
            yield f"{id_} of {task_id} came, and no delivery shows it"
    for row in owed.values():
        if row.status != "delivered":
            yield f"{row.type} of {row.task_id} is {row.status}"
        elif row.id not in came[row.task_id][row.type] and row.type not in TERMINAL_TYPES.values():
            yield f"{row.type} of {row.task_id} did not come"


def _regress(log: ClientLog) -> Iterator[str]:
    """Seen to have ended, and later seen otherwise, without a retry or a delete in between."""
    ended: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for sighting in sorted(log.sightings, key=lambda sighting: sighting.got):
        for word, since in ended[sighting.task_id]:
            if sighting.sent > since and sighting.word != word:
                verbs = {"delete"} if sighting.word == MISSING else {"retry"}
                between = any(
                    ask.task_id == sighting.task_id
                    and ask.verb in verbs
                    and ask.sent < sighting.got
                    and (ask.status is None or ask.got > since)
                    for ask in log.asks
                )
                if not between:
                    yield f"{sighting.task_id} was {word} and then {sighting.word}"
        if sighting.word in TERMINAL:
            ended[sighting.task_id].append((sighting.word, sighting.got))


def _phantom(evidence: Evidence) -> Iterator[str]:
    """Results that are not the task's own, or not whole."""
    log = evidence.log
    jobs, deleted = _accepted(log), _asked(log, "delete")
    read: dict[str, dict[str, int | None]] = defaultdict(dict)
    for result in log.results:
        if (result.sha256, result.bytes) != (result.told_sha256, result.told_bytes):
            yield f"node {result.node_id} of {result.task_id} is not what the task says of it"
        if result.node_id in read[result.task_id]:
            yield f"node {result.node_id} of {result.task_id} has two results"
        read[result.task_id][result.node_id] = result.color
    for task_id, task in evidence.rows.tasks.items():
        if task.status != "succeeded" or task_id in deleted or task_id not in jobs:
            continue
        if read[task_id] != jobs[task_id].colors:
            yield f"{task_id} has {_shown(read[task_id])} where {_shown(jobs[task_id].colors)} is its own"


def _shown(colors: Mapping[str, int | None]) -> str:
    return (
        ", ".join(
            f"{node}: {color:#08x}" if color is not None else f"{node}: ?" for node, color in colors.items()
        )
        or "nothing"
    )


def _idem_split(evidence: Evidence) -> Iterator[str]:
    """One key, two tasks: as clients were told, or in the database where nobody was told."""
    made: dict[str, set[str]] = defaultdict(set)
    for submit in evidence.log.submits:
        if submit.task_id is not None:
            made[submit.key].add(submit.task_id)
    for task in evidence.rows.tasks.values():
        if task.key is not None:
            made[task.key].add(task.id)
    for key, tasks in made.items():
        if len(tasks) > 1:
            yield f"key {key} made {', '.join(sorted(tasks))}"


# --- the database -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The database, to read only."""
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=10)
    try:
        yield connection
    finally:
        connection.close()


def read_rows(path: Path) -> Rows:
    """Everything the checker wants of a database that nobody writes to."""
    with opened(path) as connection:
        connection.row_factory = sqlite3.Row
        tasks = connection.execute(
            "SELECT t.id, t.status, json_extract(t.error, '$.code') AS error,"
            " (SELECT value FROM metadata m WHERE m.task = t.number AND m.key = 'key') AS key FROM tasks t"
        )
        attempts = connection.execute(
            "SELECT a.id, t.id AS task_id, a.number, a.step, a.outcome, a.claimed_at, a.executed_at,"
            " a.ended_at FROM attempts a JOIN tasks t ON t.number = a.task"
        )
        return Rows(
            tasks={row["id"]: TaskRow(**dict(row)) for row in tasks},
            attempts=tuple(AttemptRow(**dict(row)) for row in attempts),
            deliveries=tuple(_deliveries(connection)),
            broken=tuple(broken(connection)),
        )


def _deliveries(connection: sqlite3.Connection) -> Iterator[DeliveryRow]:
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'deliveries'").fetchone():
        return
    asked = (
        "SELECT d.id, t.id AS task_id, d.type, d.status FROM deliveries d JOIN tasks t ON t.number = d.task"
    )
    for row in connection.execute(asked):
        yield DeliveryRow(**dict(row))


INVARIANTS: Final = {
    "a task has two live attempts": (
        "SELECT task FROM attempts WHERE ended_at IS NULL GROUP BY task HAVING count(*) > 1"
    ),
    "a running task has no live attempt": (
        "SELECT t.id FROM tasks t WHERE t.status = 'running'"
        " AND NOT EXISTS (SELECT 1 FROM attempts a WHERE a.task = t.number AND a.ended_at IS NULL)"
    ),
    "a task that does not run has a live attempt": (
        "SELECT t.id FROM tasks t WHERE t.status <> 'running'"
        " AND EXISTS (SELECT 1 FROM attempts a WHERE a.task = t.number AND a.ended_at IS NULL)"
    ),
    "the counts of statuses are wrong": (
        "SELECT status FROM status_counts s"
        " WHERE tasks <> (SELECT count(*) FROM tasks t WHERE t.status = s.status)"
    ),
    "the sequence is behind": "SELECT last FROM sequence WHERE last < (SELECT max(seq) FROM tasks)",
    "a task that did not succeed has results": (
        "SELECT t.id FROM tasks t WHERE t.status <> 'succeeded'"
        " AND EXISTS (SELECT 1 FROM artefacts a WHERE a.task = t.number)"
    ),
    "attempts are not numbered one by one": (
        "SELECT task FROM attempts GROUP BY task HAVING count(*) <> max(number)"
    ),
}


def broken(connection: sqlite3.Connection) -> Iterator[str]:
    """What is wrong with a database: SQLite's own checks, and the invariants of the task machine."""
    for (said,) in connection.execute("PRAGMA integrity_check"):
        if said != "ok":
            yield f"integrity_check: {said}"
    for row in connection.execute("PRAGMA foreign_key_check"):
        yield f"foreign_key_check: {tuple(row)}"
    for sentence, query in INVARIANTS.items():
        if (row := connection.execute(query).fetchone()) is not None:
            yield f"{sentence}: {row[0]}"
