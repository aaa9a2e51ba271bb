"""A copy of a file in pieces: some of its bytes as they are, some new ones; never holds more than a block."""

from pathlib import Path
from typing import BinaryIO, Final

from comfyd.errors import MediaError

BLOCK: Final = 1 << 18
MOST_PIECES: Final = 100_000


class Pieces:
    """What a copy is made of, in order. Lives as long as one copy is planned and written."""

    def __init__(self) -> None:
        self._pieces: list[bytes | range] = []

    def keep(self, start: int, end: int) -> None:
        """Next comes `source[start:end]` as it is."""
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, range) and last.stop == start:
            self._pieces[-1] = range(last.start, end)
        else:
            self._add(range(start, end))

    def put(self, data: bytes) -> None:
        """Next comes this."""
        self._add(data)

    def extend(self, other: "Pieces") -> None:
        """Next comes all of another plan for the same source."""
        for piece in other._pieces:  # noqa: SLF001 - another one of its own class
            if isinstance(piece, bytes):
                self.put(piece)
            else:
                self.keep(piece.start, piece.stop)

    def _add(self, piece: bytes | range) -> None:
        if len(self._pieces) == MOST_PIECES:
            raise MediaError("the file is broken: it is in too many pieces")
        self._pieces.append(piece)

    @property
    def size(self) -> int:
        """Bytes of the copy."""
        return sum(len(piece) for piece in self._pieces)

    def is_whole(self, size: int) -> bool:
        """Whether the copy would be the same as its source of `size` bytes."""
        return self._pieces == [range(size)]

    def write(self, source: BinaryIO, target: Path) -> None:
        """Make the copy."""
        with target.open("wb") as out:
            for piece in self._pieces:
                if isinstance(piece, bytes):
                    out.write(piece)
                else:
                    _copy(source, out, piece)


def _copy(source: BinaryIO, out: BinaryIO, span: range) -> None:
    source.seek(span.start)
    left = len(span)
    while left:
        data = source.read(min(left, BLOCK))
        if not data:
            raise MediaError("the file became shorter while it was read")
        out.write(data)
        left -= len(data)


def exactly(file: BinaryIO, start: int, count: int) -> bytes:
    """`file[start:start + count]`. Raises `MediaError` where the file ends before."""
    file.seek(start)
    data = file.read(count)
    if len(data) < count:
        raise MediaError("the file is broken: it ends too early")
    return data
