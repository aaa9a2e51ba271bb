"""One suite for every storage: streams in, streams out, whole or not at all."""

import hashlib
import os
import stat
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from comfyd.errors import FileNotFound, StorageError
from comfyd.storage.base import Storage, StoredFile
from comfyd.storage.local import BLOCK, LocalStorage, open_local


@pytest.fixture(params=["local"])
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Storage]:
    assert request.param == "local"
    async with open_local(tmp_path / "files") as opened:
        yield opened


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def breaking(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
    raise ConnectionResetError("the source broke off")


async def read(storage: Storage, key: str, start: int = 0, length: int | None = None) -> bytes:
    async with storage.open(key, start, length) as file:
        return b"".join([part async for part in file.chunks])


async def exists(storage: Storage, key: str) -> bool:
    try:
        async with storage.open(key):
            return True
    except FileNotFound:
        return False


async def test_what_was_put_comes_back_with_its_size_and_digest(storage: Storage) -> None:
    stored = await storage.put("t/1/a.png", chunks(b"one", b"", b"two"), "image/png")
    assert (stored.key, stored.size_bytes) == ("t/1/a.png", 6)
    assert stored.sha256 == hashlib.sha256(b"onetwo").hexdigest()
    assert await read(storage, "t/1/a.png") == b"onetwo"
    async with storage.open("t/1/a.png") as file:
        assert file.size_bytes == 6


async def test_large_streams_are_joined_into_blocks(storage: Storage) -> None:
    part = os.urandom(300_000)
    stored = await storage.put("t/1/big", chunks(*[part] * 12), "application/octet-stream")
    assert stored.size_bytes == 12 * len(part) > 3 * BLOCK
    assert await read(storage, "t/1/big") == part * 12


async def test_an_empty_file_is_a_file(storage: Storage) -> None:
    assert (await storage.put("t/1/empty.txt", chunks(), "text/plain")).size_bytes == 0
    assert await read(storage, "t/1/empty.txt") == b""


async def test_ranges_are_read(storage: Storage) -> None:
    await storage.put("t/1/a", chunks(b"0123456789"), "text/plain")
    assert await read(storage, "t/1/a", 3, 4) == b"3456"
    assert await read(storage, "t/1/a", 8) == b"89"
    assert await read(storage, "t/1/a", 8, 100) == b"89"


async def test_the_same_key_is_replaced(storage: Storage) -> None:
    await storage.put("t/1/a", chunks(b"old and longer"), "text/plain")
    await storage.put("t/1/a", chunks(b"new"), "text/plain")
    assert await read(storage, "t/1/a") == b"new"


async def test_a_broken_source_leaves_nothing(storage: Storage) -> None:
    with pytest.raises(ConnectionResetError):
        await storage.put("t/1/a", breaking([b"x" * BLOCK, b"y"]), "text/plain")
    assert not await exists(storage, "t/1/a")


async def test_a_broken_source_leaves_the_older_file(storage: Storage) -> None:
    await storage.put("t/1/a", chunks(b"old"), "text/plain")
    with pytest.raises(ConnectionResetError):
        await storage.put("t/1/a", breaking([b"new"]), "text/plain")
    assert await read(storage, "t/1/a") == b"old"


async def test_deleted_files_are_gone_and_may_be_deleted_again(storage: Storage) -> None:
    await storage.put("t/1/a", chunks(b"x"), "text/plain")
    await storage.delete("t/1/a")
    await storage.delete("t/1/a")
    assert not await exists(storage, "t/1/a")


async def test_ping_leaves_nothing_behind(storage: Storage) -> None:
    await storage.ping()
    await storage.ping()


@pytest.mark.parametrize("key", ["", "../outside", "a/../../outside", "/etc/passwd", "a\\b", "a\0b"])
async def test_keys_never_leave_the_storage(storage: Storage, key: str) -> None:
    assert not await exists(storage, key)
    with pytest.raises(FileNotFound):
        await storage.put(key, chunks(b"x"), "text/plain")


async def test_local_folders_are_private_and_emptied_folders_go(tmp_path: Path) -> None:
    async with open_local(tmp_path / "files") as storage:
        await storage.put("t/1/a", chunks(b"x"), "text/plain")
        await storage.put("t/2/b", chunks(b"x"), "text/plain")
        assert stat.S_IMODE((tmp_path / "files" / "t").stat().st_mode) == 0o700
        await storage.delete("t/1/a")
        assert not (tmp_path / "files" / "t" / "1").exists()
        assert (tmp_path / "files" / "t" / "2" / "b").exists()
        await storage.delete("t/2/b")
        assert not (tmp_path / "files" / "t").exists()


async def test_what_a_dead_process_left_unfinished_is_forgotten(tmp_path: Path) -> None:
    unfinished = tmp_path / "files" / ".unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "half").write_bytes(b"ha")
    async with open_local(tmp_path / "files"):
        assert list(unfinished.iterdir()) == []


async def test_a_disk_that_refuses_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "files").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot use"):
        async with open_local(tmp_path / "files"):
            pass


async def test_a_file_in_the_way_is_a_storage_error(storage: Storage) -> None:
    await storage.put("t/1", chunks(b"x"), "text/plain")
    with pytest.raises(StorageError, match="cannot store"):
        await storage.put("t/1/a", chunks(b"y"), "text/plain")


async def test_a_folder_is_not_a_file(storage: Storage) -> None:
    await storage.put("t/1/a", chunks(b"x"), "text/plain")
    assert not await exists(storage, "t/1")
    assert not await exists(storage, "t/1/a/b")


async def test_a_place_that_gives_back_other_bytes_is_no_storage(tmp_path: Path) -> None:
    class Forgetful(LocalStorage):
        @asynccontextmanager
        async def open(self, *_: object) -> AsyncIterator[StoredFile]:
            yield StoredFile(size_bytes=0, chunks=chunks())

    async with open_local(tmp_path / "files"):
        with pytest.raises(StorageError, match="other bytes"):
            await Forgetful(tmp_path / "files").ping()
