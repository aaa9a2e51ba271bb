"""Takes what is owed to webhooks and due, has it sent, and records each try; never decides what is owed.

A crash between a receiver's answer and its record sends the same message again, with the same `webhook-id`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Protocol, Self

import structlog

from comfyd import failpoints
from comfyd.clock import Clock
from comfyd.deliveries import Delivery, DeliveryStatus, DeliveryTry, DueDeliveries
from comfyd.errors import ComfydError, StoreError
from comfyd.metrics import Metrics
from comfyd.webhooks.lanes import LINGER_SECONDS, Lanes, Place
from comfyd.webhooks.schedule import LONGEST_PAUSE_MS, Answer, Verdict, judge
from comfyd.webhooks.sender import Sender, one_line

log = structlog.get_logger("comfyd.webhooks")

PAGE: Final = 32
"""Deliveries that are read at once, beside those that are under way."""
READS: Final = 16
"""How often one step reads on past endpoints that can get no place."""
LOOK_SECONDS: Final = 10.0
"""How long the table goes unread at most, whoever may have forgotten to call."""
STORE_PAUSE_MS: Final = 1_000
"""How long a record waits for a database that refuses it."""
HOLD_MS: Final = 300_000
"""How long a delivery is left alone whose try cannot be recorded, for a reason that is not the database's."""
REPAIR_EVERY_MS: Final = 600_000
"""How often it is seen to what a clock that was ahead has put off."""
REPAIRED_AT_ONCE: Final = 1_000
CLOSE_SECONDS: Final = 1.0
"""How long a stop waits for answers: what has none by then is sent again by the next process."""


class Outbox(Protocol):
    """The verbs of `Store` that are used here."""

    async def due_deliveries(self, now: int, limit: int, busy: list[str]) -> DueDeliveries:
        """See `Store.due_deliveries`."""

    async def record_try(
        self, taken: Delivery, made: DeliveryTry, status: DeliveryStatus, next_at: int | None, now: int
    ) -> None:
        """See `Store.record_try`."""

    async def make_deliveries_due(self, after: int, now: int, limit: int) -> int:
        """See `Store.make_deliveries_due`."""


class Deliverer:
    """Delivers what is due while its `step` is looped. Enter it before that; leaving it stops every try."""

    def __init__(
        self, outbox: Outbox, sender: Sender, metrics: Metrics, clock: Clock, lanes: Lanes | None = None
    ) -> None:
        self._outbox = outbox
        self._sender = sender
        self._metrics = metrics
        self._clock = clock
        self._lanes = lanes or Lanes()
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._ended: set[str] = set()
        """Since the table was last read: it may show them as they were before."""
        self._held: dict[str, int] = {}
        """Deliveries that are left alone, and until when."""
        self._called = asyncio.Event()
        self._called.set()
        self._next_due: int | None = None
        self._repair_at = clock.monotonic()
        self.look_seconds = LOOK_SECONDS
        self._latest = clock.now()
        self._latest_at = clock.monotonic()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        tries = tuple(self._under_way.values())
        if tries:
            await asyncio.wait(tries, timeout=CLOSE_SECONDS)
        for made in tries:
            made.cancel()
        await asyncio.gather(*tries, return_exceptions=True)

    def wake(self) -> None:
        """Something may be due now that was not before."""
        self._called.set()

    async def step(self) -> int:
        """Wait until something may be due, then start what is. Raises `StoreError`."""
        await self._wait()
        self._called.clear()
        try:
            await self._start_due()
        except StoreError:
            self._called.set()
            raise
        return 0

    async def _wait(self) -> None:
        if self._called.is_set():
            return
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._called.wait())]
        if self._next_due is not None:
            pause = self._clock.sleep(max(self._next_due - self._now(), 0) + 1)
            waits.append(asyncio.ensure_future(pause))
        try:
            await asyncio.wait(waits, timeout=self.look_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _now(self) -> int:
        """The wall clock, but going on when that is set back: no pause here gets longer by that."""
        at = self._clock.monotonic()
        self._latest = max(self._clock.now(), self._latest + at - self._latest_at)
        self._latest_at = at
        return self._latest

    async def _start_due(self) -> None:
        """Start what is due, the longest waiting first, past endpoints that can get no place now."""
        await self._repair()
        passed: set[str] = set()
        before = len(self._under_way)
        self._held = {id_: until for id_, until in self._held.items() if until > self._clock.monotonic()}
        for _ in range(READS):
            if not self._lanes.room:
                self._next_due = None  # whoever leaves calls; what becomes due before that must wait
                return
            limit = PAGE + len(self._under_way) + len(self._held)
            self._ended.clear()
            busy = sorted(self._lanes.busy() | passed)
            due = await self._outbox.due_deliveries(self._now(), limit, busy)
            self._next_due = due.next_due
            for delivery in due.entries:
                if not self._start(delivery):
                    passed.add(delivery.endpoint)
            if len(due.entries) < limit:
                return
        if len(self._under_way) > before:
            self._called.set()

    async def _repair(self) -> None:
        """Now and then: no pause of ours leads to a time that is later than the longest one's end. What waits
        for one was put off by a clock that has been set back since, and is due.
        """
        if self._clock.monotonic() < self._repair_at:
            return
        now = self._now()
        made = await self._outbox.make_deliveries_due(now + LONGEST_PAUSE_MS, now, REPAIRED_AT_ONCE)
        if made:
            log.warning("webhook.clock_was_ahead", deliveries=made)
        if made == REPAIRED_AT_ONCE:
            self._called.set()
        else:
            self._repair_at = self._clock.monotonic() + REPAIR_EVERY_MS

    def _start(self, delivery: Delivery) -> bool:
        """Start a try unless one is under way, or just was; whether there was a place for it."""
        id_ = delivery.id
        if id_ in self._under_way or id_ in self._ended or id_ in self._held:
            return True
        place = self._lanes.enter(delivery.endpoint)
        if place is None:
            return False
        made = asyncio.create_task(self._deliver(delivery, place), name=f"webhook:{id_}")
        self._under_way[id_] = made
        made.add_done_callback(partial(self._over, id_, place))
        return True

    def _over(self, delivery_id: str, place: Place, made: asyncio.Task[None]) -> None:
        """A try ended. If not even its record could be made, it is said here, since nobody waits for it."""
        place.leave()
        del self._under_way[delivery_id]
        self._ended.add(delivery_id)
        if not made.cancelled() and (error := made.exception()) is not None:
            log.error("webhook.unrecorded", webhook_id=delivery_id, exc_info=error)
            self._held[delivery_id] = self._clock.monotonic() + HOLD_MS
        self._called.set()

    async def _deliver(self, delivery: Delivery, place: Place) -> None:
        """One try, from the message to the record. One that breaks is a try that failed: a mistake in here is
        not repeated for ever, and not more often than a receiver's.
        """
        at, begun = self._clock.now(), self._clock.monotonic()
        (answer,) = await asyncio.gather(self._answer(delivery, place), return_exceptions=True)
        if isinstance(answer, BaseException):
            log.error("webhook.broken", webhook_id=delivery.id, exc_info=answer)
            answer = Answer(error=f"comfyd made a mistake: {type(answer).__name__}")
        made = DeliveryTry(
            number=len(delivery.tries) + 1,
            at=at,
            duration_ms=self._clock.monotonic() - begun,
            status=answer.status,
            error=answer.error,
        )
        failpoints.reach("webhook.answered")
        verdict = judge(answer, delivery.round, self._clock.now(), self._clock.jitter())
        await self._record(delivery, made, verdict)
        failpoints.reach("webhook.committed")
        self._tell(delivery, answer, verdict)

    async def _answer(self, delivery: Delivery, place: Place) -> Answer:
        """What came of a message, which is written for this try."""
        try:
            message = await self._sender.write(delivery)
        except ComfydError as exc:
            log.warning("webhook.unwritten", task_id=delivery.task_id, reason=exc.message)
            return Answer(error=one_line(f"the message could not be written: {exc.message}"))
        except TimeoutError:
            log.warning("webhook.unwritten", task_id=delivery.task_id, reason="it took too long")
            return Answer(error="the message could not be written: it took too long")
        failpoints.reach("webhook.taken")
        lingering = asyncio.get_running_loop().call_later(LINGER_SECONDS, self._linger, place)
        try:
            answer = await self._sender.send(delivery.url, message)
        finally:
            lingering.cancel()
        place.heard(status=answer.status)
        return answer

    def _linger(self, place: Place) -> None:
        place.linger()
        self._called.set()

    async def _record(self, delivery: Delivery, made: DeliveryTry, verdict: Verdict) -> None:
        """Make it durable; waits while the database cannot take it, and nothing is sent again meanwhile."""
        now = self._now()
        next_at = None if verdict.wait_ms is None else now + verdict.wait_ms
        record: Callable[[], Awaitable[None]] = partial(
            self._outbox.record_try, delivery, made, verdict.status, next_at, now
        )
        while True:
            try:
                await record()
            except StoreError as exc:
                log.warning("webhook.waits", task_id=delivery.task_id, reason=exc.message)
                await self._clock.sleep(STORE_PAUSE_MS)
            else:
                return

    def _tell(self, delivery: Delivery, answer: Answer, verdict: Verdict) -> None:
        outcome = "retried" if verdict.status is DeliveryStatus.PENDING else verdict.status.value
        self._metrics.webhook_tried(outcome)
        facts = {
            "task_id": delivery.task_id,
            "webhook_id": delivery.id,
            "type": delivery.type.value,
            "host": _host(delivery.endpoint),
            "status": answer.status,
            "number": len(delivery.tries) + 1,
        }
        if verdict.status is DeliveryStatus.DELIVERED:
            log.info("webhook.delivered", **facts)
        else:
            log.info("webhook.failed", **facts, outcome=outcome, error=answer.error, wait_ms=verdict.wait_ms)


def _host(endpoint: str) -> str | None:
    """Host and port of an endpoint; None for one that is no such thing, since it may be a whole url."""
    _, mark, host = endpoint.partition("://")
    return host if mark and "/" not in host and "@" not in host and "?" not in host else None
