"""What happens to a task, as it happens, by Server-Sent Events or WebSocket; never the truth itself.

Both begin with the whole task under `status`, go on with `progress preview output log`, send the whole task
again whenever its status changes, and end after the status that is final. The row is the truth: every
`status` is read fresh from it, and a quiet stream looks at it from time to time.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

import msgspec
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from comfyd.api import requests
from comfyd.api.responses import base_url, encoded
from comfyd.api.state import State, state_of
from comfyd.api.tasks import looked_up
from comfyd.api.waiting import LOOK_SECONDS, found, gone, unless_stopped
from comfyd.errors import MalformedRequest, TaskNotFound
from comfyd.progress import Event, Watcher
from comfyd.tasks import Artefact, Status

SEND_SECONDS: Final = 30.0
"""How long a reader may take nothing of what is sent before it is given up."""
NORMAL, GOING_AWAY, TOO_SLOW = 1000, 1001, 1008
"""Close codes of a WebSocket."""

_MARK: Final = Event(name="mark", data=b"")
_FLEETING: Final = frozenset({"progress", "preview"})
_ARTEFACT: Final = msgspec.json.Decoder(Artefact)
_HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}


class Reader:
    """One client's view of one task's events, as (name, JSON, picture). Lives as long as its stream.

    The watcher was entered before the first look at the row, so that nothing falls in between. After `quiet`
    seconds without an event the row is looked at.
    """

    def __init__(
        self, connection: HTTPConnection, task_id: str, watcher: Watcher, quiet: float = LOOK_SECONDS
    ) -> None:
        self._quiet = quiet
        self._connection = connection
        self._state: State = state_of(connection)
        self._task_id = task_id
        self._base = base_url(connection)
        self._watcher = watcher
        self._marks = 0
        self._status: Status | None = None

    async def status(self) -> Event:
        """The whole task as it is now. Raises `TaskNotFound`.

        Progress that was waiting is older than this: a mark tells where it ends, so that none falls back.
        """
        task, view = await looked_up(self._connection, self._task_id)
        self._watcher.put(_MARK)
        self._marks += 1
        self._status = task.status
        return Event(name="status", data=encoded(view), final=task.status.terminal)

    async def following(self) -> AsyncIterator[Event | None]:
        """What happens from then on, to the end or until the reader was too slow; None when it is quiet."""
        while True:
            event = await self._watcher.next(self._quiet)
            if event is None:
                if self._watcher.overrun:
                    return
                task = await found(self._state, self._task_id)
                if task.status is self._status:
                    yield None
                    continue
                event = await self.status()
            elif event is _MARK:
                self._marks -= 1
                continue
            elif event.name == "status":
                event = await self.status()
            elif event.name == "output":
                view = await self._state.links.output(_ARTEFACT.decode(event.data), self._base)
                event = Event(name="output", data=encoded(view))
            elif self._marks and event.name in _FLEETING:
                continue
            yield event
            if event.final:
                return


class EventStream(Response):
    """The answer that never ends before its task; 404 if there is no such task."""

    def __init__(self, request: Request, task_id: str) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._request = request
        self._task_id = task_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        state = state_of(self._request)
        with state.board.watch(self._task_id) as watcher:
            reader = Reader(self._request, self._task_id, watcher)
            first = await reader.status()
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            if scope["method"] != "HEAD":
                work = _stream(reader, watcher, first, send)
                await unless_stopped(work, gone(receive), state.closing)
            with contextlib.suppress(TimeoutError):
                await _write(send, b"", more=False)


async def events(request: Request) -> Response:
    """`GET /api/tasks/{task_id}/events`."""
    return EventStream(request, requests.task_id(request))


async def _stream(reader: Reader, watcher: Watcher, first: Event, send: Send) -> None:
    with contextlib.suppress(TimeoutError, TaskNotFound):
        await _write(send, _server_sent(first))
        if first.final:
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
        reader = Reader(socket, task_id, watcher)
        first = await reader.status()
        await socket.accept()
        done = await unless_stopped(
            _speak(reader, first, socket, binary), gone(socket.receive), state.closing
        )
        if socket.client_state is WebSocketState.CONNECTED:
            code = TOO_SLOW if watcher.overrun else NORMAL if done else GOING_AWAY
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SEND_SECONDS):
                    await socket.close(code)


async def _speak(reader: Reader, first: Event, socket: WebSocket, binary: bool) -> None:
    with contextlib.suppress(TimeoutError, TaskNotFound):
        await _say(socket, first, binary)
        if first.final:
            return
        async for event in reader.following():
            if event is not None:  # the server pings by itself
                await _say(socket, event, binary)


async def _say(socket: WebSocket, event: Event, binary: bool) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        if binary and event.picture is not None:
            await socket.send_bytes(event.picture)
        else:
            await socket.send_text(f'{{"event":"{event.name}","data":{event.data.decode()}}}')


async def not_a_websocket(_: Request) -> Response:
    """`GET /api/tasks/{task_id}/ws` without an upgrade."""
    raise MalformedRequest("this address speaks WebSocket; /events is the same over plain HTTP")
