"""A `multipart/form-data` body as a contract server receives it: fields in memory, one file on the disk."""

from collections.abc import AsyncIterable
from pathlib import Path
from typing import IO

from python_multipart.multipart import MultipartParser, parse_options_header


class TooLarge(Exception):
    """The file has more bytes than the server takes."""


class ReceivedForm:
    """A form that is being received. Made and finished by `receive`."""

    def __init__(self, content_type: str, path: Path, largest: int) -> None:
        kind, options = parse_options_header(content_type)
        assert kind == b"multipart/form-data"
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._part_begins,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._data,
                "on_part_end": self._part_ends,
            },
        )
        self._path = path
        self._largest = largest
        self._file: IO[bytes] | None = None
        self._headers: dict[bytes, bytes] = {}
        self._name = self._header = self._value = b""
        self._content = bytearray()
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        """None where there is no file in the form."""
        self.content_type = ""
        """What the file is declared as."""
        self.size = 0
        self.head = b""
        """The file's first bytes."""

    async def receive(self, chunks: AsyncIterable[bytes]) -> None:
        """Read the whole form. Raises `TooLarge`."""
        try:
            async for chunk in chunks:
                self._parser.write(chunk)
            self._parser.finalize()
        finally:
            if self._file is not None:
                self._file.close()

    def _part_begins(self) -> None:
        self._headers.clear()
        self._content.clear()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ends(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._headers[b"content-disposition"])
        self._name = options[b"name"]
        if self._name == b"file":
            self.filename = options.get(b"filename", b"").decode()
            self.content_type = self._headers.get(b"content-type", b"").decode()
            self._file = self._path.open("wb")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name != b"file":
            self._content += data[start:end]
            return
        assert self._file is not None
        self.size += end - start
        if self.size > self._largest:
            raise TooLarge
        if len(self.head) < 512:
            self.head += data[start : min(end, start + 512)]
        self._file.write(data[start:end])

    def _part_ends(self) -> None:
        if self._name != b"file":
            self.fields[self._name.decode()] = self._content.decode()
