"""A server with as much of Google's as uploads and tokens need, that checks what `fake-gcs-server` does not.

It runs in the test's own process, and keeps digests instead of content. Tests script what it refuses.
"""

import base64
import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

MULTIPLE = 256 * 1024
"""Every piece but the last has a multiple of so many bytes."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@cache
def private_key() -> rsa.RSAPrivateKey:
    """The key of every service account here; to make one takes a while."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, password: str = "") -> str:
    """The key as it stands in a file."""
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked = (
        serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    )
    return key.private_bytes(encoding, form, locked).decode()


def account_file(folder: Path, **changed: object) -> str:
    """A service account's file, as Google hands it out."""
    account = {
        "type": "service_account",
        "project_id": "project",
        "private_key_id": "a-key",
        "private_key": pem(private_key()),
        "client_email": "comfyd@project.iam.gserviceaccount.com",
        "token_uri": "http://127.0.0.1:9/token",
        **changed,
    }
    path = folder / f"{uuid.uuid4().hex}.json"
    path.write_text(json.dumps(account))
    return str(path)


class Google:
    """The storage and the token service, on one url. Lives for a test."""

    def __init__(self) -> None:
        self.url = ""
        self.stored: dict[str, tuple[int, str]] = {}
        """Size and digest of each object."""
        self.tokens: list[str] = []
        """Given out, in order; only the last is good."""
        self.sessions: dict[str, Session] = {}
        self.taken_back: list[str] = []
        self.scripted: dict[str, Handler] = {}
        """By method: what answers in place of the storage."""
        self.token_handler: Handler | None = None
        self.keeps = 1 << 40
        """Bytes of each piece that are kept."""

    async def token(self, request: web.Request) -> web.StreamResponse:
        """The token service."""
        if self.token_handler is not None:
            return await self.token_handler(request)
        form = await request.post()
        assert form["grant_type"] == "urn:ietf:params:oauth:grant-type:jwt-bearer"
        self.tokens.append(f"T0KEN-{len(self.tokens)}")
        return web.json_response({"access_token": self.tokens[-1], "expires_in": 3600})

    async def storage(self, request: web.Request) -> web.StreamResponse:
        """Everything else."""
        if request.method in self.scripted:
            return await self.scripted[request.method](request)
        if request.path.startswith("/session/"):
            assert "Authorization" not in request.headers
            session = self.sessions[request.path]
            return await (session.receive(request) if request.method == "PUT" else session.end())
        if request.headers.get("Authorization") != f"Bearer {self.tokens[-1]}":
            return refusal(401, "Invalid Credentials")
        assert request.method == "POST"
        if request.query["uploadType"] == "multipart":
            return await self._multipart(request)
        path = f"/session/{len(self.sessions)}"
        about = await request.json()
        assert request.headers["X-Upload-Content-Type"] == about["contentType"]
        self.sessions[path] = Session(self, path, about, int(request.headers["X-Upload-Content-Length"]))
        return web.Response(headers={"Location": f"{self.url}{path}?upload_id=S3CRET"})

    async def _multipart(self, request: web.Request) -> web.Response:
        assert request.headers["Content-Type"].startswith("multipart/related; boundary=")
        reader = await request.multipart()
        first = await reader.next()
        assert isinstance(first, aiohttp.BodyPartReader)
        about = await first.json()
        assert about is not None
        second = await reader.next()
        assert isinstance(second, aiohttp.BodyPartReader)
        assert second.headers["Content-Type"] == about["contentType"]
        assert "Content-Disposition" not in second.headers
        data = bytes(await second.read())
        return self.keep(about, len(data), hashlib.md5(data, usedforsecurity=False))

    def keep(self, about: dict[str, str], size: int, digest: Any) -> web.Response:
        """An object that came whole, unless its digest is another than announced."""
        md5 = base64.b64encode(digest.digest()).decode()
        if about["md5Hash"] != md5:
            return refusal(
                400, f"Provided MD5 hash {about['md5Hash']} doesn't match calculated MD5 hash {md5}."
            )
        self.stored[about["name"]] = (size, digest.hexdigest())
        return web.json_response({"name": about["name"], "size": str(size), "md5Hash": md5})


class Session:
    """One resumable upload: takes pieces in order, of the sizes that the protocol wants."""

    def __init__(self, google: Google, path: str, about: dict[str, str], size: int) -> None:
        self._google = google
        self._path = path
        self._about = about
        self._size = size
        self._digest = hashlib.md5(usedforsecurity=False)
        self._kept = 0

    async def receive(self, request: web.Request) -> web.Response:
        """One piece."""
        span, total = request.headers["Content-Range"].removeprefix("bytes ").split("/")
        start, last = (int(end) for end in span.split("-"))
        assert (start, total) == (self._kept, str(self._size))
        assert request.content_length == last + 1 - start
        assert last + 1 == self._size or (last + 1 - start) % MULTIPLE == 0
        left = self._google.keeps
        async for chunk in request.content.iter_any():
            self._digest.update(chunk[:left])
            self._kept += len(chunk[:left])
            left -= len(chunk[:left])
        if self._kept == self._size:
            return self._google.keep(self._about, self._size, self._digest)
        headers = {"Range": f"bytes=0-{self._kept - 1}"} if self._kept else {}
        return web.Response(status=308, headers=headers)

    async def end(self) -> web.Response:
        """Taken back."""
        self._google.taken_back.append(self._path)
        return web.Response(status=499)


def refusal(status: int, message: str) -> web.Response:
    """How the storage refuses."""
    return web.json_response({"error": {"code": status, "message": message}}, status=status)


def always(answer: Callable[[], web.Response]) -> Handler:
    """A handler that answers so to everything."""

    async def handle(request: web.Request) -> web.Response:
        await request.read()
        return answer()

    return handle


@asynccontextmanager
async def serving(google: Google) -> AsyncIterator[None]:
    """The server on a free port of loopback."""
    app = web.Application(client_max_size=1 << 40)
    app.router.add_post("/token", google.token)
    app.router.add_route("*", "/{rest:.*}", google.storage)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        google.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield
    finally:
        await runner.cleanup()
