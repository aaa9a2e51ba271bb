"""Whether a file is all there, as far as its own container says how long it is; decodes nothing.

ComfyUI serves whatever is on its disk under a fitting length: a file that is still being written, or that a
full disk cut short, looks whole over HTTP. Kinds that do not say where they end count as whole.
"""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from comfyd.errors import MediaError
from comfyd.media import gif, png
from comfyd.media.kinds import sniff_open

_RIFF_UNKNOWN: Final = 0xFFFFFFF0
"""Sizes from here on are written by those who do not know it yet; so is 0."""
_BLOCK: Final = 1 << 20
_MOST_BOXES: Final = 1_000_000
_END_OF_IMAGE: Final = b"\xff\xd9"


def is_whole(path: Path) -> bool:
    """False for a picture, sound or video that ends before its own end. Raises `OSError`; for a thread."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        check = _CHECKS.get(sniff_open(file).extension)
        if check is None:
            return True
        try:
            return check(file, size)
        except MediaError:
            return False


def _png(file: BinaryIO, size: int) -> bool:
    return any(chunk.name == b"IEND" for chunk in png.chunks(file, size))


def _gif(file: BinaryIO, _: int) -> bool:
    return any(block.kind == "end" for block in gif.blocks(file))


def _jpeg(file: BinaryIO, size: int) -> bool:
    """A picture's data never holds the mark of its end; a thumbnail has one, but lies near the start."""
    file.seek(size // 2)
    before = b""
    while block := file.read(_BLOCK):
        if _END_OF_IMAGE in before[-1:] + block:
            return True
        before = block
    return False


def _riff(file: BinaryIO, size: int) -> bool:
    file.seek(4)
    announced = int.from_bytes(file.read(4), "little")
    return announced == 0 or announced >= _RIFF_UNKNOWN or announced + 8 <= size


def _boxed(file: BinaryIO, size: int) -> bool:
    """Every box but the last says where the next one begins; what is no box any more is not judged."""
    start, named = 0, False
    for _ in range(_MOST_BOXES):
        file.seek(start)
        header = file.read(16)
        if len(header) < 8:
            return named
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length < 8:  # to the end of the file, or no box
            return True
        if start + length > size:
            return False
        named = named or header[4:8] == b"moov"
        start += length
    return True


_CHECKS: Final[dict[str, Callable[[BinaryIO, int], bool]]] = {
    "png": _png,
    "gif": _gif,
    "jpg": _jpeg,
    "webp": _riff,
    "wav": _riff,
    "avi": _riff,
    "mp4": _boxed,
    "mov": _boxed,
    "m4a": _boxed,
}
"""Extension, as `sniff` tells it -> whether a file of that kind is all there."""
