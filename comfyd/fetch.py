"""What is behind a url that a client gives, as a file; never believes what its server says of it.

The way out is `comfyd.guard`. Time, tries, bytes and pace are bounded by `[inputs]`, and whatever goes wrong,
no file is left behind.
"""

import asyncio
import email.utils
from collections.abc import AsyncIterator
from datetime import UTC
from email.message import Message
from pathlib import Path
from typing import Final
from urllib.parse import unquote

import msgspec
import structlog
from yarl import URL

from comfyd.clock import Clock
from comfyd.config import InputsConfig
from comfyd.disk import write_stream
from comfyd.errors import FetchFailed, InputTooLarge, InputTooSlow
from comfyd.guard import GuardedClient, Reply

log = structlog.get_logger("comfyd.fetch")

WINDOW_SECONDS: Final = 10.0
"""How long a server may be slow; see `inputs.min_rate`."""
BACKOFF_FIRST_MS: Final = 500
BACKOFF_MOST_MS: Final = 30_000
RETRY_AFTER_MOST_MS: Final = 60_000
"""A server that wants more patience than this gets so much."""
_AGAIN: Final = frozenset({408, 425, 429})
_LONGEST_NAME: Final = 255


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """A file that has arrived whole."""

    size_bytes: int
    sha256: str
    """Hexadecimal."""
    name: str | None
    """What its server or its url calls it: one printable line without a slash, and safe for nothing."""


class Fetcher:
    """Fetches urls that clients give. Lives as long as the process; any number of fetches may run at once."""

    def __init__(
        self, config: InputsConfig, client: GuardedClient, clock: Clock, window: float = WINDOW_SECONDS
    ) -> None:
        self._config = config
        self._client = client
        self._clock = clock
        self._window = window

    async def fetch(self, url: str, target: Path) -> Fetched:
        """Write what is at a url to `target`, where nothing is yet. If this raises, `target` is not there.

        Raises, beside what `GuardedClient.get` does: `InputTooLarge`, `InputTooSlow`; `StorageError` for
        this machine's own disk. Messages name the host, not the rest of the url.
        """
        host = self._client.guard.check_url(url).raw_host
        seconds = self._config.timeout
        try:
            async with asyncio.timeout(seconds):
                return await self._try(url, target)
        except TimeoutError:
            raise InputTooSlow(
                f"{host} took longer than the {seconds:g} seconds of inputs.timeout", details={"host": host}
            ) from None

    async def _try(self, url: str, target: Path) -> Fetched:
        """Fetch, and again after errors that may pass."""
        until = self._clock.monotonic() + round(self._config.timeout * 1000)
        attempt = 1
        while True:
            try:
                return await self._fetch_once(url, target)
            except FetchFailed as error:
                pause = self._pause(attempt, error.details.get("retry_after"))
                if not error.retryable or attempt >= self._config.attempts:
                    raise
                if self._clock.monotonic() + pause >= until:
                    raise
                log.info("fetch.again", reason=error.message, attempt=attempt, pause_ms=pause)
            await self._clock.sleep(pause)
            attempt += 1

    def _pause(self, attempt: int, retry_after: int | None) -> int:
        """Milliseconds before the next try: doubling and spread, at least what the server asks for."""
        pause = min(BACKOFF_FIRST_MS << (attempt - 1), BACKOFF_MOST_MS)
        spread = round(pause * (1 - self._clock.jitter() / 2))
        return max(spread, min((retry_after or 0) * 1000, RETRY_AFTER_MOST_MS))

    async def _fetch_once(self, url: str, target: Path) -> Fetched:
        async with self._client.get(url) as reply:
            self._check(reply)
            digest = await write_stream("an input cannot be written", target, self._body(reply))
            return Fetched(
                size_bytes=digest.size_bytes,
                sha256=digest.sha256,
                name=_name(reply.headers.get("Content-Disposition"), reply.url, URL(url)),
            )

    async def _body(self, reply: Reply) -> AsyncIterator[bytes]:
        """What comes, as long as it is not too much and not too slow."""
        pace, size = _Pace(self._config.min_rate, self._window, self._clock), 0
        while block := await pace.read(reply):
            size += len(block)
            self._check_size(reply.host, size)
            yield block

    def _check(self, reply: Reply) -> None:
        """Whether an answer has a body that is wanted. Raises `FetchFailed` and `InputTooLarge`."""
        if reply.status != 200:
            details = {"host": reply.host, "status": reply.status}
            wanted = self._retry_after(reply)
            if wanted is not None:
                details["retry_after"] = wanted
            raise FetchFailed(
                f"{reply.host} answered {reply.status}",
                details=details,
                retryable=reply.status in _AGAIN or reply.status >= 500,
            )
        encoding = reply.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in {"", "identity"}:
            raise FetchFailed(
                f"{reply.host} sends the file encoded, which was not asked for",
                details={"host": reply.host},
                retryable=False,
            )
        self._check_size(reply.host, reply.length or 0)

    def _check_size(self, host: str, size: int) -> None:
        most = self._config.max_bytes
        if size > most:
            raise InputTooLarge(
                f"{host} sends more than the {most} bytes of inputs.max_bytes",
                details={"host": host, "limit": most},
            )

    def _retry_after(self, reply: Reply) -> int | None:
        """Seconds that the server asks to wait, from a number or a date; None if it does not say."""
        text = reply.headers.get("Retry-After", "").strip()
        if text.isascii() and text.isdigit():
            return int(text[:9])
        try:
            moment = email.utils.parsedate_to_datetime(text)
            moment = moment.replace(tzinfo=moment.tzinfo or UTC)
            return max(0, round(moment.timestamp() - self._clock.now() / 1000))
        except (ValueError, OverflowError):
            return None


class _Pace:
    """How fast a body comes, over windows of waiting for it. Lives as long as one answer.

    Only waiting counts: a disk of ours that is slow is no fault of the server.
    """

    def __init__(self, min_rate: int, window: float, clock: Clock) -> None:
        self._min_rate = min_rate
        self._window = window
        self._clock = clock
        self._waited = 0.0
        self._received = 0

    async def read(self, reply: Reply) -> bytes:
        """As `Reply.read`. Raises `InputTooSlow` as soon as a window is over in which too little came."""
        if not self._min_rate:
            return await reply.read()
        while True:
            began = self._clock.monotonic()
            try:
                async with asyncio.timeout(max(self._window - self._waited, 0.001)):
                    block = await reply.read()
            except TimeoutError:
                self._turn(reply.host)
                continue
            self._received += len(block)
            self._waited += (self._clock.monotonic() - began) / 1000
            if block and self._waited >= self._window:
                self._turn(reply.host)
            return block

    def _turn(self, host: str) -> None:
        """A window is over."""
        if self._received < self._min_rate * self._window:
            raise InputTooSlow(
                f"{host} sends less than the {self._min_rate} bytes per second of inputs.min_rate",
                details={"host": host},
            )
        self._waited = 0.0
        self._received = 0


def _name(disposition: str | None, *urls: URL) -> str | None:
    """What a file is called: by its server, else by the first of these urls that ends in a name."""
    header = Message()
    header["Content-Disposition"] = disposition or ""
    given = [value for key, value in header.get_params([], "Content-Disposition") if key == "filename"]
    # The one with a character set, `filename*`, comes last and goes before the plain one (RFC 6266).
    texts = [email.utils.collapse_rfc2231_value(value) for value in reversed(given)]
    for text in (*texts, *(unquote(url.raw_path.rpartition("/")[2]) for url in urls)):
        last = text.replace("\\", "/").rpartition("/")[2]
        name = "".join(filter(str.isprintable, last)).strip()[-_LONGEST_NAME:]
        if name.strip("."):
            return name
    return None
