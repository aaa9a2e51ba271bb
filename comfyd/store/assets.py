"""Every read and write of assets as one plain function on a database; never the bytes, never a clock.

A record that has expired is there until `expire` takes it, but no other verb tells of it; only `extend`, for
whoever found it before, makes it last again.
"""

from typing import Any, Final

from comfyd.assets import Asset, OutputAsset
from comfyd.store.rows import Database, artefact_with_id

_EVER: Final = -(2**63)
"""A moment at which nothing has expired."""


def add(db: Database, asset: Asset) -> bool:
    """See `Store.add_asset`."""
    new = of_bytes(db, asset.blake3, asset.key_id, asset.created_at) is None
    db.execute(
        """
        INSERT INTO assets (id, file, blake3, size_bytes, content_type, file_path, created_at, expires_at,
                            key_id)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
        """,
        (
            asset.id,
            asset.file,
            asset.blake3,
            asset.size_bytes,
            asset.content_type,
            asset.file_path,
            asset.created_at,
            asset.expires_at,
            asset.key_id,
        ),
    )
    return new


def get(db: Database, asset_id: str, now: int) -> Asset | None:
    """See `Store.asset`."""
    rows = db.execute(
        """
        SELECT id, file, blake3, size_bytes, content_type, file_path, created_at, expires_at, key_id
        FROM assets WHERE id = ? AND expires_at > ?
        """,
        (asset_id, now),
    ).fetchall()
    return _only(rows)


def of_bytes(
    db: Database, blake3: str, key_id: str | None, now: int, file_path: str | None = None
) -> Asset | None:
    """See `Store.asset_of_bytes`. The index gives them newest first; what has expired is never long there."""
    rows = db.execute(
        """
        SELECT id, file, blake3, size_bytes, content_type, file_path, created_at, expires_at, key_id
        FROM assets INDEXED BY assets_bytes WHERE blake3 = ? AND key_id IS ? AND expires_at > ?
            AND file_path = coalesce(?, file_path)
        ORDER BY number DESC LIMIT 1
        """,
        (blake3, key_id, now, file_path),
    ).fetchall()
    return _only(rows)


def output(db: Database, asset_id: str) -> OutputAsset | None:
    """See `Store.output_asset`. A task that has artefacts has ended; `data` is left out."""
    found = artefact_with_id(db, asset_id)
    if found is None:
        return None
    number, artefact = found
    task_id, completed_at = db.execute(
        "SELECT id, completed_at FROM tasks WHERE number = ?", (number,)
    ).fetchone()
    return OutputAsset(task_id=task_id, artefact=artefact, created_at=completed_at, ended_at=completed_at)


def extend(db: Database, asset_id: str, expires_at: int) -> Asset | None:
    """See `Store.extend_asset`."""
    db.execute(
        "UPDATE assets SET expires_at = ? WHERE id = ? AND expires_at < ?", (expires_at, asset_id, expires_at)
    )
    return get(db, asset_id, _EVER)


def delete(db: Database, asset_id: str, now: int) -> Asset | None:
    """See `Store.delete_asset`."""
    asset = get(db, asset_id, now)
    db.execute("DELETE FROM assets WHERE id = ? AND expires_at > ?", (asset_id, now))
    return asset


def expire(db: Database, now: int, limit: int) -> tuple[Asset, ...]:
    """See `Store.expire_assets`."""
    rows = db.execute(
        """
        DELETE FROM assets WHERE number IN (
            SELECT number FROM assets INDEXED BY assets_expiry
            WHERE expires_at <= ? ORDER BY expires_at LIMIT ?)
        RETURNING id, file, blake3, size_bytes, content_type, file_path, created_at, expires_at, key_id
        """,
        (now, limit),
    ).fetchall()
    return tuple(_asset(row) for row in rows)


def _only(rows: list[Any]) -> Asset | None:
    return _asset(rows[0]) if rows else None


def _asset(row: Any) -> Asset:
    return Asset(
        id=row[0],
        file=row[1],
        blake3=row[2],
        size_bytes=row[3],
        content_type=row[4],
        file_path=row[5],
        created_at=row[6],
        expires_at=row[7],
        key_id=row[8],
    )
