"""From a submission to a verified message, through the real database and a simulated ComfyUI."""

import asyncio
import stat
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from comfyd.clock import SystemClock
from comfyd.config import Config, OutboundConfig, WebhooksConfig, public
from comfyd.deliveries import Delivery, DeliveryFilter, DeliveryStatus, DeliveryTry
from comfyd.guard import SystemNames
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.store.base import Store
from comfyd.store.sqlite import open_sqlite
from comfyd.tasks import EventType, Status, Webhook
from comfyd.webhooks import AT_ONCE
from comfyd.webhooks.schedule import RETRIES_MS
from tests.support.service import bench, colored, configuration
from tests.support.trap import hang as hanging
from tests.support.trap import open_trap
from tests.support.values import new_task
from tests.webhooks.rig import (
    OLD_SECRET,
    SECRET,
    MemoryOutbox,
    delivering,
    delivery,
    receiver,
    until,
)

EVERYTHING = tuple(EventType)
GONE = "http://127.0.0.1:9"
"""Where no ComfyUI listens."""


def configured(data: Path, url: str, **webhooks: Any) -> Config:
    """A configuration that may reach this machine."""
    return msgspec.structs.replace(
        configuration(data, url),
        webhooks=WebhooksConfig(**{"secret": SECRET, **webhooks}),
        outbound=OutboundConfig(allow=("127.0.0.0/8",)),
    )


async def test_a_task_tells_its_webhook_what_it_does_and_both_secrets_verify(tmp_path: Path) -> None:
    async with Simulator(SimulatorOptions(step_seconds=0.01)) as simulator, receiver() as made:
        made.secrets = (SECRET, OLD_SECRET)
        config = configured(tmp_path, simulator.url, old_secrets=(OLD_SECRET,))
        async with bench(config) as running:
            task = await running.submit(colored(1), webhook=Webhook(url=made.url, events=EVERYTHING))
            await running.ended(task.id)
            heard = await made.heard_from(3)
            await until(lambda: made.verified == 6)
            told = {one.told["type"]: one.told for one in heard}
            assert set(told) == {"task.started", "task.output", "task.completed"}
            assert told["task.completed"]["data"]["task_id"] == task.id
            assert len({one.message_id for one in heard}) == 3
            async with asyncio.timeout(20):
                while not await all_delivered(running.store, 3):
                    await asyncio.sleep(0.01)
    assert not config.webhook_secret.exists()


async def all_delivered(store: Any, count: int) -> bool:
    page = await store.list_deliveries(DeliveryFilter(), None, 100)
    return [one.status for one in page.deliveries] == [DeliveryStatus.DELIVERED] * count


async def test_a_task_that_is_canceled_while_it_waits_tells_at_once(tmp_path: Path) -> None:
    async with receiver() as made, bench(configured(tmp_path, GONE)) as running:
        task = await running.submit(webhook=Webhook(url=made.url))
        begun = time.monotonic()
        assert (await running.state.control.cancel(task.id)).status is Status.CANCELED
        (heard,) = await made.heard_from(1)
        assert heard.told["type"] == "task.canceled"
        assert time.monotonic() - begun < 5


async def test_without_a_secret_one_is_made_and_kept_and_shown_nowhere(tmp_path: Path) -> None:
    config = configured(tmp_path, GONE, secret=None)
    async with bench(config, works=False):
        secret = config.webhook_secret.read_text().strip()
    assert stat.S_IMODE(config.webhook_secret.stat().st_mode) == 0o600
    async with receiver(secrets=(secret,)) as made, bench(config) as running:
        task = await running.submit(webhook=Webhook(url=made.url))
        await running.state.control.cancel(task.id)
        await made.heard_from(1)
        assert made.verified == 1
        assert secret not in f"{public(config)}{config!r}{running.ground!r}"


@pytest.mark.fault(28)
async def test_what_one_process_owes_the_next_one_delivers_with_the_same_id(tmp_path: Path) -> None:
    async with receiver(500, 204) as made:
        config = configured(tmp_path, GONE)
        async with bench(config, works=False) as first:
            task = await first.submit(webhook=Webhook(url=made.url))
            await first.state.control.cancel(task.id)
            (owed,) = (await first.store.list_deliveries(DeliveryFilter(), None, 10)).deliveries
        assert owed.status is DeliveryStatus.PENDING
        async with bench(config) as second:
            await made.heard_from(1)
            async with asyncio.timeout(20):
                while (after := await second.store.delivery(owed.id)) is None or not after.tries:
                    await asyncio.sleep(0.01)
            assert after.round == 1
            await second.store.redeliver(owed.id, second.state.clock.now())
            second.state.wake_deliverer()
            await made.heard_from(2)
        assert [one.message_id for one in made.heard] == [owed.id, owed.id]
        assert len({one.body for one in made.heard}) == 1


@pytest.mark.fault(29)
async def test_with_the_real_table_two_hundred_that_hang_do_not_slow_a_good_one(tmp_path: Path) -> None:
    async with (
        open_trap(hanging, host="0.0.0.0") as bad,  # noqa: S104 - all of 127.0.0.0/8
        receiver() as good,
        open_sqlite(tmp_path / "comfyd.db") as store,
    ):
        urls = [f"http://127.0.1.{number}:{bad.port}/hook" for number in range(1, 201)]
        await asyncio.gather(*(owe(store, number, url) for number, url in enumerate(urls)))
        await owe(store, 200, good.url)
        async with delivering(store, timeout=15.0):
            begun = time.monotonic()
            await good.heard_from(1)
            assert time.monotonic() - begun < 10  # about 1 s on a machine that is free
            await until(lambda: bad.accepted == 200)
        page = await store.list_deliveries(DeliveryFilter(), None, 500)
    assert Counter(one.status for one in page.deliveries) == {
        DeliveryStatus.PENDING: 200,
        DeliveryStatus.DELIVERED: 1,
    }


async def owe(store: Store, number: int, url: str) -> None:
    """A task that ends, and whose webhook has to hear of it."""
    task_id, now = f"5e1f6c1e-0000-4000-8000-{number:012}", 1_700_000_000_000
    await store.add(new_task(task_id, webhook=Webhook(url=url)), None, now)
    await store.cancel(task_id, now + number)


@pytest.mark.parametrize("tries", [3, len(RETRIES_MS)], ids=["a later try", "the last try"])
async def test_a_redelivery_asked_for_during_a_try_is_made_at_once(tmp_path: Path, tries: int) -> None:
    """The try that is under way fails then: it neither ends the delivery nor puts it off for hours."""
    release = asyncio.Event()

    async def hold(_request: web.Request) -> web.StreamResponse:
        if len(made.heard) > 1:
            return web.Response(status=204)
        await release.wait()
        return web.Response(status=500)

    async with open_sqlite(tmp_path / "comfyd.db") as store, receiver(hold) as made:
        await owe(store, 1, made.url)
        now = SystemClock().now()
        for number in range(tries):
            row = await only_delivery(store)
            tried = DeliveryTry(number=number + 1, at=now, duration_ms=1, status=500, error="it answered 500")
            await store.record_try(row, tried, DeliveryStatus.PENDING, now + number, now)
        async with delivering(store) as office:
            await made.heard_from(1)
            again = await store.redeliver((await only_delivery(store)).id, SystemClock().now())
            assert again is not None
            assert (again.status, again.round) == (DeliveryStatus.PENDING, 0)
            office.deliverer.wake()
            release.set()
            await until(lambda: office.tried("delivered") == 1)
        after = await only_delivery(store)
    assert (after.status, after.round) == (DeliveryStatus.DELIVERED, 1)
    assert [one.status for one in after.tries] == [500] * (tries + 1) + [204]


async def only_delivery(store: Store) -> Delivery:
    (row,) = (await store.list_deliveries(DeliveryFilter(), None, 10)).deliveries
    return row


async def test_names_that_nobody_answers_for_hold_up_no_other_receiver() -> None:
    done = threading.Event()

    def ask(host: str) -> list[str]:
        if host.startswith("dead"):
            done.wait(30)
        return ["127.0.0.1"]

    try:
        async with receiver() as made:
            dead = [delivery(f"http://dead{number}.test/hook", number, next_at=1) for number in range(2, 80)]
            good = delivery(f"http://good.test:{made.port}/hook", 1, next_at=2)
            async with delivering(MemoryOutbox(*dead, good), lookup=SystemNames(AT_ONCE, ask=ask)):
                begun = time.monotonic()
                await made.heard_from(1)
                assert time.monotonic() - begun < 8  # less than any of the others takes
    finally:
        done.set()
