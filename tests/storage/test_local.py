"""What only the local disk promises: private folders, second names instead of copies, nothing half done."""

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest

from comfyd.disk import BLOCK
from comfyd.errors import FileNotFound, StorageError
from comfyd.storage.base import LocalFile, StoredFile
from comfyd.storage.local import LocalStorage, open_local
from tests.storage.stands import local_file, random_sample

OTHER_DISK = Path("/dev/shm")  # noqa: S108 - any other file system does, and this one is always there


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
async def storage(files: Path) -> AsyncIterator[LocalStorage]:
    async with open_local(files) as opened:
        yield opened


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another disk than the storage."""
    with TemporaryDirectory(dir=OTHER_DISK) as folder:
        assert Path(folder).stat().st_dev != tmp_path.stat().st_dev
        yield Path(folder)


def source(folder: Path, data: bytes = b"x") -> LocalFile:
    return local_file(folder / "sources", data, "a.bin", "application/octet-stream")


def unfinished(files: Path) -> list[Path]:
    return list((files / ".unfinished").iterdir())


async def test_a_file_on_the_same_disk_is_not_copied(
    storage: LocalStorage, files: Path, tmp_path: Path
) -> None:
    file = source(tmp_path)
    await storage.put("t/1/a", file)
    assert (files / "t/1/a").samefile(file.path)
    assert unfinished(files) == []


async def test_a_second_put_of_the_same_file_leaves_no_third_name(
    storage: LocalStorage, files: Path, tmp_path: Path
) -> None:
    file = source(tmp_path)
    await storage.put("t/1/a", file)
    await storage.put("t/1/a", file)
    assert file.path.stat().st_nlink == 2
    assert unfinished(files) == []


async def test_a_file_on_another_disk_is_copied(storage: LocalStorage, files: Path, elsewhere: Path) -> None:
    data = random_sample(1, 3 * BLOCK + 5)
    file = source(elsewhere, data)
    await storage.put("t/1/a", file)
    assert (files / "t/1/a").read_bytes() == data
    assert unfinished(files) == []


async def test_an_empty_file_is_a_file(storage: LocalStorage, tmp_path: Path, elsewhere: Path) -> None:
    for folder in (tmp_path, elsewhere):
        await storage.put("t/1/a", source(folder, b""))
        async with storage.open("t/1/a") as stored:
            assert stored.size_bytes == 0
            assert [block async for block in stored.chunks] == []


async def test_a_canceled_copy_leaves_nothing(storage: LocalStorage, files: Path, elsewhere: Path) -> None:
    file = source(elsewhere, random_sample(1, 30 * BLOCK))
    putting = asyncio.create_task(storage.put("t/1/a", file))
    async with asyncio.timeout(10):
        while not any(path.stat().st_size > BLOCK for path in unfinished(files)):
            await asyncio.sleep(0)
    putting.cancel()
    await asyncio.wait({putting})
    assert putting.cancelled()
    assert unfinished(files) == []
    assert not (files / "t").exists()


async def test_a_file_that_is_shorter_than_it_says_is_not_stored(
    storage: LocalStorage, files: Path, tmp_path: Path
) -> None:
    file = msgspec.structs.replace(source(tmp_path, b"short"), size_bytes=6)
    with pytest.raises(StorageError, match="5 bytes instead of 6"):
        await storage.put("t/1/a", file)
    assert unfinished(files) == []
    assert not (files / "t").exists()


async def test_only_files_are_stored(storage: LocalStorage, files: Path, tmp_path: Path) -> None:
    file = source(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(file.path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (link, tmp_path, pipe):
        with pytest.raises(StorageError, match="cannot store t/1/a"):
            await storage.put("t/1/a", msgspec.structs.replace(file, path=path))
    assert unfinished(files) == []


async def test_a_source_that_is_gone_is_a_storage_error(storage: LocalStorage, tmp_path: Path) -> None:
    file = source(tmp_path)
    file.path.unlink()
    with pytest.raises(StorageError, match="No such file"):
        await storage.put("t/1/a", file)


async def test_comfyd_serves_local_files_itself(storage: LocalStorage, tmp_path: Path) -> None:
    location = await storage.put("t/1/a", source(tmp_path))
    assert await storage.url("t/1/a", location) is None


async def test_folders_are_private_and_emptied_folders_go(
    storage: LocalStorage, files: Path, tmp_path: Path
) -> None:
    await storage.put("t/1/a", source(tmp_path))
    await storage.put("t/2/b", source(tmp_path))
    assert stat.S_IMODE((files / "t").stat().st_mode) == 0o700
    await storage.delete("t/1/a")
    assert not (files / "t" / "1").exists()
    assert (files / "t" / "2" / "b").exists()
    await storage.delete("t/2/b")
    assert not (files / "t").exists()


async def test_what_a_dead_process_left_unfinished_is_forgotten(files: Path) -> None:
    (files / ".unfinished").mkdir(parents=True)
    (files / ".unfinished" / "half").write_bytes(b"ha")
    async with open_local(files):
        assert unfinished(files) == []


async def test_what_is_unfinished_cannot_be_read(storage: LocalStorage, files: Path) -> None:
    (files / ".unfinished" / "half").write_bytes(b"ha")
    with pytest.raises(FileNotFound):
        async with storage.open(".unfinished/half"):
            pass


async def test_a_disk_that_refuses_is_a_storage_error(files: Path) -> None:
    await asyncio.to_thread(files.write_text, "a file where the folder should be")
    with pytest.raises(StorageError, match="cannot use"):
        async with open_local(files):
            pass


async def test_a_folder_that_is_gone_is_explained_by_the_probe(storage: LocalStorage, files: Path) -> None:
    (files / ".unfinished").rmdir()
    with pytest.raises(StorageError, match="cannot write to"):
        await storage.ping()


async def test_a_file_in_the_way_is_a_storage_error(storage: LocalStorage, tmp_path: Path) -> None:
    await storage.put("t/1", source(tmp_path))
    with pytest.raises(StorageError, match="cannot store"):
        await storage.put("t/1/a", source(tmp_path))


async def test_a_folder_is_not_a_file(storage: LocalStorage, tmp_path: Path) -> None:
    await storage.put("t/1/a", source(tmp_path))
    for key in ("t/1", "t/1/a/b"):
        with pytest.raises(FileNotFound):
            async with storage.open(key):
                pass


async def test_a_key_that_no_disk_can_hold_is_a_storage_error(storage: LocalStorage, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot store"):
        await storage.put("t/" + "a" * 300, source(tmp_path))
    with pytest.raises(StorageError, match="cannot read"):
        async with storage.open("t/" + "a" * 300):
            pass


async def test_a_place_that_gives_back_other_bytes_is_no_storage(files: Path) -> None:
    async def other() -> AsyncIterator[bytes]:
        yield b"other"

    class Forgetful(LocalStorage):
        @asynccontextmanager
        async def open(self, *_: object) -> AsyncIterator[StoredFile]:
            yield StoredFile(size_bytes=5, chunks=other())

    async with open_local(files):
        with pytest.raises(StorageError, match="other bytes"):
            await Forgetful(files).ping()


async def test_a_put_survives_its_neighbours_deletion(
    storage: LocalStorage, files: Path, tmp_path: Path
) -> None:
    """A folder that becomes empty goes, while somebody stores into it."""
    kept = source(tmp_path)
    for _ in range(30):
        await storage.put("t/1/gone", source(tmp_path))
        await asyncio.gather(storage.put("t/1/kept", kept), storage.delete("t/1/gone"))
        assert (files / "t/1/kept").samefile(kept.path)
        await storage.delete("t/1/kept")
