"""Cuts metadata and comments out of an SVG; never writes the rest of it anew, loads nothing that it names."""

import re
from typing import BinaryIO, Final
from xml.parsers import expat

from comfyd.errors import MediaError
from comfyd.media.pieces import Pieces

MOST_BYTES: Final = 16 << 20
"""Read at once: drawings are small."""
# a value may hold a `>`
_EMPTY_ELEMENT: Final = re.compile(rb"""<(?:[^"'>]|"[^"]*"|'[^']*')*>""")
_ENCODINGS: Final = frozenset({"utf-8", "us-ascii"})


def stripped(file: BinaryIO, size: int) -> Pieces:
    """The file without `metadata` elements and comments. ComfyUI writes one after every `<svg>`.

    Raises `MediaError` for what is not well-formed, declares entities, or is not in UTF-8.
    """
    if size > MOST_BYTES:
        raise MediaError("the SVG file is too large to be stripped of its metadata")
    file.seek(0)
    text = file.read(size)
    pieces, at = Pieces(), 0
    for start, end in _Metadata(text).spans():
        if start > at:
            pieces.keep(at, start)
        at = end
    if at < size:
        pieces.keep(at, size)
    return pieces


class _Metadata:
    """Finds the bytes that are metadata. Lives as long as one parse."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._spans: list[tuple[int, int]] = []
        self._depth = 0
        self._start = 0
        self._usable = not text.startswith((b"\xff\xfe", b"\xfe\xff"))
        parser = expat.ParserCreate("utf-8")
        parser.StartElementHandler = self._started
        parser.EndElementHandler = self._ended
        parser.CommentHandler = self._commented
        parser.XmlDeclHandler = self._declared
        parser.EntityDeclHandler = self._entity
        self._parser = parser

    def spans(self) -> list[tuple[int, int]]:
        """Where metadata starts and ends, in order; none overlaps another."""
        try:
            self._parser.Parse(self._text, True)
        except expat.ExpatError as exc:
            raise MediaError("the SVG file is broken: it is not well-formed XML") from exc
        if not self._usable:
            raise MediaError("the SVG file has entities or is not in UTF-8, so it cannot be stripped")
        return self._spans

    def _started(self, name: str, _attributes: dict[str, str]) -> None:
        if self._depth or name.rpartition(":")[2] == "metadata":
            if not self._depth:
                self._start = self._parser.CurrentByteIndex
            self._depth += 1

    def _ended(self, name: str) -> None:
        if not self._depth:
            return
        self._depth -= 1
        if self._depth == 0:
            self._spans.append((self._start, self._tag_end(name, self._parser.CurrentByteIndex)))

    def _tag_end(self, name: str, at: int) -> int:
        """Where the end tag at `at` ends. An empty element has none: then `at` is its start or its end."""
        end = re.compile(rb"</%b\s*>" % re.escape(name.encode())).match(self._text, at)
        if end is None and at == self._start:
            end = _EMPTY_ELEMENT.match(self._text, at)
        return at if end is None else end.end()

    def _commented(self, _text: str) -> None:
        if not self._depth:
            start = self._parser.CurrentByteIndex
            end = self._text.find(b"-->", start)
            self._spans.append((start, end + 3 if end >= 0 else len(self._text)))

    def _declared(self, _version: str, encoding: str | None, _standalone: int) -> None:
        self._usable = self._usable and (encoding is None or encoding.lower() in _ENCODINGS)

    def _entity(self, *_declaration: object) -> None:
        """Places inside of an entity are not places in the file."""
        self._usable = False
