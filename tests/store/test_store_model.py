"""Any sequence of verbs, held against a plain model of the store in memory."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from comfyd.deliveries import DeliveryFilter, DeliveryStatus
from comfyd.errors import Conflict, StaleClaim
from comfyd.store.base import Store
from comfyd.store.sqlite import open_sqlite
from comfyd.tasks import (
    Attempt,
    Claim,
    EventType,
    IdempotencyKey,
    Settlement,
    Status,
    Task,
    TaskFilter,
    Webhook,
)
from tests.store.samples import HOOK, again, artefact, failed, made, new_id, new_task, submitting, succeeded

T = TypeVar("T")

HOOKS = st.sampled_from(
    [None, HOOK, Webhook(url="http://a.example/"), Webhook(url="http://b.example/", events=())]
)
PRIORITIES = st.sampled_from([-1, 0, 5])
PAUSES = st.sampled_from([0, 1, 50])
KEYS = st.sampled_from([None, None, "k1", "k2"])


@dataclass
class Row:
    """What the model knows of a task."""

    id: str
    created: int
    seq: int
    priority: int
    available_at: int
    status: Status = Status.QUEUED
    cancel_requested: bool = False
    attempts: list[str] = field(default_factory=list)
    key: str | None = None
    webhook: Webhook | None = None
    started: bool = False


@dataclass
class Owed:
    """What the model knows of a delivery."""

    id: str
    task: str
    next_at: int | None
    status: DeliveryStatus = DeliveryStatus.PENDING
    round: int = 0
    tries: int = 0


class StoreMachine(RuleBasedStateMachine):
    """The store and the model take the same verbs and have to agree after each."""

    implementation: Callable[[Path], AbstractAsyncContextManager[Store]]
    ids = Bundle("ids")
    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.opened = AsyncExitStack()
        self.now = 1000
        self.places = 0
        self.rows: dict[str, Row] = {}
        self.owed: dict[str, Owed] = {}
        self.open()

    def run(self, verb: Awaitable[T]) -> T:
        async def wait() -> T:
            return await asyncio.wait_for(verb, 20)

        return self.runner.run(wait())

    def open(self) -> None:
        opening = type(self).implementation(Path(self.directory.name))
        self.store = self.run(self.opened.enter_async_context(opening))

    def teardown(self) -> None:
        self.run(self.opened.aclose())
        self.runner.close()
        self.directory.cleanup()

    @rule()
    def close_and_open_again(self) -> None:
        self.run(self.opened.aclose())
        self.open()

    @rule(pause=PAUSES)
    def time_passes(self, pause: int) -> None:
        self.now += pause

    @rule(target=ids, priority=PRIORITIES, key=KEYS, webhook=HOOKS)
    def add(self, priority: int, key: str | None, webhook: Webhook | None) -> str:
        word = None if key is None else IdempotencyKey(key=key, body_sha256="d")
        answer = self.run(self.store.add(new_task(priority=priority, webhook=webhook), word, self.now))
        known = [row for row in self.rows.values() if key is not None and row.key == key]
        assert answer.replayed == bool(known)
        task = answer.task
        if known:
            assert task.id == known[0].id
        else:
            assert task.seq > self.places
            self.places = task.seq
            self.rows[task.id] = Row(
                task.id, task.seq, task.seq, priority, self.now, key=key, webhook=webhook
            )
        return task.id

    @rule(target=claims, task_id=ids)
    def claim(self, task_id: str) -> object:
        row = self.rows.get(task_id)
        taken = self.run(self.store.claim(task_id, new_id(), self.now))
        free = row is not None and row.status is Status.QUEUED and row.available_at <= self.now
        assert (taken is not None) == free
        if taken is None or row is None:
            return multiple()
        row.status = Status.RUNNING
        row.attempts.append(taken.attempt.id)
        if not row.started:
            self.owe(row, "started")
        row.started = True
        assert taken.attempt.number == len(row.attempts)
        return taken

    def live(self, claim: Claim) -> Row | None:
        row = self.rows.get(claim.task.id)
        held = row is not None and row.status is Status.RUNNING and row.attempts[-1] == claim.attempt.id
        return row if held else None

    @rule(claim=claims)
    def record(self, claim: Claim) -> None:
        attempt = submitting(claim.attempt)
        if self.live(claim) is None:
            self.refused(StaleClaim, self.store.record(attempt))
        else:
            self.run(self.store.record(attempt))

    @rule(
        claim=consumes(claims) | claims,
        pause=PAUSES,
        kind=st.sampled_from(["succeeded", "failed", "again", "again"]),
    )
    def settle(self, claim: Claim, pause: int, kind: str) -> None:
        settlement = {
            "succeeded": succeeded(artefact()),
            "failed": failed(),
            "again": again(self.now + pause),
        }[kind]
        row = self.live(claim)
        if row is None:
            self.refused(StaleClaim, self.store.settle(claim.attempt.id, settlement, self.now))
            return
        task = self.run(self.store.settle(claim.attempt.id, settlement, self.now))
        self.follow(row, settlement)
        assert task.status is row.status

    def follow(self, row: Row, settlement: Settlement) -> None:
        row.status = Status.CANCELED if row.cancel_requested else settlement.status
        if row.status is Status.QUEUED and settlement.available_at is not None:
            row.available_at = settlement.available_at
        if row.status is Status.SUCCEEDED:
            self.owe(row, *(f"output_{place}" for place in range(len(settlement.artefacts))), "completed")
        elif row.status.terminal:
            self.owe(row, row.status.value)

    def owe(self, row: Row, *words: str) -> None:
        wanted = row.webhook.events if row.webhook is not None else ()
        for word in words:
            if EventType(f"task.{word.split('_')[0]}") in wanted:
                name = f"msg_{row.id}_{row.seq}_{word}"
                assert name not in self.owed
                self.owed[name] = Owed(name, row.id, self.now)

    @rule(data=st.data(), status=st.sampled_from(DeliveryStatus), pause=PAUSES, wanted=st.booleans())
    def deliver(self, data: st.DataObject, status: DeliveryStatus, pause: int, wanted: bool) -> None:
        due = self.run(self.store.due_deliveries(self.now, 5, ())).entries
        if not due:
            return
        tried = data.draw(st.sampled_from(due))
        taken = self.owed[tried.id]
        if wanted:  # a redelivery is asked for meanwhile
            self.run(self.store.redeliver(taken.id, self.now))
            taken.next_at, taken.round = self.now, 0
        pending = status is DeliveryStatus.PENDING
        next_at = self.now + pause if pending else None
        self.run(self.store.record_try(tried, made(), status, next_at, self.now))
        taken.tries += 1
        if (taken.next_at, taken.round) == (tried.next_at, tried.round):
            taken.status, taken.next_at = status, next_at
            taken.round += 1

    @precondition(lambda self: self.owed)
    @rule(data=st.data())
    def redeliver(self, data: st.DataObject) -> None:
        chosen = self.owed[data.draw(st.sampled_from(list(self.owed)))]
        assert self.run(self.store.redeliver(chosen.id, self.now)) is not None
        chosen.status, chosen.next_at, chosen.round = DeliveryStatus.PENDING, self.now, 0

    @rule(task_id=ids)
    def cancel(self, task_id: str) -> None:
        result = self.run(self.store.cancel(task_id, self.now))
        row = self.rows.get(task_id)
        assert (result is None) == (row is None)
        if row is None or result is None:
            return
        assert result.ended == (row.status is Status.QUEUED)
        if row.status is Status.QUEUED:
            row.status = Status.CANCELED
            self.owe(row, "canceled")
        row.cancel_requested |= not row.status.terminal

    @rule(task_id=ids)
    def retry(self, task_id: str) -> None:
        row = self.rows.get(task_id)
        if row is not None and not row.status.terminal:
            self.refused(Conflict, self.store.retry(task_id, self.now))
            return
        task = self.run(self.store.retry(task_id, self.now))
        assert (task is None) == (row is None)
        if task is None or row is None:
            return
        assert task.seq > self.places
        row.seq = self.places = task.seq
        row.status, row.available_at, row.cancel_requested = Status.QUEUED, self.now, False
        row.started = False

    @rule(task_id=ids)
    def delete(self, task_id: str) -> None:
        row = self.rows.get(task_id)
        if row is not None and not row.status.terminal:
            self.refused(Conflict, self.store.delete(task_id))
            return
        task = self.run(self.store.delete(task_id))
        assert (task is None) == (row is None)
        self.rows.pop(task_id, None)
        self.owed = {name: each for name, each in self.owed.items() if each.task != task_id}

    def refused(self, error: type[Exception], verb: Awaitable[object]) -> None:
        try:
            self.run(verb)
        except error:
            return
        raise AssertionError(f"{error.__name__} was not raised")

    @invariant()
    def counts_agree(self) -> None:
        expected = dict.fromkeys(Status, 0)
        for row in self.rows.values():
            expected[row.status] += 1
        assert self.run(self.store.counts()) == expected

    @invariant()
    def queue_agrees(self) -> None:
        queued = [row for row in self.rows.values() if row.status is Status.QUEUED]
        due = sorted(
            (row for row in queued if row.available_at <= self.now), key=lambda row: (-row.priority, row.seq)
        )
        page = self.run(self.store.ready(self.now, 1000))
        assert [entry.task_id for entry in page.entries] == [row.id for row in due]
        later = [row.available_at for row in queued if row.available_at > self.now]
        assert page.next_due == min(later, default=None)

    @invariant()
    def rows_agree(self) -> None:
        page = self.run(self.store.list_tasks(TaskFilter(), None, 1000))
        newest_first = sorted(self.rows.values(), key=lambda row: -row.created)
        assert [task.id for task in page.tasks] == [row.id for row in newest_first]
        for task, row in zip(page.tasks, newest_first, strict=True):
            assert (task.status, task.seq, task.priority) == (row.status, row.seq, row.priority)
            assert [attempt.id for attempt in task.attempts] == row.attempts
            self.agrees_with_itself(task)

    def agrees_with_itself(self, task: Task) -> None:
        open_attempts: list[Attempt] = [attempt for attempt in task.attempts if attempt.ended_at is None]
        assert len(open_attempts) == (task.status is Status.RUNNING)
        assert (task.completed_at is not None) == task.status.terminal
        assert (task.error is not None) == (task.status is Status.FAILED)
        assert bool(task.artefacts) == (task.status is Status.SUCCEEDED)
        assert task == msgspec.convert(msgspec.to_builtins(task), Task)

    @invariant()
    def outbox_agrees(self) -> None:
        page = self.run(self.store.list_deliveries(DeliveryFilter(), None, 1000))
        listed = [Owed(d.id, d.task_id, d.next_at, d.status, d.round, len(d.tries)) for d in page.deliveries]
        assert listed == list(reversed(self.owed.values()))
        assert all((d.ended_at is None) == (d.next_at is not None) for d in page.deliveries)
        due = self.run(self.store.due_deliveries(self.now, 1000, ()))
        moments = [d.next_at for d in due.entries]
        pending = sorted(each.next_at for each in self.owed.values() if each.next_at is not None)
        assert moments == [moment for moment in pending if moment <= self.now]
        assert due.next_due == next((moment for moment in pending if moment > self.now), None)

    @invariant()
    def only_what_owes_nothing_is_old(self) -> None:
        owing = {each.task for each in self.owed.values() if each.next_at is not None}
        expected = {row.id for row in self.rows.values() if row.status.terminal} - owing
        assert set(self.run(self.store.ended_before(self.now + 1, 1000))) == expected

    @invariant()
    def live_claims_agree(self) -> None:
        running = [row for row in self.rows.values() if row.status is Status.RUNNING]
        held = self.run(self.store.live())
        assert {claim.attempt.id for claim in held} == {row.attempts[-1] for row in running}


class SqliteMachine(StoreMachine):
    """The same, over SQLite."""

    implementation = staticmethod(lambda directory: open_sqlite(directory / "comfyd.db"))


TestSqliteAgainstTheModel = SqliteMachine.TestCase
TestSqliteAgainstTheModel.settings = settings(
    max_examples=12,
    stateful_step_count=40,
    deadline=None,  # a loaded machine is not a failure
    suppress_health_check=[HealthCheck.too_slow],
)
