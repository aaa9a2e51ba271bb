"""Copies of files without their metadata: ComfyUI writes the whole prompt into nearly all it saves.

Never re-encodes: pixels and samples stay as they are. What is not known to be clean is refused, so that
nothing leaks without a word.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from comfyd.errors import MediaError, StorageError
from comfyd.media import avif, documents, gif, jpeg, png, svg, webp
from comfyd.media.failures import failure
from comfyd.media.kinds import Sniffed, sniff_open
from comfyd.media.pieces import Pieces

_CLEAN: Final = frozenset({"application/x-empty", "image/bmp", "text/plain; charset=utf-8"})
"""Kinds of files that have no place for metadata."""
_PLANS: Final[dict[str, Callable[[BinaryIO, int], Pieces]]] = {
    "gif": lambda file, _size: gif.stripped(file),
    "glb": documents.glb,
    "jpg": jpeg.stripped,
    "png": png.stripped,
    "safetensors": documents.tensors,
    "svg": svg.stripped,
    "webp": webp.stripped,
}


def strip(source: Path, target: Path) -> bool:
    """Write a copy without metadata. False, and no copy, if there is none in it that could tell anything.

    Colour profiles, orientation, timing and loops stay. Raises `StorageError` where the disk fails, and
    `MediaError` for a broken file and for one of a kind that it does not know how to strip.
    """
    try:
        return _strip(source, target)
    except (MediaError, StorageError):
        target.unlink(missing_ok=True)
        raise
    except OSError as exc:
        target.unlink(missing_ok=True)
        what = "the file cannot be stripped of its metadata"
        raise failure(exc, what, "it cannot be read or written") from exc


def _strip(source: Path, target: Path) -> bool:
    with source.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        found = sniff_open(file)
        if found.content_type in _CLEAN:
            return False
        if found.extension == "avif":
            avif.check_clean(file, size)
            return False
        plan = _PLANS.get(found.extension)
        if plan is not None:
            pieces = plan(file, size)
            if pieces.is_whole(size):
                return False
            pieces.write(file, target)
            return True
    return _copy_streams(source, target, found)


def _copy_streams(source: Path, target: Path, found: Sniffed) -> bool:
    from comfyd.media import tracks  # noqa: PLC0415 - libav is loaded when there is something to look into

    if found.kind == "file" or not tracks.is_stripped_here(found.extension):
        raise MediaError(f"a file of type {found.content_type} cannot be stripped of its metadata")
    tracks.copy_streams(source, target, found.extension)
    return True
