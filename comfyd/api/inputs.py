"""The route of uploads: a form with files, or the bytes of one file; never what a task does with them.

Files go from the socket to the disk as they come. They become uploads together, when the whole request is
good: one that fails or breaks off leaves nothing.
"""

import re
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Final
from urllib.parse import unquote

import msgspec
from msgspec import Meta
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request
from starlette.responses import Response

from comfyd.api import requests
from comfyd.api.responses import JsonResponse
from comfyd.api.state import state_of
from comfyd.errors import InputError, MalformedRequest, UnsupportedMediaType
from comfyd.media import Kind
from comfyd.uploads import Received, Upload, Uploads

FILES: Final = 20
"""Files in one form at most."""
NAME: Final = 100
"""Characters of a file's name that are shown: the last ones, which hold its extension."""

_FORM: Final = b"multipart/form-data"
_PLAIN_ENCODINGS: Final = {b"", b"binary", b"8bit", b"7bit"}
_EXTENDED_NAME: Final = re.compile(rb"filename\*\s*=\s*\"?[\w-]*'[^']*'([^;\s\"]+)", re.IGNORECASE)


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


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of a file in a form; its bytes follow."""

    name: str


async def create(request: Request) -> Response:
    """`POST /api/inputs`."""
    state = state_of(request)
    state.room.check()
    body = requests.chunks(request, "upload_bytes")
    kind, options = parse_options_header(request.headers.get("content-type"))
    files: list[tuple[str | None, Received]] = []
    async with AsyncExitStack() as stack:
        if kind == _FORM:
            form = Form(options.get(b"boundary", b""), body)
            async for part in form.parts():
                name = _shown(part.name)
                chunks = form.data() if part.name else await _unless_empty(form.data())
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


def _refuse_other_forms(kind: bytes) -> None:
    """Raises `UnsupportedMediaType` for what would be stored as a file although it only holds one."""
    if kind.startswith(b"multipart/") or kind == b"application/x-www-form-urlencoded":
        word = kind.decode("latin-1")[:100]
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


class Form:
    """The files of a multipart body, as they come. Lives as long as its request.

    Holds what the parser found in one chunk of the body, and reads on when that is used up.
    """

    def __init__(self, boundary: bytes, body: AsyncIterator[bytes]) -> None:
        self._body = body
        self._found: deque[Part | bytes | None] = deque()
        """Beginnings of files, their bytes, and None where one ends."""
        self._count = 0
        self._complete = False
        self._name = bytearray()
        self._value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        if not boundary:
            raise MalformedRequest("the content type names no boundary of the form's parts")
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part,
                    "on_header_field": self._on_name,
                    "on_header_value": self._on_value,
                    "on_header_end": self._on_header,
                    "on_headers_finished": self._on_headers,
                    "on_part_data": self._on_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as exc:
            raise _malformed(exc) from exc

    async def parts(self) -> AsyncIterator[Part]:
        """Each file's beginning, whose `data` is to be read to its end before the next one."""
        while isinstance(part := await self._next(), Part):
            yield part

    async def data(self) -> AsyncIterator[bytes]:
        """The bytes of the file that began last."""
        while isinstance(piece := await self._next(), bytes):
            yield piece

    async def _next(self) -> Part | bytes | None:
        """What comes next; None at the end of a file, and of the form. Raises `MalformedRequest`."""
        while not self._found:
            chunk = await anext(self._body, None)
            if chunk is None:
                if not self._complete:
                    raise MalformedRequest("the form breaks off before its last boundary")
                return None
            try:
                self._parser.write(chunk)
            except FormParserError as exc:
                raise _malformed(exc) from exc
        return self._found.popleft()

    def _on_part(self) -> None:
        self._count += 1
        if self._count > FILES:
            raise MalformedRequest(f"there are more than {FILES} files in the form", details={"limit": FILES})
        self._headers = {}

    def _on_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        name = bytes(self._name).lower()
        if name in self._headers:
            raise MalformedRequest(f"a part of the form has two headers {name[:100].decode('latin-1')}")
        self._headers[name] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _on_headers(self) -> None:
        encoding = self._headers.get(b"content-transfer-encoding", b"").strip().lower()
        if encoding not in _PLAIN_ENCODINGS:
            word = encoding[:100].decode("latin-1")
            raise MalformedRequest(f"a part of the form is encoded as {word!r}; send the bytes as they are")
        self._found.append(Part(name=_file_name(self._headers.get(b"content-disposition", b""))))

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._found.append(data[start:end])

    def _on_part_end(self) -> None:
        self._found.append(None)

    def _on_end(self) -> None:
        self._complete = True


def _file_name(disposition: bytes) -> str:
    """What the client calls the file of a part, empty for no name. Raises `MalformedRequest` for no file.

    Forms have no `filename*` (RFC 7578), but some clients send nothing else.
    """
    kind, options = parse_options_header(disposition)
    if kind != b"form-data":
        raise MalformedRequest("a part of the form has no Content-Disposition: form-data")
    if b"filename" in options:
        return options[b"filename"].decode(errors="replace")
    extended = _EXTENDED_NAME.search(disposition)
    if extended:
        return unquote(extended[1].decode("latin-1"), errors="replace")
    field = options.get(b"name", b"").decode(errors="replace")[:100]
    raise MalformedRequest(
        f"the field {field!r} of the form is no file: a file has a filename, as in curl -F 'file=@photo.png'",
        details={"field": field},
    )


def _malformed(error: FormParserError) -> MalformedRequest:
    return MalformedRequest(f"the body is not the multipart/form-data that it is announced as: {error}")
