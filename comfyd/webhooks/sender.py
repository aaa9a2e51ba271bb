"""One signed POST to a receiver: what is sent, and what its answer means; never repeats and never records."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Final

import msgspec

from comfyd import __version__
from comfyd.clock import Clock
from comfyd.deliveries import Delivery
from comfyd.errors import FetchFailed, InputError, InvalidUrl
from comfyd.guard import GuardedClient, Reply
from comfyd.webhooks.schedule import Answer
from comfyd.webhooks.signing import Signatures

Render = Callable[[Delivery], Awaitable[bytes]]
"""Writes the body: `{type, timestamp, data}` as JSON of less than 20 kB. Raises `ComfydError`."""

READ_BYTES: Final = 64 * 1024
"""What is read of an answer, to be thrown away: a receiver that is cut off may take it for a failure."""
READ_SECONDS: Final = 1.0
ERROR_LENGTH: Final = 300
"""Characters of an error that are kept."""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent, ready and signed."""

    headers: dict[str, str]
    body: bytes


class Sender:
    """Writes and sends messages. Lives as long as the process; `timeout` is in seconds."""

    def __init__(
        self, client: GuardedClient, signatures: Signatures, render: Render, timeout: float, clock: Clock
    ) -> None:
        self._client = client
        self._signatures = signatures
        self._render = render
        self._timeout = timeout
        self._clock = clock

    async def write(self, delivery: Delivery) -> Message:
        """The message as it is sent now. Raises `ComfydError`, or `TimeoutError` where it takes too long."""
        async with asyncio.timeout(self._timeout):
            body = await self._render(delivery)
        headers = {"content-type": "application/json", "user-agent": f"comfyd/{__version__}"}
        headers |= self._signatures.headers(delivery.id, self._clock.now(), body)
        return Message(headers=headers, body=body)

    async def send(self, url: str, message: Message) -> Answer:
        """Send it once. What the network, the guard and the receiver do is an answer too: nothing raises."""
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(self._timeout):
                    posting = self._client.post(url, message.body, message.headers)
                    reply = await stack.enter_async_context(posting)
            except TimeoutError:
                return Answer(error=f"it did not answer within {self._timeout:g} seconds")
            except InputError as exc:
                return Answer(error=one_line(exc.message), hopeless=isinstance(exc, InvalidUrl))
            await _read_away(reply)
            return _judged(reply)


def _judged(reply: Reply) -> Answer:
    status = reply.status
    if 200 <= status < 300:
        return Answer(status=status)
    redirects = ", a redirect, which is not followed" if 300 <= status < 400 else ""
    error = f"it answered {status}{redirects}"
    return Answer(status=status, error=error, retry_after=reply.headers.get("Retry-After"))


async def _read_away(reply: Reply) -> None:
    """Let the receiver say what it has to say, within bounds: its status is all that counts."""
    left = READ_BYTES
    with suppress(TimeoutError, FetchFailed):
        async with asyncio.timeout(READ_SECONDS):
            while left > 0 and (block := await reply.read()):
                left -= len(block)


def one_line(text: str) -> str:
    """An error as it is kept with a try."""
    return " ".join(text.split())[:ERROR_LENGTH]
