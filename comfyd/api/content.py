"""The bytes of one file as an answer: whole, a range, or that the client has them; never which file it is.

What a browser could run is an attachment.
"""

import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final
from urllib.parse import quote

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from comfyd.api.state import state_of
from comfyd.api.waiting import gone, unless_stopped
from comfyd.storage.base import StoredFile
from comfyd.storage.objects import cache_control, media_type, shown_as

OpenFile = Callable[[int, int], AbstractAsyncContextManager[StoredFile]]
"""Opens the file to read so many bytes from a start on. Entering it raises what there is to be said."""

_RANGE: Final = re.compile(r"bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})", re.ASCII)


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """What is said of a file before its bytes."""

    name: str
    """What it is called where somebody saves it."""
    content_type: str
    size_bytes: int
    digest: str
    """Of the bytes: the tag by which clients know them again."""


def answer(request: Request, content: Content, open_file: OpenFile) -> Response:
    """What the request asks for of this file. The file is opened when that is sent, for `HEAD` too."""
    headers = _headers(content)
    tag = headers["ETag"]
    if _names(request.headers.get("if-none-match"), tag):
        return Response(status_code=304, headers=headers)
    span = _span(request, content.size_bytes, tag)
    start, length = span or (0, content.size_bytes)
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{content.size_bytes}"
    headers["Content-Length"] = str(length)
    return FileAnswer(request, open_file(start, length), 200 if span is None else 206, headers)


def _headers(content: Content) -> dict[str, str]:
    shown, name = shown_as(content.content_type), content.name
    plain = re.sub(r"[^A-Za-z0-9._ ()-]+", "_", name) or "file"
    return {
        "Content-Type": media_type(content.content_type),
        "Content-Disposition": f"{shown}; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}",
        "ETag": f'"{content.digest}"',
        "Accept-Ranges": "bytes",
        "Cache-Control": cache_control(public=False),
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }


def _names(header: str | None, tag: str) -> bool:
    """Whether an `If-None-Match` names this tag."""
    if header is None:
        return False
    return any(part.strip().removeprefix("W/") in {tag, "*"} for part in header.split(","))


def _span(request: Request, size: int, tag: str) -> tuple[int, int] | None:
    """Start and length of the one range that is asked for; None for the whole file.

    Raises the framework's 416 for one that lies outside it.
    Several ranges, other units and a range for other bytes (`If-Range`) are answered with the whole file.
    """
    found = _RANGE.fullmatch(request.headers.get("range", "").strip())
    if found is None or request.headers.get("if-range", tag) != tag or not (found[1] or found[2]):
        return None
    if not found[1]:  # the last so many bytes
        length = min(int(found[2]), size)
        if length == 0:
            raise _outside(size)
        return size - length, length
    start = int(found[1])
    last = min(int(found[2]), size - 1) if found[2] else size - 1
    if found[2] and int(found[2]) < start:
        return None  # no range at all, by RFC 9110
    if start >= size:
        raise _outside(size)
    return start, last - start + 1


def _outside(size: int) -> HTTPException:
    headers = {"Content-Range": f"bytes */{size}", "Accept-Ranges": "bytes"}
    return HTTPException(416, f"the range lies outside the {size} bytes of this file", headers)


class FileAnswer(Response):
    """A file on its way out, read only as fast as the client takes it."""

    def __init__(
        self,
        request: Request,
        file: AbstractAsyncContextManager[StoredFile],
        status: int,
        headers: dict[str, str],
    ) -> None:
        super().__init__(status_code=status, headers=headers)
        self._closing = state_of(request).closing
        self._bodiless = request.method == "HEAD"
        self._file = file

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Send it; a client that leaves ends it. What opening it raises comes before anything is sent."""
        async with self._file as file:
            await unless_stopped(self._send(file, send), gone(receive), self._closing)

    async def _send(self, file: StoredFile, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if not self._bodiless:
            async for chunk in file.chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
