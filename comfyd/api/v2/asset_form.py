"""The form of an upload: its fields checked, its file on the disk; never what becomes of them.

Text fields may come before the file, as the SDKs send them, or after it.
"""

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, Final

import msgspec

from comfyd.api.forms import Form, Part
from comfyd.api.v2 import asset_fields
from comfyd.errors import MalformedRequest
from comfyd.uploads import Received, Uploads

PARTS: Final = 64
"""Parts of one form at most, with its tags."""
TEXT: Final = 8192
"""Bytes of one text field at most."""

_FILE: Final = "file"
_FIELDS: Final[dict[str, Callable[[str], Any]]] = {
    "content_type": asset_fields.content_type,
    "file_path": asset_fields.file_path,
    "expected_hash": lambda text: asset_fields.blake3_of(text, "expected_hash"),
    "expires_in": asset_fields.keep_ms_of,
}
_REQUIRED: Final = ("content_type", "file_path", _FILE)


class AssetForm(msgspec.Struct, frozen=True, kw_only=True):
    """What a client uploads as an asset."""

    received: Received
    content_type: str
    file_path: str
    expected_blake3: str | None
    """Hexadecimal, in small letters."""
    keep_ms: int | None


async def read_form(form: Form, uploads: Uploads, stack: AsyncExitStack) -> AssetForm:
    """The form, read to its end. Its file lies on the disk until the stack ends.

    A field that is wrong is refused before the file is read, where it comes before it. Raises
    `MalformedRequest`, and what `Uploads.receive` raises.
    """
    read: dict[str, Any] = {}
    async for part in form.parts():
        if part.field in read:
            raise _wrong(part, "is given twice")
        if part.field == _FILE:
            name = read.get("file_path") or part.file_name
            read[_FILE] = await stack.enter_async_context(uploads.receive(form.data(), name))
        elif part.field in _FIELDS:
            read[part.field] = _FIELDS[part.field](await form.text(part, TEXT))
        elif part.file_name is not None:
            raise _wrong(part, f"holds a file: the one file of the form is called {_FILE!r}")
        else:  # tags, which nothing is made of, and what is not known
            await form.text(part, TEXT)
    for name in _REQUIRED:
        if name not in read:
            raise MalformedRequest(f"the form has no field {name!r}", details={"field": name})
    return AssetForm(
        received=read[_FILE],
        content_type=read["content_type"],
        file_path=read["file_path"],
        expected_blake3=read.get("expected_hash"),
        keep_ms=read.get("expires_in"),
    )


def _wrong(part: Part, what: str) -> MalformedRequest:
    field = part.field[:100]
    return MalformedRequest(f"the field {field!r} {what}", details={"field": field})
