"""Assets as the Comfy API v2 shows them; never finds or changes one."""

from msgspec import UNSET, UnsetType

from comfyd.api.faces import COMFY_V2
from comfyd.api.state import State
from comfyd.api.v2.schemas import AssetView
from comfyd.api.v2.views import kept_until
from comfyd.api.views import moment
from comfyd.assets import Asset, OutputAsset


def content_path(asset_id: str) -> str:
    """Where the bytes of an asset are served: what its url is signed for."""
    return f"{COMFY_V2}/assets/{asset_id}/content"


async def asset_view(
    state: State, asset: Asset | OutputAsset, base: str, *, created_new: bool | UnsetType = UNSET
) -> AssetView:
    """The asset with a fresh url. `base` is the url that comfyd is reached under."""
    if isinstance(asset, OutputAsset):
        return await _output_view(state, asset, base)
    link = state.links.own(content_path(asset.id), base)
    return AssetView(
        id=asset.id,
        hash=f"blake3:{asset.blake3}",
        size_bytes=asset.size_bytes,
        content_type=asset.content_type,
        file_path=asset.file_path,
        created_at=moment(asset.created_at),
        url=link.url,
        url_expires_at=moment(asset.expires_at if link.expires_at is None else link.expires_at),
        expires_at=moment(asset.expires_at),
        created_new=created_new,
    )


async def _output_view(state: State, asset: OutputAsset, base: str) -> AssetView:
    artefact = asset.artefact
    link = await state.links.link(artefact, base)
    kept = kept_until(state, asset.ended_at)
    return AssetView(
        id=artefact.id,
        hash=None if artefact.blake3 is None else f"blake3:{artefact.blake3}",
        size_bytes=artefact.size_bytes,
        content_type=artefact.content_type,
        file_path=artefact.name,
        created_at=moment(asset.created_at),
        url=link.url,
        url_expires_at=moment(kept if link.expires_at is None else link.expires_at),
        expires_at=None,
        job_id=asset.task_id,
    )
