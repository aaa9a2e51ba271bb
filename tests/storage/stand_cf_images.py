"""Cloudflare Images for the storage suite: an account of its own on the contract server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from comfyd.clock import SystemClock
from comfyd.config import CfImagesStorageConfig
from comfyd.storage.cloudflare_images import LARGEST, open_cloudflare_images
from tests.storage.stands import Stand, png_sample
from tests.support.cf_images_server import ImagesServer


@asynccontextmanager
async def stand(server: ImagesServer, folder: Path) -> AsyncIterator[Stand]:  # noqa: ARG001 - the server has its own
    """See `stands`."""
    account = server.new_account()
    config = CfImagesStorageConfig(account_id=account.id, api_token=account.token, endpoint=server.endpoint)

    async def held() -> list[str]:
        return sorted(account.images)

    async with open_cloudflare_images(config, SystemClock()) as storage:
        yield Stand(
            storage=storage,
            held=held,
            sample=png_sample,
            content_type="image/png",
            suffix=".png",
            largest=LARGEST,
        )
