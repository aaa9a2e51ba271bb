"""What happens to a task, as it happens, by Server-Sent Events or WebSocket; never the truth itself.

A stream begins with what is known, goes on with what comes, says every change of the task's status, and ends
after the one that is final. The row is the truth: every status is read fresh from it, and a quiet stream
looks at it from time to time. How all this is put into words is a `Telling`; comfyd's own API says the whole
task under `status`, beside `progress preview output log`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Final, Protocol

import msgspec
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from comfyd.api import requests
from comfyd.api.responses import base_url, encoded
from comfyd.api.sights import Sight, look
from comfyd.api.state import State, state_of
from comfyd.api.tasks import shown
from comfyd.api.waiting import LOOK_SECONDS, found, gone, unless_stopped
from comfyd.errors import MalformedRequest, StoreError, TaskNotFound
from comfyd.progress import Event, Preview, Watcher
from comfyd.tasks import Artefact, Task

SEND_SECONDS: Final = 30.0
"""How long a reader may take nothing of what is sent before it is given up."""
NORMAL, GOING_AWAY, TOO_SLOW = 1000, 1001, 1008
"""Close codes of a WebSocket."""

_MARK: Final = Event(name="mark")
_ARTEFACT: Final = msgspec.json.Decoder(Artefact)


class Telling(Protocol):
    """How one stream puts into words what happens. Lives as long as the stream."""

    quiet: float
    """Seconds without an event after which the row is looked at and the client is told that we are here."""
    caching: str
    """What `Cache-Control` says of the stream."""

    def standing(self, task: Task) -> object:
        """What of a row makes a status: the task is told anew when it is another than before."""

    async def task(self, sight: Sight) -> Sequence[Event]:
        """The task, for the first time or because it stands otherwise. If it has ended the last is final."""

    async def waiting(self, task: Task) -> Sequence[Event]:
        """What there may be to say of a task that stands as before."""

    async def happened(self, event: Event) -> Sequence[Event]:
        """An event of the board that is no status."""

    def preview(self, preview: Preview) -> Event:
        """A picture."""


class OwnTelling:
    """The words of comfyd's own API."""

    caching = "no-store"

    def __init__(self, connection: HTTPConnection, quiet: float = LOOK_SECONDS) -> None:
        self.quiet = quiet
        self._connection = connection
        self._links = state_of(connection).links
        self._base = base_url(connection)

    def standing(self, task: Task) -> object:
        """See `Telling`."""
        return task.status, task.cancel_requested_at

    async def task(self, sight: Sight) -> Sequence[Event]:
        """See `Telling`: the whole of it."""
        view = await shown(self._connection, sight)
        return [Event(name="status", data=encoded(view), final=sight.task.status.terminal)]

    async def waiting(self, task: Task) -> Sequence[Event]:  # noqa: ARG002 - nothing, whatever the task
        """See `Telling`."""
        return ()

    async def happened(self, event: Event) -> Sequence[Event]:
        """See `Telling`."""
        if event.picture is not None:
            return [self.preview(event.picture)]
        if event.name == "output":
            view = await self._links.output(artefact_of(event), self._base)
            return [Event(name="output", data=encoded(view))]
        return [event]

    def preview(self, preview: Preview) -> Event:
        """See `Telling`."""
        body = {"node_id": preview.node_id, "image_type": preview.image_type, "data": preview.base64}
        return Event(name="preview", data=encoded(body), picture=preview)


class Reader:
    """One client's view of one task's events. Lives as long as its stream.

    The watcher was entered before the first look at the row, so that nothing falls in between.
    """

    def __init__(self, state: State, task_id: str, watcher: Watcher, telling: Telling) -> None:
        self._state = state
        self._task_id = task_id
        self._watcher = watcher
        self._telling = telling
        self._marks = 0
        self._standing: object = None
        self._picture: Preview | None = None

    async def opening(self) -> Sequence[Event]:
        """What there is to say at first. Raises `TaskNotFound`."""
        events = await self._look()
        picture = self._state.board.preview(self._task_id)
        if picture is None or events[-1].final:
            return events
        self._picture = picture
        return [*events, self._telling.preview(picture)]

    async def _look(self) -> Sequence[Event]:
        """The task as it is now.

        Progress that was waiting is older than this: a mark tells where it ends, so that none falls back.
        """
        sight = await look(self._state, self._task_id)
        self._watcher.put(_MARK)
        self._marks += 1
        events = await self._telling.task(sight)
        self._standing = self._telling.standing(sight.task)  # not before all of it can be told
        return events

    async def following(self) -> AsyncIterator[Event | None]:
        """What happens from then on, to the end or until the reader was too slow; None when it is quiet."""
        while True:
            event = await self._watcher.next(self._telling.quiet)
            if event is None and self._watcher.overrun:
                return
            if event is _MARK:
                self._marks -= 1
                continue
            if event is not None and self._said(event):
                continue
            try:
                events = await self._words(event)
            except StoreError:
                events = ()  # what was to be told is found at the next look
            for each in events or (None,):
                yield each
            if events and events[-1].final:
                return

    def _said(self, event: Event) -> bool:
        """Whether the last look at the task, or the opening, has told this already."""
        if event.picture is not None:
            return event.picture is self._picture
        return self._marks > 0 and event.name == "progress"

    async def _words(self, event: Event | None) -> Sequence[Event]:
        """What an event has to say, or that there was none for a while."""
        if event is None:
            task = await found(self._state, self._task_id)
            if self._telling.standing(task) == self._standing:
                return await self._telling.waiting(task)
        elif event.name != "status":
            return await self._telling.happened(event)
        return await self._look()


def artefact_of(event: Event) -> Artefact:
    """The output that an event of the board is about."""
    return _ARTEFACT.decode(event.data)


class EventStream(Response):
    """The answer that never ends before its task; 404 if there is no such task."""

    media_type = "text/event-stream"

    def __init__(self, request: Request, task_id: str, telling: Telling) -> None:
        super().__init__(headers={"Cache-Control": telling.caching, "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._state = state_of(request)
        self._task_id = task_id
        self._telling = telling

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        state = self._state
        with state.board.watch(self._task_id) as watcher:
            reader = Reader(state, self._task_id, watcher, self._telling)
            first = await reader.opening()
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            if scope["method"] != "HEAD":
                work = _stream(reader, watcher, first, send)
                await unless_stopped(work, gone(receive), state.closing)
            with contextlib.suppress(TimeoutError):
                await _write(send, b"", more=False)


async def events(request: Request) -> Response:
    """`GET /api/tasks/{task_id}/events`."""
    return EventStream(request, requests.task_id(request), OwnTelling(request))


async def _stream(reader: Reader, watcher: Watcher, first: Sequence[Event], send: Send) -> None:
    with contextlib.suppress(TimeoutError, TaskNotFound):
        await _write(send, b"".join(map(_server_sent, first)))
        if first[-1].final:
            return
        async for event in reader.following():
            await _write(send, b": still here\n\n" if event is None else _server_sent(event))
        if watcher.overrun:
            await _write(send, b": too slow: read the task, or connect again\n\n")


def _server_sent(event: Event) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (event.name.encode(), event.data)


async def _write(send: Send, data: bytes, *, more: bool = True) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        await send({"type": "http.response.body", "body": data, "more_body": more})


async def websocket(socket: WebSocket) -> None:
    """`/api/tasks/{task_id}/ws`: text frames `{"event", "data"}`.

    With `?binary_previews=true` a preview is a binary frame: the picture as it is.
    """
    task_id = requests.task_id(socket)
    binary = requests.truth(socket.query_params, "binary_previews")
    state = state_of(socket)
    # A client may leave at any moment; that is no error.
    with state.board.watch(task_id) as watcher, contextlib.suppress(WebSocketDisconnect):
        reader = Reader(state, task_id, watcher, OwnTelling(socket))
        first = await reader.opening()
        await socket.accept()
        done = await unless_stopped(
            _speak(reader, first, socket, binary), gone(socket.receive), state.closing
        )
        if socket.client_state is WebSocketState.CONNECTED:
            code = TOO_SLOW if watcher.overrun else NORMAL if done else GOING_AWAY
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SEND_SECONDS):
                    await socket.close(code)


async def _speak(reader: Reader, first: Sequence[Event], socket: WebSocket, binary: bool) -> None:
    with contextlib.suppress(TimeoutError, TaskNotFound):
        for known in first:
            await _say(socket, known, binary)
        if first[-1].final:
            return
        async for event in reader.following():
            if event is not None:  # the server pings by itself
                await _say(socket, event, binary)


async def _say(socket: WebSocket, event: Event, binary: bool) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        if binary and event.picture is not None:
            await socket.send_bytes(event.picture.data)
        else:
            await socket.send_text(f'{{"event":"{event.name}","data":{event.data.decode()}}}')


async def not_a_websocket(_: Request) -> Response:
    """`GET /api/tasks/{task_id}/ws` without an upgrade."""
    raise MalformedRequest("this address speaks WebSocket; /events is the same over plain HTTP")
