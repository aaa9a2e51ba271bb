"""What the tests of webhooks share: an outbox in memory, a receiver that checks signatures, a deliverer."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web
from standardwebhooks import Webhook

from comfyd.clock import Clock, SystemClock
from comfyd.deliveries import Delivery, DeliveryStatus, DeliveryTry, DueDeliveries
from comfyd.errors import StoreUnavailable
from comfyd.guard import Guard, Lookup, open_client
from comfyd.loops import Crew, Health, Loop
from comfyd.metrics import Metrics
from comfyd.tasks import EventType
from comfyd.webhooks import Deliverer, Sender, Signatures
from comfyd.webhooks.deliverer import Outbox
from comfyd.webhooks.lanes import Lanes
from comfyd.webhooks.sender import Render
from tests.support.values import task

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # noqa: S105 - an example
OLD_SECRET = "whsec_ThisIsAnExampleMakeYourOwnSecret"  # noqa: S105 - an example
PATIENCE = 20.0


def delivery(url: str, number: int = 1, **facts: Any) -> Delivery:
    """A message that is owed and due."""
    return Delivery(
        **{
            "id": f"msg_{number}",
            "task_id": f"task-{number}",
            "type": EventType.COMPLETED,
            "url": url,
            "endpoint": "/".join(url.split("/")[:3]),
            "created_at": 1_000,
            "subject": task(),
            "next_at": 1_000,
            **facts,
        }
    )


async def render(owed: Delivery) -> bytes:
    """A body with what a test looks at, and letters that are no ASCII."""
    return msgspec.json.encode(
        {"type": owed.type, "timestamp": "1970-01-01T00:00:01Z", "data": {"id": owed.id, "text": "Größe"}}
    )


class MemoryOutbox:
    """The verbs of the store that concern deliveries. `refusals` says how many records are refused next."""

    def __init__(self, *owed: Delivery) -> None:
        self.rows: dict[str, Delivery] = {row.id: row for row in owed}
        self.refusals = 0
        self.reads = 0

    def owe(self, *owed: Delivery) -> None:
        """More to deliver."""
        self.rows |= {row.id: row for row in owed}

    async def due_deliveries(self, now: int, limit: int, busy: Sequence[str]) -> DueDeliveries:
        """See `Store.due_deliveries`."""
        self.reads += 1
        await asyncio.sleep(0)
        pending = [(row.next_at, row) for row in self.rows.values() if row.next_at is not None]
        later = [next_at for next_at, _ in pending if next_at > now]
        due = [(at, row) for at, row in pending if at <= now and row.endpoint not in busy]
        due.sort(key=lambda entry: entry[0])
        return DueDeliveries(
            entries=tuple(row for _, row in due[:limit]), next_due=min(later) if later else None
        )

    async def record_try(
        self, taken: Delivery, made: DeliveryTry, status: DeliveryStatus, next_at: int | None, now: int
    ) -> None:
        """See `Store.record_try`."""
        await asyncio.sleep(0)
        if self.refusals:
            self.refusals -= 1
            raise StoreUnavailable("the database does not answer")
        row = self.rows[taken.id]
        assert row.status is DeliveryStatus.PENDING
        assert (status is DeliveryStatus.PENDING) == (next_at is not None)
        assert made.number == len(row.tries) + 1
        self.rows[taken.id] = msgspec.structs.replace(
            row,
            status=status,
            next_at=next_at,
            round=row.round + 1,
            ended_at=None if next_at is not None else now,
            tries=(*row.tries, made),
        )

    async def make_deliveries_due(self, after: int, now: int, limit: int) -> int:
        """See `Store.make_deliveries_due`."""
        put_off = [row for row in self.rows.values() if row.next_at is not None and row.next_at > after]
        self.owe(*(msgspec.structs.replace(row, next_at=now) for row in put_off[:limit]))
        return len(put_off[:limit])

    def count(self, status: DeliveryStatus) -> int:
        """How many have this status."""
        return sum(row.status is status for row in self.rows.values())


class Heard(msgspec.Struct, frozen=True):
    """One request as the receiver got it."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def message_id(self) -> str:
        """The `webhook-id`."""
        return self.headers["webhook-id"]

    @property
    def told(self) -> Any:
        """The body."""
        return msgspec.json.decode(self.body)


Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Receiver:
    """A server on loopback that keeps what it hears. Each message is verified as a client would do it."""

    def __init__(self, respond: Respond, secrets: Sequence[str]) -> None:
        self._respond = respond
        self.secrets = secrets
        self.heard: list[Heard] = []
        self.verified = 0
        self.at_once = 0
        self.most_at_once = 0
        self.url = ""
        self.port = 0

    async def take(self, request: web.Request) -> web.StreamResponse:
        """Take one message."""
        body, headers = await request.read(), {name.lower(): text for name, text in request.headers.items()}
        for secret in self.secrets:
            Webhook(secret).verify(body, headers)
            self.verified += 1
        self.heard.append(Heard(request.path_qs, headers, body))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._respond(request)
        finally:
            self.at_once -= 1

    async def heard_from(self, count: int) -> list[Heard]:
        """What it heard, as soon as that is so much."""
        await until(lambda: len(self.heard) >= count)
        return self.heard


@asynccontextmanager
async def receiver(
    *answers: int | web.Response | Respond, host: str = "127.0.0.1", secrets: Sequence[str] = (SECRET,)
) -> AsyncIterator[Receiver]:
    """Answer with these in turn, the last one again and again; 204 unless told otherwise."""
    left = list(answers or (204,))

    async def respond(request: web.Request) -> web.StreamResponse:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, int):
            return web.Response(status=answer, text="thank you")
        if isinstance(answer, web.Response):
            return web.Response(status=answer.status, headers=dict(answer.headers))
        return await answer(request)

    made = Receiver(respond, secrets)
    app = web.Application()
    app.router.add_post("/{tail:.*}", made.take)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, host, 0)
    await site.start()
    made.port = runner.addresses[0][1]
    made.url = f"http://{f'[{host}]' if ':' in host else host}:{made.port}/hook"
    try:
        yield made
    finally:
        await runner.cleanup()


async def hang(_request: web.Request) -> web.StreamResponse:
    """Take the message and never answer."""
    await asyncio.Event().wait()
    raise AssertionError


class Office:
    """A deliverer at work. Lives as long as the block of `delivering`."""

    def __init__(self, deliverer: Deliverer, metrics: Metrics, health: Health) -> None:
        self.deliverer = deliverer
        self.metrics = metrics
        self.health = health

    def tried(self, outcome: str) -> float:
        """What the counter says."""
        return self.metrics.registry.get_sample_value("comfyd_webhook_tries_total", {"outcome": outcome}) or 0


@asynccontextmanager
async def sending(
    *,
    clock: Clock | None = None,
    timeout: float = 10.0,
    allow: Sequence[str] = ("127.0.0.0/8", "::1"),
    old_secrets: Sequence[str] = (),
    write: Render = render,
    lookup: Lookup | None = None,
) -> AsyncIterator[Sender]:
    """A sender that reaches this machine."""
    async with open_client(Guard.of(allow), lookup=lookup) as client:
        yield Sender(client, Signatures(SECRET, old_secrets), write, timeout, clock or SystemClock())


@asynccontextmanager
async def delivering(
    outbox: Outbox, *, clock: Clock | None = None, lanes: Lanes | None = None, **facts: Any
) -> AsyncIterator[Office]:
    """Deliver what is in the outbox until the block ends."""
    clock, metrics, health = clock or SystemClock(), Metrics(), Health()
    async with sending(clock=clock, **facts) as sender:
        deliverer = Deliverer(outbox, sender, metrics, clock, lanes)
        loop = Loop(name="webhooks", step=deliverer.step, expected=(StoreUnavailable,))
        async with deliverer, Crew((loop,), clock, health):
            yield Office(deliverer, metrics, health)


async def until(condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Wait for something that no event announces."""
    async with asyncio.timeout(patience):
        while not condition():
            await asyncio.sleep(0.005)
