"""ComfyUI's WebSocket side: who is connected, what is sent to whom, and the one loop that sends it.

Faithful in its weaknesses: a reused client id leaves a deaf socket (Q3), one reader that does not read stops
the messages of everyone (Q4), an unhashable client id ends the process (Q10). It never pings.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import WSMsgType, web

from comfyd.simulator import timing

if TYPE_CHECKING:
    from collections.abc import Callable

    from comfyd.simulator.faults import Faults
    from comfyd.simulator.options import Flavor

PREVIEW_FORMATS = {"JPEG": 1, "PNG": 2}
MAX_UPLOAD_FEATURE = 104857600


@dataclass(frozen=True, slots=True)
class SocketCount:
    """Sockets open now, the most that were ever open at once, and how many were opened in all."""

    open: int
    peak: int
    total: int


class Sockets:
    """All WebSockets of one server process. `fatal` is called when ComfyUI's process would end."""

    def __init__(
        self,
        queue_info: Callable[[], dict[str, Any]],
        flavor: Flavor,
        faults: Faults,
        fatal: Callable[[], None],
    ) -> None:
        self.client_id: Any = None  # of the prompt that runs or ran last
        self.last_node_id: str | None = None
        self.peak = self.total = 0
        self._queue_info = queue_info
        self._flavor = flavor
        self._faults = faults
        self._fatal = fatal
        self._sockets: dict[Any, web.WebSocketResponse] = {}
        self._flags: dict[Any, dict[str, Any]] = {}
        self._open: dict[web.WebSocketResponse, asyncio.BaseTransport | None] = {}
        self._messages: asyncio.Queue[tuple[Any, bytes, WSMsgType]] = asyncio.Queue()

    def count(self) -> SocketCount:
        """How many sockets there are."""
        return SocketCount(len(self._open), self.peak, self.total)

    def features(self) -> dict[str, Any]:
        """The server's feature flags."""
        features: dict[str, Any] = {"supports_preview_metadata": True, "max_upload_size": MAX_UPLOAD_FEATURE}
        if self._flavor.jobs_api:
            features |= {
                "supports_model_type_tags": True,
                "extension": {"manager": {"supports_v4": True}},
                "node_replacements": True,
                "assets": False,
            }
        return features

    def send(self, event: str, data: dict[str, Any], client_id: Any) -> None:
        """Queue a JSON message for one client, or for everyone when `client_id` is None.

        It is serialised now, so `data` may change afterwards.
        """
        if self._wanted(client_id):
            self._messages.put_nowait((client_id, encode({"type": event, "data": data}), WSMsgType.TEXT))

    def broadcast_status(self) -> None:
        """Tell everyone how many prompts remain."""
        self.send("status", {"status": self._queue_info()}, None)

    def takes_metadata(self, client_id: Any) -> bool:
        """Whether this client asked for previews with metadata."""
        return bool(self._flags.get(client_id, {}).get("supports_preview_metadata"))

    def listened(self, client_id: Any) -> bool:
        """Whether anyone would get a message for this client."""
        return bool(self._sockets) if client_id is None else client_id in self._sockets

    def send_preview(self, image: bytes, kind: str, client_id: Any) -> None:
        """Queue an old-style preview (type 1): no id at all."""
        if self._wanted(client_id):
            frame = struct.pack(">II", 1, PREVIEW_FORMATS[kind]) + image
            self._messages.put_nowait((client_id, frame, WSMsgType.BINARY))

    def send_metadata_preview(
        self, image: bytes, kind: str, metadata: dict[str, Any], client_id: Any
    ) -> None:
        """Queue a preview with metadata (type 4)."""
        text = json.dumps({**metadata, "image_type": f"image/{kind.lower()}"}).encode()
        frame = struct.pack(">II", 4, len(text)) + text + image
        self._messages.put_nowait((client_id, frame, WSMsgType.BINARY))

    async def publish(self) -> None:
        """Send what is queued, one message after the other, for ever."""
        while True:
            client_id, payload, kind = await self._messages.get()
            if self._faults.sockets == "deaf":
                continue
            if client_id is None:
                for socket in list(self._sockets.values()):
                    await _send(socket, payload, kind)
            elif client_id in self._sockets:
                await _send(self._sockets[client_id], payload, kind)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """GET /ws."""
        if self._faults.sockets == "refuse":
            return web.Response(status=503)
        while self._faults.sockets == "hang" and request.transport is not None:
            await timing.pause(0.05)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        sid: Any = request.query.get("clientId", "")
        if sid:
            self._sockets.pop(sid, None)  # the old socket stays open and goes silent
        else:
            sid = uuid.UUID(timing.new_id()).hex
        self._sockets[sid] = socket
        self._flags[sid] = {}
        self._open[socket] = request.transport
        self.total += 1
        self.peak = max(self.peak, len(self._open))
        try:
            await self._greet(sid)
            await self._listen(socket, sid)
        finally:
            self._open.pop(socket, None)
            self._sockets.pop(sid, None)  # even if a newer socket has the id by now: ComfyUI's own bug
            self._flags.pop(sid, None)
        return socket

    def drop(self) -> int:
        """Break every open socket without a closing handshake; returns how many."""
        dropped = 0
        for transport in self._open.values():
            if isinstance(transport, asyncio.Transport):
                transport.abort()
                dropped += 1
        return dropped

    async def _greet(self, sid: Any) -> None:
        if self._faults.sockets == "deaf":
            return
        status = {"type": "status", "data": {"status": self._queue_info(), "sid": sid}}
        await _send(self._sockets[sid], encode(status), WSMsgType.TEXT)
        if self.client_id == sid and self.last_node_id is not None:
            executing = {"type": "executing", "data": {"node": self.last_node_id}}
            await _send(self._sockets[sid], encode(executing), WSMsgType.TEXT)

    async def _listen(self, socket: web.WebSocketResponse, sid: Any) -> None:
        first = True
        async for message in socket:
            if message.type is not WSMsgType.TEXT:
                continue
            try:
                document = json.loads(message.data)
            except json.JSONDecodeError:
                continue  # does not count as the first message
            if first and isinstance(document, dict) and document.get("type") == "feature_flags":
                self._flags[sid] = document.get("data", {})
                reply = {"type": "feature_flags", "data": self.features()}
                if self._sockets.get(sid) is not None and self._faults.sockets != "deaf":
                    await _send(self._sockets[sid], encode(reply), WSMsgType.TEXT)
            first = False

    def _wanted(self, client_id: Any) -> bool:
        try:
            return self.listened(client_id)
        except TypeError:  # a list or an object as client id
            self._fatal()
            return False


async def _send(socket: web.WebSocketResponse, payload: bytes, kind: WSMsgType) -> None:
    with contextlib.suppress(ConnectionError, RuntimeError):  # closed or closing: ComfyUI logs and goes on
        await socket.send_frame(payload, kind)


def encode(document: Any) -> bytes:
    """JSON as bytes; what the fast encoder refuses (huge integers, lone surrogates) Python's takes."""
    try:
        return orjson.dumps(document)
    except TypeError:
        return json.dumps(document).encode()
