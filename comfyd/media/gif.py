"""The blocks of GIF (https://www.w3.org/Graphics/GIF/spec-gif89a.txt); decodes nothing."""

from collections.abc import Iterator
from typing import BinaryIO, Final, Literal, NamedTuple

from comfyd.errors import MediaError
from comfyd.media.pieces import Pieces, exactly

MOST_SUB_BLOCKS: Final = 4_000_000
"""About 1 GB of picture data, and a second of work."""
_HEADER_BYTES: Final = 13
_LOOPS: Final = frozenset({b"NETSCAPE2.0", b"ANIMEXTS1.0"})
_COLOURS: Final = b"ICCRGBG1012"
_GRAPHIC_CONTROL: Final = 0xF9
_APPLICATION: Final = 0xFF


class Block(NamedTuple):
    """One block: `file[start:end]`. Its sub-blocks start at `data`; `label` says which extension it is."""

    kind: Literal["header", "image", "extension", "end"]
    start: int
    end: int
    data: int = 0
    label: int = 0


def blocks(file: BinaryIO) -> Iterator[Block]:
    """All blocks up to and with the trailer. Raises `MediaError` where they do not add up."""
    at = _HEADER_BYTES + _colour_table(exactly(file, 10, 1)[0])
    yield Block("header", 0, at)
    left = MOST_SUB_BLOCKS
    while left > 0:
        introducer, label = (*exactly(file, at, 1), 0)
        if introducer == 0x3B:
            yield Block("end", at, at + 1)
            return
        if introducer == 0x2C:
            data = at + 11 + _colour_table(exactly(file, at + 9, 1)[0])
        elif introducer == 0x21:
            label, data = exactly(file, at + 1, 1)[0], at + 2
        else:
            raise MediaError("the GIF file is broken: it has an unknown block")
        end, left = _sub_blocks_end(file, data, left - 1)
        yield Block("image" if introducer == 0x2C else "extension", at, end, data, label)
        at = end
    raise MediaError("the GIF file is broken: it has too many blocks")


def duration(file: BinaryIO) -> float | None:
    """Seconds of an animation; None for a still picture."""
    frames, delay, total = 0, 0, 0
    for block in blocks(file):
        if block.kind == "image":
            frames, total, delay = frames + 1, total + delay, 0
        elif block.label == _GRAPHIC_CONTROL:
            delay = int.from_bytes(exactly(file, block.data + 2, 2), "little")
    return total / 100 if frames > 1 else None


def stripped(file: BinaryIO) -> Pieces:
    """The file without comments, texts and unknown extensions, and without what follows its end.

    Timing, loops and colour profile stay.
    """
    pieces = Pieces()
    for block in blocks(file):
        if block.kind != "extension" or _is_kept(file, block):
            pieces.keep(block.start, block.end)
    return pieces


def _is_kept(file: BinaryIO, extension: Block) -> bool:
    if extension.label == _GRAPHIC_CONTROL:
        return extension.end - extension.data == 6  # one sub-block of 4 bytes
    if extension.label != _APPLICATION:
        return False
    name = exactly(file, extension.data, 12)[1:]
    return name == _COLOURS or (name in _LOOPS and extension.end - extension.data == 17)


def _colour_table(flags: int) -> int:
    """Bytes of the colour table that these flags announce."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _sub_blocks_end(file: BinaryIO, at: int, left: int) -> tuple[int, int]:
    """Where the sub-blocks from `at` on end, and how many more may be read."""
    file.seek(at)
    while left > 0:
        length = file.read(1)
        if not length:
            break
        at += 1 + length[0]
        if not length[0]:
            return at, left
        file.seek(at)
        left -= 1
    raise MediaError("the GIF file is broken: its blocks do not end")
