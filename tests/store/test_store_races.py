"""What every store promises to callers that come at the same moment, or that leave."""

from __future__ import annotations

import asyncio

from comfyd.errors import StaleClaim
from comfyd.store.base import Store
from comfyd.tasks import IdempotencyKey, Status
from tests.store.samples import NOW, Opener, added, claimed, failed, found, new_id, new_task, succeeded


async def test_of_many_claims_of_one_task_one_wins(store: Store) -> None:
    task = await added(store)
    claims = await asyncio.gather(*(store.claim(task.id, new_id(), NOW) for _ in range(100)))
    (won,) = [each for each in claims if each is not None]
    assert (await found(store, task.id)).attempts == (won.attempt,)


async def test_parallel_adds_with_one_key_are_one_task(store: Store) -> None:
    key = IdempotencyKey(key="order-1", body_sha256="d")
    answers = await asyncio.gather(*(store.add(new_task(), key, NOW) for _ in range(100)))
    assert len({answer.task.id for answer in answers}) == 1
    assert [answer.replayed for answer in answers].count(False) == 1
    assert (await store.counts())[Status.QUEUED] == 1


async def test_of_two_settlements_one_is_stale(store: Store) -> None:
    taken = await claimed(store)
    results = await asyncio.gather(
        store.settle(taken.attempt.id, succeeded(), NOW),
        store.settle(taken.attempt.id, failed(), NOW),
        return_exceptions=True,
    )
    assert len([result for result in results if isinstance(result, StaleClaim)]) == 1
    assert sum((await store.counts()).values()) == 1


async def test_cancel_and_claim_at_once_never_run_a_canceled_task(store: Store) -> None:
    tasks = [await added(store) for _ in range(20)]
    claims = [store.claim(task.id, new_id(), NOW) for task in tasks]
    cancels = [store.cancel(task.id, NOW) for task in tasks]
    order = [verb for pair in zip(claims, cancels, strict=True) for verb in pair]
    await asyncio.gather(*order[1::2], *order[0::2])
    counts = await store.counts()
    assert (counts[Status.CANCELED], counts[Status.RUNNING]) == (20, 0)


async def test_many_adds_at_once_have_distinct_places_in_the_order_of_their_answers(store: Store) -> None:
    answers = await asyncio.gather(*(store.add(new_task(), None, NOW) for _ in range(300)))
    places = [answer.task.seq for answer in answers]
    assert places == sorted(set(places))
    page = await store.ready(NOW, 300)
    assert [entry.task_id for entry in page.entries] == [answer.task.id for answer in answers]


async def test_reads_see_what_was_answered_before_them(store: Store) -> None:
    async def add_and_read() -> None:
        task = await added(store)
        assert await store.get(task.id) == task
        await store.cancel(task.id, NOW)
        assert (await found(store, task.id)).status is Status.CANCELED

    await asyncio.gather(*(add_and_read() for _ in range(50)))


async def test_caller_that_leaves_harms_nobody(store: Store) -> None:
    adds = [asyncio.create_task(store.add(new_task(), None, NOW)) for _ in range(60)]
    await asyncio.sleep(0)
    for add in adds[::3]:
        add.cancel()
    results = await asyncio.gather(*adds, return_exceptions=True)
    stayed = [result for result in results if not isinstance(result, BaseException)]
    assert len(stayed) == 40
    for answer in stayed:
        assert await store.get(answer.task.id) == answer.task
    assert (await added(store)).status is Status.QUEUED


async def test_closing_finishes_what_was_begun(opener: Opener) -> None:
    async with opener() as store:
        adds = [asyncio.create_task(store.add(new_task(), None, NOW)) for _ in range(200)]
        await asyncio.sleep(0)
    answers = [await add for add in adds]
    async with opener() as store:
        for answer in answers:
            assert await store.get(answer.task.id) == answer.task
