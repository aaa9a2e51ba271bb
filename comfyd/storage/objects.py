"""What is said of a file wherever it is served: its name, its headers, its public url; never serves one."""

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
    """Where an object is publicly served, below the url `base`."""
    return f"{base.rstrip('/')}/{quote(name)}"


def media_type(content_type: str) -> str:
    """The media type as it may stand in a header."""
    return content_type if _MEDIA_TYPE.fullmatch(content_type) else "application/octet-stream"


def shown_as(content_type: str) -> str:
    """What `Content-Disposition` begins with: `inline` where showing it runs nothing, else `attachment`."""
    return "inline" if _SHOWN.fullmatch(media_type(content_type).lower()) else "attachment"


def disposition(file: LocalFile) -> str:
    """`Content-Disposition` for buckets: what is shown is shown, and saved under the file's own name."""
    return f"{shown_as(file.content_type)}; filename*=UTF-8''{quote(file.name, safe='', errors='replace')}"


def cache_control(*, public: bool) -> str:
    """`Cache-Control`: a repeated put may replace the bytes under a key, so caches ask again, by the tag."""
    return "public, no-cache" if public else "private, no-cache"
