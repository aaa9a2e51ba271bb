"""The head of the queue, in memory: an `asyncio.PriorityQueue` in front of the table; never the truth.

The table holds every task; this holds the most urgent few hundred of those that are due (priority, order, id:
nothing else), is refilled from the table's index, and is thrown away at exit. It also carries the nudges by
which a worker learns that its task's row has changed.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import structlog

from comfyd.clock import Clock
from comfyd.errors import StoreError
from comfyd.store.base import Store
from comfyd.tasks import Ready, ReadyPage, Task

log = structlog.get_logger("comfyd.queue")

HEAD: Final = 512
"""How many tasks are held at most; twice as many for a moment while urgent ones arrive."""
LONGEST_SLEEP_MS: Final = 60_000
LONGEST_PAUSE_MS: Final = 300_000
"""The longest that a task waits for its next attempt, where nobody says another."""


class Attention:
    """How somebody who changed a task's row calls whoever works on it. Lives as long as that work."""

    def __init__(self) -> None:
        self._called = asyncio.Event()
        self._relay: Callable[[], None] | None = None

    def call(self) -> None:
        """Make the worker look up."""
        self._called.set()
        if self._relay is not None:
            self._relay()

    @property
    def called(self) -> bool:
        """Whether there was a call since the last `take`."""
        return self._called.is_set()

    def take(self) -> bool:
        """Whether there was a call since the last time; forgets it."""
        called = self._called.is_set()
        self._called.clear()
        return called

    async def wait(self) -> None:
        """Until there is a call."""
        await self._called.wait()

    @contextmanager
    def relay(self, wake: Callable[[], None]) -> Iterator[None]:
        """Within this block a call also wakes whatever the worker waits on instead."""
        self._relay = wake
        try:
            yield
        finally:
            self._relay = None


class TaskQueue:
    """What is to be claimed next. Lives as long as the process.

    `offer` a task once it is queued durably, `take` the most urgent one, say `taken` when its row is decided.
    No task waits longer than `longest_ms`, the longest pause before a retry: a row that says so was written
    by a clock that has been set back since.
    """

    def __init__(self, store: Store, clock: Clock, longest_ms: int = LONGEST_PAUSE_MS) -> None:
        self._store = store
        self._clock = clock
        self._longest_ms = longest_ms
        self._head: asyncio.PriorityQueue[Ready] = asyncio.PriorityQueue()
        self._held: dict[str, Ready] = {}
        self._worst: Ready | None = None
        self._whole = False
        self._missed = False
        self._stale = asyncio.Event()
        self._stale.set()
        self._alarm: asyncio.TimerHandle | None = None
        self._working: dict[str, Attention] = {}
        self._latest = 0
        self._doubtful = True
        """The clock may have been set back since rows were written: at the start nobody knows."""
        self.crowded: Callable[[Ready], bool] = _nobody
        """Told of a task that is held now, since all workers may have taken less urgent ones: was it so?"""

    def now(self) -> int:
        """The wall clock, but not earlier than it was: a task that was due is so when that is set back.

        Set back by more than any pause it is believed, or retries would know no pause until it has caught up;
        `refill` then makes due what waits for the time as it was.
        """
        now = self._clock.now()
        if now < self._latest - self._longest_ms:
            self._latest = now
            self._doubtful = True
            self.look_again()
        self._latest = max(self._latest, now)
        return self._latest

    def offer(self, task: Task) -> None:
        """A task is queued, durably. If it is due and urgent enough it is held; else the table keeps it."""
        if task.available_at > self.now():
            self._stale.set()
            return
        ready = Ready(rank=-task.priority, seq=task.seq, task_id=task.id)
        if self._whole or (self._worst is not None and ready < self._worst):
            self._hold(ready)
            self.crowded(ready)
        else:
            self._missed = True
            self._refill_if_low()

    async def take(self) -> Ready:
        """The most urgent task that is due; waits for one."""
        while True:
            ready = await self._head.get()
            self._refill_if_low()
            if self.current(ready):
                return ready

    def current(self, ready: Ready) -> bool:
        """Whether this is still the task's place: one that was canceled and run again has a later one."""
        return self._held.get(ready.task_id) == ready

    def give_back(self, ready: Ready) -> None:
        """It was taken and is to be taken again, after what is more urgent."""
        if self.current(ready):
            self._hold(ready)

    def taken(self, ready: Ready) -> None:
        """The row of this task has been decided: from now on the table alone says whether it is queued."""
        if self.current(ready):
            del self._held[ready.task_id]

    async def refill(self) -> int:
        """One step of the refilling loop: wait until the table may hold more, then read its head."""
        await self._stale.wait()
        self._stale.clear()
        self._missed = False
        try:
            page = await self._page()
        except StoreError:
            self._stale.set()
            raise
        fresh = [ready for ready in page.entries if not self.current(ready)]
        for ready in fresh:
            self._hold(ready)
        self._whole = len(page.entries) < HEAD and not self._missed
        self._trim()
        for ready in fresh:
            if not self.crowded(ready):
                break  # those that follow are less urgent
        if page.next_due is not None:
            self._wake_at(page.next_due)
        return 0

    async def _page(self) -> ReadyPage:
        """The table's head, without tasks that wait for a time which no pause of ours leads to."""
        now = self.now()
        page = await self._store.ready(now, HEAD)
        if page.next_due is not None and (self._doubtful or page.next_due > now + self._longest_ms):
            made = await self._store.make_due(now + self._longest_ms, now, HEAD)
            self._doubtful = made == HEAD
            if made:
                log.warning("queue.clock_set_back", tasks=made)
                self.look_again()
        return page

    def _hold(self, ready: Ready) -> None:
        self._held[ready.task_id] = ready
        self._head.put_nowait(ready)
        if self._worst is None or ready > self._worst:
            self._worst = ready
        if self._head.qsize() > 2 * HEAD:
            self._trim()

    def _trim(self) -> None:
        """Keep the most urgent `HEAD` and leave the rest to the table."""
        if self._head.qsize() <= HEAD:
            return
        kept = [self._head.get_nowait() for _ in range(HEAD)]
        while not self._head.empty():
            self.taken(self._head.get_nowait())
        for ready in kept:
            self._head.put_nowait(ready)
        self._worst = kept[-1]
        self._whole = False

    def _refill_if_low(self) -> None:
        if not self._whole and self._head.qsize() < HEAD // 2:
            self._stale.set()

    def _wake_at(self, due: int) -> None:
        delay = min(max(due - self.now(), 0) + 1, LONGEST_SLEEP_MS)
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = asyncio.get_running_loop().call_later(delay / 1000, self._stale.set)

    @contextmanager
    def attention(self, task_id: str) -> Iterator[Attention]:
        """Be called when somebody else changes the row of this task."""
        attention = Attention()
        self._working[task_id] = attention
        try:
            yield attention
        finally:
            if self._working.get(task_id) is attention:  # and not that of whoever runs it again already
                del self._working[task_id]

    def nudge(self, task_id: str) -> None:
        """The row of this task was changed: whoever works on it should look."""
        attention = self._working.get(task_id)
        if attention is not None:
            attention.call()

    def look_again(self) -> None:
        """Read the table again: what is in it may not be held here."""
        self._whole = False
        self._stale.set()


def _nobody(_: Ready) -> bool:
    """Who makes way where nobody waits."""
    return False
