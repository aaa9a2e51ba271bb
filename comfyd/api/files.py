"""Artefacts over HTTP, whichever storage has them; never a file that no task names.

A path is the task's id, the attempt and the file, so the row says what the file is. What a browser could run
is an attachment.
"""

import re
from contextlib import AbstractAsyncContextManager
from typing import Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from comfyd.api.links import served_path
from comfyd.api.requests import is_task_id
from comfyd.api.state import State, state_of
from comfyd.api.waiting import gone, unless_stopped
from comfyd.errors import FileNotFound
from comfyd.storage.base import StoredFile
from comfyd.storage.objects import cache_control, media_type, shown_as
from comfyd.tasks import Artefact

_RANGE: Final = re.compile(r"bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})", re.ASCII)


class NoSuchRange(Exception):
    """The range lies outside the file."""


async def read_file(request: Request) -> Response:
    """`GET /api/files/{key}`."""
    state = state_of(request)
    path, query = request.path_params["key"], request.query_params
    state.links.check(path, query.get("expires"), query.get("signature"))
    artefact = await _artefact(state, path)
    headers = _headers(artefact)
    tag = headers["ETag"]
    if _names(request.headers.get("if-none-match"), tag):
        return Response(status_code=304, headers=headers)
    try:
        span = _span(request, artefact.size_bytes, tag)
    except NoSuchRange:
        headers["Content-Range"] = f"bytes */{artefact.size_bytes}"
        return Response(status_code=416, headers={**headers, "Content-Length": "0"})
    start, length = span or (0, artefact.size_bytes)
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{artefact.size_bytes}"
    headers["Content-Length"] = str(length)
    status = 200 if span is None else 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    storage = await state.storages.get(artefact.storage)
    return FileAnswer(state, storage.open(artefact.key, start, length), status, headers)


async def _artefact(state: State, path: str) -> Artefact:
    """The row's own word about a file, or that of the running task. Raises `FileNotFound`."""
    task_id = path.partition("/")[0]
    # Looked at first: a task that ends between the two looks is read as running and has none here any more.
    early = state.board.artefacts(task_id)
    task = await state.store.get(task_id) if is_task_id(task_id) else None
    if task is not None:
        for artefact in task.artefacts or state.board.artefacts(task_id) or early:
            if served_path(artefact) == path:
                return artefact
    raise FileNotFound(f"there is no file {path[:200]!r}")


def _headers(artefact: Artefact) -> dict[str, str]:
    shown, name = shown_as(artefact.content_type), artefact.name
    plain = re.sub(r"[^A-Za-z0-9._ ()-]+", "_", name) or "file"
    return {
        "Content-Type": media_type(artefact.content_type),
        "Content-Disposition": f"{shown}; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}",
        "ETag": f'"{artefact.sha256}"',
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
    """Start and length of the one range that is asked for; None for the whole file. Raises `NoSuchRange`.

    Several ranges, other units and a range for other bytes (`If-Range`) are answered with the whole file.
    """
    found = _RANGE.fullmatch(request.headers.get("range", "").strip())
    if found is None or request.headers.get("if-range", tag) != tag or not (found[1] or found[2]):
        return None
    if not found[1]:  # the last so many bytes
        length = min(int(found[2]), size)
        if length == 0:
            raise NoSuchRange
        return size - length, length
    start = int(found[1])
    last = min(int(found[2]), size - 1) if found[2] else size - 1
    if found[2] and int(found[2]) < start:
        return None  # no range at all, by RFC 9110
    if start >= size:
        raise NoSuchRange
    return start, last - start + 1


class FileAnswer(Response):
    """A file on its way out, read only as fast as the client takes it."""

    def __init__(
        self,
        state: State,
        file: AbstractAsyncContextManager[StoredFile],
        status: int,
        headers: dict[str, str],
    ) -> None:
        super().__init__(status_code=status, headers=headers)
        self._closing = state.closing
        self._file = file

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Send it; a client that leaves ends it. Raises `FileNotFound` before anything is sent."""
        async with self._file as file:
            await unless_stopped(self._send(file, send), gone(receive), self._closing)

    async def _send(self, file: StoredFile, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in file.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
