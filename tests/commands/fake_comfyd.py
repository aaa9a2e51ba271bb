"""A scripted comfyd: real HTTP on loopback in a thread of its own, with the answers that a test wants."""

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from aiohttp import web

TASK_ID = "11111111-2222-4333-8444-555555555555"


def task(status: str, **parts: Any) -> dict[str, Any]:
    """A task as the API shows it."""
    return {"task_id": TASK_ID, "status": status, "outputs": [], "error": None, "progress": None, **parts}


def output(name: str, data: bytes, **changes: Any) -> dict[str, Any]:
    """An output as the API shows it; the file is served under its own name."""
    return {
        "node_id": "9",
        "name": name,
        "storage": "local",
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "url": "/api/files/one",
        **changes,
    }


def event(name: str, data: Any) -> bytes:
    """A Server-Sent Event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


class FakeComfyd:
    """What the routes answer. Change it from the test's thread before the command asks."""

    def __init__(self) -> None:
        self.url = ""
        self.submissions: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.asked: list[str] = []
        self.refusal: tuple[int, Any] | None = None
        """Status and body that a submission is answered with instead."""
        self.states: list[dict[str, Any] | int] = [task("COMPLETED")]
        """Answers to GET task, in order, the last one for ever; a number is an error of that status."""
        self.streams: list[list[bytes] | int] = [404]
        """Answers to GET events, likewise; `b"!"` breaks the connection."""
        self.files: list[bytes | int | Callable[[], web.Response]] = [b""]
        """Answers to GET of anything else, likewise."""
        self.asked_as: list[str] = []
        """The paths of those, as they were sent."""
        self.headers: list[Mapping[str, str]] = []
        """The headers that each of those came with."""
        self.uploads: list[tuple[str, bytes]] = []
        """Name and bytes of each file that arrived whole."""
        self.upload_refusal: tuple[int, Any] | None = None
        """Status and body that an upload is answered with at once, and its file left unread."""
        self.dropped_uploads = 0
        self.at_upload: Callable[[], None] = lambda: None
        """Called when the first bytes of a file are there."""
        self.dropped_submissions = 0
        """So many submissions are taken and not answered."""

    async def submit(self, request: web.Request) -> web.StreamResponse:
        self.submissions.append(await request.json())
        self.keys.append(request.headers["Idempotency-Key"])
        if len(self.submissions) <= self.dropped_submissions:
            assert request.transport is not None
            request.transport.abort()
        if self.refusal is not None:
            status, body = self.refusal
            return web.Response(
                status=status, body=body if isinstance(body, bytes) else json.dumps(body).encode()
            )
        return web.json_response(task("PENDING"), status=202)

    async def upload(self, request: web.Request) -> web.StreamResponse:
        if self.upload_refusal is not None:
            status, body = self.upload_refusal
            return web.Response(status=status, body=json.dumps(body).encode())
        data = await request.content.read(1)
        self.at_upload()
        data += await request.content.read()
        assert len(data) == request.content_length
        self.uploads.append((request.query["name"], data))
        if len(self.uploads) <= self.dropped_uploads:
            assert request.transport is not None
            request.transport.abort()
        reference = f"upload:{hashlib.sha256(data).hexdigest()}.png"
        return web.json_response({"inputs": [{"reference": reference}]}, status=201)

    async def task(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path_qs)
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return _error(state) if isinstance(state, int) else web.json_response(state)

    async def events(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path_qs)
        stream = self.streams.pop(0) if len(self.streams) > 1 else self.streams[0]
        if isinstance(stream, int):
            return web.Response(text="hello") if stream == 200 else _error(stream)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for chunk in stream:
            if chunk == b"!":
                assert request.transport is not None
                request.transport.abort()
            await response.write(chunk)
        return response

    async def file(self, request: web.Request) -> web.StreamResponse:
        self.asked_as.append(request.raw_path)
        self.headers.append(request.headers)
        data = self.files.pop(0) if len(self.files) > 1 else self.files[0]
        if isinstance(data, int):
            return _error(data)
        return web.Response(body=data) if isinstance(data, bytes) else data()

    async def serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        application = web.Application(client_max_size=1 << 30)
        application.router.add_post("/api/tasks", self.submit)
        application.router.add_get("/api/tasks/{id}", self.task)
        application.router.add_get("/api/tasks/{id}/events", self.events)
        application.router.add_post("/api/inputs", self.upload)
        application.router.add_get("/{path:.*}", self.file)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        await stop.wait()
        await runner.cleanup()


def _error(status: int) -> web.Response:
    return web.json_response(
        {"error": {"code": "some_code", "message": f"refused with {status}"}}, status=status
    )


@contextmanager
def fake_comfyd() -> Iterator[FakeComfyd]:
    """A fake that listens, until the block ends."""
    fake, started, stop = FakeComfyd(), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    def run() -> None:
        loop.run_until_complete(fake.serve(started, stop))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(10)
        yield fake
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
