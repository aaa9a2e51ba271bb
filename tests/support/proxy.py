"""A TCP proxy on loopback that goes wrong as networks and servers do; it never looks at what it carries."""

import asyncio
import contextlib
import socket
import struct
from types import TracebackType
from typing import Final, Self

import msgspec

BLOCK: Final = 65_536
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER of 0 seconds: closing resets the connection."""


class Pass(msgspec.Struct, frozen=True):
    """Carry everything, as fast as it goes."""


class Refuse(msgspec.Struct, frozen=True):
    """Nobody listens: connecting is refused, and what was open is reset."""


class Stall(msgspec.Struct, frozen=True):
    """Connections are taken, and nothing is carried any more in either direction."""


class Slow(msgspec.Struct, frozen=True):
    """Carry so many bytes a second of what the client sends, on each connection."""

    rate: int


class Reset(msgspec.Struct, frozen=True):
    """Reset each connection on which the client has sent so many bytes since it was opened."""

    after: int
    times: int = -1
    """How many connections; then everything passes. A negative number never ends."""


class Answer(msgspec.Struct, frozen=True):
    """Answer with these bytes instead of asking the server, once something was sent; then close."""

    data: bytes
    times: int = -1


Fault = Pass | Refuse | Stall | Slow | Reset | Answer


class Proxy:
    """Carries connections to one server. An async context manager; `url` is the same as long as it lives.

    `set` switches what goes wrong, also for connections that are open. `faulted` counts the connections that
    were reset or answered instead of the server, `accepted` all of them.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._target = (host, port)
        self._fault: Fault = Pass()
        self._left = -1
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._port = 0
        self._held: socket.socket | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._carrying: set[asyncio.Task[None]] = set()
        self.accepted = 0
        self.faulted = 0

    async def __aenter__(self) -> Self:
        await self._listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_listening(keep_port=False)
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    @property
    def url(self) -> str:
        """`http://host:port`, without a slash at the end."""
        return f"http://127.0.0.1:{self._port}"

    async def set(self, fault: Fault) -> None:
        """From now on this goes wrong."""
        self._fault = fault
        self._left = fault.times if isinstance(fault, Reset | Answer) else -1
        before, self._changed = self._changed, asyncio.Event()
        before.set()
        if isinstance(fault, Refuse):
            self._stop_listening(keep_port=True)
            for writer in self._writers:
                _reset(writer)
        else:
            await self._listen()

    async def _listen(self) -> None:
        if self._server is not None:
            return
        if self._held is not None:
            self._held.close()
            self._held = None
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    def _stop_listening(self, *, keep_port: bool) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._held is not None:
            self._held.close()
            self._held = None
        if keep_port:  # bound and not listening: refused, and nobody else takes it
            self._held = socket.socket()
            self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._held.bind(("127.0.0.1", self._port))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._carrying.add(task)
        try:
            async with contextlib.AsyncExitStack() as stack:
                self._keep(stack, writer)
                with contextlib.suppress(OSError, asyncio.CancelledError):
                    await self._serve(stack, reader, writer)
        finally:
            self._carrying.discard(task)

    def _keep(self, stack: contextlib.AsyncExitStack, writer: asyncio.StreamWriter) -> None:
        """Close it at the end of the stack, whatever is still in it."""
        self._writers.add(writer)
        stack.callback(self._writers.discard, writer)
        stack.callback(writer.transport.abort)

    async def _serve(
        self, stack: contextlib.AsyncExitStack, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if isinstance(self._fault, Answer):
            first = await reader.read(BLOCK)
            if first and self._once():
                await self._answer(writer)
                return
        else:
            first = b""
        upstream_reader, upstream = await asyncio.open_connection(*self._target)
        self._keep(stack, upstream)
        upstream.write(first)
        ways = (self._up(reader, upstream, writer, len(first)), self._down(upstream_reader, writer))
        tasks = [asyncio.ensure_future(way) for way in ways]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, writer: asyncio.StreamWriter) -> None:
        assert isinstance(self._fault, Answer)
        writer.write(self._fault.data)
        await writer.drain()
        writer.write_eof()
        await asyncio.sleep(0.05)  # what the client still sends must not reset what it is to read

    async def _up(
        self,
        reader: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
        client: asyncio.StreamWriter,
        carried: int,
    ) -> None:
        """What the client sends."""
        while True:
            fault = self._fault
            most = max(fault.rate // 20, 1) if isinstance(fault, Slow) else BLOCK
            block = await reader.read(most)
            if not block:
                return
            await self._while_stalled()
            carried += len(block)
            if isinstance(self._fault, Reset) and carried > self._fault.after and self._once():
                _reset(client)
                return
            upstream.write(block)
            await upstream.drain()
            if isinstance(fault, Slow):
                await self._pause(len(block) / fault.rate)

    async def _down(self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while block := await upstream.read(BLOCK):
            await self._while_stalled()
            writer.write(block)
            await writer.drain()
        writer.close()
        await writer.wait_closed()  # what is still to be sent is sent

    def _once(self) -> bool:
        """Count one use of the fault down; True while it applies."""
        if self._left == 0:
            return False
        self._left = max(self._left - 1, -1) if self._left > 0 else self._left
        self.faulted += 1
        return True

    async def _while_stalled(self) -> None:
        while isinstance(self._fault, Stall):
            await self._changed.wait()

    async def _pause(self, seconds: float) -> None:
        """Wait, but not when it is not slow any more."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End the connection without a goodbye."""
    held = writer.get_extra_info("socket")
    if held is not None:
        with contextlib.suppress(OSError):
            held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
