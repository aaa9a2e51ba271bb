"""A raw HTTP server on loopback that counts who connects and answers by script, right or wrong."""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

Script = Callable[[asyncio.StreamWriter], Awaitable[None]]
"""Writes one answer. The connection is closed after it."""


class Trap:
    """A running server. Lives as long as the block of `open_trap`."""

    def __init__(self, scripts: Sequence[Script]) -> None:
        self._scripts = list(scripts)
        self._writers: set[asyncio.StreamWriter] = set()
        self._idle = asyncio.Event()
        self.port = 0
        self.accepted = 0
        self.heads: list[bytes] = []
        """What was sent up to the blank line, one for each connection on which it came whole."""
        self.bodies: list[bytes] = []

    @property
    def url(self) -> str:
        """Of its IPv4 address, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: the next script, the last one again and again."""
        self.accepted += 1
        self._writers.add(writer)
        self._idle.clear()
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            length = re.search(rb"(?i)content-length: *(\d+)", head)
            if length:
                self.bodies.append(await reader.readexactly(int(length[1])))
            script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
            await script(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away, which some tests are about
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
            self._writers.discard(writer)
            if not self._writers:
                self._idle.set()

    async def stop(self) -> None:
        """End what is still being answered."""
        while self._writers:
            for writer in self._writers:
                writer.transport.abort()
            await self._idle.wait()


@asynccontextmanager
async def open_trap(
    *scripts: Script, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Trap]:
    """Serve at this address until the block ends."""
    trap = Trap(scripts or [answer(b"trapped")])
    server = await asyncio.start_server(trap.serve, host, port, ssl=tls)
    async with server:
        trap.port = server.sockets[0].getsockname()[1]
        yield trap
        server.close()
        await trap.stop()


def answer(body: bytes = b"", status: int = 200, *, length: int | None = None, **headers: str) -> Script:
    """A whole answer; `length` is announced instead of the true one. `Content_Type` is `Content-Type`."""
    fields = {"Content-Length": str(len(body) if length is None else length)}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}

    async def script(writer: asyncio.StreamWriter) -> None:
        writer.write(head(status, fields) + body)
        await writer.drain()

    return script


def redirect(location: str, status: int = 302) -> Script:
    """Somewhere else."""
    return answer(b"elsewhere", status, Location=location)


def head(status: int, headers: dict[str, str]) -> bytes:
    """The beginning of an answer, with the blank line."""
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode()


async def hang(writer: asyncio.StreamWriter) -> None:
    """Take the request and never answer."""
    await writer.wait_closed()
