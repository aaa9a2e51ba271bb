"""Forms in `multipart/form-data`, read as they come; never what a part of one means.

Of a part nothing is held but its headers, and what was found in one chunk of the body.
"""

import re
from collections import deque
from collections.abc import AsyncIterator
from typing import Final
from urllib.parse import unquote

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from comfyd.errors import MalformedRequest

_FORM: Final = b"multipart/form-data"
_PLAIN_ENCODINGS: Final = {b"", b"binary", b"8bit", b"7bit"}
_EXTENDED_NAME: Final = re.compile(rb"filename\*\s*=\s*\"?[\w-]*'[^']*'([^;\s\"]+)", re.IGNORECASE)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of a part; its bytes follow."""

    field: str
    """Which field of the form it is; empty where it does not say."""
    file_name: str | None
    """What the client calls the file, empty for no name; None for a part that is no file."""


def boundary_of(content_type: str | None) -> bytes | None:
    """What stands between the parts, empty where that is not said; None for a body that is no form."""
    kind, options = parse_options_header(content_type)
    return options.get(b"boundary", b"") if kind == _FORM else None


class Form:
    """The parts of a multipart body, as they come. Lives as long as its request.

    Holds what the parser found in one chunk of the body, and reads on when that is used up. Whatever is
    wrong with the form raises `MalformedRequest`.
    """

    def __init__(self, boundary: bytes, body: AsyncIterator[bytes], limit: int) -> None:
        """`limit` is how many parts there may be."""
        self._body = body
        self._limit = limit
        self._found: deque[Part | bytes | None] = deque()
        """Beginnings of parts, their bytes, and None where one ends."""
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
        """Each part's beginning, whose bytes are to be read to their end before the next one."""
        while isinstance(part := await self._next(), Part):
            yield part

    async def data(self) -> AsyncIterator[bytes]:
        """The bytes of the part that began last."""
        while isinstance(piece := await self._next(), bytes):
            yield piece

    async def text(self, part: Part, limit: int) -> str:
        """The part that began last as text, of `limit` bytes at most."""
        held = bytearray()
        async for piece in self.data():
            held += piece
            if len(held) > limit:
                raise _wrong(part, f"is longer than {limit} bytes", limit=limit)
        try:
            return held.decode()
        except UnicodeDecodeError:
            raise _wrong(part, "is not UTF-8") from None

    async def _next(self) -> Part | bytes | None:
        """What comes next; None at the end of a part, and of the form."""
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
        if self._count > self._limit:
            message = f"there are more than {self._limit} parts in the form"
            raise MalformedRequest(message, details={"limit": self._limit})
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
        self._found.append(_part(self._headers.get(b"content-disposition", b"")))

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._found.append(data[start:end])

    def _on_part_end(self) -> None:
        self._found.append(None)

    def _on_end(self) -> None:
        self._complete = True


def _part(disposition: bytes) -> Part:
    """What a part is said to be. Forms have no `filename*` (RFC 7578), but some clients send nothing else."""
    kind, options = parse_options_header(disposition)
    if kind != b"form-data":
        raise MalformedRequest("a part of the form has no Content-Disposition: form-data")
    field = options.get(b"name", b"").decode(errors="replace")
    if b"filename" in options:
        return Part(field=field, file_name=options[b"filename"].decode(errors="replace"))
    extended = _EXTENDED_NAME.search(disposition)
    if extended is None:
        return Part(field=field, file_name=None)
    return Part(field=field, file_name=unquote(extended[1].decode("latin-1"), errors="replace"))


def _wrong(part: Part, what: str, **details: int) -> MalformedRequest:
    field = part.field[:100]
    return MalformedRequest(f"the field {field!r} of the form {what}", details={"field": field, **details})


def _malformed(error: FormParserError) -> MalformedRequest:
    return MalformedRequest(f"the body is not the multipart/form-data that it is announced as: {error}")
