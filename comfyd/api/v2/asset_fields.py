"""What a client says of an asset, checked: its hash, its path, its type, its time; never its bytes.

Whatever does not fit raises `MalformedRequest`, whose `details["field"]` names the field.
"""

import re
import unicodedata
from typing import Final

from comfyd.errors import MalformedRequest

FILE_PATH: Final = 255
"""Characters at most, as in `CONTENT_TYPE`."""
CONTENT_TYPE: Final = 255
EXPIRES_IN: Final = (60, 604_800)
"""Seconds at least and at most."""

_INPUT: Final = "input"
"""The only folder that a file can be meant for: comfyd brings inputs to ComfyUI, and installs no models."""
_HASH: Final = re.compile(r"blake3:([0-9a-f]{64})", re.IGNORECASE)
_TYPE: Final = re.compile(r"[\w!#$&^.+-]+/[\w!#$&^.+-]+([ \t]*;[\x20-\x7e]*)?", re.ASCII)
_SEPARATORS: Final = {"Cc", "Zl", "Zp"}
"""Unicode categories of what breaks lines, or is no character."""


def blake3_of(text: str, field: str) -> str:
    """The 64 hexadecimal digits of a hash, in small letters."""
    found = _HASH.fullmatch(text)
    if found is None:
        raise _wrong(field, "must be blake3: and 64 hexadecimal digits")
    return found[1].lower()


def file_path(text: str) -> str:
    """A relative path: a bare name, or one below `input/`."""
    field = "file_path"
    if not text.strip() or len(text) > FILE_PATH:
        raise _wrong(field, f"must have 1 to {FILE_PATH} characters")
    if "\\" in text or any(unicodedata.category(letter) in _SEPARATORS for letter in text):
        raise _wrong(field, "must have no backslash and no control character")
    first, *rest = text.split("/")
    if any(not part.strip() or part in {".", ".."} for part in (first, *rest)):
        raise _wrong(field, "must be a relative path of plain names, as photo.png or input/photo.png")
    if rest and first != _INPUT:
        what = f"{first[:50]}/... would place a file below that folder of ComfyUI, which comfyd does not do"
        raise _wrong(field, f"must be a bare name or begin with input/: {what}")
    return text


def content_type(text: str) -> str:
    """A media type."""
    if len(text) > CONTENT_TYPE or not _TYPE.fullmatch(text):
        raise _wrong("content_type", "must be a media type, as image/png")
    return text


def keep_ms(seconds: int) -> int:
    """How long the asset is wanted, in milliseconds."""
    least, most = EXPIRES_IN
    if not least <= seconds <= most:
        raise _wrong("expires_in", f"must be a whole number of seconds from {least} to {most}")
    return seconds * 1000


def keep_ms_of(text: str) -> int:
    """The same for digits in a form."""
    return keep_ms(int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else 0)


def _wrong(field: str, what: str) -> MalformedRequest:
    return MalformedRequest(f"{field} {what}", details={"field": field})
