"""Everything owed is delivered at least once, on schedule, whatever receivers, clock and database do."""

import asyncio
import contextlib
import datetime as dt
import email.utils
import time
from typing import Any

import msgspec
import pytest
from aiohttp import web
from standardwebhooks import Webhook

from comfyd.clock import SystemClock
from comfyd.deliveries import Delivery, DeliveryStatus, DeliveryTry, DueDeliveries
from comfyd.errors import StorageError, StoreUnavailable
from comfyd.metrics import Metrics
from comfyd.tasks import EventType
from comfyd.webhooks import Deliverer
from comfyd.webhooks.deliverer import HOLD_MS, REPAIR_EVERY_MS, REPAIRED_AT_ONCE, STORE_PAUSE_MS
from comfyd.webhooks.lanes import EACH, KEPT_SLOW, QUICK, SLOW, Lanes, Manners
from comfyd.webhooks.schedule import RETRIES_MS
from tests.support.clock import HandClock
from tests.support.logs import captured_logs
from tests.support.trap import open_trap
from tests.webhooks.rig import (
    SECRET,
    MemoryOutbox,
    Receiver,
    delivering,
    delivery,
    hang,
    receiver,
    render,
    sending,
    until,
)

DELIVERED, FAILED = DeliveryStatus.DELIVERED, DeliveryStatus.FAILED
GONE, PENDING = DeliveryStatus.GONE, DeliveryStatus.PENDING


async def ended(outbox: MemoryOutbox, status: DeliveryStatus, count: int = 1) -> None:
    """Until so many deliveries have this status."""
    await until(lambda: outbox.count(status) >= count)


async def tried(outbox: MemoryOutbox, times: int, id_: str = "msg_1") -> Delivery:
    """The delivery as soon as so many tries are recorded."""
    await until(lambda: len(outbox.rows[id_].tries) >= times)
    return outbox.rows[id_]


# --- tries and records


async def test_what_is_owed_at_the_start_and_what_is_owed_later_is_delivered() -> None:
    async with receiver() as made:
        outbox = MemoryOutbox(delivery(made.url, 1))
        async with delivering(outbox) as office:
            await ended(outbox, DELIVERED)
            outbox.owe(delivery(made.url, 2, type=EventType.STARTED))
            office.deliverer.wake()
            await ended(outbox, DELIVERED, 2)
            assert office.tried("delivered") == 2
        assert [heard.message_id for heard in made.heard] == ["msg_1", "msg_2"]
        assert made.heard[1].told["type"] == "task.started"
        assert made.verified == 2
    (one,) = outbox.rows["msg_1"].tries
    assert (one.number, one.status, one.error) == (1, 204, None)
    assert abs(one.at / 1000 - time.time()) < 60
    assert 0 <= one.duration_ms < 20_000


async def test_what_nobody_calls_for_is_found_a_little_later() -> None:
    async with receiver() as made:
        outbox = MemoryOutbox()
        async with delivering(outbox) as office:
            await until(lambda: outbox.reads > 0)
            office.deliverer.look_seconds = 0.05
            office.deliverer.wake()
            outbox.owe(delivery(made.url, next_at=SystemClock().now() + 100))
            await ended(outbox, DELIVERED)


@pytest.mark.fault(28)
async def test_a_receiver_that_fails_is_tried_over_three_days_and_then_no_more() -> None:
    clock = HandClock()
    begun = clock.time
    async with receiver(500, secrets=()) as made:
        outbox = MemoryOutbox(delivery(made.url))
        async with delivering(outbox, clock=clock) as office:
            await ended(outbox, FAILED)
            assert (office.tried("retried"), office.tried("failed")) == (9, 1)
        assert len({heard.message_id for heard in made.heard}) == 1
        for heard in made.heard:
            signed = Signed.of(heard.headers)
            assert signed.by(SECRET, heard.body)
    row = outbox.rows["msg_1"]
    pauses = [after.at - before.at for before, after in zip(row.tries, row.tries[1:], strict=False)]
    assert pauses == pytest.approx([round(pause * 1.05) for pause in RETRIES_MS], abs=20)
    assert [one.number for one in row.tries] == list(range(1, 11))
    assert {one.error for one in row.tries} == {"it answered 500"}
    assert 3 * 86_400_000 < clock.time - begun < 4 * 86_400_000
    assert row.next_at is None


class Signed(msgspec.Struct, frozen=True):
    """A signature of another time than now, which `verify` would refuse as too old."""

    message_id: str
    seconds: int
    signatures: tuple[str, ...]

    @classmethod
    def of(cls, headers: dict[str, str]) -> "Signed":
        """What the headers say."""
        return cls(
            headers["webhook-id"],
            int(headers["webhook-timestamp"]),
            tuple(headers["webhook-signature"].split(" ")),
        )

    def by(self, secret: str, body: bytes) -> bool:
        """Whether the official library signs the same with this secret."""
        moment = dt.datetime.fromtimestamp(self.seconds, tz=dt.UTC)
        return Webhook(secret).sign(self.message_id, moment, body.decode()) in self.signatures


@pytest.mark.fault(28)
async def test_a_receiver_that_recovers_gets_the_same_message_signed_for_its_moment() -> None:
    clock = HandClock()
    async with receiver(503, 500, 200, secrets=()) as made:
        outbox = MemoryOutbox(delivery(made.url))
        async with delivering(outbox, clock=clock):
            await ended(outbox, DELIVERED)
    assert len({(heard.message_id, heard.body) for heard in made.heard}) == 1
    signed = [Signed.of(heard.headers) for heard in made.heard]
    assert all(one.by(SECRET, heard.body) for one, heard in zip(signed, made.heard, strict=True))
    row = outbox.rows["msg_1"]
    assert [one.seconds for one in signed] == [one.at // 1000 for one in row.tries]
    assert [one.status for one in row.tries] == [503, 500, 200]


@pytest.mark.fault(31)
async def test_a_receiver_that_is_gone_hears_nothing_more() -> None:
    async with receiver(410) as made:
        outbox = MemoryOutbox(delivery(made.url))
        async with delivering(outbox) as office:
            await ended(outbox, GONE)
            assert office.tried("gone") == 1
        assert len(made.heard) == 1


@pytest.mark.fault(31)
@pytest.mark.parametrize("form", ["seconds", "date"])
@pytest.mark.parametrize("status", [429, 503])
async def test_a_receiver_that_is_busy_is_left_alone_as_long_as_it_wants(form: str, status: int) -> None:
    clock = HandClock(1_700_000_000_000)
    hour = clock.time / 1000 + 3600
    wish = "3600" if form == "seconds" else email.utils.formatdate(hour, usegmt=True)
    busy = web.Response(status=status, headers={"Retry-After": wish})
    async with receiver(busy, 200, secrets=()) as made:
        outbox = MemoryOutbox(delivery(made.url))
        async with delivering(outbox, clock=clock):
            await ended(outbox, DELIVERED)
        assert len(made.heard) == 2
    first, second = outbox.rows["msg_1"].tries
    assert (first.status, second.status) == (status, 200)
    assert 3_600_000 <= second.at - first.at <= 3_601_100


@pytest.mark.fault(30)
async def test_a_redirect_inward_is_a_failed_try_and_reaches_nobody() -> None:
    async with open_trap() as inside:
        away = web.Response(status=302, headers={"Location": f"http://localhost:{inside.port}/secret"})
        async with receiver(away) as made:
            outbox = MemoryOutbox(delivery(made.url))
            async with delivering(outbox):
                row = await tried(outbox, 1)
        assert (row.status, row.round) == (PENDING, 1)
        assert "not followed" in (row.tries[0].error or "")
        assert inside.accepted == 0


@pytest.mark.fault(30)
async def test_an_address_that_is_blocked_is_a_failed_try() -> None:
    async with open_trap() as inside:
        outbox = MemoryOutbox(delivery(f"{inside.url}/hook?key=hidden"))
        async with delivering(outbox, allow=()):
            row = await tried(outbox, 1)
        assert inside.accepted == 0
    assert row.status is PENDING
    assert row.tries[0].status is None
    assert "is not public (loopback)" in (row.tries[0].error or "")


async def test_a_url_that_can_never_be_reached_fails_at_once() -> None:
    outbox = MemoryOutbox(delivery("ftp://example.com/", endpoint="ftp://example.com/?key=hidden"))
    with captured_logs() as lines:
        async with delivering(outbox):
            await ended(outbox, FAILED)
    assert len(outbox.rows["msg_1"].tries) == 1
    assert "hidden" not in str(lines)


async def test_a_redelivery_begins_the_schedule_anew() -> None:
    clock = HandClock()
    async with receiver(500, secrets=()) as made:
        outbox = MemoryOutbox(delivery(made.url))
        async with delivering(outbox, clock=clock) as office:
            await ended(outbox, FAILED)
            row = outbox.rows["msg_1"]
            outbox.owe(msgspec.structs.replace(row, status=PENDING, round=0, next_at=clock.now()))
            office.deliverer.wake()
            await tried(outbox, 20)
            await ended(outbox, FAILED)
        assert len({heard.message_id for heard in made.heard}) == 1


async def test_logs_name_the_host_and_nothing_that_may_be_secret() -> None:
    async with receiver(204, 500) as made:
        url = f"{made.url}/path-canary?key=query-canary"
        outbox = MemoryOutbox(delivery(url, 1, next_at=1), delivery(url, 2, next_at=2))
        with captured_logs() as lines:
            async with delivering(outbox):
                await until(lambda: all(row.tries for row in outbox.rows.values()))
                await until(lambda: len(lines) >= 2)
    good, bad = lines
    assert (good["event"], good["task_id"], good["status"], good["number"]) == (
        "webhook.delivered",
        "task-1",
        204,
        1,
    )
    assert (bad["event"], bad["status"], bad["outcome"]) == ("webhook.failed", 500, "retried")
    assert good["host"] == made.url.split("/")[2]
    for hidden in ("canary", SECRET[6:]):
        assert hidden not in str(lines)


# --- the database


async def test_a_record_that_the_database_refuses_is_made_later_and_nothing_is_sent_again() -> None:
    clock = HandClock(time.time_ns() // 1_000_000)
    async with receiver() as made:
        outbox = MemoryOutbox(delivery(made.url))
        outbox.refusals = 5
        async with delivering(outbox, clock=clock):
            await ended(outbox, DELIVERED)
        assert len(made.heard) == 1
    assert clock.slept.count(STORE_PAUSE_MS) == 5


async def test_a_table_that_cannot_be_read_is_read_again() -> None:
    class Refusing(MemoryOutbox):
        """Its first reads fail."""

        async def due_deliveries(self, now: int, limit: int, busy: Any) -> DueDeliveries:
            """See `Store.due_deliveries`."""
            due = await super().due_deliveries(now, limit, busy)
            if self.reads < 4:
                raise StoreUnavailable("the database does not answer")
            return due

    async with receiver() as made:
        outbox = Refusing(delivery(made.url))
        with captured_logs() as lines:
            async with delivering(outbox, clock=HandClock(time.time_ns() // 1_000_000)):
                await ended(outbox, DELIVERED)
    assert [line["event"] for line in lines].count("loop.waiting") == 3


class Stalling(MemoryOutbox):
    """Its records do not come through before it is told so; its reads may be slow."""

    def __init__(self, *owed: Delivery) -> None:
        super().__init__(*owed)
        self.through = asyncio.Event()
        self.reading = asyncio.Event()
        self.read_on = asyncio.Event()
        self.read_on.set()

    async def due_deliveries(self, now: int, limit: int, busy: Any) -> DueDeliveries:
        """See `Store.due_deliveries`."""
        due = await super().due_deliveries(now, limit, busy)
        self.reading.set()
        await self.read_on.wait()
        return due

    async def record_try(
        self, taken: Delivery, made: DeliveryTry, status: DeliveryStatus, next_at: int | None, now: int
    ) -> None:
        """See `Store.record_try`."""
        await self.through.wait()
        await super().record_try(taken, made, status, next_at, now)


async def test_what_is_under_way_is_not_sent_twice_however_often_the_table_is_read() -> None:
    async with receiver() as made:
        outbox = Stalling(delivery(made.url))
        async with delivering(outbox) as office:
            await made.heard_from(1)
            for _ in range(5):
                reads = outbox.reads
                office.deliverer.wake()
                await until(lambda before=reads: outbox.reads > before)  # type: ignore[misc] # its own number
            outbox.through.set()
            await ended(outbox, DELIVERED)
        assert len(made.heard) == 1


async def test_a_read_that_is_older_than_the_record_sends_nothing() -> None:
    async with receiver() as made:
        outbox = Stalling(
            delivery(made.url), delivery("http://127.0.0.1:9/", 2, next_at=SystemClock().now() + 3_600_000)
        )
        async with delivering(outbox) as office:
            await made.heard_from(1)
            outbox.reading.clear()
            outbox.read_on.clear()
            # trusted now, so that the table shows its deliveries although one is under way
            await until(lambda: made.at_once == 0)
            office.deliverer.wake()
            await asyncio.wait_for(outbox.reading.wait(), 20)
            outbox.through.set()
            await ended(outbox, DELIVERED)
            await until(lambda: office.tried("delivered") == 1)
            reads = outbox.reads
            outbox.read_on.set()
            await until(lambda: outbox.reads > reads)
        assert len(made.heard) == 1


async def test_what_was_answered_and_not_recorded_is_sent_again_with_the_same_id() -> None:
    async with receiver() as made:
        outbox = Stalling(delivery(made.url))
        async with delivering(outbox):
            await made.heard_from(1)
        assert outbox.rows["msg_1"].status is PENDING
        outbox.through.set()
        async with delivering(outbox):
            await ended(outbox, DELIVERED)
        assert [heard.message_id for heard in made.heard] == ["msg_1", "msg_1"]
        assert made.verified == 2


# --- what breaks in here


async def test_a_message_that_cannot_be_written_is_a_failed_try_and_written_again_later() -> None:
    clock = HandClock(time.time_ns() // 1_000_000)
    times = 0

    async def sometimes(owed: Delivery) -> bytes:
        nonlocal times
        times += 1
        if times == 1:
            raise StorageError("it signs no urls now")
        return await render(owed)

    async with receiver(secrets=()) as made:
        outbox = MemoryOutbox(delivery(made.url))
        async with delivering(outbox, clock=clock, write=sometimes):
            await ended(outbox, DELIVERED)
        assert len(made.heard) == 1
    first, second = outbox.rows["msg_1"].tries
    assert (first.status, first.error) == (None, "the message could not be written: it signs no urls now")
    assert second.at - first.at == pytest.approx(5_250, abs=20)


async def test_a_message_that_can_never_be_written_uses_up_the_schedule_and_reaches_nobody() -> None:
    async def slow(_owed: Delivery) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async with receiver() as made:
        outbox = MemoryOutbox(delivery(made.url))
        async with delivering(outbox, clock=HandClock(), write=slow, timeout=0.01) as office:
            await ended(outbox, FAILED)
            assert (office.tried("retried"), office.tried("failed")) == (9, 1)
        assert made.heard == []
    errors = {one.error for one in outbox.rows["msg_1"].tries}
    assert errors == {"the message could not be written: it took too long"}


async def test_a_try_that_breaks_is_said_and_fails_like_any_other_and_holds_up_nobody() -> None:
    async def breaks(owed: Delivery) -> bytes:
        if owed.id == "msg_1":
            raise KeyError(owed.url)
        return await render(owed)

    async with receiver(secrets=()) as made:
        outbox = MemoryOutbox(delivery(made.url, 1), delivery(made.url, 2))
        with captured_logs() as lines:
            async with delivering(outbox, clock=HandClock(), write=breaks):
                await ended(outbox, DELIVERED)
                await ended(outbox, FAILED)
        broken = [line for line in lines if line["event"] == "webhook.broken"]
    assert [(line["webhook_id"], line["log_level"]) for line in broken] == [("msg_1", "error")] * 10
    assert {one.error for one in outbox.rows["msg_1"].tries} == {"comfyd made a mistake: KeyError"}
    assert outbox.rows["msg_2"].status is DELIVERED


async def test_a_try_that_cannot_be_recorded_is_said_and_left_alone_for_a_while() -> None:
    class Unfit(MemoryOutbox):
        """It breaks at the first record."""

        broken = 0

        async def record_try(
            self, taken: Delivery, made: DeliveryTry, status: DeliveryStatus, next_at: int | None, now: int
        ) -> None:
            """See `Store.record_try`."""
            if not self.broken:
                self.broken = 1
                raise ValueError("no such column")
            await super().record_try(taken, made, status, next_at, now)

    clock = HandClock(time.time_ns() // 1_000_000)
    async with receiver(secrets=()) as made:
        outbox = Unfit(delivery(made.url))
        with captured_logs() as lines:
            async with delivering(outbox, clock=clock) as office:
                await until(lambda: any(line["event"] == "webhook.unrecorded" for line in lines))
                reads = outbox.reads
                office.deliverer.wake()
                await until(lambda: outbox.reads > reads)
                assert len(made.heard) == 1
                clock.advance(HOLD_MS)
                office.deliverer.wake()
                await ended(outbox, DELIVERED)
        assert len(made.heard) == 2


# --- the clock


class ShiftedClock(HandClock):
    """A clock of which somebody sets the wall; what counts durations does not follow."""

    def __init__(self, now: int) -> None:
        super().__init__(now)
        self.shift = 0

    def now(self) -> int:
        """See `Clock`."""
        return self.time + self.shift


@pytest.mark.fault(27)
@pytest.mark.parametrize("hours", [-5, 5])
async def test_a_clock_that_jumps_neither_delays_a_try_for_hours_nor_hurries_it(hours: int) -> None:
    clock = ShiftedClock(1_700_000_000_000)
    begun = clock.time

    async def jump(_request: web.Request) -> web.StreamResponse:
        clock.shift = hours * 3_600_000
        return web.Response(status=500)

    async with receiver(jump, 500, 200, secrets=()) as made:
        outbox = MemoryOutbox(delivery(made.url))
        async with delivering(outbox, clock=clock):
            await ended(outbox, DELIVERED)
        assert len(made.heard) == 3
    assert 305_000 <= clock.time - begun <= 340_000


@pytest.mark.fault(27)
async def test_what_is_owed_after_the_clock_was_set_back_is_due_at_once() -> None:
    clock = ShiftedClock(time.time_ns() // 1_000_000)
    async with receiver() as made:
        outbox = MemoryOutbox()
        async with delivering(outbox, clock=clock) as office:
            await until(lambda: outbox.reads > 0)
            clock.shift = -60_000
            outbox.owe(delivery(made.url, next_at=clock.now()))
            office.deliverer.wake()
            await ended(outbox, DELIVERED)


@pytest.mark.fault(27)
async def test_what_was_put_off_by_a_clock_that_was_far_ahead_is_not_put_off_for_years() -> None:
    clock = HandClock(time.time_ns() // 1_000_000)
    year = 365 * 86_400_000
    async with receiver(500, 204, secrets=()) as made:
        outbox = MemoryOutbox(delivery(made.url, next_at=clock.time + year))
        async with delivering(outbox, clock=clock):
            await ended(outbox, DELIVERED)
    first, second = outbox.rows["msg_1"].tries
    assert second.at - first.at == pytest.approx(5_250, abs=20)


@pytest.mark.fault(27)
async def test_what_a_clock_far_ahead_put_off_does_not_wait_behind_other_retries() -> None:
    async with receiver() as made:
        now = SystemClock().now()
        soon = delivery("http://127.0.0.1:1/", 0, next_at=now + 3_600_000)
        ahead = [
            delivery(made.url, number + 1, next_at=now + 365 * 86_400_000)
            for number in range(REPAIRED_AT_ONCE + 1)
        ]
        outbox = MemoryOutbox(soon, *ahead)
        with captured_logs() as lines:
            async with delivering(outbox):
                await until(lambda: all(row.next_at != ahead[0].next_at for row in outbox.rows.values()))
                await ended(outbox, DELIVERED)
        repairs = [line["deliveries"] for line in lines if line["event"] == "webhook.clock_was_ahead"]
    assert repairs == [REPAIRED_AT_ONCE, 1]
    assert outbox.rows["msg_0"] == soon


@pytest.mark.fault(27)
async def test_what_is_put_off_while_comfyd_runs_is_found_some_minutes_later() -> None:
    clock = LaterClock()
    async with receiver(secrets=()) as made:
        outbox = MemoryOutbox()
        async with delivering(outbox, clock=clock) as office:
            await until(lambda: outbox.reads > 0)
            soon = delivery("http://127.0.0.1:1/", 2, next_at=clock.now() + 2 * REPAIR_EVERY_MS)
            outbox.owe(soon, delivery(made.url, 1, next_at=clock.now() + 365 * 86_400_000))
            clock.ahead = REPAIR_EVERY_MS
            office.deliverer.wake()
            await ended(outbox, DELIVERED)
        assert outbox.rows["msg_2"] == soon


class LaterClock(SystemClock):
    """So many milliseconds have passed at once."""

    ahead = 0

    def now(self) -> int:
        """See `Clock`."""
        return super().now() + self.ahead

    def monotonic(self) -> int:
        """See `Clock`."""
        return super().monotonic() + self.ahead


# --- many receivers


async def test_an_endpoint_that_answers_gets_four_at_a_time_and_no_more() -> None:
    free = asyncio.Event()

    async def slow(_request: web.Request) -> web.StreamResponse:
        if made.heard[0].message_id != made.heard[-1].message_id:
            await free.wait()
        return web.Response(status=204)

    async with receiver(slow) as made:
        outbox = MemoryOutbox(*(delivery(made.url, number) for number in range(30)))
        async with delivering(outbox):
            await until(lambda: made.at_once == EACH)
            free.set()
            await ended(outbox, DELIVERED, 30)
        assert made.most_at_once == EACH
        assert len({heard.message_id for heard in made.heard}) == 30


@pytest.mark.fault(29)
async def test_a_receiver_that_hangs_gets_one_at_a_time_and_is_tried_again_later() -> None:
    async with receiver(hang) as made:
        outbox = MemoryOutbox(*(delivery(made.url, number, next_at=number) for number in range(3)))
        async with delivering(outbox, timeout=0.1):
            await until(lambda: all(row.tries for row in outbox.rows.values()))
        assert made.most_at_once <= EACH
        assert made.heard[0].message_id == "msg_0"
    assert {row.status for row in outbox.rows.values()} == {PENDING}
    assert outbox.rows["msg_0"].tries[0].error == "it did not answer within 0.1 seconds"


@pytest.mark.fault(29)
async def test_two_hundred_that_hang_do_not_slow_a_good_one() -> None:
    """The first time nobody knows that they hang, and each has more to hear; the good one is the last."""
    async with receiver(hang, host="0.0.0.0") as bad, receiver() as good:  # noqa: S104 - all of 127.0.0.0/8
        hanging = [
            delivery(f"http://127.0.1.{number}:{bad.port}", 1_000 * turn + number, next_at=turn)
            for turn in range(3)
            for number in range(1, 201)
        ]
        outbox = MemoryOutbox(*hanging, delivery(good.url, 999_999, next_at=1_000))
        async with delivering(outbox, timeout=15.0) as office:
            begun = time.monotonic()
            await good.heard_from(1)
            first = time.monotonic() - begun
            await until(lambda: len(bad.heard) >= 200)
            assert await served(office.deliverer.wake, outbox, good) < 2.0
        assert bad.most_at_once == 200  # one each
        assert good.verified == 2
    assert first < 10.0, first  # about 1 s on a machine that is free


@pytest.mark.fault(29)
async def test_a_long_backlog_at_receivers_that_hang_does_not_hide_a_good_one() -> None:
    async with receiver(hang, host="0.0.0.0") as bad, receiver() as good:  # noqa: S104 - all of 127.0.0.0/8
        hanging = [
            delivery(f"http://127.0.1.{number}:{bad.port}", 1_000 * number + turn, next_at=number)
            for number in range(1, 61)
            for turn in range(40)
        ]
        outbox = MemoryOutbox(*hanging, delivery(good.url, 999_999, next_at=1_000))
        async with delivering(outbox, timeout=15.0):
            begun = time.monotonic()
            await good.heard_from(1)
            assert time.monotonic() - begun < 5.0  # a third of a second on a machine that is free


async def served(wake: Any, outbox: MemoryOutbox, good: Receiver) -> float:
    """How many seconds it takes the good one to hear of something new."""
    begun, before = time.monotonic(), len(good.heard)
    outbox.owe(delivery(good.url, 1_000_000, next_at=SystemClock().now()))
    wake()
    await good.heard_from(before + 1)
    return time.monotonic() - begun


@pytest.mark.fault(29)
async def test_a_thousand_that_are_known_to_hang_do_not_slow_one_that_is_new() -> None:
    async with receiver(hang, host="0.0.0.0") as bad, receiver() as good:  # noqa: S104 - all of 127.0.0.0/8
        endpoints = [f"http://127.1.{number // 250}.{1 + number % 250}:{bad.port}" for number in range(1_000)]
        outbox, lanes = MemoryOutbox(), Lanes()
        for endpoint in endpoints:
            lanes.remember(endpoint, Manners.HUNG)
        async with delivering(outbox, lanes=lanes, timeout=15.0) as office:
            outbox.owe(*(delivery(url, number) for number, url in enumerate(endpoints)))
            office.deliverer.wake()
            await until(lambda: len(bad.heard) >= SLOW - KEPT_SLOW)
            assert await served(office.deliverer.wake, outbox, good) < 3.0
        assert bad.most_at_once <= SLOW - KEPT_SLOW


async def test_no_step_is_hot_while_there_is_no_room() -> None:
    """Something becomes due meanwhile: that alone is no reason to look before somebody leaves."""
    clock, lanes, steps = SystemClock(), Lanes(), 0
    outbox = MemoryOutbox(delivery("http://127.0.0.1:1/", next_at=clock.now() + 100))
    async with sending() as sender, Deliverer(outbox, sender, Metrics(), clock, lanes) as deliverer:
        await deliverer.step()  # reads that something is due soon
        lanes.count("http://hang", QUICK, slow=False)
        lanes.count("http://hang", SLOW, slow=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.6):
                while True:
                    await deliverer.step()
                    steps += 1
    assert steps == 1
    assert outbox.rows["msg_1"].tries == ()


# --- the end


@pytest.mark.fault(29)
async def test_a_stop_does_not_wait_for_who_hangs_and_leaves_no_try_behind() -> None:
    async with receiver(hang) as made:
        outbox = MemoryOutbox(delivery(made.url))
        async with delivering(outbox):
            await made.heard_from(1)
            begun = time.monotonic()
        assert time.monotonic() - begun < 5
        await until(lambda: made.at_once == 0)
    row = outbox.rows["msg_1"]
    assert (row.status, row.tries) == (PENDING, ())
    assert not [one for one in asyncio.all_tasks() if one.get_name().startswith("webhook:")]


async def test_a_stop_waits_a_moment_for_an_answer_that_is_near() -> None:
    asked = asyncio.Event()

    async def soon(_request: web.Request) -> web.StreamResponse:
        asked.set()
        await asyncio.sleep(0.1)
        return web.Response(status=204)

    async with receiver(soon) as made:
        outbox = MemoryOutbox(delivery(made.url))
        async with delivering(outbox):
            await asyncio.wait_for(asked.wait(), 20)
    assert outbox.rows["msg_1"].status is DELIVERED
