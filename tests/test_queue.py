"""The head in memory: never out of order, never without what the table has, never more than it may hold."""

import asyncio
import heapq
import random

import msgspec

from comfyd.queue import HEAD, TaskQueue
from comfyd.tasks import Ready, ReadyPage, Task
from tests.support.clock import HandClock
from tests.support.values import task


class Table:
    """The part of a store that the queue reads: a sorted list of what is queued."""

    def __init__(self, clock: HandClock) -> None:
        self.clock = clock
        self.rows: dict[str, Task] = {}
        self.reads = 0
        self.during: list[Task] = []

    def add(self, seq: int, priority: int = 0, available_at: int = 0) -> Task:
        """Queue one."""
        row = task(id=f"t{seq}", seq=seq, priority=priority, available_at=available_at)
        self.rows[row.id] = row
        return row

    async def ready(self, now: int, limit: int) -> ReadyPage:
        """See `Store.ready`."""
        self.reads += 1
        due = [
            Ready(rank=-row.priority, seq=row.seq, task_id=row.id)
            for row in self.rows.values()
            if row.available_at <= now
        ]
        later = [row.available_at for row in self.rows.values() if row.available_at > now]
        page = ReadyPage(entries=tuple(heapq.nsmallest(limit, due)), next_due=min(later, default=None))
        for row in self.during:
            self.rows[row.id] = row
        await asyncio.sleep(0)
        return page

    async def make_due(self, after: int, now: int, limit: int) -> int:
        """See `Store.make_due`."""
        late = [row for row in self.rows.values() if row.available_at > after][:limit]
        for row in late:
            self.rows[row.id] = msgspec.structs.replace(row, available_at=now)
        return len(late)


def make() -> tuple[TaskQueue, Table, HandClock]:
    clock = HandClock()
    table = Table(clock)
    return TaskQueue(table, clock), table, clock  # type: ignore[arg-type] # only `ready` is asked for


async def drain(queue: TaskQueue, table: Table, count: int) -> list[str]:
    refilling = asyncio.ensure_future(repeat(queue))
    taken = []
    try:
        async with asyncio.timeout(10):
            for _ in range(count):
                ready = await queue.take()
                del table.rows[ready.task_id]
                queue.taken(ready)
                taken.append(ready.task_id)
    finally:
        refilling.cancel()
    return taken


async def repeat(queue: TaskQueue) -> None:
    while True:
        await queue.refill()


async def test_tasks_come_by_priority_then_in_order_from_the_table() -> None:
    queue, table, _ = make()
    order = [(n, random.Random(n).choice([-1, 0, 5])) for n in range(3 * HEAD)]
    for seq, priority in order:
        table.add(seq, priority)
    wanted = [f"t{seq}" for seq, _ in sorted(order, key=lambda entry: (-entry[1], entry[0]))]
    assert await drain(queue, table, len(order)) == wanted
    assert table.reads <= 12


async def test_an_urgent_newcomer_is_next_although_the_head_is_full() -> None:
    queue, table, _ = make()
    for seq in range(2 * HEAD):
        table.add(seq)
    await queue.refill()
    queue.offer(table.add(9_000, priority=3))
    queue.offer(table.add(9_001, priority=-3))
    assert (await queue.take()).task_id == "t9000"


async def test_an_offer_to_an_idle_queue_needs_no_read() -> None:
    queue, table, _ = make()
    await queue.refill()
    reads = table.reads
    queue.offer(table.add(1))
    assert (await queue.take()).task_id == "t1"
    assert table.reads == reads


async def test_memory_stays_bounded_while_urgent_tasks_pour_in() -> None:
    queue, table, _ = make()
    await queue.refill()
    for seq in range(5 * HEAD):
        queue.offer(table.add(seq, priority=seq % 7))
    assert queue._head.qsize() <= 2 * HEAD  # noqa: SLF001 - the claim is about it
    wanted = [f"t{n}" for n in sorted(range(5 * HEAD), key=lambda n: (-(n % 7), n))]
    assert await drain(queue, table, 5 * HEAD) == wanted


async def test_a_task_that_waits_for_its_time_is_read_when_it_comes() -> None:
    queue, table, clock = make()
    await queue.refill()
    queue.offer(table.add(1, available_at=clock.now() + 5))
    await queue.refill()
    clock.advance(5)
    async with asyncio.timeout(5):
        await queue.refill()
        assert (await queue.take()).task_id == "t1"


async def test_tasks_of_a_clock_that_was_set_back_are_due_in_their_order() -> None:
    queue, table, clock = make()
    for seq in range(HEAD + 50):
        table.add(seq, priority=seq % 2, available_at=clock.now() + 86_400_000)
    retried = table.add(HEAD + 50, priority=5, available_at=clock.now() + 299_000)
    async with asyncio.timeout(10):
        for _ in range(3):  # as many as are held at most, the rest, and both together
            await queue.refill()
        taken = [await queue.take() for _ in range(HEAD)]
    urgent = (HEAD + 50) // 2
    assert [ready.seq for ready in taken[:urgent]] == [2 * number + 1 for number in range(urgent)]
    assert [ready.rank for ready in taken[urgent:]] == [0] * (HEAD - urgent)
    assert table.rows[retried.id] == retried


async def test_a_clock_that_is_set_back_by_a_day_is_believed_and_by_a_moment_is_not() -> None:
    queue, table, clock = make()
    before = queue.now()
    clock.advance(-200_000)
    assert queue.now() == before
    table.add(1, available_at=before)
    assert await drain(queue, table, 1) == ["t1"]
    clock.advance(-86_400_000)
    assert queue.now() == clock.now()
    table.add(2, available_at=before)
    assert await drain(queue, table, 1) == ["t2"]


async def test_what_is_queued_during_a_read_is_not_missed() -> None:
    queue, table, _ = make()
    refilling = asyncio.ensure_future(queue.refill())
    await asyncio.sleep(0)
    table.during.append(table.add(1))
    queue.offer(table.rows["t1"])
    await refilling
    assert await drain(queue, table, 1) == ["t1"]


async def test_a_taken_task_is_not_read_again_until_its_row_is_decided() -> None:
    queue, table, _ = make()
    table.add(1)
    await queue.refill()
    ready = await queue.take()
    queue.look_again()
    await queue.refill()
    assert queue._head.empty()  # noqa: SLF001 - the claim is about it
    queue.taken(ready)
    queue.look_again()
    await queue.refill()
    assert (await queue.take()).task_id == "t1"


async def test_a_worker_is_called_when_its_row_was_changed() -> None:
    queue, _, _ = make()
    woken: list[str] = []
    with queue.attention("t1") as attention:
        queue.nudge("somebody else")
        assert not attention.take()
        with attention.relay(lambda: woken.append("relay")):
            queue.nudge("t1")
        await attention.wait()
        assert attention.called
        assert attention.take()
        assert not attention.take()
        queue.nudge("t1")
    queue.nudge("t1")
    assert woken == ["relay"]
