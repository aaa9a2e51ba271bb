"""What crosses the store's seam of assets: files that clients uploaded, by an id of their own; never bytes.

An asset is a record over an upload, whose content it shares with every other record over the same bytes.
"""

import msgspec

from comfyd.tasks import Artefact


class Asset(msgspec.Struct, frozen=True, kw_only=True):
    """An uploaded file that graphs can name by `id`. Times are UTC milliseconds."""

    id: str
    """A UUID."""
    file: str
    """The upload that has its bytes (`Upload.file`)."""
    blake3: str
    """Of the bytes, hexadecimal."""
    size_bytes: int
    content_type: str
    file_path: str
    """What the client calls it; it names nothing here."""
    created_at: int
    expires_at: int
    """When it is forgotten, unless it is used again before."""
    key_id: str | None = None


class OutputAsset(msgspec.Struct, frozen=True, kw_only=True):
    """An output of a task as an asset: `artefact.id` names it as long as its task keeps it."""

    task_id: str
    artefact: Artefact
    created_at: int
    """When the task ended; for one that runs, now."""
    ended_at: int | None = None
    """None while the task runs."""
