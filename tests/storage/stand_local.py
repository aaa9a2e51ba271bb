"""The local storage's stand: a folder."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from comfyd.storage.local import open_local
from tests.storage.stands import Stand, random_sample


@asynccontextmanager
async def stand(server: None, folder: Path) -> AsyncIterator[Stand]:  # noqa: ARG001 - the disk has no server
    """See `stands`."""
    place = folder / "files"

    def held() -> list[str]:
        return [str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()]

    async with open_local(place) as storage:
        yield Stand(
            storage=storage,
            held=lambda: asyncio.to_thread(held),
            sample=random_sample,
            content_type="application/octet-stream",
            suffix=".bin",
        )
