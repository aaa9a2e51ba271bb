"""HTTP with one ComfyUI: requests, answers, and aiohttp's exceptions as ours; never knows what a route means.

Redirects are not followed, proxies of the environment are not used, cookies are not kept, bodies are not
decoded.
"""

import errno
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import aiohttp
import msgspec
from yarl import URL

from comfyd.comfy.health import Health
from comfyd.comfy.wire import Undecodable, decode_object
from comfyd.errors import BackendUnclear, BackendUnreachable, ConfigError

LONGEST_ANSWER: Final = 256 * 1024 * 1024
"""Bytes of an answer that is read whole: /queue, /history/{id} and /object_info are megabytes at most."""
_MOST_CONNECTIONS: Final = 256
_CONNECT_SECONDS: Final = 10.0
_CLOSE_SECONDS: Final = 1.0
_READ_AHEAD: Final = 256 * 1024


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that was read whole."""

    status: int
    body: bytes


def server_url(text: str) -> URL:
    """The address of a ComfyUI, without a slash at its end. Raises `ConfigError`."""
    try:
        url = URL(text.rstrip("/"))
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a url: {error}", details={"key": "comfyui.url"}) from error
    if url.scheme not in {"http", "https"} or not url.host or url.query_string or url.fragment:
        shown = url.with_user(None) if url.host else url
        raise ConfigError(
            f"{str(shown)!r} is not the url of a ComfyUI, such as http://127.0.0.1:8188",
            details={"key": "comfyui.url"},
        )
    return url


def open_session() -> aiohttp.ClientSession:
    """The one session of a backend; whoever calls this closes it."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=_MOST_CONNECTIONS),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept-Encoding": "identity"},
        auto_decompress=False,
        trust_env=False,
        read_bufsize=_READ_AHEAD,
    )


class Client:
    """Requests to one ComfyUI. Lives as long as its backend; the session is the backend's."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: URL,
        timeout: float,
        health: Health,
        longest_answer: int = LONGEST_ANSWER,
    ) -> None:
        self._session = session
        self._url = url
        self._health = health
        self._longest_answer = longest_answer
        self.timeout = timeout
        self.place = str(url.with_user(None))
        """The address as it may be shown."""
        connect = min(timeout / 2, _CONNECT_SECONDS)  # the sooner, so that it is known which it was
        self._whole = aiohttp.ClientTimeout(total=timeout, sock_connect=connect)
        self._by_silence = aiohttp.ClientTimeout(total=None, sock_connect=connect, sock_read=timeout)

    def url(self, path: str, query: Mapping[str, str] | None = None) -> URL:
        """The full address of a route; `path` is percent-encoded already and begins with a slash."""
        url = URL(f"{self._url}{path}", encoded=True)
        return url.with_query(query) if query else url

    async def call(
        self, method: str, path: str, body: Any = None, query: Mapping[str, str] | None = None
    ) -> Answer:
        """One request with a JSON body or none, and its whole answer within the configured time.

        Raises `BackendUnreachable` where nothing was sent, `BackendUnclear` where no whole answer came.
        """
        data = None if body is None else body if isinstance(body, bytes) else msgspec.json.encode(body)
        headers = None if data is None else {"Content-Type": "application/json"}
        with self.translated(f"{method} {path}"):
            async with self._session.request(
                method,
                self.url(path, query),
                data=data,
                headers=headers,
                allow_redirects=False,
                timeout=self._whole,
            ) as response:
                content = await self._read_whole(response)
        self._health.answered()
        return Answer(status=response.status, body=content)

    async def _read_whole(self, response: aiohttp.ClientResponse) -> bytes:
        parts: list[bytes] = []
        length = 0
        async for chunk in response.content.iter_any():
            parts.append(chunk)
            length += len(chunk)
            if length > self._longest_answer:
                raise BackendUnclear(f"ComfyUI's answer is longer than {self._longest_answer} bytes")
        return b"".join(parts)

    async def get_object(self, path: str) -> dict[str, Any]:
        """The JSON object that a route answers. Raises as `call`; `BackendUnclear` for anything but a 200."""
        return read_object(await self.call("GET", path), f"GET {path}")

    @asynccontextmanager
    async def exchange(
        self,
        method: str,
        url: URL,
        *,
        headers: Iterable[tuple[str, str]] = (),
        data: Any = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request whose bodies are streamed: it may take as long as something moves. Raises as `call`."""
        with self.translated(f"{method} {url.path}"):
            response = await self._session.request(
                method,
                url,
                headers=tuple(headers),
                data=data,
                allow_redirects=False,
                timeout=self._by_silence,
            )
        self._health.answered()
        try:
            yield response
        finally:
            response.close()  # a connection whose answer was read to its end is back in the pool already

    async def chunks(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The body as it comes. Raises `BackendUnclear` where it stops before its end."""
        with self.translated(f"{response.method} {response.url.path}"):
            # errors of whoever consumes the chunks do not pass through here: they end the generator instead
            async for chunk in response.content.iter_any():
                yield chunk

    @asynccontextmanager
    async def websocket(self, client_id: str, longest: int) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """An open WebSocket under this client id. Raises as `call`; the connecting is not bounded in time."""
        with self.translated("GET /ws"):
            websocket = await self._session.ws_connect(
                self.url("/ws", {"clientId": client_id}),
                max_msg_size=longest,
                autoping=True,
                # A pong is due after half of this. ComfyUI answers late while it loads models (Q20).
                heartbeat=2 * self.timeout,
                timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSE_SECONDS),
            )
        try:
            yield websocket
        finally:
            await websocket.close()

    @contextmanager
    def translated(self, what: str) -> Iterator[None]:
        """aiohttp's exceptions as ours; what they prove goes to `health`."""
        try:
            yield
        except aiohttp.ConnectionTimeoutError as error:
            self._health.timed_out()
            raise BackendUnreachable(f"no connection in time at {self.place}") from error
        except aiohttp.ClientConnectorError as error:
            reason = f"{_words(error.os_error)} at {self.place}"
            self._health.refused(reason)
            raise BackendUnreachable(reason) from error
        except TimeoutError as error:
            self._health.timed_out()
            raise BackendUnclear(f"{self.place} did not answer {what} in time") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            text = str(error) or type(error).__name__
            raise BackendUnclear(f"{self.place} broke off {what}: {text}") from error


def read_object(answer: Answer, what: str) -> dict[str, Any]:
    """The JSON object of a clean 200. Raises `BackendUnclear` for anything else."""
    if answer.status != 200:
        raise unexpected(answer.status, what)
    try:
        return decode_object(answer.body)
    except Undecodable as error:
        raise unreadable(what, error) from error


def unexpected(status: int, what: str) -> BackendUnclear:
    """An answer with a status that proves nothing."""
    return BackendUnclear(f"ComfyUI answered {what} with {status}", details={"status": status})


def unreadable(what: str, error: Undecodable) -> BackendUnclear:
    """A 200 whose body is not what it should be."""
    return BackendUnclear(f"ComfyUI answered {what} with something that is {error}", details={"status": 200})


def _words(error: OSError) -> str:
    """What the system said, in plain words."""
    if error.errno == errno.ECONNREFUSED:
        return "connection refused"
    if isinstance(error, socket.gaierror):
        return "no such host name"
    if isinstance(error, ssl.SSLError | ssl.CertificateError):
        return "the TLS connection failed"
    return (error.strerror or str(error) or type(error).__name__).lower()
