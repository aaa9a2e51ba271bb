"""The stands of the storage suite; each server starts once, where a test first needs it."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from tests.storage import stand_cf_images, stand_gcs, stand_local, stand_s3
from tests.storage.stands import Stand
from tests.support import seaweed
from tests.support.cf_images_server import ImagesServer
from tests.support.cf_images_server import running as cf_images_running
from tests.support.gcs_server import GcsServer
from tests.support.gcs_server import running as gcs_running

STORAGES = ("local", "s3", "r2", "gcs", "cf_images")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[seaweed.SeaweedServer]:
    """A real S3 server that checks signatures."""
    with seaweed.running() as server:
        yield server


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[GcsServer]:
    """A server that speaks the protocol of Google Cloud Storage."""
    with gcs_running() as server:
        yield server


@pytest.fixture(scope="session")
def cf_images_server() -> Iterator[ImagesServer]:
    """A server that keeps to the documentation of Cloudflare Images."""
    with cf_images_running() as server:
        yield server


@pytest.fixture(params=STORAGES)
async def stand(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stand]:
    """One storage after the other, each on an empty place of its own."""
    async with _opening(request, tmp_path) as found:
        yield found


def _opening(request: pytest.FixtureRequest, folder: Path) -> AbstractAsyncContextManager[Stand]:
    match request.param:
        case "local":
            return stand_local.stand(None, folder)
        case "s3":
            return stand_s3.stand(request.getfixturevalue("s3_server"), folder)
        case "r2":
            return stand_s3.stand_r2(request.getfixturevalue("s3_server"), folder)
        case "gcs":
            return stand_gcs.stand(request.getfixturevalue("gcs_server"), folder)
        case "cf_images":
            return stand_cf_images.stand(request.getfixturevalue("cf_images_server"), folder)
        case other:
            raise AssertionError(other)
