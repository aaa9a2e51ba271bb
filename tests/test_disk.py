"""Work on the disk: whole or not at all, in words, and over when it says so."""

import asyncio
import errno
import gc
import hashlib
import os
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from blake3 import blake3

from comfyd.disk import (
    BLOCK,
    Room,
    digest_of,
    free_bytes,
    make_empty,
    on_disk,
    opened,
    read_blocks,
    write_stream,
)
from comfyd.errors import DiskFull, StorageError
from tests.support.files import small_disk
from tests.support.logs import captured_logs


async def parts(*given: bytes) -> AsyncIterator[bytes]:
    for part in given:
        yield part


async def breaking() -> AsyncIterator[bytes]:
    yield bytes(2 * BLOCK)
    raise ConnectionResetError("the source broke off")


@pytest.mark.parametrize("sync", [False, True])
async def test_a_stream_becomes_a_file_with_its_digest(tmp_path: Path, *, sync: bool) -> None:
    content = [b"one", b"", bytes(BLOCK), b"two" * 100_000, b"end"]
    digest = await write_stream("cannot write", tmp_path / "a", parts(*content), sync=sync, md5=sync)
    whole = b"".join(content)
    assert (digest.size_bytes, digest.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
    assert digest.md5 == (hashlib.md5(whole, usedforsecurity=False).hexdigest() if sync else None)
    assert digest.blake3 is None
    assert (tmp_path / "a").read_bytes() == whole
    assert digest_of(tmp_path / "a", md5=sync) == digest
    assert b"".join([block async for block in read_blocks("cannot read", tmp_path / "a")]) == whole


async def test_an_empty_stream_is_an_empty_file(tmp_path: Path) -> None:
    assert (await write_stream("cannot write", tmp_path / "a", parts())).size_bytes == 0
    assert (tmp_path / "a").read_bytes() == b""


async def test_a_source_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError):
        await write_stream("cannot write", tmp_path / "a", breaking())
    assert not (tmp_path / "a").exists()


async def test_a_file_that_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(StorageError, match="cannot write: File exists"):
        await write_stream("cannot write", tmp_path / "a", parts(b"yours"))
    assert (tmp_path / "a").read_bytes() == b"mine"


async def test_cancelled_at_any_moment_it_leaves_nothing(tmp_path: Path) -> None:
    for turns in range(40):
        path = tmp_path / f"{turns}"
        writing = asyncio.ensure_future(write_stream("cannot write", path, parts(bytes(BLOCK), b"x")))
        for _ in range(turns % 20):
            await asyncio.sleep(0)
        writing.cancel()
        writing.cancel()
        if isinstance((await asyncio.gather(writing, return_exceptions=True))[0], asyncio.CancelledError):
            assert not path.exists()


async def test_a_full_disk_is_told_from_other_errors() -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(DiskFull, match="cannot write: No space left on device"):
        await on_disk("cannot write", full)
    with pytest.raises(StorageError, match="cannot write: Input/output error") as caught:
        await on_disk("cannot write", broken)
    assert not isinstance(caught.value, DiskFull)


async def test_nothing_happens_on_the_disk_after_a_call_that_was_canceled_has_left() -> None:
    entered, free, left = threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        free.wait(20)
        left.set()

    call = asyncio.ensure_future(on_disk("cannot work", slow))
    await asyncio.to_thread(entered.wait, 20)
    for _ in range(3):
        call.cancel()
        await asyncio.sleep(0.01)
    assert not call.done()
    free.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert left.is_set()


async def test_a_canceled_call_that_fails_as_well_is_canceled() -> None:
    entered, free = threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        free.wait(20)
        raise OSError("the disk is on fire")

    call = asyncio.ensure_future(on_disk("cannot work", slow))
    await asyncio.to_thread(entered.wait, 20)
    call.cancel()
    await asyncio.sleep(0)
    free.set()
    with pytest.raises(asyncio.CancelledError):
        await call


class Waiting:
    """A source that gives a block and a little more, which Python's buffer keeps, and then nothing."""

    def __init__(self) -> None:
        self.dry = asyncio.Event()

    async def chunks(self) -> AsyncIterator[bytes]:
        """See `write_stream`."""
        yield bytes(BLOCK + 100)
        self.dry.set()
        await asyncio.Event().wait()


async def test_a_cancellation_that_meets_a_full_disk_is_still_one(tmp_path: Path) -> None:
    source, path = Waiting(), tmp_path / "a"
    with small_disk(BLOCK):  # no room for one byte more
        writing = asyncio.ensure_future(write_stream("cannot write", path, source.chunks()))
        await source.dry.wait()
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
    assert not path.exists()


async def test_a_cancellation_stays_one_where_the_disk_does_not_let_go_of_the_file(tmp_path: Path) -> None:
    source, path = Waiting(), tmp_path / "folder" / "a"
    path.parent.mkdir()
    writing = asyncio.ensure_future(write_stream("cannot write", path, source.chunks()))
    await source.dry.wait()
    path.unlink()
    path.mkdir()  # nobody may unlink this
    writing.cancel()
    with captured_logs() as lines, pytest.raises(asyncio.CancelledError):
        await writing
    assert [(line["event"], line["log_level"], line["file"]) for line in lines] == [
        ("disk.left", "warning", str(path))
    ]


async def test_an_error_of_the_block_is_not_replaced_by_one_of_closing_the_file(tmp_path: Path) -> None:
    async def write(name: str, error: Exception | None) -> None:
        async with opened("cannot write", lambda: (tmp_path / name).open("xb")) as file:
            file.write(bytes(100))
            if error is not None:
                raise error

    with small_disk(10):
        with pytest.raises(ConnectionResetError):
            await write("a", ConnectionResetError("the source broke off"))
        with pytest.raises(StorageError, match="cannot write: File too large"):
            await write("b", None)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
async def test_a_stream_is_written_as_it_comes_and_known_by_its_digests(tmp_path: Path, size: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    data = data[:size]
    pieces = [data[start : start + 70_001] for start in range(0, size, 70_001)]
    found = await write_stream("cannot write", tmp_path / "a", parts(*pieces), md5=True, blake3=True)
    assert (tmp_path / "a").read_bytes() == data
    assert found.size_bytes == size
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.md5 == hashlib.md5(data, usedforsecurity=False).hexdigest()
    assert found.blake3 == blake3(data).hexdigest()
    assert digest_of(tmp_path / "a", md5=True, blake3=True) == found
    assert b"".join([block async for block in read_blocks("cannot read", tmp_path / "a")]) == data


async def test_errors_of_the_disk_are_storage_errors_in_words(tmp_path: Path) -> None:
    with small_disk(4_000), pytest.raises(StorageError) as caught:
        await write_stream("cannot write", tmp_path / "a", parts(bytes(BLOCK), bytes(BLOCK)))
    assert caught.value.message == "cannot write: File too large"
    assert caught.value.retryable
    with pytest.raises(StorageError, match="No such file"):
        _ = [block async for block in read_blocks("cannot read", tmp_path / "nothing")]
    (tmp_path / "a").write_bytes(b"no folder")
    with pytest.raises(StorageError, match="Not a directory"):
        await write_stream("cannot write", tmp_path / "a" / "b", parts(b"x"))


async def test_reading_that_is_canceled_leaves_no_file_open(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(4 * BLOCK))

    async def read() -> None:
        async for _ in read_blocks("cannot read", tmp_path / "a"):
            await asyncio.sleep(0)

    for turns in range(40):
        reading = asyncio.ensure_future(read())
        for _ in range(turns):
            await asyncio.sleep(0)
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
    gc.collect()  # a file that nobody closed is a warning now, and warnings are errors
    assert [Path(f"/proc/self/fd/{name}") for name in open_files() if name == str(tmp_path / "a")] == []


def open_files() -> list[str]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.append(str(link.readlink()))
    return found


def test_a_folder_is_made_or_emptied_of_files_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    make_empty(folder)
    (folder / "kept").mkdir()
    (folder / "rest").write_bytes(b"half")
    (folder / "link").symlink_to(tmp_path)
    make_empty(folder)
    assert [entry.name for entry in folder.iterdir()] == ["kept"]
    assert tmp_path.is_dir()


async def test_what_is_free_is_what_the_file_system_says(tmp_path: Path) -> None:
    stats = os.statvfs(tmp_path)
    assert 0 < free_bytes(tmp_path) <= stats.f_blocks * stats.f_frsize
    room = Room(tmp_path, 1)
    await room.look()
    room.check()
    room = Room(tmp_path, 1 << 62)
    await room.look()
    with pytest.raises(DiskFull, match=r"limits\.free_bytes"):
        room.check()


async def test_a_shortage_is_said_once_and_so_is_its_end(tmp_path: Path) -> None:
    free = iter([100, 99, 98, 100, 101])
    room = Room(tmp_path, 100, lambda _: next(free))
    seen = []
    with captured_logs() as lines:
        for _ in range(5):
            await room.look()
            seen.append(room.shortage is not None)
    assert seen == [False, True, True, False, False]
    assert [(line["event"], line["free_bytes"]) for line in lines] == [
        ("disk.short", 99),
        ("disk.enough", 100),
    ]


async def test_a_disk_that_does_not_answer_changes_nothing(tmp_path: Path) -> None:
    room = Room(tmp_path / "gone", 100)
    with pytest.raises(StorageError, match=r"cannot see how much room data\.dir has: No such file"):
        await room.look()
    room.check()
