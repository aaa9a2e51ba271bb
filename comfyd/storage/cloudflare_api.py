"""Cloudflare's API for the images of one account: calls, answers, errors, its limit; never what is in a file.

Pages of developers.cloudflare.com that this follows: fundamentals/"Make API calls" (the token; the envelope
of `success`, `errors` and `result`), fundamentals/"Rate limits" (1,200 calls in five minutes, `retry-after`),
and the API's list "Cloudflare Images errors" (codes 54xx).
"""

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import IO, Any, Final
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from comfyd.clock import Clock
from comfyd.config import CfImagesStorageConfig
from comfyd.disk import opened
from comfyd.errors import ConfigError, StorageError

CALLS: Final = 1200
WINDOW: Final = 305_000
"""Milliseconds with at most `CALLS` calls: five minutes, and what calls differ in on their way."""
PATIENCE: Final = 60_000
"""Milliseconds that a call waits at most where Cloudflare says `retry-after`; told more, it fails at once."""
PAUSE: Final = 10_000
"""Milliseconds to wait where Cloudflare does not say how long."""
TRIES: Final = 4

ACCOUNT: Final = frozenset({5403, 7000, 7003})
"""Codes for an account that there is not, or that has no Images."""
TOKEN: Final = frozenset({1000, 6003, 6111, 9106, 9109, 10000})
FULL: Final = 5453

_OWN_HOST: Final = "api.cloudflare.com"
_ANSWER_BYTES: Final = 1 << 20
_CONNECTIONS: Final = 32
_CONNECT_SECONDS: Final = 10.0
_TEXT_ERROR: Final = re.compile(r"ERROR (\d{4,5}):?\s*([^\n<]*)")
_HEADER_WORD: Final = re.compile(r"[!-~]+")


class Said(msgspec.Struct, frozen=True):
    """One thing that Cloudflare finds wrong, by its own number; 0 where it has none."""

    code: int = 0
    message: str = ""


class _Envelope(msgspec.Struct, frozen=True):
    success: bool
    errors: tuple[Said, ...] | None = None
    result: msgspec.Raw = msgspec.Raw(b"null")


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that was read whole. One that is not the API's own has neither `errors` nor a `result`."""

    status: int
    errors: tuple[Said, ...] = ()
    result: msgspec.Raw | None = None
    """JSON, where the call did what it was asked."""

    @property
    def codes(self) -> frozenset[int]:
        """The numbers of what is wrong."""
        return frozenset(said.code for said in self.errors)

    @property
    def fine(self) -> bool:
        """Whether the call did what it was asked."""
        return self.status // 100 == 2 and self.result is not None

    @property
    def missing(self) -> bool:
        """Whether there is no such image, though the account is right."""
        return self.status == 404 and bool(self.errors) and not self.codes & ACCOUNT


class FileForm(msgspec.Struct, frozen=True, kw_only=True):
    """A form with a file, which can be sent again."""

    fields: Mapping[str, str]
    open: Callable[[], IO[bytes]]
    filename: str
    content_type: str

    def form(self, source: IO[bytes]) -> aiohttp.FormData:
        """The form around an opened file, which is read as it is sent."""
        form = aiohttp.FormData(self.fields)
        form.add_field("file", source, filename=self.filename, content_type=self.content_type)
        return form


class Allowance:
    """When the next call may be made. Lives as long as its API, and knows of no other user of the token.

    Exact rather than quick to forget: at most `calls` in any `WINDOW`, because whoever makes one more is
    refused everything for five minutes ("Rate limits"). First come, first served.
    """

    def __init__(self, clock: Clock, calls: int = CALLS) -> None:
        self._clock = clock
        self._made: deque[int] = deque(maxlen=calls)
        self._open_from = clock.monotonic()
        self._turn = asyncio.Lock()

    async def take(self) -> None:
        """Wait until a call may be made. Raises `StorageError` while Cloudflare refuses for long."""
        async with self._turn:
            while (wait := self._wait()) > 0:
                await self._clock.sleep(wait)
            self._made.append(self._clock.monotonic())

    def refused(self, milliseconds: int) -> None:
        """Cloudflare takes no call for so long."""
        self._open_from = max(self._open_from, self._clock.monotonic() + min(milliseconds, WINDOW))

    def _wait(self) -> int:
        now = self._clock.monotonic()
        if self._open_from - now > PATIENCE:
            raise _busy(self._open_from - now)
        full = len(self._made) == self._made.maxlen
        return max(self._open_from - now, self._made[0] + WINDOW - now if full else 0)


class CloudflareApi:
    """The images of one account, as calls. Made by `open_api`, which owns the session.

    A path is what follows `.../images/v1`, percent-encoded. No call is repeated, except where Cloudflare says
    when to (429).
    """

    def __init__(
        self, session: aiohttp.ClientSession, root: URL, token: str, allowance: Allowance, timeout: float
    ) -> None:
        self._session = session
        self._root = str(root)
        self._host = root.host
        self._token = token
        self._allowance = allowance
        self._timeout = timeout

    async def call(self, what: str, method: str, path: str, upload: FileForm | None = None) -> Reply:
        """One request and its whole answer, whatever it says. Raises `StorageError` where there is none."""
        async with AsyncExitStack() as stack:
            response = await self.answer(stack, what, method, path, upload)
            return await self.read(what, response)

    async def answer(
        self, stack: AsyncExitStack, what: str, method: str, path: str, upload: FileForm | None = None
    ) -> aiohttp.ClientResponse:
        """The answer to a request, open as long as the stack is; asked again where it is 429."""
        wait = PAUSE
        for _ in range(TRIES):
            await self._allowance.take()
            async with AsyncExitStack() as attempt:
                response = await self._send(attempt, what, method, path, upload)
                if response.status != 429:
                    await stack.enter_async_context(attempt.pop_all())
                    return response
                wait = _retry_after(response)
                self._allowance.refused(wait)
        raise _busy(wait)

    async def _send(
        self, stack: AsyncExitStack, what: str, method: str, path: str, upload: FileForm | None
    ) -> aiohttp.ClientResponse:
        with self._translated(what):
            data = None
            if upload is not None:
                # Open until the answer is read: an early one comes while the file is still being sent.
                data = upload.form(await stack.enter_async_context(opened(what, upload.open)))
            url = URL(f"{self._root}{path}", encoded=True)
            sent = self._session.request(method, url, data=data, allow_redirects=False)
            async with asyncio.timeout(self._timeout):
                return await stack.enter_async_context(sent)

    async def read(self, what: str, response: aiohttp.ClientResponse) -> Reply:
        """An answer as far as it is the API's: an envelope, or the line of text that uploads may end in."""
        body = bytearray()
        async for chunk in self.chunks(what, response):
            body += chunk
            if len(body) > _ANSWER_BYTES:
                break  # cut, it cannot be decoded, which is right: no answer of the API is so long
        try:
            envelope = msgspec.json.decode(body, type=_Envelope)
        except msgspec.DecodeError:
            found = _TEXT_ERROR.match(body[:1000].decode("utf-8", "replace").strip())
            return Reply(status=response.status, errors=(Said(int(found[1]), found[2]),) if found else ())
        if envelope.success:
            return Reply(status=response.status, result=envelope.result)
        return Reply(status=response.status, errors=envelope.errors or (Said(),))

    async def chunks(self, what: str, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The body as it comes. Raises `StorageError` where it stops before its end."""
        with self._translated(what):
            # errors of whoever consumes the chunks do not pass through here: they end the generator instead
            async for chunk in response.content.iter_any():
                yield chunk

    def words(self, reply: Reply) -> str:
        """What Cloudflare said, in one line."""
        if not reply.errors:
            return f"status {reply.status}"
        said = reply.errors[0]
        text = " ".join(said.message.split()).replace(self._token, "***")[:200]
        return f"{text or 'no reason given'} (code {said.code})"

    def problem(self, what: str, reply: Reply) -> StorageError:
        """What is wrong, and the key of the configuration that mends it, where one does."""
        key = None
        if FULL in reply.codes:
            text = "Cloudflare Images is full: delete images or take a larger plan"
        elif reply.codes & ACCOUNT or (reply.status == 404 and reply.errors):
            text, key = "there is no such account, or it has no Cloudflare Images", "account_id"
        elif reply.codes & TOKEN or reply.status in {401, 403}:
            text = (
                "the token is wrong or expired, lacks the permission Images Write, or is for another account"
            )
            key = "api_token"
        elif not reply.errors and reply.status < 500:
            text, key = f"{self._host} does not answer as Cloudflare's API does", "endpoint"
        else:
            text = f"{self._host} failed"
        details: dict[str, Any] = {"status": reply.status, "codes": sorted(reply.codes)}
        if key is not None:
            details["key"] = f"storage.cf_images.{key}"
        return StorageError(f"{what}: {text}: {self.words(reply)}", details=details)

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """aiohttp's exceptions as ours."""
        try:
            yield
        except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError) as exc:
            reason = "no connection in time"
            if isinstance(exc, aiohttp.ClientConnectorError):
                reason = exc.os_error.strerror or str(exc.os_error)
            details = {"key": "storage.cf_images.endpoint"} if self._host != _OWN_HOST else {}
            raise StorageError(f"{what}: cannot reach {self._host}: {reason}", details=details) from exc
        except TimeoutError as exc:
            raise StorageError(f"{what}: {self._host} did not answer in time") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise StorageError(f"{what}: {self._host} broke off ({type(exc).__name__})") from exc


@asynccontextmanager
async def open_api(
    config: CfImagesStorageConfig, clock: Clock, calls: int, timeout: float
) -> AsyncIterator[CloudflareApi]:
    """The configured account; nothing is sent yet. Raises `ConfigError`.

    At most `calls` are made in any `WINDOW`. `timeout` is in seconds, for a request as for a silence.
    """
    root, token = _root(config), _token(config)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=_CONNECTIONS),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"},
        auto_decompress=False,
        trust_env=False,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=timeout),
    ) as session:
        yield CloudflareApi(session, root, token, Allowance(clock, calls), timeout)


def _root(config: CfImagesStorageConfig) -> URL:
    """The address of the account's images."""
    account = quote(_needed("account_id", config.account_id), safe="")
    text = f"{config.endpoint.rstrip('/')}/accounts/{account}/images/v1"
    message = "storage.cf_images.endpoint is no url of an API, such as https://api.cloudflare.com/client/v4"
    unusable = ConfigError(message, details={"key": "storage.cf_images.endpoint"})
    try:
        root = URL(text, encoded=True)
        usable = root.scheme in {"http", "https"} and bool(root.host) and root.user is None
    except ValueError:
        raise unusable from None  # its text would show a password in the url
    if not usable or root.raw_query_string or root.raw_fragment:
        raise unusable
    return root


def _token(config: CfImagesStorageConfig) -> str:
    token = _needed("api_token", config.api_token)
    if not _HEADER_WORD.fullmatch(token):
        message = "storage.cf_images.api_token holds what no token does, such as a space or a line's end"
        raise ConfigError(message, details={"key": "storage.cf_images.api_token"})
    return token


def _needed(name: str, value: str | None) -> str:
    key = f"storage.cf_images.{name}"
    if not value:
        raise ConfigError(f"{key} is not set", details={"key": key})
    return value


def _retry_after(response: aiohttp.ClientResponse) -> int:
    """Milliseconds. The header is "the number of seconds, rounded up" ("Rate limits")."""
    text = response.headers.get("Retry-After", "")
    return int(text) * 1000 if text.isascii() and text.isdigit() and len(text) < 10 else PAUSE


def _busy(milliseconds: int) -> StorageError:
    seconds = -(-milliseconds // 1000)
    message = f"Cloudflare takes no calls for {seconds} s: there were more than it allows in five minutes"
    return StorageError(message, details={"retry_after": seconds})
