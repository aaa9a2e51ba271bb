"""What every bucket is told about a file: its name, its headers, its public url. Never speaks to one."""

import re
from pathlib import PurePosixPath
from typing import Final
from urllib.parse import quote

from comfyd.errors import FileNotFound
from comfyd.storage.base import LocalFile

_MEDIA_TYPE: Final = re.compile(r"[a-z0-9!#$&^_.+-]+/[a-z0-9!#$&^_.+-]+(;[\x20-\x7e]*)?", re.IGNORECASE)
_SHOWN: Final = re.compile(r"(image/(?!svg)|video/|audio/|text/plain\b|application/json\b).*", re.DOTALL)
"""Media types that a browser shows without running anything; the rest it saves."""


def key_parts(key: str) -> tuple[str, ...]:
    """The folders and the name of a key. Raises `FileNotFound` for one that would lead somewhere else."""
    parts = PurePosixPath(key).parts
    if not parts or any(part in {"..", "/", "//"} for part in parts) or "\\" in key or "\0" in key:
        raise FileNotFound(f"not a key: {key[:200]!r}")
    return parts


def object_name(prefix: str, key: str) -> str:
    """The name of a key in a bucket, below the operator's prefix. Raises `FileNotFound` for a bad key."""
    return "/".join([*([prefix] if prefix else []), *key_parts(key)])


def public_url(base: str, name: str) -> str:
    """Where an object is publicly served; `base` is a url, or just a domain."""
    if "://" not in base:
        base = f"https://{base}"
    return f"{base.rstrip('/')}/{quote(name)}"


def media_type(content_type: str) -> str:
    """The media type as it may stand in a header."""
    return content_type if _MEDIA_TYPE.fullmatch(content_type) else "application/octet-stream"


def disposition(file: LocalFile) -> str:
    """`Content-Disposition`: shown where that runs nothing, saved under the file's own name otherwise."""
    shown = "inline" if _SHOWN.fullmatch(media_type(file.content_type).lower()) else "attachment"
    return f"{shown}; filename*=UTF-8''{quote(file.name, safe='', errors='replace')}"


def cache_control(*, public: bool) -> str:
    """`Cache-Control`: a repeated put may replace the bytes under a key, so caches ask again, by the tag."""
    return "public, no-cache" if public else "private, no-cache"
