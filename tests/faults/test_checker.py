"""The checker counts what is wrong: a whole run is clean, each doctored one is found by its own counter."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from comfyd.simulator.executions import Execution
from comfyd.store.sqlite import open_sqlite
from tests.faults import checker
from tests.faults.checker import (
    COUNTERS,
    AttemptRow,
    DeliveryRow,
    Evidence,
    Rows,
    TaskRow,
    Verdict,
    check,
)
from tests.faults.load import Ask, ClientLog, Job, Result, Sighting, Submit, solid
from tests.faults.receiver import Received

T1, T2 = "task-1", "task-2"


def job(number: int) -> Job:
    return Job(
        number=number,
        key=f"key-{number}",
        graph=solid(number),
        colors={"9": number},
        hook="http://127.0.0.1/",
    )


def submit(number: int, **facts: object) -> Submit:
    told = Submit(number=number, key=f"key-{number}", sent=1, got=2, status=202, task_id=f"task-{number}")
    return msgspec.structs.replace(told, **facts)


def ran(prompt: str, begin: int, end: int | None, outcome: str = "success") -> list[Execution]:
    log = [Execution(event="start", prompt_id=prompt, client_id=None, number=1, at=begin)]
    if end is not None:
        ended = Execution(event="end", prompt_id=prompt, client_id=None, number=1, at=end)
        log.append(msgspec.structs.replace(ended, outcome=outcome))
    return log


def hook(number: int, **facts: object) -> Received:
    told = Received(
        id=f"hook-{number}",
        type="task.completed",
        task_id=f"task-{number}",
        verified=True,
        answered=200,
        at=9,
    )
    return msgspec.structs.replace(told, **facts)


def delivery(number: int, status: str = "delivered") -> DeliveryRow:
    return DeliveryRow(id=f"hook-{number}", task_id=f"task-{number}", type="task.completed", status=status)


def attempt(task: int, number: int = 1, **facts: object) -> AttemptRow:
    row = AttemptRow(
        id=f"prompt-{task}-{number}",
        task_id=f"task-{task}",
        number=number,
        claimed_at=100,
        executed_at=200,
        ended_at=300,
    )
    return msgspec.structs.replace(row, **facts)


def good() -> Evidence:
    """Two tasks, each asked for, run, read and announced once."""
    log = ClientLog()
    log.jobs = [job(1), job(2)]
    log.submits = [submit(1, status=None, task_id=None), submit(1, sent=3, got=4), submit(2)]
    for number in (1, 2):
        task = f"task-{number}"
        for at, word in ((2, "PENDING"), (4, "PROCESSING"), (6, "COMPLETED")):
            log.sightings.append(Sighting(task_id=task, sent=at, got=at + 1, word=word))
        log.results.append(
            Result(
                task_id=task,
                node_id="9",
                told_sha256="a",
                told_bytes=1,
                sha256="a",
                bytes=1,
                color=number,
            )
        )
    tasks = {f"task-{n}": TaskRow(id=f"task-{n}", status="succeeded", key=f"key-{n}") for n in (1, 2)}
    rows = Rows(tasks=tasks, attempts=(attempt(1), attempt(2)), deliveries=(delivery(1), delivery(2)))
    executions = ran("prompt-1-1", 110, 190) + ran("prompt-2-1", 120, 190)
    return Evidence(log=log, executions=executions, rows=rows, received=[hook(1), hook(2)])


def with_rows(evidence: Evidence, **changes: object) -> Evidence:
    return msgspec.structs.replace(evidence, rows=msgspec.structs.replace(evidence.rows, **changes))


def with_task(evidence: Evidence, **changes: object) -> Evidence:
    changed = msgspec.structs.replace(evidence.rows.tasks[T1], **changes)
    return with_rows(evidence, tasks={**evidence.rows.tasks, T1: changed})


def again(evidence: Evidence, first: list[Execution], **facts: object) -> Evidence:
    """The first task has a second attempt that ran; what its first one did is told."""
    attempts = (attempt(1, 1, **facts), attempt(1, 2), attempt(2))
    executions = first + ran("prompt-1-2", 400, 500) + ran("prompt-2-1", 120, 190)
    return with_rows(msgspec.structs.replace(evidence, executions=executions), attempts=attempts)


def asked(evidence: Evidence, verb: str, **facts: object) -> Evidence:
    ask = Ask(verb="cancel", task_id=T1, sent=7.5, got=8.5, status=200)
    evidence.log.asks.append(msgspec.structs.replace(ask, verb=verb, **facts))
    return evidence


def counts(verdict: Verdict) -> dict[str, int]:
    return {name: len(sentences) for name, sentences in verdict.found.items() if sentences}


def test_a_whole_run_is_clean() -> None:
    verdict = check(good())
    assert verdict.clean, str(verdict)
    assert verdict.tasks == 2
    assert tuple(verdict.found)[:6] == COUNTERS


# one doctored log for each sentence that the checker knows


def gone(e: Evidence) -> Evidence:
    return with_rows(e, tasks={T2: e.rows.tasks[T2]})


def missed(e: Evidence) -> Evidence:
    e.log.sightings.insert(2, Sighting(task_id=T1, sent=5, got=5.5, word="MISSING"))
    return e


def unended(e: Evidence) -> Evidence:
    return with_task(e, status="running")


def canceled_by_nobody(e: Evidence) -> Evidence:
    changed = with_task(e, status="canceled")
    return msgspec.structs.replace(changed, received=[hook(1, type="task.canceled"), hook(2)])


def failed(e: Evidence) -> Evidence:
    changed = with_task(e, status="failed", error="internal_error")
    return msgspec.structs.replace(changed, received=[hook(1, type="task.failed"), hook(2)])


def blamed(e: Evidence) -> Evidence:
    return msgspec.structs.replace(
        failed(with_task(e)), rows=with_task(e, status="failed", error="backend_crashed").rows
    )


def twice_the_same(e: Evidence) -> Evidence:
    return msgspec.structs.replace(e, executions=[*e.executions, *ran("prompt-1-1", 210, 220)])


def unknown_prompt(e: Evidence) -> Evidence:
    return msgspec.structs.replace(e, executions=[*e.executions, *ran("prompt-of-nobody", 210, 220)])


def second_run(e: Evidence) -> Evidence:
    return again(e, ran("prompt-1-1", 110, 190))


def second_run_before_the_crash(e: Evidence) -> Evidence:
    changed = again(e, ran("prompt-1-1", 110, 190), executed_at=None)
    return msgspec.structs.replace(changed, deaths=[105])


def second_run_of_what_was_known(e: Evidence) -> Evidence:
    """ComfyUI died, but comfyd had the verdict on disk."""
    return msgspec.structs.replace(again(e, ran("prompt-1-1", 110, 190)), deaths=[250])


def never_told(e: Evidence) -> Evidence:
    return msgspec.structs.replace(e, received=[hook(2)])


def refused(e: Evidence) -> Evidence:
    return msgspec.structs.replace(e, received=[hook(1, answered=500), hook(2)])


def two_ids(e: Evidence) -> Evidence:
    rows = with_rows(e, deliveries=(*e.rows.deliveries, delivery(3)))
    return msgspec.structs.replace(rows, received=[*e.received, hook(1, id="hook-3")])


def badly_signed(e: Evidence) -> Evidence:
    return msgspec.structs.replace(e, received=[*e.received, hook(1, verified=False)])


def unowed(e: Evidence) -> Evidence:
    return with_rows(e, deliveries=(delivery(2),))


def output_never_told(e: Evidence) -> Evidence:
    output = msgspec.structs.replace(delivery(1), id="hook-4", type="task.output")
    return with_rows(e, deliveries=(*e.rows.deliveries, output))


def pending(e: Evidence) -> Evidence:
    return with_rows(e, deliveries=(delivery(1, "pending"), delivery(2)))


def back_to_work(e: Evidence) -> Evidence:
    e.log.sightings.append(Sighting(task_id=T1, sent=8, got=9, word="PROCESSING"))
    return e


def another_end(e: Evidence) -> Evidence:
    e.log.sightings.append(Sighting(task_id=T1, sent=8, got=9, word="CANCELED"))
    return e


def of_another(e: Evidence) -> Evidence:
    e.log.results[0] = msgspec.structs.replace(e.log.results[0], color=2)
    return e


def short(e: Evidence) -> Evidence:
    e.log.results[0] = msgspec.structs.replace(e.log.results[0], bytes=0)
    return e


def without_result(e: Evidence) -> Evidence:
    del e.log.results[0]
    return e


def told_two(e: Evidence) -> Evidence:
    e.log.submits.append(submit(1, task_id=T2))
    return e


def hidden_twin(e: Evidence) -> Evidence:
    twin = TaskRow(id="task-3", status="succeeded", key="key-1")
    return with_rows(e, tasks={**e.rows.tasks, "task-3": twin})


def charged(e: Evidence) -> Evidence:
    innocent = attempt(1, 1, id="prompt-1-0", outcome="suspect")
    return with_rows(e, attempts=(innocent, attempt(1, 2, id="prompt-1-1"), attempt(2)))


def torn(e: Evidence) -> Evidence:
    return with_rows(e, broken=("integrity_check: row 1 missing from index",))


@pytest.mark.parametrize(
    ("doctored", "counter"),
    [
        (gone, "lost"),
        (unended, "lost"),
        (canceled_by_nobody, "lost"),
        (failed, "lost"),
        (blamed, "lost"),
        (twice_the_same, "dup"),
        (unknown_prompt, "dup"),
        (second_run, "dup"),
        (second_run_before_the_crash, "dup"),
        (second_run_of_what_was_known, "dup"),
        (never_told, "undelivered"),
        (refused, "undelivered"),
        (two_ids, "undelivered"),
        (badly_signed, "undelivered"),
        (unowed, "undelivered"),
        (pending, "undelivered"),
        (output_never_told, "undelivered"),
        (back_to_work, "regress"),
        (another_end, "regress"),
        (of_another, "phantom"),
        (short, "phantom"),
        (without_result, "phantom"),
        (hidden_twin, "idem_split"),
        (charged, "other"),
        (torn, "other"),
    ],
)
def test_a_doctored_run_is_found_by_its_counter_alone(
    doctored: Callable[[Evidence], Evidence], counter: str
) -> None:
    assert counts(check(doctored(good()))) == {counter: 1}


@pytest.mark.parametrize(("doctored", "counter"), [(missed, "lost"), (told_two, "idem_split")])
def test_what_breaks_more_than_one_promise_is_found_by_its_counter_too(
    doctored: Callable[[Evidence], Evidence], counter: str
) -> None:
    assert counter in counts(check(doctored(good())))


# what the promises allow


def died_running(e: Evidence) -> Evidence:
    crashed = again(e, ran("prompt-1-1", 110, None), executed_at=None, outcome="suspect")
    return msgspec.structs.replace(crashed, deaths=[150])


def history_lost(e: Evidence) -> Evidence:
    crashed = again(e, ran("prompt-1-1", 110, 190), executed_at=None, outcome="suspect")
    return msgspec.structs.replace(crashed, deaths=[195])


def evicted(e: Evidence) -> Evidence:
    return msgspec.structs.replace(again(e, ran("prompt-1-1", 110, 190), executed_at=None), evicted=True)


def failed_once(e: Evidence) -> Evidence:
    return again(e, ran("prompt-1-1", 110, 190, "error"), outcome="failed")


@pytest.mark.parametrize("allowed", [died_running, history_lost, evicted, failed_once])
def test_a_second_run_that_is_allowed_is_counted_and_no_fault(
    allowed: Callable[[Evidence], Evidence],
) -> None:
    verdict = check(allowed(good()))
    assert verdict.clean, str(verdict)
    assert verdict.second_runs == 1


def test_a_retry_that_a_client_asked_for_is_no_fault() -> None:
    evidence = asked(again(good(), ran("prompt-1-1", 110, 190)), "retry", status=202)
    evidence.log.sightings += [
        Sighting(task_id=T1, sent=8, got=9, word="PENDING"),
        Sighting(task_id=T1, sent=10, got=11, word="COMPLETED"),
    ]
    evidence = with_rows(evidence, deliveries=(*evidence.rows.deliveries, delivery(3)))
    evidence = msgspec.structs.replace(evidence, received=[*evidence.received, hook(1, id="hook-3")])
    verdict = check(evidence)
    assert verdict.clean, str(verdict)
    assert verdict.second_runs == 0


def test_what_a_client_canceled_or_deleted_is_not_lost() -> None:
    assert check(asked(canceled_by_nobody(good()), "cancel")).clean
    deleted = asked(gone(good()), "delete", status=204)
    deleted.log.prompts[T1] = {"prompt-1-1"}
    deleted.log.sightings.append(Sighting(task_id=T1, sent=9, got=10, word="MISSING"))
    deleted = with_rows(deleted, attempts=(attempt(2),), deliveries=(delivery(2),))
    assert check(deleted).clean


def test_a_poison_task_that_failed_after_three_crashes_is_not_lost() -> None:
    evidence = msgspec.structs.replace(failed(good()), deaths=[150, 250, 350])
    crashed = [attempt(1, n, outcome="suspect", executed_at=None) for n in (1, 2, 3)]
    starts = [each for n in (1, 2, 3) for each in ran(f"prompt-1-{n}", 100 * n, None)]
    evidence = msgspec.structs.replace(evidence, executions=starts + ran("prompt-2-1", 120, 190))
    evidence = with_rows(
        with_task(evidence, status="failed", error="backend_crashed"), attempts=(*crashed, attempt(2))
    )
    verdict = check(evidence)
    assert verdict.clean, str(verdict)
    assert verdict.second_runs == 2


def test_a_verdict_prints_as_a_table() -> None:
    lines = str(check(hidden_twin(good()))).splitlines()
    assert lines[0].split() == [*COUNTERS, "other"]
    assert lines[1].split() == ["0", "0", "0", "0", "0", "1", "0"]
    assert lines[2] == "idem_split: key key-1 made task-1, task-3"


# the database


async def test_a_fresh_database_breaks_no_invariant(tmp_path: Path) -> None:
    async with open_sqlite(tmp_path / "comfyd.db"):
        pass
    assert checker.read_rows(tmp_path / "comfyd.db") == Rows()


TASK = (
    "INSERT INTO tasks (number, id, seq, status, priority, shape, nodes_total, policy, output, created_at,"
    " available_at, started_at, completed_at, attempt_count, webhook) "
    "SELECT 1, 'task-1', 1, '{}', 0, 's', 1, '{{}}', '{{}}', 1, 1, 1, {}, 1, NULL;"
)
ATTEMPT = "INSERT INTO attempts (id, task, number, step, claimed_at) VALUES ('{0}', 1, {0}, 'claimed', 1);"
ARTEFACT = (
    'INSERT INTO artefacts (task, position, node_id, "index", name, type, content_type, size_bytes, sha256,'
    " key, storage) VALUES (1, 0, '9', 0, 'n', 'image', 'image/png', 1, hex(zeroblob(32)), 'k', 'local');"
)
SEQUENCE = "UPDATE sequence SET last = 9;"


@pytest.mark.parametrize(
    ("broken_by", "sentence"),
    [
        (SEQUENCE + TASK.format("running", "NULL"), "a running task has no live attempt"),
        (
            SEQUENCE + TASK.format("succeeded", "1") + ATTEMPT.format(1),
            "a task that does not run has a live attempt",
        ),
        (
            SEQUENCE + TASK.format("running", "NULL") + ATTEMPT.format(1) + ATTEMPT.format(2),
            "a task has two live attempts",
        ),
        (
            SEQUENCE + TASK.format("running", "NULL") + ATTEMPT.format(2),
            "attempts are not numbered one by one",
        ),
        (
            SEQUENCE + TASK.format("canceled", "1") + ARTEFACT,
            "a task that did not succeed has results",
        ),
        (TASK.format("canceled", "1"), "the sequence is behind"),
        ("UPDATE status_counts SET tasks = 7 WHERE status = 'queued'", "the counts of statuses are wrong"),
        ("PRAGMA foreign_keys = OFF; INSERT INTO metadata VALUES (9, 'k', 'v')", "foreign_key_check"),
    ],
)
async def test_a_broken_database_is_told(tmp_path: Path, broken_by: str, sentence: str) -> None:
    path = tmp_path / "comfyd.db"
    async with open_sqlite(path):
        pass
    connection = sqlite3.connect(path)
    named = "SELECT type, name FROM sqlite_master WHERE type = 'trigger' AND name NOT LIKE 'tasks_counted%'"
    guards = [*connection.execute(named), ("index", "attempts_live")]
    connection.executescript("".join(f"DROP {kind} {name};" for kind, name in guards) + broken_by)
    connection.close()
    (said,) = checker.read_rows(path).broken
    assert said.startswith(sentence)
