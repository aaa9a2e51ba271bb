"""Storages by name: opened once and when they are needed, their drivers loaded only then, errors in words."""

import asyncio
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast, get_args

import msgspec
import pytest

from comfyd.clock import SystemClock
from comfyd.config import (
    CfImagesStorageConfig,
    Config,
    DataConfig,
    GcsStorageConfig,
    R2StorageConfig,
    S3StorageConfig,
    StorageConfig,
    StorageName,
)
from comfyd.errors import ConfigError, StorageError, StorageNotConfigured
from comfyd.storage.base import Storage
from comfyd.storage.opening import Storages, check_usable, open_storage, open_storages
from tests.support.files import local_file, read

SECRET = secrets.token_hex(8)
EVERYTHING = StorageConfig(
    s3=S3StorageConfig(bucket="a-bucket", access_key="key", secret_key=SECRET),
    r2=R2StorageConfig(bucket="a-bucket", account_id="0" * 32, access_key="key", secret_key=SECRET),
    gcs=GcsStorageConfig(bucket="a-bucket"),
    cf_images=CfImagesStorageConfig(account_id="0" * 32, api_token=SECRET),
)


def config(folder: Path, storage: StorageConfig = EVERYTHING) -> Config:
    return Config(data=DataConfig(dir=str(folder)), storage=storage)


class Opened:
    """A storage as far as opening is concerned; it counts how often it is opened and closed."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.failures: list[Exception] = []
        self.pause = 0.0

    @asynccontextmanager
    async def __call__(self, name: StorageName) -> AsyncIterator[Storage]:
        await asyncio.sleep(self.pause)
        if self.failures:
            raise self.failures.pop(0)
        self.opened.append(name)
        try:
            yield cast("Any", f"storage {name}")
        finally:
            self.closed.append(name)


async def test_a_storage_is_opened_once_however_many_ask_for_it_at_once() -> None:
    opener = Opened()
    opener.pause = 0.01
    async with AsyncExitStack() as stack:
        storages = Storages(EVERYTHING, opener, stack)
        assert opener.opened == []
        found = await asyncio.gather(*[storages.get(("s3", "gcs")[number % 2]) for number in range(40)])
        assert {str(storage) for storage in found} == {"storage s3", "storage gcs"}
        assert sorted(opener.opened) == ["gcs", "s3"]
        assert opener.closed == []
    assert sorted(opener.closed) == ["gcs", "s3"]


async def test_one_that_could_not_be_opened_is_opened_when_it_is_asked_for_again() -> None:
    opener = Opened()
    opener.failures = [StorageError("the disk is away")]
    async with AsyncExitStack() as stack:
        storages = Storages(EVERYTHING, opener, stack)
        with pytest.raises(StorageError, match="the disk is away"):
            await storages.get("s3")
        assert str(await storages.get("s3")) == "storage s3"
    assert opener.closed == ["s3"]


async def test_whoever_gives_up_while_one_is_opened_does_not_break_it_for_the_others() -> None:
    opener = Opened()
    opener.pause = 0.02
    async with AsyncExitStack() as stack:
        storages = Storages(EVERYTHING, opener, stack)
        first = asyncio.ensure_future(storages.get("s3"))
        second = asyncio.ensure_future(storages.get("s3"))
        await asyncio.sleep(0.005)
        first.cancel()
        assert str(await second) == "storage s3"
        with pytest.raises(asyncio.CancelledError):
            await first
    assert (opener.opened, opener.closed) == (["s3"], ["s3"])


@pytest.mark.parametrize("name", ["s3", "another", ""])
async def test_one_that_is_not_configured_any_more_is_a_storage_error(tmp_path: Path, name: str) -> None:
    async with open_storages(config(tmp_path, StorageConfig()), SystemClock()) as storages:
        with pytest.raises(StorageError, match="is not configured"):
            await storages.get(name)


async def test_the_ones_that_results_go_to_are_opened_at_once_and_the_others_when_used(
    tmp_path: Path,
) -> None:
    (tmp_path / "files").write_bytes(b"not a folder")
    with pytest.raises(StorageError, match="cannot use"):
        async with open_storages(config(tmp_path), SystemClock()):
            pass
    storage = msgspec.structs.replace(EVERYTHING, provider="s3", fallback="s3")
    async with open_storages(config(tmp_path, storage), SystemClock()) as storages:
        assert (storages.default, storages.fallback) == ("s3", "s3")
        assert (await storages.get("s3")).name == "s3"
        with pytest.raises(StorageError, match="cannot use"):
            await storages.get("local")


@pytest.mark.parametrize("name", get_args(StorageName))
async def test_every_storage_opens_without_asking_anybody(tmp_path: Path, name: StorageName) -> None:
    async with open_storage(name, config(tmp_path), SystemClock()) as storage:
        assert storage.name == name


async def test_two_places_of_one_comfyd_do_not_mix(tmp_path: Path) -> None:
    for number in range(2):
        async with open_storages(config(tmp_path / str(number)), SystemClock()) as storages:
            storage = await storages.get("local")
            await storage.put("t/1/a", local_file(tmp_path / "source", b"%d" % number))
    for number in range(2):
        async with open_storages(config(tmp_path / str(number)), SystemClock()) as storages:
            assert await read(await storages.get("local"), "t/1/a") == b"%d" % number


def test_a_request_may_name_only_what_is_configured() -> None:
    usable = StorageConfig(s3=S3StorageConfig(bucket="b1")).usable
    check_usable("s3", usable)
    check_usable("local", usable)
    with pytest.raises(StorageNotConfigured) as caught:
        check_usable("gcs", usable)
    assert caught.value.message == "storage 'gcs' is not configured here; there is local, s3"
    assert caught.value.details == {"storage": "gcs", "configured": ["local", "s3"]}


def in_a_fresh_process(program: str, *arguments: str) -> str:
    """What a program says in a process of its own, which has imported nothing yet."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WITHOUT_DRIVERS = """
import sys
for driver in ("aioboto3", "gcloud"):
    sys.modules[driver] = None  # as if it were not installed
from pathlib import Path
from comfyd.clock import SystemClock
from comfyd.config import Config
from comfyd.errors import ConfigError, StorageNotConfigured
from comfyd.storage.opening import check_usable, open_storage
for name in ("s3", "r2", "gcs"):
    try:
        open_storage(name, Config(), SystemClock())
    except ConfigError as error:
        print(error.details["key"], error.message)
    try:
        check_usable(name, [name])
    except StorageNotConfigured as error:
        print("request:", error.message)
"""


def test_a_driver_that_is_not_installed_is_told_with_what_installs_it_also_to_whoever_asks_for_it() -> None:
    said = in_a_fresh_process(WITHOUT_DRIVERS).splitlines()
    assert said == [
        f"{to} storage {name} needs a driver that is not installed: pip install 'comfyd[{extra}]'"
        for name, extra in (("s3", "s3"), ("r2", "s3"), ("gcs", "gcs"))
        for to in ("storage.provider", "request:")
    ]


async def test_a_missing_driver_comes_out_as_it_is_and_opens_nothing() -> None:
    opener = Opened()
    opener.failures = [ConfigError("storage s3 needs a driver")]
    async with AsyncExitStack() as stack:
        with pytest.raises(ConfigError, match="needs a driver"):
            await Storages(EVERYTHING, opener, stack).get("s3")
    assert (opener.opened, opener.closed) == ([], [])


LIGHT_START = """
import asyncio, sys
import comfyd.cli
from comfyd.app import open_ground, wire
from comfyd.clock import SystemClock
from comfyd.config import Config, DataConfig

async def start():
    async with open_ground(Config(data=DataConfig(dir=sys.argv[1])), SystemClock()) as ground:
        wire(ground)
        await ground.storages.get("local")

asyncio.run(start())
heavy = ("aioboto3", "aiobotocore", "boto3", "botocore", "gcloud", "av", "PIL", "cryptography")
print(sorted(name for name in heavy if name in sys.modules))
"""


def test_a_local_comfyd_loads_no_driver_of_another_storage_and_no_codec(tmp_path: Path) -> None:
    assert in_a_fresh_process(LIGHT_START, str(tmp_path / "data")).splitlines()[-1] == "[]"
