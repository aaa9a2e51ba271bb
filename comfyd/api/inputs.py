"""The route of uploads: a form with files, or the bytes of one file; never what a task does with them.

Files go from the socket to the disk as they come. They become uploads together, when the whole request is
good: one that fails or breaks off leaves nothing.
"""

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Final

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from comfyd.api import requests
from comfyd.api.forms import Form, Part, boundary_of
from comfyd.api.responses import JsonResponse
from comfyd.api.state import state_of
from comfyd.errors import InputError, MalformedRequest, UnsupportedMediaType
from comfyd.media import Kind
from comfyd.uploads import Received, Upload, Uploads

FILES: Final = 20
"""Files in one form at most."""
NAME: Final = 100
"""Characters of a file's name that are shown: the last ones, which hold its extension."""


class UploadView(msgspec.Struct, frozen=True, kw_only=True):
    """A file that can be an input."""

    reference: Annotated[str, Meta(description="The input value that names it.")]
    name: Annotated[str | None, Meta(description="What the client called it.")]
    content_type: Annotated[str, Meta(description="By its content, whatever was announced.")]
    kind: Kind
    size_bytes: int
    sha256: str
    width: int | None
    height: int | None


class UploadListView(msgspec.Struct, frozen=True, kw_only=True):
    """The files of one request, in its order."""

    inputs: tuple[UploadView, ...]


async def create(request: Request) -> Response:
    """`POST /api/inputs`."""
    state = state_of(request)
    state.room.check()
    body = requests.chunks(request, "upload_bytes")
    kind = request.headers.get("content-type")
    boundary = boundary_of(kind)
    files: list[tuple[str | None, Received]] = []
    async with AsyncExitStack() as stack:
        if boundary is not None:
            form = Form(boundary, body, FILES)
            async for part in form.parts():
                given = _file_name(part)
                name = _shown(given)
                chunks = form.data() if given else await _unless_empty(form.data())
                if chunks is None:  # what a browser sends for a field in which no file was chosen
                    continue
                files.append((name, await _received(stack, state.uploads, chunks, name)))
            if not files:
                raise MalformedRequest("there is no file in the form")
        else:
            _refuse_other_forms(kind)
            name = _shown(request.query_params.get("name", ""))
            files.append((name, await _received(stack, state.uploads, body, name)))
        views = [_view(name, await state.uploads.keep(received)) for name, received in files]
    return JsonResponse(UploadListView(inputs=tuple(views)), 201)


async def _received(
    stack: AsyncExitStack, uploads: Uploads, chunks: AsyncIterator[bytes], name: str | None
) -> Received:
    """The file on the disk, until the stack ends. Raises what is wrong with it, with its name."""
    try:
        return await stack.enter_async_context(uploads.receive(chunks, name))
    except InputError as exc:
        if name is None:
            raise
        raise type(exc)(f"{name}: {exc.message}", details={**exc.details, "name": name}) from exc


def _file_name(part: Part) -> str:
    """What the client calls the file, empty for no name. Raises `MalformedRequest` for no file."""
    if part.file_name is not None:
        return part.file_name
    field = part.field[:100]
    raise MalformedRequest(
        f"the field {field!r} of the form is no file: a file has a filename, as in curl -F 'file=@photo.png'",
        details={"field": field},
    )


def _refuse_other_forms(content_type: str | None) -> None:
    """Raises `UnsupportedMediaType` for what would be stored as a file although it only holds one."""
    kind = (content_type or "").partition(";")[0].strip(" \t").lower()
    if kind.startswith("multipart/") or kind == "application/x-www-form-urlencoded":
        word = kind[:100]
        raise UnsupportedMediaType(
            f"the body is announced as {word}; send multipart/form-data, or one file with its own type",
            details={"content_type": word},
        )


def _view(name: str | None, upload: Upload) -> UploadView:
    return UploadView(
        reference=upload.reference,
        name=name,
        content_type=upload.content_type,
        kind=upload.kind,
        size_bytes=upload.size_bytes,
        sha256=upload.sha256,
        width=upload.width,
        height=upload.height,
    )


def _shown(name: str) -> str | None:
    """The end of a name that a client gave, without folders; it is data, and names nothing here."""
    last = re.split(r"[/\\]", name)[-1]
    printable = "".join(letter for letter in last if letter.isprintable()).strip()
    return printable[-NAME:] if printable.strip(".") else None


async def _unless_empty(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes] | None:
    """The same bytes; None where there are none."""
    first = await anext(chunks, None)
    return None if first is None else _again(first, chunks)


async def _again(first: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in chunks:
        yield chunk
