"""Width, height and duration of an output, as the task tells them; decodes no picture, never fails."""

import os
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from comfyd.errors import MediaError
from comfyd.media import gif, png, webp
from comfyd.media.kinds import Sniffed, sniff_open

_NOTHING_TO_TELL: Final = ("text/", "model/", "image/svg", "application/json")


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a file: pixels as stored, and seconds of sound, video or animation."""

    width: int | None = None
    height: int | None = None
    duration: float | None = None


def facts(path: Path, content_type: str) -> Facts:
    """What the file's content tells. All None for what has no such facts and for what cannot be read."""
    if content_type.startswith(_NOTHING_TO_TELL):
        return Facts()
    try:
        with path.open("rb") as file:
            found = sniff_open(file)
            duration = _picture_duration(file, found.extension)
    except OSError:
        return Facts()
    if found.kind == "image":
        return _of_picture(path, found, duration)
    if found.kind == "file":
        return Facts()
    from comfyd.media import tracks  # noqa: PLC0415 - libav is loaded when there is something to look into

    return tracks.measure(path, found.extension)


def _of_picture(path: Path, found: Sniffed, duration: float | None) -> Facts:
    if found.content_type == "image/avif" and _is_sequence(path):
        from comfyd.media import tracks  # noqa: PLC0415 - as above

        duration = tracks.measure(path, found.extension).duration
    return Facts(width=found.width, height=found.height, duration=duration)


def _picture_duration(file: BinaryIO, extension: str) -> float | None:
    size = file.seek(0, os.SEEK_END)
    try:
        if extension == "png":
            return png.duration(file, size)
        if extension == "webp":
            return webp.duration(file, size)
        return gif.duration(file) if extension == "gif" else None
    except MediaError:
        return None


def _is_sequence(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(12)[8:] == b"avis"
