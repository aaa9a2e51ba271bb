"""Google Cloud Storage beyond the suite: large files, canceled ones, what the server is told, credentials."""

import asyncio
import base64
import hashlib
import traceback
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from comfyd.clock import SystemClock
from comfyd.config import GcsStorageConfig
from comfyd.errors import ConfigError, FileNotFound, NotAccepted, StorageError
from comfyd.storage.base import LocalFile, Storage
from comfyd.storage.gcs import LARGEST, PIECE, WHOLE, open_gcs
from tests.storage.stands import local_file, random_sample
from tests.support.gcs_server import GcsServer, running
from tests.support.strict_gcs import account_file, pem, private_key

MB = 1 << 20
CREDENTIALS = "storage.gcs.credentials"


def made(folder: Path, data: bytes, name: str = "a.bin", kind: str = "application/octet-stream") -> LocalFile:
    return local_file(folder / "made", data, name, kind)


async def read(storage: Storage, key: str, start: int = 0, length: int | None = None) -> bytes:
    async with storage.open(key, start, length) as file:
        return b"".join([chunk async for chunk in file.chunks])


def key_of(caught: pytest.ExceptionInfo[StorageError]) -> str | None:
    """The key that the error names; and it is one line."""
    assert "\n" not in caught.value.message
    return caught.value.details.get("key")


def in_bucket(server: GcsServer, **options: Any) -> GcsStorageConfig:
    """The configuration of a new bucket."""
    return GcsStorageConfig(bucket=server.make_bucket(), endpoint=server.endpoint, **options)


async def test_large_files_arrive_whole_and_in_pieces(gcs_server: GcsServer, tmp_path: Path) -> None:
    config = in_bucket(gcs_server)
    data = random_sample(1, 40 * MB + 17)
    assert len(data) > 2 * PIECE
    file = made(tmp_path, data, "film.mp4", "video/mp4")
    async with open_gcs(config, SystemClock()) as storage:
        assert await storage.put("t/1/film.mp4", file) is None
        about = gcs_server.about(str(config.bucket), "t/1/film.mp4")
        assert base64.b64decode(about["md5Hash"]).hex() == file.md5
        assert (about["size"], about["contentType"]) == (str(len(data)), "video/mp4")
        assert gcs_server.held(str(config.bucket)) == ["t/1/film.mp4"]
        assert hashlib.sha256(await read(storage, "t/1/film.mp4")).hexdigest() == file.sha256
        assert await read(storage, "t/1/film.mp4", PIECE - 2, 4) == data[PIECE - 2 : PIECE + 2]


@pytest.mark.parametrize("size", [WHOLE, WHOLE + 1, PIECE, PIECE + 1])
async def test_no_byte_is_lost_where_requests_end(gcs_server: GcsServer, tmp_path: Path, size: int) -> None:
    config = in_bucket(gcs_server)
    file = made(tmp_path, random_sample(size, size))
    async with open_gcs(config, SystemClock()) as storage:
        await storage.put("t/1/a", file)
    about = gcs_server.about(str(config.bucket), "t/1/a")
    assert (about["size"], base64.b64decode(about["md5Hash"]).hex()) == (str(size), file.md5)


async def test_the_event_loop_goes_on_during_an_upload(gcs_server: GcsServer, tmp_path: Path) -> None:
    turns = 0

    async def turning() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    async with open_gcs(in_bucket(gcs_server), SystemClock()) as storage:
        file = made(tmp_path, bytes(24 * MB))
        other = asyncio.create_task(turning())
        await storage.put("t/1/a", file)
        other.cancel()
    assert turns > 40


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("bild ä.png", "image/png", ("image/png", "inline; filename*=UTF-8''bild%20%C3%A4.png")),
        ("a.svg", "image/svg+xml", ("image/svg+xml", "attachment; filename*=UTF-8''a.svg")),
        (
            "a.html",
            "text/html; charset=utf-8",
            ("text/html; charset=utf-8", "attachment; filename*=UTF-8''a.html"),
        ),
        ("a.bin", "no\r\ntype", ("application/octet-stream", "attachment; filename*=UTF-8''a.bin")),
    ],
)
async def test_browsers_are_told_what_to_show_and_what_to_save(
    gcs_server: GcsServer, tmp_path: Path, name: str, kind: str, told: tuple[str, str]
) -> None:
    config = in_bucket(gcs_server, prefix="out/comfyd")
    async with open_gcs(config, SystemClock()) as storage:
        for size in (1000, WHOLE + 1):
            await storage.put("t/1/a", made(tmp_path, bytes(size), name, kind))
            about = gcs_server.about(str(config.bucket), "out/comfyd/t/1/a")
            assert (about["contentType"], about["contentDisposition"]) == told
            assert about["cacheControl"] == "private, no-cache"


async def test_a_canceled_upload_is_taken_back(gcs_server: GcsServer, tmp_path: Path) -> None:
    config = in_bucket(gcs_server)
    bucket = str(config.bucket)
    file = made(tmp_path, bytes(64 * MB))
    async with open_gcs(config, SystemClock()) as storage:
        putting = asyncio.create_task(storage.put("t/1/a", file))
        async with asyncio.timeout(20):
            while await asyncio.to_thread(gcs_server.held, bucket) != ["an upload"]:
                assert not putting.done()
                await asyncio.sleep(0.001)
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting
        assert await asyncio.to_thread(gcs_server.held, bucket) == []


@pytest.mark.parametrize("size", [1000, WHOLE + 1])
@pytest.mark.parametrize("gone", [True, False])
async def test_a_file_that_changed_is_not_stored(
    gcs_server: GcsServer, tmp_path: Path, size: int, gone: bool
) -> None:
    config = in_bucket(gcs_server)
    file = made(tmp_path, bytes(size))
    if gone:
        file.path.unlink()
    else:
        file.path.write_bytes(b"shorter")
    async with open_gcs(config, SystemClock()) as storage:
        with pytest.raises(
            StorageError, match=r"cannot store t/1/a: (No such file|the file has another size)"
        ):
            await storage.put("t/1/a", file)
    assert gcs_server.held(str(config.bucket)) == []


async def test_a_server_that_went_away_fails_puts_until_it_is_back(tmp_path: Path) -> None:
    with running() as server:
        config = in_bucket(server)
        file = made(tmp_path, bytes(32 * MB))
        async with open_gcs(config, SystemClock()) as storage:
            putting = asyncio.create_task(storage.put("t/1/a", file))
            async with asyncio.timeout(20):
                while await asyncio.to_thread(server.held, str(config.bucket)) != ["an upload"]:
                    assert not putting.done()
                    await asyncio.sleep(0.001)
            server.stop()
            with pytest.raises(
                StorageError, match=r"cannot store t/1/a: (the connection broke off|cannot reach)"
            ) as broken:
                await putting
            assert broken.value.retryable
            with pytest.raises(StorageError, match=f"cannot reach 127.0.0.1:{server.port}: ") as down:
                await storage.put("t/1/a", made(tmp_path, b"small"))
            assert key_of(down) == "storage.gcs.endpoint"
            with pytest.raises(StorageError, match="cannot reach"):
                await storage.delete("t/1/a")
            with pytest.raises(StorageError, match="cannot reach"):
                await read(storage, "t/1/a")
            await asyncio.to_thread(server.start)
            await storage.put("t/1/a", file)
            assert hashlib.sha256(await read(storage, "t/1/a")).hexdigest() == file.sha256


@pytest.mark.parametrize("size", [1000, WHOLE + 1])
async def test_a_missing_bucket_is_named(gcs_server: GcsServer, tmp_path: Path, size: int) -> None:
    async with open_gcs(
        GcsStorageConfig(bucket="nowhere", endpoint=gcs_server.endpoint), SystemClock()
    ) as storage:
        with pytest.raises(StorageError, match="there is no bucket nowhere") as caught:
            await storage.put("t/1/a", made(tmp_path, bytes(size)))
        assert key_of(caught) == "storage.gcs.bucket"
        with pytest.raises(StorageError, match="there is no bucket nowhere") as caught:
            await storage.ping()
        assert key_of(caught) == "storage.gcs.bucket"
        with pytest.raises(FileNotFound):
            await read(storage, "t/1/a")


async def test_ping_looks_at_the_region(gcs_server: GcsServer) -> None:
    async with open_gcs(in_bucket(gcs_server, region="europe-west4"), SystemClock()) as storage:
        await storage.ping()
    config = in_bucket(gcs_server, region="us-east1")
    async with open_gcs(config, SystemClock()) as storage:
        with pytest.raises(StorageError, match="is in EUROPE-WEST4, not in us-east1") as caught:
            await storage.ping()
    assert key_of(caught) == "storage.gcs.region"
    assert gcs_server.held(str(config.bucket)) == []
    config = GcsStorageConfig(bucket="nowhere", endpoint=gcs_server.endpoint, region="us-east1")
    async with open_gcs(config, SystemClock()) as storage:
        with pytest.raises(StorageError, match="there is no bucket nowhere"):
            await storage.ping()


async def test_parts_outside_a_file_are_empty_but_know_its_size(
    gcs_server: GcsServer, tmp_path: Path
) -> None:
    async with open_gcs(in_bucket(gcs_server), SystemClock()) as storage:
        await storage.put("t/1/a", made(tmp_path, b"0123456789"))
        for start, length in [(10, None), (99, 5), (3, 0)]:
            async with storage.open("t/1/a", start, length) as file:
                assert file.size_bytes == 10
                assert [chunk async for chunk in file.chunks] == []
        with pytest.raises(FileNotFound):
            await read(storage, "t/1/b", 3, 0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read .*account.json: No such file"),
        ("{", "holds no credentials"),
        ("[]", "holds no credentials"),
        ("{}", "holds no credentials"),
        ('{"type": "something"}', "holds no credentials"),
        ('{"type": 3}', "holds no credentials"),
        ("\xff", "holds no credentials"),
        ('{"type": "external_account"}', "holds no credentials"),
        ('{"type": "service_account"}', "no private key"),
        ('{"type": "service_account", "client_email": "a@b", "private_key": "S3CRET"}', "no private key"),
    ],
)
async def test_a_file_that_holds_no_credentials_is_named(
    tmp_path: Path, content: str | None, said: str
) -> None:
    path = tmp_path / "account.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(StorageError, match=said) as caught:
        async with open_gcs(GcsStorageConfig(bucket="b", credentials=str(path)), SystemClock()):
            pass
    assert key_of(caught) == CREDENTIALS
    assert "S3CRET" not in "".join(traceback.format_exception(caught.value))


async def test_a_folder_is_no_file_of_credentials(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*: Is a directory") as caught:
        async with open_gcs(GcsStorageConfig(bucket="b", credentials=str(tmp_path)), SystemClock()):
            pass
    assert key_of(caught) == CREDENTIALS


async def test_keys_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for key in (pem(ec.generate_private_key(ec.SECP256R1())), pem(private_key(), "password")):
        with pytest.raises(StorageError, match="no private key that can be used") as caught:
            async with open_gcs(
                GcsStorageConfig(bucket="b", credentials=account_file(tmp_path, private_key=key)),
                SystemClock(),
            ):
                pass
        assert key_of(caught) == CREDENTIALS


async def test_the_machines_own_credentials_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")  # the driver's; comfyd is not led by it
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", account_file(tmp_path))
    async with open_gcs(GcsStorageConfig(bucket="b"), SystemClock()) as storage:
        assert str(await storage.url("t/1/a", None)).startswith("https://storage.googleapis.com/b/t/1/a?")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(StorageError, match="cannot read the machine's") as caught:
        async with open_gcs(GcsStorageConfig(bucket="b"), SystemClock()):
            pass
    assert key_of(caught) == CREDENTIALS


@pytest.mark.parametrize(
    "endpoint", ["localhost:4443", "ftp://a", "http://", "http://user:S3CRET@a", "http://a?b=c", "http://[a"]
)
async def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"storage\.gcs\.endpoint is not the url") as caught:
        async with open_gcs(GcsStorageConfig(bucket="b", endpoint=endpoint), SystemClock()):
            pass
    assert caught.value.details == {"key": "storage.gcs.endpoint"}
    assert "S3CRET" not in str(caught.value)


async def test_files_that_google_never_takes_are_not_accepted(tmp_path: Path) -> None:
    file = msgspec.structs.replace(made(tmp_path, b""), size_bytes=LARGEST + 1)
    async with open_gcs(
        GcsStorageConfig(bucket="b", endpoint="http://127.0.0.1:9"), SystemClock()
    ) as storage:
        with pytest.raises(NotAccepted, match="up to 5 TiB"):
            await storage.put("t/1/a", file)
