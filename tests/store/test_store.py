"""What every store promises, verb by verb."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from comfyd.errors import Conflict, IdempotencyKeyReuse, InvalidCursor, StaleClaim
from comfyd.store.base import Store
from comfyd.tasks import (
    CancelResult,
    IdempotencyKey,
    OutputOptions,
    OutputType,
    Policy,
    Settlement,
    Status,
    Step,
    TaskFilter,
)
from tests.store.samples import (
    BOOM,
    GRAPH,
    NOW,
    OUTPUT_FILE,
    Opener,
    added,
    again,
    artefact,
    claim,
    claimed,
    ended,
    failed,
    found,
    new_id,
    new_task,
    submitting,
    succeeded,
)

KEY = IdempotencyKey(key="order-1", body_sha256="d1")


async def ready_ids(store: Store, now: int = NOW, limit: int = 100) -> list[str]:
    return [entry.task_id for entry in (await store.ready(now, limit)).entries]


# add, replay, get, graph


async def test_added_task_reads_back_as_it_was_answered(store: Store) -> None:
    new = new_task(
        priority=-7,
        workflow="portrait",
        inputs={"prompt": "a cat", "images": ["a", "b"], "seed": 2**70},
        metadata={"b": "2", "a": "1"},
        policy=Policy(max_attempts=5, timeout_ms=1, start_timeout_ms=2, stall_timeout_ms=3),
        output=OutputOptions(include_temp=True),
        key_id="key-1",
        extra_data={"note": "x"},
        credentials=True,
    )
    answer = await store.add(new, None, NOW)
    assert not answer.replayed
    assert await store.get(new.id) == answer.task
    assert answer.task.status is Status.QUEUED
    assert answer.task.created_at == answer.task.available_at == NOW
    assert answer.task.attempts == ()
    assert answer.task.artefacts == ()
    for name in ("id", "priority", "workflow", "inputs", "metadata", "policy", "output", "key_id", "shape"):
        assert getattr(answer.task, name) == getattr(new, name)
    assert answer.task.credentials is True


async def test_task_says_whether_it_came_with_credentials_in_all_its_states(store: Store) -> None:
    for flag in (True, False):
        taken = await claimed(store, credentials=flag)
        assert taken.task.credentials is flag
        assert (await store.live())[0].task.credentials is flag
        task = await store.settle(taken.attempt.id, failed(), NOW)
        assert task.credentials is flag
        assert (await found(store, task.id)).credentials is flag
        (listed,) = (await store.list_tasks(TaskFilter(), None, 1)).tasks
        assert listed.credentials is flag


async def test_graph_comes_back_as_it_was_accepted(store: Store) -> None:
    task = await added(store)
    assert await store.graph(task.id) == GRAPH


async def test_unknown_task_is_none_to_every_verb(store: Store) -> None:
    nobody = new_id()
    assert await store.get(nobody) is None
    assert await store.graph(nobody) is None
    assert await store.claim(nobody, new_id(), NOW) is None
    assert await store.cancel(nobody, NOW) is None
    assert await store.retry(nobody, NOW) is None
    assert await store.delete(nobody) is None


async def test_same_key_and_body_is_the_first_task_again(store: Store) -> None:
    first = await store.add(new_task(), KEY, NOW)
    again_ = await store.add(new_task(), KEY, NOW + 1)
    assert again_.replayed
    assert again_.task == first.task
    assert await store.replay(KEY) == first.task
    assert (await store.counts())[Status.QUEUED] == 1


async def test_replayed_task_is_shown_as_it_stands_now(store: Store) -> None:
    first = (await store.add(new_task(), KEY, NOW)).task
    await store.cancel(first.id, NOW + 1)
    assert (await store.add(new_task(), KEY, NOW + 2)).task.status is Status.CANCELED


async def test_same_key_with_another_body_is_refused_and_stores_nothing(store: Store) -> None:
    await store.add(new_task(), KEY, NOW)
    other = msgspec.structs.replace(KEY, body_sha256="d2")
    with pytest.raises(IdempotencyKeyReuse):
        await store.add(new_task(), other, NOW)
    with pytest.raises(IdempotencyKeyReuse):
        await store.replay(other)
    assert (await store.counts())[Status.QUEUED] == 1


async def test_same_key_of_two_api_keys_is_two_tasks(store: Store) -> None:
    tasks = [
        (await store.add(new_task(), msgspec.structs.replace(KEY, key_id=owner), NOW)).task.id
        for owner in (None, "key-1", "key-2")
    ]
    assert len(set(tasks)) == 3
    assert await store.replay(msgspec.structs.replace(KEY, key_id="key-3")) is None


# ready, ahead


async def test_ready_is_by_priority_then_first_in_first_out(store: Store) -> None:
    priorities = [0, 5, -1000, 5, 1000, 0]
    tasks = [await added(store, priority=priority) for priority in priorities]
    expected = sorted(tasks, key=lambda task: (-task.priority, task.seq))
    page = await store.ready(NOW, 100)
    assert [(e.rank, e.seq, e.task_id) for e in page.entries] == [
        (-task.priority, task.seq, task.id) for task in expected
    ]
    assert page.next_due is None
    assert await ready_ids(store, limit=2) == [task.id for task in expected[:2]]


async def test_ready_leaves_out_what_is_not_due_and_says_when_the_next_is(store: Store) -> None:
    for pause in (300, 100, 200):
        taken = await claimed(store, priority=9)
        await store.settle(taken.attempt.id, again(NOW + pause), NOW)
    due = await added(store)
    page = await store.ready(NOW, 100)
    assert [entry.task_id for entry in page.entries] == [due.id]
    assert page.next_due == NOW + 100
    later = await store.ready(NOW + 100, 100)
    assert len(later.entries) == 2
    assert later.next_due == NOW + 200
    assert (await store.ready(NOW + 300, 100)).next_due is None


async def test_what_waits_for_too_long_is_made_due_a_few_at_a_time(store: Store) -> None:
    for pause in (100, 300, 200, 400):
        taken = await claimed(store, priority=9)
        await store.settle(taken.attempt.id, again(NOW + pause), NOW)
    done = await ended(store)
    assert [await store.make_due(NOW + 150, NOW, 2) for _ in range(3)] == [2, 1, 0]
    page = await store.ready(NOW, 100)
    assert len(page.entries) == 3
    assert page.next_due == NOW + 100
    assert await found(store, done.id) == done


async def test_ahead_counts_exactly_what_will_be_claimed_before(store: Store) -> None:
    tasks = [await added(store, priority=priority) for priority in (0, 1, 0, -1, 1)]
    waiting = await claimed(store, priority=9)
    await store.settle(waiting.attempt.id, again(NOW + 50), NOW)
    order = await ready_ids(store)
    for task in tasks:
        assert await store.ahead(task, NOW) == order.index(task.id)
        assert await store.ahead(task, NOW + 50) == order.index(task.id) + 1


# claim


async def test_claim_gives_the_task_its_graph_and_a_first_attempt(store: Store) -> None:
    task = await added(store, extra_data={"note": "x"}, inputs={"a": 1})
    attempt_id = new_id()
    taken = await store.claim(task.id, attempt_id, NOW + 5)
    assert taken is not None
    assert taken.graph == GRAPH
    assert taken.extra_data == {"note": "x"}
    assert taken.task.status is Status.RUNNING
    assert taken.task.started_at == NOW + 5
    assert taken.task.attempt_count == taken.attempt.number == 1
    assert taken.attempt.id == attempt_id
    assert taken.attempt.step is Step.CLAIMED
    assert taken.attempt.claimed_at == NOW + 5
    assert taken.task.attempts == (taken.attempt,)
    assert await store.get(task.id) == taken.task
    assert await ready_ids(store) == []


async def test_running_ended_and_waiting_tasks_cannot_be_claimed(store: Store) -> None:
    running = await claimed(store)
    waiting = await claimed(store)
    await store.settle(waiting.attempt.id, again(NOW + 10), NOW)
    canceled = await added(store)
    await store.cancel(canceled.id, NOW)
    done = await ended(store)
    for task_id in (running.task.id, waiting.task.id, canceled.id, done.id):
        assert await store.claim(task_id, new_id(), NOW + 9) is None
    assert await store.claim(waiting.task.id, new_id(), NOW + 10) is not None


async def test_second_claim_keeps_the_first_start_and_counts_on(store: Store) -> None:
    first = await claimed(store)
    await store.settle(first.attempt.id, again(NOW), NOW + 1)
    second = await claim(store, first.task.id, NOW + 2)
    assert second.task.started_at == NOW
    assert [attempt.number for attempt in second.task.attempts] == [1, 2]
    assert second.attempt.number == second.task.attempt_count == 2


# record


async def test_recorded_steps_read_back(store: Store) -> None:
    taken = await claimed(store)
    attempt = submitting(taken.attempt)
    await store.record(attempt)
    assert (await found(store, taken.task.id)).attempts == (attempt,)
    attempt = msgspec.structs.replace(
        attempt,
        step=Step.COLLECTED,
        accepted_at=NOW + 2,
        seen_running_at=NOW + 3,
        executed_at=NOW + 4,
        execution_ms=1,
        collected=(OUTPUT_FILE, msgspec.structs.replace(OUTPUT_FILE, index=1, text="plain")),
    )
    await store.record(attempt)
    assert (await found(store, taken.task.id)).attempts == (attempt,)


async def test_stale_claim_cannot_record(store: Store) -> None:
    taken = await claimed(store)
    await store.settle(taken.attempt.id, again(NOW), NOW)
    await claim(store, taken.task.id)
    with pytest.raises(StaleClaim):
        await store.record(submitting(taken.attempt))
    with pytest.raises(StaleClaim):
        await store.record(submitting(msgspec.structs.replace(taken.attempt, id=new_id())))


# settle


async def test_success_ends_the_task_with_its_artefacts_in_order(store: Store) -> None:
    taken = await claimed(store)
    text = msgspec.structs.replace(artefact(0, "3"), type=OutputType.TEXT, text="hello", duration=1.5)
    hashed = msgspec.structs.replace(artefact(1), blake3="0123456789abcdef" * 4)
    artefacts = (hashed, artefact(0), text)
    task = await store.settle(taken.attempt.id, succeeded(*artefacts), NOW + 9)
    assert task.status is Status.SUCCEEDED
    assert task.completed_at == NOW + 9
    assert task.artefacts == artefacts
    assert task.error is None
    (attempt,) = task.attempts
    assert (attempt.step, attempt.ended_at, attempt.outcome) == (Step.SETTLED, NOW + 9, "succeeded")
    assert await store.get(task.id) == task


async def test_failure_keeps_its_error_with_the_task_and_the_attempt(store: Store) -> None:
    taken = await claimed(store)
    task = await store.settle(taken.attempt.id, failed(failures=3, suspects=2, strays=1), NOW)
    assert task.status is Status.FAILED
    assert task.error == task.attempts[0].error == BOOM
    assert (task.failures, task.suspects, task.strays) == (3, 2, 1)


async def test_task_that_goes_back_is_first_among_its_equals(store: Store) -> None:
    taken = await claimed(store)
    other = await added(store)
    task = await store.settle(taken.attempt.id, again(NOW + 7), NOW)
    assert task.status is Status.QUEUED
    assert task.available_at == NOW + 7
    assert task.error is None
    assert task.attempts[0].error == BOOM
    assert task.completed_at is None
    assert task.seq == taken.task.seq
    assert await ready_ids(store, NOW + 7) == [task.id, other.id]


async def test_stale_claim_cannot_settle(store: Store) -> None:
    taken = await claimed(store)
    task = await store.settle(taken.attempt.id, succeeded(), NOW)
    with pytest.raises(StaleClaim):
        await store.settle(taken.attempt.id, failed(), NOW + 1)
    with pytest.raises(StaleClaim):
        await store.settle(new_id(), failed(), NOW + 1)
    assert await store.get(task.id) == task


async def test_cancel_between_decision_and_settlement_is_kept(store: Store) -> None:
    taken = await claimed(store)
    await store.cancel(taken.task.id, NOW + 1)
    task = await store.settle(taken.attempt.id, again(NOW + 5), NOW + 2)
    assert task.status is Status.CANCELED
    assert (task.cancel_requested_at, task.completed_at) == (NOW + 1, NOW + 2)
    assert task.error is None
    assert await ready_ids(store, NOW + 5) == []


# run times


async def test_run_times_begin_as_a_plain_mean_and_then_follow_the_latest(store: Store) -> None:
    async def run(milliseconds: int | None, shape: str = "shape-1") -> None:
        taken = await claimed(store, shape=shape)
        attempt = msgspec.structs.replace(submitting(taken.attempt), execution_ms=milliseconds)
        await store.record(attempt)
        await store.settle(attempt.id, succeeded(), NOW)

    assert await store.run_times("shape-1") is None
    assert await store.mean_run_time() is None
    await run(None)
    assert await store.run_times("shape-1") is None
    for milliseconds in (100, 200, 300):
        await run(milliseconds)
    learned = await store.run_times("shape-1")
    assert learned is not None
    assert learned.runs == 3
    assert learned.mean_ms == pytest.approx(200)
    await run(1200)
    learned = await store.run_times("shape-1")
    assert learned is not None
    assert learned.runs == 4
    assert learned.mean_ms == pytest.approx(500)
    await run(0, "shape-2")
    overall = await store.mean_run_time()
    assert overall is not None
    assert overall.runs == 5
    assert overall.mean_ms == pytest.approx(400)


async def test_failures_teach_no_run_time(store: Store) -> None:
    taken = await claimed(store)
    await store.record(msgspec.structs.replace(submitting(taken.attempt), execution_ms=5))
    await store.settle(taken.attempt.id, failed(), NOW)
    assert await store.mean_run_time() is None


# cancel, retry, delete


async def test_queued_task_is_canceled_at_once(store: Store) -> None:
    task = await added(store)
    result = await store.cancel(task.id, NOW + 1)
    assert result is not None
    assert result.ended
    canceled = result.task
    assert canceled.status is Status.CANCELED
    assert (canceled.cancel_requested_at, canceled.completed_at) == (NOW + 1, NOW + 1)
    assert await ready_ids(store) == []


async def test_running_task_is_asked_to_cancel_and_keeps_the_first_moment(store: Store) -> None:
    taken = await claimed(store)
    for moment in (NOW + 1, NOW + 2):
        result = await store.cancel(taken.task.id, moment)
        assert result is not None
        assert not result.ended
        asked = result.task
        assert asked.status is Status.RUNNING
        assert asked.cancel_requested_at == NOW + 1


async def test_cancel_leaves_an_ended_task_alone(store: Store) -> None:
    task = await ended(store)
    assert await store.cancel(task.id, NOW + 1) == CancelResult(task=task, ended=False)


@pytest.mark.parametrize("decided", [succeeded(artefact()), failed(), again(NOW)])
async def test_a_cancel_between_the_decision_and_its_write_is_kept(store: Store, decided: Settlement) -> None:
    taken = await claimed(store)
    await store.cancel(taken.task.id, NOW)
    task = await store.settle(taken.attempt.id, decided, NOW + 1)
    assert (task.status, task.error, task.artefacts) == (Status.CANCELED, None, ())
    assert task.attempts[0].outcome == decided.outcome
    assert await store.artefact_bytes() == 0


async def test_retry_queues_behind_the_equals_with_fresh_counters(store: Store) -> None:
    taken = await claimed(store)
    await store.cancel(taken.task.id, NOW)
    await store.settle(taken.attempt.id, failed(failures=3, suspects=2, strays=1), NOW)
    other = await added(store)
    task = await store.retry(taken.task.id, NOW + 3)
    assert task is not None
    assert task.status is Status.QUEUED
    assert task.seq > other.seq
    assert task.available_at == NOW + 3
    assert (task.failures, task.suspects, task.strays, task.attempt_count) == (0, 0, 0, 1)
    assert (task.error, task.started_at, task.completed_at, task.cancel_requested_at) == (None,) * 4
    assert len(task.attempts) == 1
    assert await ready_ids(store, NOW + 3) == [other.id, task.id]
    rerun = await claim(store, task.id, NOW + 4)
    assert (rerun.attempt.number, rerun.task.started_at) == (2, NOW + 4)


async def test_retry_forgets_the_artefacts(store: Store) -> None:
    task = await ended(store)
    retried = await store.retry(task.id, NOW)
    assert retried is not None
    assert retried.artefacts == ()
    taken = await claim(store, task.id)
    assert (await store.settle(taken.attempt.id, succeeded(artefact()), NOW)).artefacts == (artefact(),)


async def test_retry_and_delete_refuse_what_has_not_ended(store: Store) -> None:
    queued = await added(store)
    running = (await claimed(store)).task
    for task in (queued, running):
        with pytest.raises(Conflict):
            await store.retry(task.id, NOW)
        with pytest.raises(Conflict):
            await store.delete(task.id)
        assert await store.get(task.id) == task


async def test_delete_forgets_everything_of_the_task(store: Store) -> None:
    answer = await store.add(new_task(metadata={"a": "b"}), KEY, NOW)
    taken = await claim(store, answer.task.id)
    task = await store.settle(taken.attempt.id, succeeded(artefact()), NOW)
    assert await store.delete(task.id) == task
    assert await store.get(task.id) is None
    assert await store.graph(task.id) is None
    assert await store.replay(KEY) is None
    assert (await store.list_tasks(TaskFilter(metadata={"a": "b"}), None, 10)).tasks == ()
    assert not (await store.add(new_task(), KEY, NOW)).replayed


# live, counts, ended_before


async def test_live_is_every_running_task_most_urgent_first(store: Store) -> None:
    low = await claimed(store, priority=-1)
    await ended(store)
    await added(store)
    high = await claimed(store, priority=1, extra_data={"a": 1})
    assert await store.live() == (high, low)


async def test_counts_have_every_status_and_follow_every_verb(store: Store) -> None:
    assert await store.counts() == dict.fromkeys(Status, 0)
    await added(store)
    canceled = await added(store)
    await store.cancel(canceled.id, NOW)
    await claimed(store)
    done = await ended(store)
    lost = await claimed(store)
    await store.settle(lost.attempt.id, failed(), NOW)
    assert await store.counts() == dict.fromkeys(Status, 1)
    await store.delete(done.id)
    await store.retry(lost.task.id, NOW)
    counts = await store.counts()
    assert (counts[Status.QUEUED], counts[Status.SUCCEEDED], counts[Status.FAILED]) == (2, 0, 0)


async def test_ended_before_is_oldest_first_and_bounded(store: Store) -> None:
    ends = [await ended(store, NOW + moment) for moment in (30, 10, 20, 40)]
    await claimed(store, NOW)
    expected = [ends[1].id, ends[2].id, ends[0].id]
    assert list(await store.ended_before(NOW + 40, 10)) == expected
    assert list(await store.ended_before(NOW + 40, 2)) == expected[:2]
    assert await store.ended_before(NOW + 10, 10) == ()


async def test_ended_attempts_are_those_of_ours_that_have_ended_in_the_order_given(store: Store) -> None:
    first, live = await claimed(store), await claimed(store)
    await store.settle(first.attempt.id, again(NOW), NOW)
    second = await claim(store, first.task.id)
    await store.settle(second.attempt.id, succeeded(), NOW)
    foreign = "it's foreign"
    asked = [second.attempt.id, foreign, live.attempt.id, first.attempt.id, first.task.id]
    assert await store.ended_attempts(asked) == (second.attempt.id, first.attempt.id)
    assert await store.ended_attempts(()) == ()
    await store.delete(first.task.id)
    assert await store.ended_attempts(asked) == ()


# lists


async def test_list_is_newest_first_also_after_a_retry(store: Store) -> None:
    first, second = await ended(store), await ended(store)
    await store.retry(first.id, NOW)
    page = await store.list_tasks(TaskFilter(), None, 10)
    assert [task.id for task in page.tasks] == [second.id, first.id]
    assert page.tasks[0] == second
    assert page.next_cursor is None


async def test_pages_are_stable_while_tasks_come_and_go(store: Store) -> None:
    tasks = [await ended(store) for _ in range(5)]
    newest_first = [task.id for task in reversed(tasks)]
    page = await store.list_tasks(TaskFilter(), None, 2)
    seen = [task.id for task in page.tasks]
    await added(store)
    await store.delete(tasks[3].id)  # the very one that the cursor stands after
    while page.next_cursor is not None:
        page = await store.list_tasks(TaskFilter(), page.next_cursor, 2)
        seen += [task.id for task in page.tasks]
    assert seen == newest_first


async def test_filters_narrow_and_combine(store: Store) -> None:
    a = await added(store, workflow="w1", key_id="k1", metadata={"user": "ann", "album": "1"})
    b = await added(store, workflow="w1", key_id="k2", metadata={"user": "bob", "album": "1"})
    c = await added(store, workflow="w2", key_id="k1", metadata={"user": "ann", "album": "2"})
    await store.cancel(b.id, NOW)

    async def ids(wanted: TaskFilter) -> list[str]:
        first = await store.list_tasks(wanted, None, 1)
        rest = await store.list_tasks(wanted, first.next_cursor, 10) if first.next_cursor else None
        return [task.id for task in (*first.tasks, *(rest.tasks if rest else ()))]

    assert await ids(TaskFilter(workflow="w1")) == [b.id, a.id]
    assert await ids(TaskFilter(key_id="k1")) == [c.id, a.id]
    assert await ids(TaskFilter(statuses=frozenset({Status.CANCELED}))) == [b.id]
    assert await ids(TaskFilter(metadata={"user": "ann"})) == [c.id, a.id]
    assert await ids(TaskFilter(metadata={"user": "ann", "album": "1"})) == [a.id]
    assert await ids(
        TaskFilter(metadata={"album": "1"}, statuses=frozenset({Status.QUEUED}), key_id="k1")
    ) == [a.id]
    assert await ids(TaskFilter(metadata={"user": "x"})) == []


async def test_several_statuses_are_listed_newest_first_over_any_pages(store: Store) -> None:
    tasks = []
    for number in range(12):
        task = await added(store, key_id=f"k{number % 2}", metadata={"half": str(number // 6)})
        if number % 3 == 0:
            await store.cancel(task.id, NOW)
        elif number % 3 == 1:
            await claim(store, task.id)
        tasks.append(await found(store, task.id))
    queued, running, canceled = Status.QUEUED, Status.RUNNING, Status.CANCELED

    async def listed(limit: int, *statuses: Status, **facts: Any) -> list[str]:
        ids: list[str] = []
        cursor = None
        while True:
            wanted = TaskFilter(statuses=frozenset(statuses), **facts)
            page = await store.list_tasks(wanted, cursor, limit)
            assert len(page.tasks) <= limit
            ids += [task.id for task in page.tasks]
            if (cursor := page.next_cursor) is None:
                return ids

    newest_first = tasks[::-1]
    for statuses in ((), (queued,), (queued, canceled), (queued, running, canceled), tuple(Status)):
        there = [task for task in newest_first if not statuses or task.status in statuses]
        mine = [task.id for task in there if task.key_id == "k1"]
        for limit in (1, 3, 50):
            assert await listed(limit, *statuses) == [task.id for task in there]
            assert await listed(limit, *statuses, key_id="k1") == mine
            late = [task.id for task in there if task.metadata == {"half": "1"}]
            assert await listed(limit, *statuses, metadata={"half": "1"}) == late
    assert await listed(5, Status.SUCCEEDED, Status.FAILED) == []


@pytest.mark.parametrize("word", ["') OR 1=1 --", "a.b[0]$", '"', "%", "\x00", "", "ключ"])
async def test_metadata_is_never_more_than_text(store: Store, word: str) -> None:
    task = await added(store, metadata={word: word})
    await added(store, metadata={"other": "x"})
    page = await store.list_tasks(TaskFilter(metadata={word: word}), None, 10)
    assert [(each.id, each.metadata) for each in page.tasks] == [(task.id, {word: word})]


@pytest.mark.parametrize(
    "cursor", ["", "x", "n5", "bjU1NQ!", "bi01", "ę", "bg", "bjk5OTk5OTk5OTk5OTk5OTk5OTk5OTk"]
)
async def test_cursor_that_is_not_ours_is_refused(store: Store, cursor: str) -> None:
    with pytest.raises(InvalidCursor, match="leave it out"):
        await store.list_tasks(TaskFilter(), cursor, 10)


# what a task brought and made


async def test_uploads_are_those_that_the_task_names_until_it_is_deleted(store: Store) -> None:
    first = await added(store, uploads=("b.png", "a.png"))
    second = await added(store, uploads=("b.png",))
    plain = await added(store)
    assert [await store.uploads(task.id) for task in (first, second, plain)] == [
        ("a.png", "b.png"),
        ("b.png",),
        (),
    ]
    assert await store.uploads(new_id()) == ()
    await store.cancel(first.id, NOW)
    assert await store.uploads(first.id) == ("a.png", "b.png")
    await store.delete(first.id)
    assert await store.uploads(first.id) == ()


async def test_unused_uploads_are_those_that_no_task_names_in_the_order_given(store: Store) -> None:
    files = ("c.png", "a.png", "it's.png", "b.png")
    assert await store.unused_uploads(files) == files
    assert await store.unused_uploads(()) == ()
    first, second = await added(store, uploads=("a.png", "b.png")), await added(store, uploads=("b.png",))
    assert await store.unused_uploads(files) == ("c.png", "it's.png")
    for task in (first, second):
        await store.cancel(task.id, NOW)
        assert await store.unused_uploads(files) == ("c.png", "it's.png")  # an ended task can be run again
    await store.delete(first.id)
    assert await store.unused_uploads(files) == ("c.png", "a.png", "it's.png")
    await store.delete(second.id)
    assert await store.unused_uploads(files) == files


async def test_a_repeated_request_names_no_uploads_of_its_own(store: Store) -> None:
    await store.add(new_task(uploads=("a.png",)), KEY, NOW)
    again_added = await store.add(new_task(uploads=("b.png",)), KEY, NOW)
    assert again_added.replayed
    assert await store.unused_uploads(("a.png", "b.png")) == ("b.png",)


async def test_a_task_keeps_its_uploads_when_it_is_run_again(store: Store) -> None:
    task = await ended(store, uploads=("a.png",))
    await store.retry(task.id, NOW)
    assert await store.uploads(task.id) == ("a.png",)


async def test_artefact_bytes_are_those_of_every_task_that_is_there(store: Store) -> None:
    assert await store.artefact_bytes() == 0
    sizes = (0, 123, 2**40)
    for size in sizes:
        taken = await claimed(store)
        big = msgspec.structs.replace(artefact(), size_bytes=size)
        await store.settle(taken.attempt.id, succeeded(big, artefact(1)), NOW)
    assert await store.artefact_bytes() == sum(sizes) + 3 * 123
    *_, last = (await store.list_tasks(TaskFilter(), None, 10)).tasks
    await store.retry(last.id, NOW)  # forgets the artefacts of 0 and 123 bytes
    assert await store.artefact_bytes() == sum(sizes) + 2 * 123
    for task in (await store.list_tasks(TaskFilter(), None, 10)).tasks:
        await store.cancel(task.id, NOW)
        await store.delete(task.id)
    assert await store.artefact_bytes() == 0


async def test_a_failed_settlement_counts_no_bytes(store: Store) -> None:
    taken = await claimed(store)
    with pytest.raises(StaleClaim):
        await store.settle(new_id(), succeeded(artefact()), NOW)
    await store.settle(taken.attempt.id, failed(), NOW)
    assert await store.artefact_bytes() == 0


async def test_an_artefact_reads_back_with_its_place_and_its_data_but_lists_leave_the_data_out(
    store: Store,
) -> None:
    taken = await claimed(store)
    inline = msgspec.structs.replace(artefact(), location="id-1/public", data=b"\x89PNG\x00\xff")
    empty, plain = msgspec.structs.replace(artefact(1), data=b""), artefact(2)
    answer = await store.settle(taken.attempt.id, succeeded(inline, empty, plain), NOW)
    assert answer.artefacts == (inline, empty, plain)
    assert (await found(store, answer.id)).artefacts == (inline, empty, plain)
    (listed,) = (await store.list_tasks(TaskFilter(), None, 10)).tasks
    without = tuple(msgspec.structs.replace(each, data=None) for each in (inline, empty, plain))
    assert listed.artefacts == without


# over restarts


async def test_everything_is_there_after_opening_again(opener: Opener) -> None:
    async with opener() as store:
        task, taken = await ended(store), await claimed(store)
        replayable = (await store.add(new_task(), KEY, NOW)).task
        counts = await store.counts()
    async with opener() as store:
        assert await store.get(task.id) == task
        assert await store.live() == (taken,)
        assert await store.replay(KEY) == replayable
        assert await store.counts() == counts


async def test_order_goes_on_after_deletion_and_opening_again(opener: Opener) -> None:
    async with opener() as store:
        task = await ended(store)
        await store.delete(task.id)
    async with opener() as store:
        assert (await added(store)).seq > task.seq
