"""A file server on loopback, as the applications of clients have one; counts who asks for what.

Whoever wants wrong HTTP takes `tests.support.trap`.
"""

import asyncio
import base64
import io
import wave
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from PIL import Image

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]

PATIENCE = 30.0


class Sources:
    """A running server. Lives as long as the block of `open_sources`; a path that nobody set is 404."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[str] = []
        """The paths, in order."""
        self.open = 0
        """Requests that are being answered."""
        self.most_open = 0
        self.left: Counter[str] = Counter()
        """How often a client went away before its answer was whole, by path."""
        self._answers: dict[str, Answer] = {}

    def set(self, path: str, answer: Answer) -> str:
        """Answer this path so; its url."""
        self._answers[path] = answer
        return self.url + path

    def file(self, path: str, data: bytes, content_type: str = "application/octet-stream") -> str:
        """A file; its url."""
        return self.set(path, _file(data, content_type))

    def redirect(self, path: str, location: str) -> str:
        """A path that leads elsewhere; its url."""

        async def answer(_: web.Request) -> web.StreamResponse:
            return web.Response(status=302, headers={"Location": location})

        return self.set(path, answer)

    def refuse(self, path: str, status: int, times: int = -1, then: bytes = b"") -> str:
        """So many answers with this status, and then the file; -1 is always. Its url."""
        left = times

        async def answer(request: web.Request) -> web.StreamResponse:
            nonlocal left
            if left == 0:
                return await _file(then)(request)
            left -= 1
            return web.Response(status=status)

        return self.set(path, answer)

    def hang(self, path: str, opened: asyncio.Event | None = None, data: bytes = b"") -> str:
        """A file that does not come before this event; never without one. Its url."""
        waited_for = opened or asyncio.Event()

        async def answer(request: web.Request) -> web.StreamResponse:
            await waited_for.wait()
            return await _file(data)(request)

        return self.set(path, answer)

    def endless(self, path: str, begin: bytes = b"") -> str:
        """A file of unknown length that begins so and never ends, though nothing more comes. Its url."""

        async def answer(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            response.enable_chunked_encoding()
            await response.prepare(request)
            await response.write(begin)
            await asyncio.Event().wait()
            return response

        return self.set(path, answer)

    def together(self, prefix: str, data: list[bytes]) -> list[str]:
        """Files of which none is sent before all were asked for; their urls."""
        everybody = asyncio.Barrier(len(data))

        def answer(own: bytes) -> Answer:
            async def wait(request: web.Request) -> web.StreamResponse:
                await everybody.wait()
                return await _file(own)(request)

            return wait

        return [self.set(f"{prefix}{number}", answer(own)) for number, own in enumerate(data)]

    def count(self, path: str) -> int:
        """How often a path was asked for."""
        return self.asked.count(path)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Any request."""
        self.asked.append(request.path)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            answer = self._answers.get(request.path)
            return web.Response(status=404) if answer is None else await answer(request)
        except asyncio.CancelledError:
            self.left[request.path] += 1
            raise
        finally:
            self.open -= 1


def _file(data: bytes, content_type: str = "application/octet-stream") -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(body=data, content_type=content_type)

    return answer


@asynccontextmanager
async def open_sources() -> AsyncIterator[Sources]:
    """Serve until the block ends."""
    sources = Sources()
    application = web.Application()
    application.router.add_get("/{path:.*}", sources.handle)
    # with cancellation a handler learns at once that its client went away
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        sources.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield sources
    finally:
        await runner.cleanup()


def png(color: int = 0xFF0000, size: tuple[int, int] = (16, 16), alpha: int | None = None) -> bytes:
    """A picture of one colour (0xRRGGBB), all of it as transparent as `alpha` (0..255) says."""
    rgb = (color >> 16 & 255, color >> 8 & 255, color & 255)
    picture = Image.new("RGB", size, rgb) if alpha is None else Image.new("RGBA", size, (*rgb, alpha))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def wav() -> bytes:
    """A moment of silence."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8_000)
        file.writeframes(bytes(1_600))
    return buffer.getvalue()


def data_uri(data: bytes, content_type: str = "image/png") -> str:
    """The file as a data URI."""
    return f"data:{content_type};base64,{base64.b64encode(data).decode()}"


def color_of(data: bytes) -> int:
    """The colour (0xRRGGBB) of a picture's first pixel."""
    with Image.open(io.BytesIO(data)) as picture:
        red, green, blue = picture.convert("RGB").getpixel((0, 0))  # type: ignore[misc] # three bands give three numbers
    return int(red) << 16 | int(green) << 8 | int(blue)
