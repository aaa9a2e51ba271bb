"""PNG files as ComfyUI writes them: the prompt and the workflow as text chunks.

Can pad a file to a given size with random data in a chunk of its own, for tests that need large outputs.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from typing import TYPE_CHECKING, Any

from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from PIL.Image import Image
END_CHUNK = 12  # bytes of IEND, the last chunk
FRAME = 12  # bytes of a chunk around its data
PADDING = b"pdNg"  # ancillary, private, safe to copy: every reader skips it


def metadata(prompt: dict[str, Any], extra_pnginfo: Any) -> PngInfo:
    """The text chunks `prompt` and one per key of `extra_pnginfo`."""
    info = PngInfo()
    for name, text in texts(prompt, extra_pnginfo).items():
        info.add_text(name, text)
    return info


def texts(prompt: dict[str, Any], extra_pnginfo: Any) -> dict[str, str]:
    """What savers write into files: each value as JSON text."""
    found = {"prompt": json.dumps(prompt)}
    if extra_pnginfo is not None:
        for name in extra_pnginfo:
            found[name] = json.dumps(extra_pnginfo[name])
    return found


def encode(picture: Image, info: PngInfo | None, level: int, at_least: int | None) -> bytes:
    """The picture as a PNG file of at least `at_least` bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info, compress_level=level)
    return pad(buffer.getvalue(), at_least)


def pad(data: bytes, at_least: int | None) -> bytes:
    """The same PNG with a chunk of random bytes before its end, if it is too short."""
    if at_least is None or len(data) >= at_least:
        return data
    filling = os.urandom(max(0, at_least - len(data) - FRAME))
    checksum = zlib.crc32(PADDING + filling)
    chunk = struct.pack(">I", len(filling)) + PADDING + filling + struct.pack(">I", checksum)
    return data[:-END_CHUNK] + chunk + data[-END_CHUNK:]
