"""Files on their way through comfyd: gone when their block ends, whatever ended it; errors in words."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from comfyd.disk import BLOCK, write_stream
from comfyd.errors import FetchFailed, StorageError
from comfyd.scratch import Scratch, open_scratch
from tests.support.logs import captured_logs


def rest(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_what_an_earlier_process_left_is_gone_at_the_start_and_strangers_folders_stay(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "data" / "tmp"
    (folder / "a folder").mkdir(parents=True)
    (folder / "a folder" / "kept").write_bytes(b"x")
    (tmp_path / "elsewhere").write_bytes(b"x")
    for number in range(20):
        (folder / f"left-{number}").write_bytes(b"x")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "link to a folder").symlink_to(tmp_path, target_is_directory=True)
    async with open_scratch(folder):
        assert rest(folder) == ["a folder"]
    assert (tmp_path / "elsewhere").exists()
    assert (folder / "a folder" / "kept").exists()


async def test_the_folder_is_made_for_nobody_else(tmp_path: Path) -> None:
    async with open_scratch(tmp_path / "data" / "tmp"):
        assert (tmp_path / "data" / "tmp").stat().st_mode & 0o777 == 0o700


async def test_a_folder_that_cannot_be_made_is_told_in_one_line_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"a file")
    with pytest.raises(StorageError) as caught:
        async with open_scratch(tmp_path / "data" / "tmp"):
            pass
    assert caught.value.details == {"key": "data.dir"}
    assert str(tmp_path / "data" / "tmp") in caught.value.message
    assert "\n" not in caught.value.message


async def test_each_file_is_another_one_and_gone_after_its_block(tmp_path: Path) -> None:
    async with open_scratch(tmp_path / "tmp") as scratch:
        async with scratch.file() as one, scratch.file() as other, scratch.file() as unused:
            assert len({one, other, unused}) == 3
            one.write_bytes(b"1")
            other.write_bytes(b"2")
            assert len(rest(tmp_path / "tmp")) == 2
        assert rest(tmp_path / "tmp") == []


@pytest.mark.parametrize("error", [FetchFailed("gone"), ValueError("odd")])
async def test_a_file_is_gone_after_an_error_which_comes_out_as_it_is(
    tmp_path: Path, error: Exception
) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield bytes(2 * BLOCK)
        raise error

    async with open_scratch(tmp_path / "tmp") as scratch:
        with pytest.raises(type(error)) as caught:
            async with scratch.file() as path:
                await write_stream("cannot write", path, broken())
        assert caught.value is error
        assert rest(tmp_path / "tmp") == []


async def test_a_file_is_gone_after_a_cancellation_at_any_moment(tmp_path: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(BLOCK // 3)
            await asyncio.sleep(0)

    async def spool(scratch: Scratch) -> None:
        async with scratch.file() as path:
            await write_stream("cannot write", path, endless())

    async with open_scratch(tmp_path / "tmp") as scratch:
        for turns in range(40):
            spooling = asyncio.ensure_future(spool(scratch))
            for _ in range(turns):
                await asyncio.sleep(0)
            spooling.cancel()
            with suppress(asyncio.CancelledError):
                await spooling
            assert rest(tmp_path / "tmp") == []


async def test_a_file_that_cannot_be_deleted_ends_nothing_and_is_told(tmp_path: Path) -> None:
    async with open_scratch(tmp_path / "tmp") as scratch:
        with captured_logs() as lines:
            async with scratch.file() as path:
                path.mkdir()  # whatever deletes files fails here, for root as well
        assert [line["event"] for line in lines] == ["scratch.left"]
        assert "file" in lines[0]
    assert path.exists()
