"""A client of comfyd's own REST API, for commands; never opens the database or speaks to ComfyUI."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import aiohttp
import msgspec

from comfyd.clock import Clock
from comfyd.commands.downloads import Announced, save
from comfyd.commands.events import EventParser, ServerEvent
from comfyd.commands.exits import DamagedDownload, ServerRefused, ServerUnreachable
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


class RestClient:
    """A comfyd over HTTP. Made by `connect`, and lives as long as that block.

    Raises `ServerUnreachable` where no whole answer comes, `ServerRefused` where the answer is an error.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, clock: Clock) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._clock = clock

    async def submit(self, body: Mapping[str, Any]) -> Json:
        """Submit a task; the body is the API's. Tried again if no answer comes: each try has the same key."""
        headers = {"Idempotency-Key": self._clock.new_id()}

        async def once() -> Json:
            return await self._json("POST", "/api/tasks", json=dict(body), headers=headers)

        return await self._persistently(once)

    async def task(self, task_id: str, wait: float | None = None) -> Json:
        """The task as it stands; with `wait` as soon as it has ended, or after so many seconds."""
        params = {} if wait is None else {"wait": f"{wait:g}"}
        return await self._json("GET", f"/api/tasks/{task_id}", params=params)

    async def events(self, task_id: str) -> AsyncGenerator[ServerEvent, None]:
        """What happens to the task from now on. Ends with the task, or when the server ends the stream."""
        parser = EventParser()
        headers = {"Accept": "text/event-stream"}
        async with self._request("GET", f"/api/tasks/{task_id}/events", headers=headers) as response:
            if response.content_type != "text/event-stream":
                raise _refused(response.status, b"")
            async for chunk in self._chunks(response):
                try:
                    for event in parser.feed(chunk):
                        yield event
                except (ValueError, msgspec.DecodeError) as error:
                    raise self._unreachable(f"sent a broken event: {error}") from error

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

    async def download(self, output: Mapping[str, Any], directory: Path) -> Path:
        """Save one of a task's `outputs` in `directory`; see `downloads.save`."""
        announced = Announced(name=output["name"], size_bytes=output["size_bytes"], sha256=output["sha256"])

        async def once() -> Path:
            async with self._request("GET", output["url"]) as response:
                return await save(self._chunks(response), announced, directory)

        return await self._persistently(once)

    async def _json(self, method: str, path: str, **options: Any) -> Json:
        async with self._request(method, path, **options) as response:
            with self._translated():
                body = await response.read()
            try:
                return msgspec.json.decode(body, type=Json)
            except msgspec.DecodeError:
                raise _refused(response.status, body) from None

    @asynccontextmanager
    async def _request(self, method: str, path: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer that is not an error; outputs may have a url of their own instead of a path."""
        url = path if "://" in path else self._url + path
        with self._translated():
            response = await self._session.request(method, url, **options)
        async with response:
            if response.status >= 400:
                with self._translated():
                    body = await response.read()
                raise _refused(response.status, body)
            yield response

    async def _chunks(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        with self._translated():
            async for chunk in response.content.iter_any():
                yield chunk

    async def _persistently(self, once: Callable[[], Awaitable[Answer]]) -> Answer:
        """Try again what broke on the way; not where nobody listens at all."""
        for _ in range(TRIES - 1):
            try:
                return await once()
            except DamagedDownload:
                pass
            except ServerUnreachable as error:
                if error.details["refused"]:
                    raise
            await self._clock.sleep(PAUSE_MS)
        return await once()

    def _unreachable(self, what: str, *, refused: bool = False) -> ServerUnreachable:
        return ServerUnreachable(f"comfyd at {masked(self._url)} {what}", details={"refused": refused})

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Let aiohttp's errors leave as `ServerUnreachable`."""
        try:
            yield
        except aiohttp.ClientConnectorError as error:
            reason = error.os_error.strerror or str(error.os_error)
            hint = "is it running? Start it with `comfyd serve`, or name another with --url"
            raise self._unreachable(f"cannot be reached ({reason}): {hint}", refused=True) from error
        except TimeoutError as error:
            raise self._unreachable("does not answer in time") from error
        except aiohttp.ClientError as error:
            raise self._unreachable(f"broke off: {error}") from error


@asynccontextmanager
async def connect(url: str, clock: Clock, *, silence: float = SILENCE_S) -> AsyncIterator[RestClient]:
    """Open a client for the comfyd at `url`; an answer may be silent for `silence` seconds."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=silence)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield RestClient(session, url, clock)


def server_url(config: Config) -> str:
    """Where commands look for comfyd: `client.url`, or the configuration's own server on this machine."""
    if config.client.url is not None:
        return config.client.url
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.server.host, config.server.host)  # noqa: S104 - read, not bound
    return f"http://{f'[{host}]' if ':' in host else host}:{config.server.port}"


def _refused(status: int, body: bytes) -> ServerRefused:
    """The error of an answer, from comfyd's envelope; anything else came from some other server."""
    try:
        envelope = msgspec.json.decode(body, type=dict[str, Json])["error"]
        code, message = str(envelope["code"]), str(envelope["message"])
    except (msgspec.DecodeError, KeyError):
        code, message, envelope = "", f"HTTP {status} and no answer of comfyd's: is the url right?", {}
    inner = envelope.get("details") or {}
    return ServerRefused(message, details={"status": status, "code": code, "details": inner})
