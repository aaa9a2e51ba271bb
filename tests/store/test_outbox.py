"""What every store promises to webhooks: what each transition owes, when it is due, and what tries change."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.deliveries import Delivery, DeliveryFilter, DeliveryStatus, DeliveryTry, DueDeliveries
from comfyd.errors import Conflict, InvalidCursor, StaleClaim
from comfyd.store.base import Store
from comfyd.store.outbox import endpoint_of
from comfyd.store.queries import LOOKED_THROUGH
from comfyd.tasks import EventType, Settlement, Status, Task, TaskFilter, Webhook
from tests.store.samples import (
    BOOM,
    HOOK,
    NOW,
    Opener,
    added,
    again,
    artefact,
    claim,
    claimed,
    ended,
    failed,
    found,
    found_delivery,
    made,
    new_id,
    new_task,
    owed,
    submitting,
    succeeded,
)

CANCELED = Settlement(status=Status.CANCELED, outcome="canceled")


def hook(*events: EventType, url: str = "https://example.com/hook") -> Webhook:
    return Webhook(url=url, events=events)


def words(deliveries: list[Delivery], task: Task) -> list[str]:
    """What was owed for this task, in the words of its ids."""
    prefix = f"msg_{task.id}_"
    return [delivery.id.removeprefix(prefix) for delivery in deliveries]


async def due_ids(store: Store, now: int, limit: int = 100, *busy: str) -> list[str]:
    return [delivery.id for delivery in (await store.due_deliveries(now, limit, busy)).entries]


async def waiting(store: Store, *urls: str, now: int = NOW) -> list[Delivery]:
    """One pending delivery to each url, owed in this order."""
    deliveries = []
    for url in urls:
        task = await added(store, now, webhook=hook(EventType.CANCELED, url=url))
        await store.cancel(task.id, now)
        deliveries += await owed(store, task.id)
    return deliveries


# the webhook of a task


async def test_webhook_reads_back_with_its_task_everywhere(store: Store) -> None:
    webhook = hook(EventType.OUTPUT, EventType.CANCELED, url="https://user:p%40ss@example.com:8443/a?b=c#d")
    new = new_task(webhook=webhook)
    answer = await store.add(new, None, NOW)
    assert answer.task.webhook == webhook
    assert await store.get(new.id) == answer.task
    (listed,) = (await store.list_tasks(TaskFilter(), None, 10)).tasks
    taken = await claim(store, new.id)
    (live,) = await store.live()
    again_ = await store.settle(taken.attempt.id, again(NOW), NOW)
    for task in (listed, taken.task, live.task, again_, await found(store, new.id)):
        assert task.webhook == webhook


async def test_task_without_a_webhook_owes_nothing(store: Store) -> None:
    task = await ended(store)
    assert task.webhook is None
    canceled = await added(store)
    await store.cancel(canceled.id, NOW)
    assert await owed(store) == []


# what each transition owes


async def test_adding_a_task_owes_nothing(store: Store) -> None:
    task = await added(store, webhook=HOOK)
    assert await owed(store, task.id) == []


async def test_first_claim_owes_the_start_and_the_next_ones_nothing(store: Store) -> None:
    taken = await claimed(store, NOW + 5, webhook=HOOK)
    (start,) = await owed(store)
    assert start.type is EventType.STARTED
    assert start.id == f"msg_{taken.task.id}_{taken.task.seq}_started"
    assert start.subject.status is Status.RUNNING
    assert (start.created_at, start.next_at, start.subject.started_at) == (NOW + 5, NOW + 5, NOW + 5)
    await store.settle(taken.attempt.id, again(NOW), NOW)
    await claim(store, taken.task.id, NOW + 9)
    assert await owed(store) == [start]


async def test_success_owes_each_output_in_order_and_then_the_end(store: Store) -> None:
    taken = await claimed(store, webhook=HOOK)
    task = await store.settle(
        taken.attempt.id, succeeded(artefact(1), artefact(0), artefact(0, "3")), NOW + 9
    )
    deliveries = await owed(store)
    assert words(deliveries, task) == [
        f"{task.seq}_{word}" for word in ("started", "output_0", "output_1", "output_2", "completed")
    ]
    assert [delivery.output for delivery in deliveries] == [None, 0, 1, 2, None]
    assert [delivery.type for delivery in deliveries[1:]] == [*[EventType.OUTPUT] * 3, EventType.COMPLETED]
    for delivery in deliveries[1:]:
        assert delivery.subject == msgspec.structs.replace(task, attempts=())
        assert delivery.created_at == delivery.next_at == NOW + 9


async def test_success_without_artefacts_owes_the_end_alone(store: Store) -> None:
    taken = await claimed(store, webhook=hook(EventType.OUTPUT, EventType.COMPLETED))
    task = await store.settle(taken.attempt.id, succeeded(), NOW)
    assert words(await owed(store), task) == [f"{task.seq}_completed"]


async def test_failure_owes_that_and_no_outputs(store: Store) -> None:
    taken = await claimed(store, webhook=HOOK)
    task = await store.settle(taken.attempt.id, failed(artefacts=(artefact(),)), NOW)
    _, failure = await owed(store)
    assert (failure.type, failure.output) == (EventType.FAILED, None)
    assert failure.id == f"msg_{task.id}_{task.seq}_failed"
    assert (failure.subject.status, failure.subject.error) == (Status.FAILED, BOOM)


async def test_settled_cancel_owes_that(store: Store) -> None:
    taken = await claimed(store, webhook=HOOK)
    await store.cancel(taken.task.id, NOW + 1)
    assert len(await owed(store)) == 1
    await store.settle(taken.attempt.id, CANCELED, NOW + 2)
    _, canceled = await owed(store)
    assert canceled.type is EventType.CANCELED
    assert canceled.subject.cancel_requested_at == NOW + 1


async def test_cancel_of_a_queued_task_owes_that_once(store: Store) -> None:
    task = await added(store, webhook=HOOK)
    for moment in (NOW + 1, NOW + 2):
        await store.cancel(task.id, moment)
    (canceled,) = await owed(store)
    assert canceled.id == f"msg_{task.id}_{task.seq}_canceled"
    assert canceled.created_at == NOW + 1
    assert canceled.subject == await found(store, task.id)
    assert canceled.subject.cancel_requested_at == canceled.subject.completed_at == NOW + 1


async def test_cancel_between_decision_and_settlement_owes_the_cancel(store: Store) -> None:
    taken = await claimed(store, webhook=HOOK)
    await store.cancel(taken.task.id, NOW + 1)
    await store.settle(taken.attempt.id, again(NOW + 5), NOW + 2)
    _, canceled = await owed(store)
    assert (canceled.type, canceled.subject.status) == (EventType.CANCELED, Status.CANCELED)
    assert canceled.created_at == NOW + 2


async def test_going_back_to_the_queue_owes_nothing(store: Store) -> None:
    taken = await claimed(store, webhook=hook(*set(EventType) - {EventType.STARTED}))
    await store.settle(taken.attempt.id, again(NOW), NOW)
    assert await owed(store) == []


@pytest.mark.parametrize("event", EventType)
async def test_only_wanted_events_are_owed(store: Store, event: EventType) -> None:
    task = await added(store, webhook=hook(event))
    await store.cancel(task.id, NOW)
    for settlement in (succeeded(artefact()), failed()):
        taken = await claimed(store, webhook=hook(event))
        await store.settle(taken.attempt.id, settlement, NOW)
    expected = 2 if event is EventType.STARTED else 1
    assert [delivery.type for delivery in await owed(store)] == [event] * expected


async def test_webhook_that_wants_nothing_is_owed_nothing(store: Store) -> None:
    await ended(store, webhook=hook())
    assert await owed(store) == []


async def test_repeats_owe_nothing_twice(store: Store) -> None:
    taken = await claimed(store, webhook=HOOK)
    await store.settle(taken.attempt.id, succeeded(artefact()), NOW)
    before = await owed(store)
    with pytest.raises(StaleClaim):
        await store.settle(taken.attempt.id, succeeded(artefact()), NOW + 1)
    with pytest.raises(StaleClaim):
        await store.record(submitting(taken.attempt))
    assert await store.claim(taken.task.id, new_id(), NOW + 1) is None
    await store.cancel(taken.task.id, NOW + 1)
    assert await owed(store) == before


async def test_task_that_is_run_again_by_its_user_owes_everything_under_new_ids(store: Store) -> None:
    taken = await claimed(store, webhook=HOOK)
    await store.settle(taken.attempt.id, succeeded(artefact()), NOW)
    first = await owed(store)
    retried = await store.retry(taken.task.id, NOW)
    assert retried is not None
    assert await owed(store) == first
    rerun = await claim(store, taken.task.id, NOW)
    await store.settle(rerun.attempt.id, succeeded(artefact()), NOW)
    second = (await owed(store))[len(first) :]
    assert words(second, retried) == [
        f"{retried.seq}_{word}" for word in ("started", "output_0", "completed")
    ]
    assert {delivery.id for delivery in first}.isdisjoint(delivery.id for delivery in second)


async def test_subject_is_the_task_of_that_moment_without_what_is_large(store: Store) -> None:
    inline = msgspec.structs.replace(artefact(), data=b"\x89PNG", text="kept", location="id-1/public")
    task = await added(store, webhook=HOOK, inputs={"prompt": "a cat"}, metadata={"a": "ü"}, key_id="k")
    taken = await claim(store, task.id)
    settled = await store.settle(taken.attempt.id, succeeded(inline), NOW)
    await store.retry(task.id, NOW + 1)
    _, output, end = await owed(store)
    assert output.subject == end.subject
    assert end.subject == msgspec.structs.replace(
        settled,
        inputs=None,
        attempts=(),
        artefacts=(msgspec.structs.replace(inline, data=None),),
    )
    assert end.task_id == task.id
    assert end.url == HOOK.url
    assert end.endpoint == "https://example.com:443"
    assert (end.status, end.round, end.ended_at, end.tries) == (DeliveryStatus.PENDING, 0, None, ())


# endpoints


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("HTTPS://Example.COM/a?b", "https://example.com:443"),
        ("http://example.com", "http://example.com:80"),
        ("http://user:secret@example.com:8080/a", "http://example.com:8080"),
        ("https://[2001:DB8::1]/a", "https://[2001:db8::1]:443"),
        ("https://bücher.example/", "https://xn--bcher-kva.example:443"),
        ("https://xn--bcher-kva.example:443/", "https://xn--bcher-kva.example:443"),
        ("http://example.com:99999/", "http://example.com:99999/"),
        ("http://[İ]@?0-]", "http://[İ]@?0-]"),
        ("no url", "no url"),
    ],
)
def test_endpoint_is_scheme_host_and_port(url: str, endpoint: str) -> None:
    assert endpoint_of(url) == endpoint


@given(st.text(min_size=1) | st.text(min_size=1).map("http://{}/".format))
def test_endpoint_of_anything_is_a_word(url: str) -> None:
    assert endpoint_of(url)


# due


async def test_due_is_what_has_waited_longest_first_and_says_when_the_next_is(store: Store) -> None:
    assert await store.due_deliveries(NOW, 10, ()) == DueDeliveries(entries=())
    (late,) = await waiting(store, "https://late.example/", now=NOW + 9)
    (early,) = await waiting(store, "https://early.example/", now=NOW + 1)
    (same,) = await waiting(store, "https://late.example/", now=NOW + 9)
    before = await store.due_deliveries(NOW, 10, ())
    assert (before.entries, before.next_due) == ((), NOW + 1)
    first = await store.due_deliveries(NOW + 1, 10, ())
    assert (first.entries, first.next_due) == ((early,), NOW + 9)
    every = await store.due_deliveries(NOW + 9, 10, ())
    assert (every.entries, every.next_due) == ((early, late, same), None)
    assert await due_ids(store, NOW + 9, 2) == [early.id, late.id]
    assert await due_ids(store, NOW + 9, 0) == []


async def test_due_steps_over_busy_endpoints(store: Store) -> None:
    a, b, a_again, c = await waiting(
        store, "https://a.example/1", "http://b.example/", "https://A.example:443/2", "https://c.example/"
    )
    assert a.endpoint == a_again.endpoint
    assert await due_ids(store, NOW, 10, a.endpoint) == [b.id, c.id]
    assert await due_ids(store, NOW, 10, a.endpoint, c.endpoint) == [b.id]
    assert await due_ids(store, NOW, 10, a.endpoint, b.endpoint, c.endpoint) == []
    assert await due_ids(store, NOW, 1, "https://nobody.example:443") == [a.id]


async def test_thousands_at_a_busy_endpoint_hide_nobody(store: Store) -> None:
    outputs = tuple(artefact(index) for index in range(LOOKED_THROUGH))
    taken = await claimed(store, webhook=hook(EventType.OUTPUT, url="https://busy.example/"))
    await store.settle(taken.attempt.id, succeeded(*outputs), NOW)
    b1, c1, b2, c2, _later = [
        (await waiting(store, f"https://{name}.example/", now=NOW + pause))[0]
        for name, pause in (("b", 3), ("c", 2), ("b", 2), ("c", 1), ("d", 9))
    ]
    busy = "https://busy.example:443"
    assert await due_ids(store, NOW + 3, 10, busy) == [c2.id, c1.id, b2.id, b1.id]
    assert await due_ids(store, NOW + 3, 2, busy) == [c2.id, c1.id]
    assert await due_ids(store, NOW + 3, 1, busy) == [c2.id]
    assert await due_ids(store, NOW + 3, 10, busy, b1.endpoint) == [c2.id, c1.id]
    assert (await due_ids(store, NOW + 3, 1))[0].endswith("output_0")
    nothing = await store.due_deliveries(NOW, 10, (busy,))
    assert (nothing.entries, nothing.next_due) == ((), NOW + 1)


# tries


async def test_failed_try_keeps_it_pending_for_later(store: Store) -> None:
    (delivery,) = await waiting(store, HOOK.url)
    await store.record_try(delivery, made(500, "HTTP 500"), DeliveryStatus.PENDING, NOW + 50, NOW + 1)
    second = await found_delivery(store, delivery.id)
    await store.record_try(second, made(None, "no answer"), DeliveryStatus.PENDING, NOW + 90, NOW + 51)
    there = await found_delivery(store, delivery.id)
    assert there == msgspec.structs.replace(
        delivery,
        next_at=NOW + 90,
        round=2,
        tries=(
            DeliveryTry(number=1, at=NOW, duration_ms=5, status=500, error="HTTP 500"),
            DeliveryTry(number=2, at=NOW, duration_ms=5, status=None, error="no answer"),
        ),
    )
    assert await due_ids(store, NOW + 89) == []
    assert await due_ids(store, NOW + 90) == [delivery.id]


@pytest.mark.parametrize("status", list(DeliveryStatus)[1:])
async def test_last_try_ends_it(store: Store, status: DeliveryStatus) -> None:
    (delivery,) = await waiting(store, HOOK.url)
    await store.record_try(delivery, made(), status, None, NOW + 7)
    there = await found_delivery(store, delivery.id)
    assert (there.status, there.next_at, there.ended_at, there.round) == (status, None, NOW + 7, 1)
    assert await store.due_deliveries(NOW + 10**9, 10, ()) == DueDeliveries(entries=())


async def test_late_try_is_kept_and_undoes_no_end(store: Store) -> None:
    (delivery,) = await waiting(store, HOOK.url)
    await store.record_try(delivery, made(), DeliveryStatus.DELIVERED, None, NOW + 7)
    await store.record_try(delivery, made(500, "HTTP 500"), DeliveryStatus.PENDING, NOW + 50, NOW + 8)
    there = await found_delivery(store, delivery.id)
    assert (there.status, there.ended_at) == (DeliveryStatus.DELIVERED, NOW + 7)
    assert [each.status for each in there.tries] == [200, 500]


async def test_unknown_delivery_is_nothing_to_every_verb(store: Store) -> None:
    (known,) = await waiting(store, HOOK.url)
    unknown = msgspec.structs.replace(known, id="msg_x")
    await store.record_try(unknown, made(), DeliveryStatus.DELIVERED, None, NOW)
    assert await store.delivery("msg_x") is None
    assert await store.redeliver("msg_x", NOW) is None


@pytest.mark.parametrize("status", DeliveryStatus)
async def test_redelivery_begins_anew_and_keeps_the_tries(store: Store, status: DeliveryStatus) -> None:
    (delivery,) = await waiting(store, HOOK.url)
    next_at = NOW + 99 if status is DeliveryStatus.PENDING else None
    await store.record_try(delivery, made(500, "HTTP 500"), status, next_at, NOW + 1)
    again_ = await store.redeliver(delivery.id, NOW + 2)
    assert again_ == await found_delivery(store, delivery.id)
    assert again_ is not None
    assert (again_.status, again_.next_at, again_.round, again_.ended_at) == (
        DeliveryStatus.PENDING,
        NOW + 2,
        0,
        None,
    )
    assert (again_.id, again_.subject, len(again_.tries)) == (delivery.id, delivery.subject, 1)
    await store.record_try(again_, made(), DeliveryStatus.DELIVERED, None, NOW + 3)
    assert [each.number for each in (await found_delivery(store, delivery.id)).tries] == [1, 2]


@pytest.mark.parametrize("status", DeliveryStatus)
@pytest.mark.parametrize("tries", [0, 3])
async def test_redelivery_asked_for_during_a_try_is_not_undone_by_that_try(
    store: Store, status: DeliveryStatus, tries: int
) -> None:
    (delivery,) = await waiting(store, HOOK.url)
    for number in range(tries):
        taken = await found_delivery(store, delivery.id)
        await store.record_try(taken, made(500, "HTTP 500"), DeliveryStatus.PENDING, NOW, NOW + number)
    taken = await found_delivery(store, delivery.id)
    promised = await store.redeliver(delivery.id, NOW + 9)
    next_at = NOW + 10_000 if status is DeliveryStatus.PENDING else None
    await store.record_try(taken, made(500, "HTTP 500"), status, next_at, NOW + 10)
    there = await found_delivery(store, delivery.id)
    assert len(there.tries) == tries + 1
    assert msgspec.structs.replace(there, tries=taken.tries) == promised


async def test_redelivery_at_the_very_moment_that_a_later_try_was_due_begins_anew(store: Store) -> None:
    (delivery,) = await waiting(store, HOOK.url)
    await store.record_try(delivery, made(500, "HTTP 500"), DeliveryStatus.PENDING, NOW + 9, NOW + 1)
    taken = await found_delivery(store, delivery.id)
    await store.redeliver(delivery.id, NOW + 9)
    await store.record_try(taken, made(500, "HTTP 500"), DeliveryStatus.FAILED, None, NOW + 10)
    there = await found_delivery(store, delivery.id)
    assert (there.status, there.next_at, there.round) == (DeliveryStatus.PENDING, NOW + 9, 0)


async def test_deliveries_that_wait_for_too_late_a_time_are_made_due_and_no_others(store: Store) -> None:
    deliveries = await waiting(store, *[HOOK.url] * 5)
    late = NOW + 1_000
    for delivery, next_at in zip(deliveries, (NOW + 5, late, late + 1, late + 2), strict=False):
        await store.record_try(delivery, made(500, "HTTP 500"), DeliveryStatus.PENDING, next_at, NOW)
    await store.record_try(deliveries[4], made(), DeliveryStatus.DELIVERED, None, NOW)
    assert await store.make_deliveries_due(late, NOW + 1, 1) == 1
    assert await store.make_deliveries_due(late, NOW + 1, 10) == 1
    assert await store.make_deliveries_due(late, NOW + 1, 10) == 0
    assert sorted(await due_ids(store, NOW + 1)) == sorted(one.id for one in deliveries[2:4])
    assert (await found_delivery(store, deliveries[1].id)).next_at == late
    assert (await found_delivery(store, deliveries[2].id)).round == 1


# lists


async def test_lists_are_newest_first_and_their_cursor_goes_on_where_a_page_ended(store: Store) -> None:
    every = await waiting(store, *(f"https://example.com/{number}" for number in range(7)))
    await store.record_try(every[3], made(), DeliveryStatus.DELIVERED, None, NOW)
    newest_first = [delivery.id for delivery in reversed(every)]
    seen: list[str] = []
    cursor = None
    for size in (3, 3, 1):
        page = await store.list_deliveries(DeliveryFilter(), cursor, 3)
        assert len(page.deliveries) == size
        seen += [delivery.id for delivery in page.deliveries]
        cursor = page.next_cursor
    assert cursor is None
    assert seen == newest_first
    (tried,) = [
        one for one in (await store.list_deliveries(DeliveryFilter(), None, 7)).deliveries if one.tries
    ]
    assert tried == await found_delivery(store, every[3].id)


async def test_new_deliveries_do_not_disturb_a_cursor(store: Store) -> None:
    every = await waiting(store, *[HOOK.url] * 4)
    page = await store.list_deliveries(DeliveryFilter(), None, 2)
    await waiting(store, *[HOOK.url] * 2)
    rest = await store.list_deliveries(DeliveryFilter(), page.next_cursor, 10)
    assert [delivery.id for delivery in rest.deliveries] == [every[1].id, every[0].id]


async def test_filters_restrict_together(store: Store) -> None:
    tasks = [
        await added(store, webhook=HOOK, key_id=key_id)
        for key_id in ("k1", "k2", "k1", None)
        for _ in range(2)
    ]
    for task in tasks:
        await store.cancel(task.id, NOW)
    every = await owed(store)
    for delivery in every[::2]:
        await store.record_try(delivery, made(410, "HTTP 410"), DeliveryStatus.GONE, None, NOW)

    async def listed(**wanted: object) -> list[str]:
        filtered = msgspec.convert(wanted, DeliveryFilter)
        page = await store.list_deliveries(filtered, None, 100)
        return [delivery.task_id for delivery in reversed(page.deliveries)]

    ids = [task.id for task in tasks]
    assert await listed() == ids
    assert await listed(task_id=ids[2]) == [ids[2]]
    assert await listed(status="gone") == ids[::2]
    assert await listed(status="pending") == ids[1::2]
    assert await listed(status="delivered") == []
    assert await listed(key_id="k1") == [ids[0], ids[1], ids[4], ids[5]]
    assert await listed(key_id="k1", status="gone") == [ids[0], ids[4]]
    assert await listed(key_id="k2", task_id=ids[0]) == []
    assert await listed(task_id=new_id()) == []


async def test_foreign_cursor_is_refused(store: Store) -> None:
    for _ in range(2):
        await ended(store, webhook=HOOK)
    of_tasks = (await store.list_tasks(TaskFilter(), None, 1)).next_cursor
    of_deliveries = (await store.list_deliveries(DeliveryFilter(), None, 1)).next_cursor
    assert of_tasks is not None
    assert of_deliveries is not None
    for cursor in (of_tasks, "", "ü", "!", "ZA", of_deliveries[:-1]):
        with pytest.raises(InvalidCursor):
            await store.list_deliveries(DeliveryFilter(), cursor, 1)
    with pytest.raises(InvalidCursor):
        await store.list_tasks(TaskFilter(), of_deliveries, 1)


# what goes with a task, and what holds it


async def test_deliveries_go_with_their_task(store: Store) -> None:
    gone, stays = await ended(store, webhook=HOOK), await ended(store, webhook=HOOK)
    deliveries = await owed(store, gone.id)
    await store.record_try(deliveries[0], made(), DeliveryStatus.DELIVERED, None, NOW)
    await store.delete(gone.id)
    for delivery in deliveries:
        assert await store.delivery(delivery.id) is None
        await store.record_try(delivery, made(), DeliveryStatus.DELIVERED, None, NOW)
    assert {delivery.task_id for delivery in await owed(store)} == {stays.id}
    assert len(await due_ids(store, NOW)) == len(deliveries)


async def test_task_that_still_owes_something_is_not_old_enough_to_forget(store: Store) -> None:
    plain = await ended(store, NOW)
    task = await ended(store, NOW + 1, webhook=hook(EventType.OUTPUT, EventType.COMPLETED))
    assert await store.ended_before(NOW + 10, 10) == (plain.id,)
    output, end = await owed(store, task.id)
    await store.record_try(end, made(410, "HTTP 410"), DeliveryStatus.GONE, None, NOW + 2)
    assert await store.ended_before(NOW + 10, 10) == (plain.id,)
    await store.record_try(output, made(500, "HTTP 500"), DeliveryStatus.FAILED, None, NOW + 2)
    assert await store.ended_before(NOW + 10, 10) == (plain.id, task.id)
    await store.redeliver(end.id, NOW + 3)
    assert await store.ended_before(NOW + 10, 1) == (plain.id,)
    await store.delete(plain.id)
    assert await store.ended_before(NOW + 10, 1) == ()


async def test_conditional_delete_spares_what_is_owed_and_what_ended_since(store: Store) -> None:
    task = await ended(store, NOW + 1, webhook=hook(EventType.COMPLETED))
    (end,) = await owed(store, task.id)
    with pytest.raises(Conflict):
        await store.delete(task.id, ended_before=NOW + 10)
    await store.record_try(end, made(), DeliveryStatus.DELIVERED, None, NOW + 2)
    with pytest.raises(Conflict):
        await store.delete(task.id, ended_before=NOW + 1)
    await store.redeliver(end.id, NOW + 3)
    with pytest.raises(Conflict):
        await store.delete(task.id, ended_before=NOW + 10)
    there = await found_delivery(store, end.id)
    await store.record_try(there, made(410, "HTTP 410"), DeliveryStatus.GONE, None, NOW + 4)
    forgot = await store.delete(task.id, ended_before=NOW + 10)
    assert forgot is not None
    assert await store.get(task.id) is None
    assert await store.delete(task.id, ended_before=NOW + 10) is None


async def test_unconditional_delete_forgets_what_is_owed(store: Store) -> None:
    task = await ended(store, webhook=hook(EventType.COMPLETED))
    assert await store.delete(task.id) is not None
    assert await owed(store, task.id) == []


async def test_outbox_is_there_after_opening_again(opener: Opener) -> None:
    async with opener() as store:
        await ended(store, webhook=HOOK)
        first, *_ = await owed(store)
        await store.record_try(first, made(), DeliveryStatus.DELIVERED, None, NOW)
        before = await owed(store)
    async with opener() as store:
        assert await owed(store) == before
        assert await due_ids(store, NOW) == [delivery.id for delivery in before[1:]]
