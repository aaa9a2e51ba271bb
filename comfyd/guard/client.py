"""HTTP to the urls that clients give; never to an address that the guard refuses.

Redirects are followed by hand and judged one by one. Proxies of the environment are not used, cookies are not
kept, bodies are not decoded, and a connection serves one request, so that each one was judged for its own.
"""

import errno
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Final, TypeAlias

import aiohttp
import structlog
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from comfyd.errors import FetchFailed, HostNotFound, InvalidUrl, TooManyRedirects
from comfyd.guard.names import SystemNames
from comfyd.guard.policy import Guard, blocked

log = structlog.get_logger("comfyd.guard")

MOST_REDIRECTS: Final = 3
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_CONNECT_SECONDS: Final = 10.0
_READ_AHEAD: Final = 128 * 1024

Lookup: TypeAlias = Callable[[str], Awaitable[Sequence[str]]]
"""Host name -> its addresses. Raises `OSError`, which is a `socket.gaierror` where there is none."""

AddressInfo: TypeAlias = tuple[int, int, int, str, tuple[Any, ...]]
"""As from `socket.getaddrinfo`: family, type, protocol, canonical name, socket address."""


class Reply:
    """An answer whose body is still to come. Valid inside its context only."""

    def __init__(self, response: aiohttp.ClientResponse, url: URL) -> None:
        self._response = response
        self.status: int = response.status
        self.headers: Mapping[str, str] = response.headers
        """Names in any case."""
        self.length: int | None = response.content_length
        """Bytes of the body as announced, if they were."""
        self.url = url
        """What was asked last, after the redirects; may hold a signature, so that it is never shown."""
        self.host = url.raw_host or ""

    async def read(self) -> bytes:
        """The next bytes as they come; none at the end. Raises `FetchFailed` where the body breaks off."""
        with _translated(self.host):
            return await self._response.content.readany()


class GuardedClient:
    """Requests to urls that clients give. Lives as long as the process; made by `open_client`."""

    def __init__(self, guard: Guard, guarded: aiohttp.ClientSession, trusting: aiohttp.ClientSession) -> None:
        self.guard = guard
        self._guarded = guarded
        self._trusting = trusting

    @asynccontextmanager
    async def get(self, url: str) -> AsyncIterator[Reply]:
        """What is at a url, after up to three redirects; any status. Time is for the caller to limit.

        Raises `InvalidUrl`, `BlockedAddress`, `HostNotFound`, `TooManyRedirects`, `FetchFailed`.
        """
        target = self.guard.check_url(url)
        for _ in range(MOST_REDIRECTS + 1):
            async with self._exchange("GET", target) as reply:
                location = reply.headers.get("Location") if reply.status in _REDIRECTS else None
                if location is None:
                    yield reply
                    return
            target = self.guard.follow(target, location)
        raise TooManyRedirects(f"it redirects more than {MOST_REDIRECTS} times, at last to {target.raw_host}")

    @asynccontextmanager
    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> AsyncIterator[Reply]:
        """Send a body once, to this url and no other; a redirect is an answer too. Raises as `get`."""
        async with self._exchange("POST", self.guard.check_url(url), body, headers) as reply:
            yield reply

    @asynccontextmanager
    async def _exchange(
        self, method: str, url: URL, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[Reply]:
        host = url.raw_host or ""
        session = self._trusting if self.guard.allows_name(host) else self._guarded
        with _translated(host):
            response = await session.request(method, url, data=body, headers=headers, allow_redirects=False)
        try:
            yield Reply(response, url)
        finally:
            response.close()


@asynccontextmanager
async def open_client(
    guard: Guard, *, lookup: Lookup | None = None, silence: float = 30.0
) -> AsyncIterator[GuardedClient]:
    """A client behind this guard. A server may be silent for so many seconds.

    Names are looked up in the system unless a `lookup` is given.
    """
    resolve = lookup or SystemNames()
    async with (
        _session(_Resolver(resolve, guard), partial(checked_socket, guard), silence) as guarded,
        _session(_Resolver(resolve, None), None, silence) as trusting,
    ):
        yield GuardedClient(guard, guarded, trusting)


class _Refused(OSError):
    """A socket that must not connect.

    An `OSError`, because any other would get lost on its way through the attempts on several addresses; with
    words that are always the same, because it is itself raised at their end only if all say the same.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EACCES, "refused by the guard")
        self.reason = reason


def checked_socket(guard: Guard, info: AddressInfo) -> socket.socket:
    """A socket for this address, to be connected to it next. Raises an `OSError` for one that is refused."""
    family, kind, protocol, _, address = info
    reason = guard.refusal(str(address[0]))
    if reason is not None:
        log.info("guard.refused", address=address[0], reason=reason)
        raise _Refused(reason)
    return socket.socket(family, kind, protocol)


class _Resolver(AbstractResolver):
    """Names for aiohttp, less the addresses that a guard refuses. Lives as long as its session.

    It only makes the better error: aiohttp does not ask it for literals, and what it answers is judged again
    when a socket is made.
    """

    def __init__(self, lookup: Lookup, guard: Guard | None) -> None:
        self._lookup = lookup
        self._guard = guard

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = list(dict.fromkeys(await self._lookup(host)))
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        good = [address for address in found if self._guard is None or self._guard.refusal(address) is None]
        if self._guard is not None and not good:
            reason = self._guard.refusal(found[0]) or ""
            log.info("guard.refused", host=host, addresses=found, reason=reason)
            raise blocked(host, reason)
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST
            )
            for address in good
        ]

    async def close(self) -> None:
        """Nothing is held."""


def _session(
    resolver: AbstractResolver, factory: Callable[[AddressInfo], socket.socket] | None, silence: float
) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            resolver=resolver,
            use_dns_cache=False,
            force_close=True,
            limit=0,  # whoever fetches bounds how much at once: what hangs must not hold up the rest
            socket_factory=factory,
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "comfyd"},
        auto_decompress=False,
        trust_env=False,
        read_bufsize=_READ_AHEAD,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=silence),
    )


@contextmanager
def _translated(host: str) -> Iterator[None]:
    """aiohttp's exceptions as ours. Theirs are not shown as the cause, because some hold the whole url."""
    try:
        yield
    except aiohttp.ClientConnectorDNSError as error:
        raise _no_address(host, error.os_error) from None
    except aiohttp.ClientConnectorCertificateError:
        raise FetchFailed(f"{host} has a TLS certificate that is not valid for it", retryable=False) from None
    except aiohttp.ClientConnectorError as error:
        if isinstance(error.os_error, _Refused):
            raise blocked(host, error.os_error.reason) from None
        raise FetchFailed(f"{host} cannot be connected to: {_words(error.os_error)}") from None
    except aiohttp.InvalidURL:
        raise InvalidUrl(f"{host} cannot be asked for this url") from None
    except TimeoutError:
        raise FetchFailed(f"{host} does not answer") from None
    except aiohttp.ClientResponseError:
        raise FetchFailed(f"{host} does not speak HTTP") from None
    except (aiohttp.ClientError, OSError):
        raise FetchFailed(f"{host} broke off") from None


def _no_address(host: str, error: OSError) -> FetchFailed | HostNotFound:
    if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
        return FetchFailed(f"{host} cannot be looked up: the name server does not answer")
    return HostNotFound(f"{host} has no address: there is no such host name")


def _words(error: OSError) -> str:
    """What the system said, in plain words."""
    if isinstance(error, ssl.SSLError):
        return "no TLS"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return (error.strerror or type(error).__name__).lower()
