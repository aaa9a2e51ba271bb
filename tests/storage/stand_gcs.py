"""The storage suite's stand on Google Cloud Storage: a bucket of its own on a real server on loopback.

With a service account, so that its urls are signed; the server looks at neither token nor signature.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from comfyd.clock import SystemClock
from comfyd.config import GcsStorageConfig
from comfyd.storage.gcs import open_gcs
from tests.storage.stands import Stand, random_sample
from tests.support.gcs_server import GcsServer
from tests.support.strict_gcs import Google, account_file, serving


@asynccontextmanager
async def stand(server: GcsServer, folder: Path) -> AsyncIterator[Stand]:
    """An empty bucket on the server; the account's file is in the folder."""
    bucket = await asyncio.to_thread(server.make_bucket)

    async def held() -> list[str]:
        return await asyncio.to_thread(server.held, bucket)

    google = Google()
    async with serving(google):
        config = GcsStorageConfig(
            bucket=bucket,
            endpoint=server.endpoint,
            credentials=account_file(folder, token_uri=f"{google.url}/token"),
        )
        async with open_gcs(config, SystemClock()) as storage:
            yield Stand(
                storage=storage,
                held=held,
                sample=random_sample,
                content_type="application/octet-stream",
                suffix=".bin",
            )
