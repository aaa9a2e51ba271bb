"""One suite for every storage: finished files in, streams out, whole or not at all."""

import asyncio
import hashlib
from pathlib import Path

import aiohttp
import pytest

from comfyd.errors import FileNotFound
from comfyd.storage.base import LocalFile, Storage
from tests.storage.stands import Stand, local_file

KEY = "0f8b2c1e/1/9_0_picture"
LARGE = 40 << 20
NAMES = (
    'qu"ote\\d.png',
    "zwei\r\nX-Injected: yes.png",
    "grüße 日本語 🎨.png",
    "semi;colon, %41'.png",
    "a" * 300,
    "\udcff",
    " ",
    "../../up",
)


class Shelf:
    """A stand, and what tests do with it. Lives as long as the test."""

    def __init__(self, stand: Stand, folder: Path) -> None:
        self.storage: Storage = stand.storage
        self.stand = stand
        self._folder = folder
        self.locations: dict[str, str | None] = {}

    def key(self, key: str = KEY) -> str:
        """A key with the suffix of the samples."""
        return key + self.stand.suffix

    def file(self, data: bytes, name: str | None = None) -> LocalFile:
        """A finished file with this content."""
        return local_file(self._folder, data, name or f"picture{self.stand.suffix}", self.stand.content_type)

    async def put(self, data: bytes, key: str = KEY, name: str | None = None) -> LocalFile:
        """Store this under a key."""
        file = self.file(data, name)
        self.locations[key] = await self.storage.put(self.key(key), file)
        return file

    async def read(self, key: str = KEY, start: int = 0, length: int | None = None) -> bytes:
        """The bytes under a key."""
        async with self.storage.open(self.key(key), start, length) as file:
            return b"".join([part async for part in file.chunks])

    async def size(self, key: str = KEY) -> int:
        """The size that the storage tells."""
        async with self.storage.open(self.key(key)) as file:
            return file.size_bytes

    async def exists(self, key: str = KEY) -> bool:
        """Whether there is such a file."""
        try:
            async with self.storage.open(self.key(key)):
                return True
        except FileNotFound:
            return False


@pytest.fixture
async def shelf(stand: Stand, tmp_path: Path) -> Shelf:
    return Shelf(stand, tmp_path / "sources")


async def test_what_was_put_comes_back_with_its_size(shelf: Shelf) -> None:
    data = shelf.stand.sample(1, None)
    await shelf.put(data)
    assert await shelf.read() == data
    assert await shelf.size() == len(data)
    assert len(await shelf.stand.held()) == 1


async def test_ranges_are_read(shelf: Shelf) -> None:
    data = shelf.stand.sample(1, 5_000)
    await shelf.put(data)
    assert await shelf.read(start=3, length=4) == data[3:7]
    assert await shelf.read(start=4_000) == data[4_000:]
    assert await shelf.read(start=4_000, length=100_000) == data[4_000:]
    assert await shelf.read(length=10) == data[:10]
    async with shelf.storage.open(shelf.key(), 3, 4) as file:
        assert file.size_bytes == 5_000


async def test_a_range_of_nothing_is_empty(shelf: Shelf) -> None:
    await shelf.put(shelf.stand.sample(1, 5_000))
    for start, length in [(5_000, None), (6_000, 10), (10, 0)]:
        async with shelf.storage.open(shelf.key(), start, length) as file:
            assert file.size_bytes == 5_000
            assert [part async for part in file.chunks] == []


async def test_the_same_key_is_replaced(shelf: Shelf) -> None:
    await shelf.put(shelf.stand.sample(1, 5_000))
    data = shelf.stand.sample(2, 3_000)
    await shelf.put(data)
    assert await shelf.read() == data
    assert await shelf.size() == 3_000
    assert len(await shelf.stand.held()) == 1


async def test_a_put_may_be_repeated(shelf: Shelf) -> None:
    data = shelf.stand.sample(1, None)
    file = shelf.file(data)
    for _ in range(3):
        await shelf.storage.put(shelf.key(), file)
    assert await shelf.read() == data
    assert len(await shelf.stand.held()) == 1


async def test_the_source_is_left_alone_and_not_needed_any_more(shelf: Shelf) -> None:
    data = shelf.stand.sample(1, None)
    file = await shelf.put(data)
    assert await asyncio.to_thread(file.path.read_bytes) == data
    await asyncio.to_thread(file.path.unlink)
    assert await shelf.read() == data


async def test_deleted_files_are_gone_and_may_be_deleted_again(shelf: Shelf) -> None:
    await shelf.put(shelf.stand.sample(1, None))
    await shelf.storage.delete(shelf.key())
    await shelf.storage.delete(shelf.key())
    assert not await shelf.exists()
    assert await shelf.stand.held() == []


async def test_deleting_one_file_leaves_its_neighbours(shelf: Shelf) -> None:
    data = shelf.stand.sample(2, None)
    await shelf.put(shelf.stand.sample(1, None), "t/1/a")
    await shelf.put(data, "t/1/ab")
    await shelf.storage.delete(shelf.key("t/1/a"))
    assert await shelf.read("t/1/ab") == data


async def test_a_file_that_was_never_put_is_not_found(shelf: Shelf) -> None:
    assert not await shelf.exists()
    with pytest.raises(FileNotFound):
        await shelf.read(start=5, length=5)
    with pytest.raises(FileNotFound):
        await shelf.read(start=5, length=0)
    await shelf.storage.delete(shelf.key())


@pytest.mark.parametrize("verb", ["put", "open", "delete"])
async def test_keys_never_leave_the_storage(shelf: Shelf, verb: str) -> None:
    file = shelf.file(shelf.stand.sample(1, None))

    async def use(key: str) -> None:
        match verb:
            case "put":
                await shelf.storage.put(key, file)
            case "open":
                async with shelf.storage.open(key):
                    pass
            case _:
                await shelf.storage.delete(key)

    for key in ("", ".", "..", "../out", "a/../../out", "/etc/passwd", "//a", "a\\b", "a\0b"):
        with pytest.raises(FileNotFound):
            await use(key)
    assert await shelf.stand.held() == []


async def test_whoever_has_the_url_gets_the_bytes(shelf: Shelf) -> None:
    data = shelf.stand.sample(1, None)
    await shelf.put(data)
    url = await shelf.storage.url(shelf.key(), shelf.locations[KEY])
    if url is None:  # comfyd serves it
        return
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert answer.status == 200
        assert await answer.read() == data
        assert answer.content_type == shelf.stand.content_type


async def test_urls_hold_for_every_key_that_comfyd_makes(shelf: Shelf) -> None:
    key = "prefix/of.a_task/0f8b-2c1e/2/12-3_0_Comfy.UI_00001_"
    data = shelf.stand.sample(1, None)
    await shelf.put(data, key)
    url = await shelf.storage.url(shelf.key(key), shelf.locations[key])
    if url is None:  # comfyd serves it
        return
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert await answer.read() == data


async def test_names_are_only_names(shelf: Shelf) -> None:
    data = shelf.stand.sample(1, None)
    async with aiohttp.ClientSession() as session:
        for name in NAMES:
            await shelf.put(data, name=name)
            assert await shelf.read() == data
            url = await shelf.storage.url(shelf.key(), shelf.locations[KEY])
            if url is None:  # comfyd serves it
                continue
            async with session.get(url) as answer:
                assert await answer.read() == data
                assert "X-Injected" not in answer.headers


async def test_a_probe_leaves_nothing_behind(shelf: Shelf) -> None:
    await shelf.storage.ping()
    await shelf.storage.ping()
    assert await shelf.stand.held() == []


async def test_several_files_are_stored_and_read_at_once(shelf: Shelf) -> None:
    samples = {f"t/{number}/a": shelf.stand.sample(number, 200_000) for number in range(8)}
    async with asyncio.TaskGroup() as group:
        for key, data in samples.items():
            group.create_task(shelf.put(data, key))
    found = await asyncio.gather(*(shelf.read(key) for key in samples))
    assert found == list(samples.values())
    async with asyncio.TaskGroup() as group:
        for key in samples:
            group.create_task(shelf.storage.delete(shelf.key(key)))
    assert await shelf.stand.held() == []


async def test_a_large_file_comes_back_as_it_was(shelf: Shelf) -> None:
    size = min(LARGE, shelf.stand.largest)
    file = await shelf.put(shelf.stand.sample(1, size))
    digest = hashlib.sha256()
    async with shelf.storage.open(shelf.key()) as stored:
        assert stored.size_bytes == size
        async for part in stored.chunks:
            assert len(part) <= 1 << 20
            digest.update(part)
    assert digest.hexdigest() == file.sha256


async def test_a_reader_may_leave_early(shelf: Shelf) -> None:
    data = shelf.stand.sample(1, min(8 << 20, shelf.stand.largest))
    await shelf.put(data)
    for _ in range(3):
        async with shelf.storage.open(shelf.key()) as file:
            async for part in file.chunks:
                assert data.startswith(part)
                break
    assert await shelf.read(length=5) == data[:5]


async def test_a_canceled_put_leaves_nothing_or_the_whole_file(shelf: Shelf) -> None:
    data = shelf.stand.sample(1, min(20 << 20, shelf.stand.largest))
    file = shelf.file(data)
    for moment in (0.0, 0.002, 0.01, 0.03, 0.06, 0.1):  # somewhere in between, wherever that is
        putting = asyncio.create_task(shelf.storage.put(shelf.key(), file))
        await asyncio.wait({putting}, timeout=moment)
        putting.cancel()
        await asyncio.wait({putting})
        if await shelf.exists():
            assert hashlib.sha256(await shelf.read()).hexdigest() == file.sha256
        async with asyncio.timeout(10):  # a request may have arrived and be worked on
            await shelf.storage.delete(shelf.key())
            while await shelf.stand.held():
                await asyncio.sleep(0.02)
                await shelf.storage.delete(shelf.key())
    await shelf.storage.put(shelf.key(), file)
    assert await shelf.size() == len(data)
