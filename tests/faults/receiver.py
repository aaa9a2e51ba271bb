"""A webhook receiver as clients run them: it checks every signature and remembers what came."""

import base64
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec
from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

PATH: Final = "/hook"
SECRET: Final = "whsec_" + base64.b64encode(b"a secret that only the tests use").decode()


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """One request. `verified` by the official library; `answered` is the status it got, `at` seconds."""

    id: str
    type: str
    task_id: str
    verified: bool
    answered: int
    at: float


class Receiver:
    """A running receiver. Lives as long as the block of `open_receiver`; what it hears of may die."""

    def __init__(self, chance: random.Random) -> None:
        self.url = ""
        self.received: list[Received] = []
        self.unwilling = 0.0
        """The part of messages of which the first try is answered with 500."""
        self._chance = chance
        self._webhook = Webhook(SECRET)

    async def handle(self, request: web.Request) -> web.Response:
        """Any request to the receiver."""
        body = await request.read()
        try:
            self._webhook.verify(body, dict(request.headers))
            verified = True
        except WebhookVerificationError:
            verified = False
        document = msgspec.json.decode(body)
        id_ = request.headers.get("webhook-id", "")
        known = any(each.id == id_ for each in self.received)
        answered = 500 if not known and self._chance.random() < self.unwilling else 200
        self.received.append(
            Received(
                id=id_,
                type=str(document.get("type")),
                task_id=str(document.get("data", {}).get("task_id")),
                verified=verified,
                answered=answered,
                at=time.monotonic(),
            )
        )
        return web.Response(status=answered)


@asynccontextmanager
async def open_receiver(chance: random.Random) -> AsyncIterator[Receiver]:
    """Serve until the block ends."""
    receiver = Receiver(chance)
    application = web.Application()
    application.router.add_post(PATH, receiver.handle)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}{PATH}"
        yield receiver
    finally:
        await runner.cleanup()
