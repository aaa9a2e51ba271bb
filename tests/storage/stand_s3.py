"""The stands of S3 and R2: a prefix of their own in a bucket of a real S3 server."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from comfyd.config import R2StorageConfig, S3StorageConfig
from comfyd.storage.base import Storage
from comfyd.storage.s3 import open_r2, open_s3
from tests.storage.stands import Stand, random_sample
from tests.support.seaweed import ACCESS_KEY, REGION, SECRET_KEY, SeaweedServer


def s3_config(server: SeaweedServer, **facts: Any) -> S3StorageConfig:
    """What an operator would write for this server; a fresh prefix of a bucket that tests share."""
    defaults = {
        "bucket": server.bucket,
        "region": REGION,
        "endpoint": server.endpoint,
        "access_key": ACCESS_KEY,
        "secret_key": SECRET_KEY,
        "prefix": secrets.token_hex(4),
    }
    return S3StorageConfig(**{**defaults, **facts})


def r2_config(server: SeaweedServer, **facts: Any) -> R2StorageConfig:
    """The same for R2, whose endpoint is this server."""
    defaults = {
        "bucket": server.bucket,
        "account_id": "0123456789abcdef0123456789abcdef",
        "endpoint": server.endpoint,
        "access_key": ACCESS_KEY,
        "secret_key": SECRET_KEY,
        "prefix": f"r2/{secrets.token_hex(4)}",
    }
    return R2StorageConfig(**{**defaults, **facts})


@asynccontextmanager
async def stand(server: SeaweedServer, folder: Path) -> AsyncIterator[Stand]:  # noqa: ARG001 - it needs no folder
    """See `stands`."""
    config = s3_config(server)
    async with open_s3(config) as storage:
        yield _stand(server, storage, config.prefix)


@asynccontextmanager
async def stand_r2(server: SeaweedServer, folder: Path) -> AsyncIterator[Stand]:  # noqa: ARG001 - as above
    """See `stands`."""
    config = r2_config(server)
    async with open_r2(config) as storage:
        yield _stand(server, storage, config.prefix)


def _stand(server: SeaweedServer, storage: Storage, prefix: str) -> Stand:
    return Stand(
        storage=storage,
        held=lambda: asyncio.to_thread(server.held, server.bucket, prefix),
        sample=random_sample,
        content_type="application/octet-stream",
        suffix=".bin",
    )
