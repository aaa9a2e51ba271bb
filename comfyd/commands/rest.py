"""A client of comfyd's own REST API, for commands; never opens the database or speaks to ComfyUI.

Outputs may lie with other servers. They get nothing of ours: no password, no header, no cookie.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import aiohttp
import msgspec
from yarl import URL

from comfyd.clock import Clock
from comfyd.commands.downloads import announcement, safe_name, save
from comfyd.commands.events import EventParser, ServerEvent
from comfyd.commands.exits import DamagedDownload, ServerRefused, ServerUnreachable, UnreadableFile
from comfyd.commands.uploads import outgoing
from comfyd.config import Config, masked

Json = dict[str, Any]
Answer = TypeVar("Answer")

ENDED: Final = frozenset({"COMPLETED", "FAILED", "CANCELED"})
"""The words of the API for a task that has ended."""

CONNECT_S: Final = 5.0
SILENCE_S: Final = 60.0
"""How long an answer may be silent; event streams send a comment more often than that."""
POLL_S: Final = 5.0
"""What `?wait` asks for where the event stream cannot be had."""
PAUSE_MS: Final = 500
PATIENCE_MS: Final = 60_000
"""How long a server that is watched may be away, for a restart, before watching ends."""
TRIES: Final = 3
PASSING: Final = frozenset({500, 502, 503, 504})
"""Statuses of answers that another try may change."""
EXPIRED: Final = frozenset({400, 401, 403})
"""Statuses that a signed url is refused with when it has expired: 400 is Google's."""


class RestClient:
    """A comfyd over HTTP. Made by `connect`, and lives as long as that block.

    Raises `ServerUnreachable` where no whole answer comes, `ServerRefused` where the answer is an error.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, clock: Clock, silence: float) -> None:
        self._session = session
        self._base = URL(url.rstrip("/"))
        self._shown = masked(url.rstrip("/"))
        self._clock = clock
        self._silence = silence

    async def submit(self, body: Mapping[str, Any]) -> Json:
        """Submit a task; the body is the API's. Tried again if no answer comes: each try has the same key."""
        headers = {"Idempotency-Key": self._clock.new_id()}

        async def once() -> Json:
            return await self._json("POST", "/api/tasks", json=dict(body), headers=headers)

        return await self._persistently(once)

    async def upload(self, path: Path) -> str:
        """Bring a file of this machine to comfyd; the input value that names it. Raises `UnreadableFile`."""
        # A name of the file system need not be Unicode.
        name = path.name.encode(errors="replace").decode()

        async def once() -> Json:
            with outgoing(path) as file, self._translated(self._base):
                async with asyncio.timeout(self._silence) as patience, aclosing(file.blocks()) as blocks:
                    return await self._json(
                        "POST",
                        "/api/inputs",
                        params={"name": name},
                        data=renewing(patience, self._silence, blocks),
                        headers={
                            "Content-Type": "application/octet-stream",
                            "Content-Length": str(file.size_bytes),
                        },
                    )

        try:
            answer = await self._persistently(once)
        except ServerRefused as error:
            said = error.message.removeprefix(f"{name}: ")
            raise ServerRefused(f"{path}: {said}", details=error.details) from error
        return str(answer["inputs"][0]["reference"])

    async def task(self, task_id: str, wait: float | None = None) -> Json:
        """The task as it stands; with `wait` as soon as it has ended, or after so many seconds."""
        params = {} if wait is None else {"wait": f"{wait:g}"}
        return await self._json("GET", f"/api/tasks/{task_id}", params=params)

    async def events(self, task_id: str) -> AsyncGenerator[ServerEvent, None]:
        """What happens to the task from now on. Ends with the task, or when the server ends the stream."""
        parser = EventParser()
        headers = {"Accept": "text/event-stream"}
        url = self._own(f"/api/tasks/{task_id}/events")
        async with self._request("GET", url, headers=headers) as response:
            if response.content_type != "text/event-stream":
                raise _refused(response.status, b"")
            async for chunk in self._chunks(url, response):
                try:
                    for event in parser.feed(chunk):
                        yield event
                except (ValueError, msgspec.DecodeError) as error:
                    raise _unreachable(f"comfyd at {self._shown} sent a broken event: {error}") from error

    async def watch(self, task_id: str, show: Callable[[Json], None]) -> Json:
        """The task after it has ended; `show` is called with each state that is seen on the way.

        Follows the event stream and falls back to polling where there is none. A server that goes away for
        less than a minute is waited for: the next process takes the task up.
        """
        streaming = True
        heard = self._clock.monotonic()
        while True:
            pause = PAUSE_MS
            try:
                state = await self.task(task_id, wait=None if streaming else POLL_S)
                heard = self._clock.monotonic()
                show(state)
                if state["status"] in ENDED:
                    return state
                if not streaming or await self._stream(state, show):
                    pause = 0
            except ServerRefused as error:
                if not streaming or error.details["status"] == 404:
                    raise
                # Something between us and comfyd lets no stream through.
                streaming = False
            except ServerUnreachable:
                if self._clock.monotonic() - heard > PATIENCE_MS:
                    raise
            await self._clock.sleep(pause)

    async def _stream(self, state: Json, show: Callable[[Json], None]) -> bool:
        """Show the events of one stream as states of the task; whether it told of the task's end."""
        async with aclosing(self.events(state["task_id"])) as events:
            async for event in events:
                if event.name == "progress":
                    progress = event.data.get("progress", event.data)
                    state = {**state, "status": "PROCESSING", "queue_position": None, "progress": progress}
                    show(state)
                elif event.name == "status":
                    state = {**state, **event.data}
                    if state["status"] in ENDED:
                        return True
                    show(state)
        return False

    async def download(self, task_id: str, output: Json, directory: Path) -> Path:
        """Save one of the task's `outputs` in `directory`; see `downloads.save`.

        A url that is refused may have expired since the task was read: the task is read once more for a new
        one.
        """
        try:
            return await self._saved(output, directory)
        except ServerRefused as error:
            if error.details["status"] not in EXPIRED:
                raise
            renewed = _again(output, await self.task(task_id))
            if renewed is None or renewed["url"] == output["url"]:
                raise
        return await self._saved(renewed, directory)

    async def _saved(self, output: Json, directory: Path) -> Path:
        announced = announcement(output)
        url = _exactly(output["url"]) if "://" in output["url"] else self._own(output["url"])
        # Files are small already, and what is decoded on the way has no length that could be checked.
        headers = {"Accept-Encoding": "identity"}

        async def once() -> Path:
            async with self._request("GET", url, headers=headers) as response:
                if announced.sha256 is None:
                    _check_picture(response, announced.name)
                return await save(self._chunks(url, response), announced, directory)

        return await self._persistently(once)

    async def _json(self, method: str, path: str, **options: Any) -> Json:
        """A POST follows no redirect: it would arrive as a GET, or bring what is ours to somebody else."""
        url = self._own(path)
        async with self._request(method, url, allow_redirects=method == "GET", **options) as response:
            with self._translated(url):
                body = await response.read()
            try:
                return msgspec.json.decode(body, type=Json)
            except msgspec.DecodeError:
                raise _refused(response.status, body) from None

    def _own(self, path: str) -> URL:
        return URL(f"{self._base}{path}", encoded=True)

    @asynccontextmanager
    async def _request(self, method: str, url: URL, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer that is not an error. Only comfyd itself gets our password, wherever it redirects to."""
        own = self._is_own(url)
        if own and self._base.user:
            url = url.with_user(self._base.user).with_password(self._base.password)
        with self._translated(url):
            response = await self._session.request(method, url, **options)
        async with response:
            if response.status >= 400:
                with self._translated(url):
                    body = await response.read()
                raise _refused(response.status, body) if own else _refused_elsewhere(response.status, url)
            yield response

    def _is_own(self, url: URL) -> bool:
        return (url.scheme, url.host, url.port) == (self._base.scheme, self._base.host, self._base.port)

    async def _chunks(self, url: URL, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        with self._translated(url):
            async for chunk in response.content.iter_any():
                yield chunk

    async def _persistently(self, once: Callable[[], Awaitable[Answer]]) -> Answer:
        """Try again what broke on the way or may pass; not where nobody listens at all."""
        for _ in range(TRIES - 1):
            try:
                return await once()
            except DamagedDownload:
                pass
            except ServerUnreachable as error:
                if error.details["refused"]:
                    raise
            except ServerRefused as error:
                if error.details["status"] not in PASSING:
                    raise
            await self._clock.sleep(PAUSE_MS)
        return await once()

    @contextmanager
    def _translated(self, url: URL) -> Iterator[None]:
        """Let aiohttp's errors leave as `ServerUnreachable`; `url` is where the request went."""
        who, hint = (
            f"comfyd at {self._shown}",
            ": is it running? Start it with `comfyd serve`, or name another with --url",
        )
        if not self._is_own(url):
            who, hint = f"{url.host_port_subcomponent}, which has the output,", ""
        try:
            yield
        except aiohttp.ClientConnectorError as error:
            reason = error.os_error.strerror or str(error.os_error)
            raise _unreachable(f"{who} cannot be reached ({reason}){hint}", refused=True) from error
        except TimeoutError as error:
            raise _unreachable(f"{who} does not answer in time") from error
        except aiohttp.ClientError as error:
            # What goes wrong with a file that is being sent comes back as aiohttp's own error.
            if isinstance(error.__cause__, UnreadableFile):
                raise error.__cause__ from None
            # The url of an output may hold a signature.
            reason = type(error).__name__ if "://" in str(error) else str(error)
            raise _unreachable(f"{who} broke off: {reason}") from error


@asynccontextmanager
async def connect(url: str, clock: Clock, *, silence: float = SILENCE_S) -> AsyncIterator[RestClient]:
    """Open a client for the comfyd at `url`; an answer may be silent for `silence` seconds."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=silence)
    async with aiohttp.ClientSession(
        timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(), requote_redirect_url=False
    ) as session:
        yield RestClient(session, url, clock, silence)


def server_url(config: Config) -> str:
    """Where commands look for comfyd: `client.url`, or the configuration's own server on this machine."""
    return config.server.local_url if config.client.url is None else config.client.url


def _refused(status: int, body: bytes) -> ServerRefused:
    """The error of an answer, from comfyd's envelope; anything else came from some other server."""
    try:
        envelope = msgspec.json.decode(body, type=dict[str, Json])["error"]
        code, message = str(envelope["code"]), str(envelope["message"])
    except (msgspec.DecodeError, KeyError):
        reason = "something before it takes no request that long" if status == 413 else "is the url right?"
        code, message, envelope = "", f"HTTP {status} and no answer of comfyd's: {reason}", {}
    inner = envelope.get("details") or {}
    return ServerRefused(message, details={"status": status, "code": code, "details": inner})


def _refused_elsewhere(status: int, url: URL) -> ServerRefused:
    """The error of a storage. What it says is in words of its own, and the url may hold a signature."""
    message = f"{url.host_port_subcomponent}, which has the output, answers HTTP {status}"
    return ServerRefused(message, details={"status": status, "code": "", "details": {}})


def _unreachable(message: str, *, refused: bool = False) -> ServerUnreachable:
    return ServerUnreachable(message, details={"refused": refused})


def _exactly(url: str) -> URL:
    """The url as it stands, of which a signature covers each character; quoted only if it must be."""
    sendable = url.isascii() and url.isprintable() and " " not in url
    return URL(url, encoded=sendable)


def _again(output: Json, task: Json) -> Json | None:
    """The same output in a later answer; None where the task has it no more."""
    facts = ("node_id", "name", "sha256", "storage")
    wanted = [output.get(fact) for fact in facts]
    found = (other for other in task["outputs"] or () if [other.get(fact) for fact in facts] == wanted)
    return next(found, None)


def _check_picture(response: aiohttp.ClientResponse, name: str) -> None:
    """For what has no digest: that it is a picture, and that its end can be known from the answer's headers.

    Raises `DamagedDownload`. Where fewer bytes come than these headers say, aiohttp raises.
    """
    if not response.content_type.startswith("image/"):
        raise DamagedDownload(f"{safe_name(name)} arrived as {response.content_type}")
    if response.content_length is None and not _chunked(response):
        raise DamagedDownload(f"{safe_name(name)} arrived without a length: it may be a part")


def _chunked(response: aiohttp.ClientResponse) -> bool:
    return "chunked" in response.headers.get("Transfer-Encoding", "").lower()


async def renewing(
    patience: asyncio.Timeout, seconds: float, blocks: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    """The same blocks. Whoever takes them has so many seconds for each, and again after the last."""
    loop = asyncio.get_running_loop()
    async for block in blocks:
        yield block
        patience.reschedule(loop.time() + seconds)
