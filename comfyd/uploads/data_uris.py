"""Data URIs: the bytes inside, decoded on a thread piece by piece; never what kind of file they are."""

import asyncio
import binascii
import re
from collections.abc import AsyncIterator, Iterator
from typing import Final

from comfyd.errors import InvalidDataUri

PIECE: Final = 1 << 20
"""Characters that are decoded in one go."""

_DATA_HEAD: Final = re.compile(r"data:[^,]{0,1000}?;[ ]*base64[ ]*,", re.IGNORECASE)
_PLAIN_ALPHABET: Final = bytes.maketrans(b"-_", b"+/")
_LINE_BREAKS: Final = b"\r\n"
_ESCAPES: Final = tuple(
    (escape, symbol)
    for symbol in (b"+", b"/", b"=", b"\r", b"\n")
    for escape in (b"%%%02X" % symbol[0], b"%%%02x" % symbol[0])
)
"""All that base64 may hold of percent-encoding; `unquote_to_bytes` takes a second for some megabytes."""


class DataUri:
    """A data URI in base64, read by its head; that the rest is base64 shows when it is decoded.

    The alphabet may be the url-safe one, `+ / =` may be percent-encoded, lines may be broken and the padding
    may be missing. Blanks inside are refused: they are what is left of a `+` that was decoded.
    """

    def __init__(self, text: str) -> None:
        """Raises `InvalidDataUri`."""
        self._text = text.strip()
        head = _DATA_HEAD.match(self._text)
        if head is None:
            raise InvalidDataUri("a data URI must look like data:image/png;base64,iVBORw0KGgo")
        self._start = head.end()

    @property
    def least_bytes(self) -> int:
        """How many bytes it holds at least; 0 where it has to be decoded to know."""
        if any(mark in self._text for mark in ("%", "\r", "\n")):
            return 0
        return max((len(self._text) - self._start) * 3 // 4 - 2, 0)

    async def chunks(self) -> AsyncIterator[bytes]:
        """What it holds. Raises `InvalidDataUri` where it turns out to hold something else."""
        pieces = _pieces(self._text, self._start)
        while piece := await asyncio.to_thread(next, pieces, b""):
            yield piece


def _pieces(text: str, start: int) -> Iterator[bytes]:
    """The bytes, piece by piece. Padding is only counted: where it belongs, the length says already."""
    held, padding = b"", 0
    while start < len(text):
        end = min(start + PIECE, len(text))
        escape = text.rfind("%", max(end - 2, start), end) if end < len(text) else -1
        end = escape if escape > start else end  # cut no escape in two
        piece = _symbols(text[start:end])
        body = piece.rstrip(b"=")
        if (padding and body) or b"=" in body:
            raise InvalidDataUri("the base64 of the data URI goes on after its padding")
        padding += len(piece) - len(body)
        held += body
        whole = len(held) // 4 * 4
        if whole:
            yield _base64(held[:whole])
        held, start = held[whole:], end
    if padding > 2 or len(held) == 1:
        raise InvalidDataUri("the base64 of the data URI is cut off, or has too much padding")
    if held:
        yield _base64(held.ljust(4, b"="))


def _symbols(text: str) -> bytes:
    """The base64 of this text in the standard alphabet, without escapes and line breaks."""
    try:
        symbols = text.encode("ascii")
    except UnicodeEncodeError as exc:
        message = f"the data URI is not valid base64: it holds {text[exc.start]!r}"
        raise InvalidDataUri(message) from None
    if b"%" in symbols:
        for escape, symbol in _ESCAPES:
            symbols = symbols.replace(escape, symbol)
    return symbols.translate(_PLAIN_ALPHABET, _LINE_BREAKS)


def _base64(symbols: bytes) -> bytes:
    try:
        return binascii.a2b_base64(symbols, strict_mode=True)
    except binascii.Error:
        raise InvalidDataUri("the data URI is not valid base64") from None
