"""The one WebSocket to a ComfyUI that all workers share, and who hears what; never a source of truth.

Each connection has a fresh client id: one that is used twice goes deaf (Q3). The reader hands messages on and
does nothing else; it never waits for disk or network, because a client that does not read stops ComfyUI's
messages for everyone (Q4).
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import aiohttp
import msgspec
import structlog

from comfyd.clock import Clock
from comfyd.comfy.client import Client
from comfyd.comfy.messages import (
    HANDSHAKE,
    Executing,
    ExecutionError,
    ExecutionInterrupted,
    ExecutionSuccess,
    Message,
    MessageReader,
    QueueChanged,
)
from comfyd.credentials import NO_SECRETS, Secrets
from comfyd.errors import BackendUnclear

LONGEST_FRAME: Final = 64 * 1024 * 1024
"""Bytes; a longer one closes the connection (Q17)."""
_SETTLING_SECONDS: Final = 0.1
"""How long `executing null` may come after the verdict: until then history may be empty (Q2)."""

_log = structlog.get_logger(__name__)


class Watch:
    """Hears what ComfyUI says of one prompt. A context manager: enter it before the prompt is sent.

    `client_id` is that of the connection that was open when the watch was made, to be sent with the prompt;
    None while none is open.
    """

    def __init__(
        self,
        socket: "Socket",
        prompt_id: str,
        listener: Callable[[Message], None],
        client_id: str | None,
        secrets: Secrets,
    ) -> None:
        self._socket = socket
        self._listener = listener
        self._hint = asyncio.Event()
        self._settled = asyncio.Event()
        self.prompt_id = prompt_id
        self.client_id = client_id
        self.secrets = secrets
        self.ended = False
        """An end of the prompt was announced."""
        self.heard = 0
        """How many messages came. None while connected, though it runs: a deaf socket (Q3)."""

    def __enter__(self) -> Self:
        self._socket.register(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.forget(self)

    @property
    def connected(self) -> bool:
        """Whether the connection that the prompt was sent under is the open one; else only polling helps."""
        return self.client_id is not None and self.client_id == self._socket.client_id

    async def wait(self, timeout_ms: int) -> bool:
        """Until there is a reason to look where the prompt is (True), or the time is over (False).

        Reasons: its end was announced, its connection was lost, or, without a connection, ComfyUI's queue got
        shorter. Each reason ends one wait, also if it came before.
        """
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                await self._hint.wait()
        except TimeoutError:
            return False
        if self.ended and not self._settled.is_set():
            await self._settle()
        self._hint.clear()
        return True

    async def _settle(self) -> None:
        """Give the history the moment that it takes."""
        try:
            async with asyncio.timeout(_SETTLING_SECONDS):
                await self._settled.wait()
        except TimeoutError:
            return

    def hear(self, message: Message) -> None:
        """From the reader: a message for this prompt."""
        self.heard += 1
        match message:
            case Executing(node=None):
                self.ended = True
                self._settled.set()
                self._hint.set()
            case ExecutionSuccess() | ExecutionError() | ExecutionInterrupted():
                self.ended = True
                self._hint.set()
            case _:
                pass
        self._listener(message)

    def cut(self) -> None:
        """From the reader: the connection is gone."""
        self._settled.set()
        self._hint.set()

    def nudge(self) -> None:
        """From the reader: something ended, perhaps this prompt."""
        self._hint.set()


class Socket:
    """The shared WebSocket of one backend. Lives as long as the backend; its connections come and go.

    `run` is one life of a connection; whoever owns the backend repeats it.
    """

    def __init__(self, client: Client, prefix: str, clock: Clock, on_connected: Callable[[], None]) -> None:
        self._client = client
        self._prefix = prefix
        self._clock = clock
        self._on_connected = on_connected
        self._watches: dict[str, list[Watch]] = {}
        self._patience: asyncio.Timeout | None = None
        """What ends the open connection."""
        self._was_reset = False
        self._remaining = 0
        self.client_id: str | None = None
        """That of the open connection."""
        self.connections = 0
        """How many were ever open."""
        self.malformed = 0
        """How many messages made no sense."""

    def watch(
        self,
        prompt_id: str,
        listener: Callable[[Message], None],
        client_id: str | msgspec.UnsetType | None = msgspec.UNSET,
        secrets: Secrets = NO_SECRETS,
    ) -> Watch:
        """See `Backend.watch`."""
        current = self.client_id if client_id is msgspec.UNSET else client_id
        return Watch(self, prompt_id, listener, current, secrets)

    def secrets_of(self, prompt_id: str) -> Secrets:
        """What must not be shown of what is said of this prompt, as who watches it says."""
        watches = self._watches.get(prompt_id)
        return watches[0].secrets if watches else NO_SECRETS

    def register(self, watch: Watch) -> None:
        """Called by a watch that is entered."""
        self._watches.setdefault(watch.prompt_id, []).append(watch)

    def forget(self, watch: Watch) -> None:
        """Called by a watch that is left."""
        watches = self._watches[watch.prompt_id]
        watches.remove(watch)
        if not watches:
            del self._watches[watch.prompt_id]

    def reset(self) -> None:
        """Give the open connection up: it seems deaf. Without one nothing happens."""
        if self._patience is not None:
            self._was_reset = True
            self._patience.reschedule(asyncio.get_running_loop().time())
            self._patience = None

    async def run(self) -> None:
        """Connect and read until the connection ends; never returns.

        Raises `BackendUnreachable` where it was refused, `BackendUnclear` where it did not come about, was
        lost or was reset.
        """
        client_id = f"{self._prefix}-{self._clock.new_id()}"
        self._was_reset = False
        try:
            # until the first message this bounds the connecting; from then on it only ends by `reset`
            async with asyncio.timeout(self._client.timeout) as patience:
                async with self._client.websocket(client_id, LONGEST_FRAME) as websocket:
                    await self._converse(websocket, client_id, patience)
        except TimeoutError as error:
            said = "was given up: it seemed deaf" if self._was_reset else "opened, but not a message came"
            raise BackendUnclear(f"The WebSocket to {self._client.place} {said}") from error
        finally:
            self._patience = None
            self._disconnect(client_id)

    async def _converse(
        self, websocket: aiohttp.ClientWebSocketResponse, client_id: str, patience: asyncio.Timeout
    ) -> None:
        reader = MessageReader(self.secrets_of)
        with self._client.translated("GET /ws"):
            await websocket.send_str(HANDSHAKE)
        while True:
            frame = await websocket.receive()
            message: Message | QueueChanged | None
            if frame.type is aiohttp.WSMsgType.TEXT:
                message = reader.text(frame.data)
            elif frame.type is aiohttp.WSMsgType.BINARY:
                message = reader.binary(frame.data)
            else:
                code = websocket.close_code
                raise BackendUnclear(f"The WebSocket to {self._client.place} was lost (code {code})")
            if self.client_id is None:
                self._connect(client_id, patience)
            self._count(reader)
            if message is not None:
                self._hand_on(message)

    def _connect(self, client_id: str, patience: asyncio.Timeout) -> None:
        """ComfyUI has spoken, so it knows this client id and will send what is meant for it."""
        patience.reschedule(None)
        self._patience = patience
        self.client_id = client_id
        self.connections += 1
        _log.info("socket.opened", backend=self._client.place, connections=self.connections)
        self._on_connected()

    def _disconnect(self, client_id: str) -> None:
        if self.client_id is None:
            return
        self.client_id = None
        _log.info("socket.closed", backend=self._client.place)
        for watch in self._all():
            if watch.client_id == client_id:
                watch.cut()

    def _count(self, reader: MessageReader) -> None:
        self.malformed += reader.malformed
        reader.malformed = 0

    def _hand_on(self, message: Message | QueueChanged) -> None:
        if not isinstance(message, QueueChanged):
            for watch in tuple(self._watches.get(message.prompt_id, ())):
                watch.hear(message)
            return
        if message.remaining < self._remaining:
            for watch in self._all():
                if not watch.connected:
                    watch.nudge()
        self._remaining = message.remaining

    def _all(self) -> list[Watch]:
        return [watch for watches in self._watches.values() for watch in watches]
