"""The files of one attempt: begun early or at the end, all of them or none."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from comfyd.artefacts import Source, from_memory
from comfyd.comfy.files import OutputStream
from comfyd.errors import OutputUnavailable, StaleClaim, StorageError
from comfyd.storing import Storing
from comfyd.tasks import OutputFile
from tests.support.service import until
from tests.support.values import task
from tests.test_artefacts import Backend, Failing, Parts, output_file, png, writing


async def told(_: OutputFile) -> None:
    """A row that takes everything."""


def begin(storing: Storing, file: OutputFile, source: Source) -> None:
    """Store this file early; the clock is turned by hand, so that this is at once."""
    storing.begin_early(file, source, told)


async def test_a_file_that_is_begun_twice_is_stored_once(tmp_path: Path) -> None:
    source, row = Backend(png()), task()
    async with writing(tmp_path, storage := Failing()) as parts, parts.storing(row) as storing:
        begin(storing, output_file(), source)
        begin(storing, output_file(), source)
        (artefact,) = await storing.finish([output_file()], source)
        assert (await storing.finish([output_file()], source)) == (artefact,)
        assert parts.board.artefacts(row.id) == (artefact,)
    assert (source.asked, storage.puts) == (1, 1)


async def test_an_early_file_that_failed_is_tried_again_at_the_end(tmp_path: Path) -> None:
    source = Backend(png(), OutputUnavailable("gone", details={"status": 404}))
    async with writing(tmp_path, storage := Failing()) as parts, parts.storing(task()) as storing:
        others = len(asyncio.all_tasks())
        begin(storing, output_file(), source)
        await until(lambda: source.asked == 1 and len(asyncio.all_tasks()) == others)
        (artefact,) = await storing.finish([output_file()], source)
    assert list(storage.kept) == [artefact.key]


async def test_an_early_file_that_is_not_among_the_results_is_forgotten(tmp_path: Path) -> None:
    source, row = Backend(png()), task()
    async with writing(tmp_path, storage := Failing()) as parts, parts.storing(row) as storing:
        begin(storing, output_file("other.png"), source)
        await until(lambda: parts.board.artefacts(row.id) != ())
        (artefact,) = await storing.finish([output_file("real.png")], source)
    assert list(storage.kept) == [artefact.key]
    assert artefact.name == "real.png"


async def test_nothing_at_all_is_a_result_too(tmp_path: Path) -> None:
    async with writing(tmp_path, Failing()) as parts, parts.storing(task()) as storing:
        assert await storing.finish([], Backend(b"")) == ()


async def entered(storing: Storing, files: list[OutputFile], source: Source) -> None:
    async with storing:
        await storing.finish(files, source)


async def test_one_file_that_fails_takes_the_others_along(tmp_path: Path) -> None:
    files = [output_file(f"{index}.png", index=index) for index in range(9)]
    good = Backend(png())

    @asynccontextmanager
    async def source(file: OutputFile) -> AsyncIterator[OutputStream]:
        if file.index == 6:
            raise OutputUnavailable("gone", details={"status": 404})
        async with good(file) as stream:
            yield stream

    row = task()
    async with writing(tmp_path, storage := Failing()) as parts:
        storing = parts.storing(row)
        with pytest.raises(OutputUnavailable):
            await entered(storing, files, source)
        assert parts.board.artefacts(row.id) == ()
    assert storage.kept == {}


@pytest.mark.parametrize("error", [asyncio.CancelledError(), StorageError("the attempt failed")])
async def test_what_is_stored_stays_only_when_the_process_stops(tmp_path: Path, error: BaseException) -> None:
    stops = isinstance(error, asyncio.CancelledError)
    never, storage = asyncio.Event(), Failing()

    @asynccontextmanager
    async def stuck(_: OutputFile) -> AsyncIterator[OutputStream]:
        await never.wait()
        async with from_memory(png(), "image/png") as stream:
            yield stream

    async def attempt(parts: Parts) -> None:
        async with parts.storing(task()) as storing:
            begin(storing, output_file(), Backend(png()))
            begin(storing, output_file("b.png", index=1), stuck)
            await until(lambda: storage.kept != {})
            raise error

    async with writing(tmp_path, storage) as parts:
        with pytest.raises(type(error)):
            await attempt(parts)
    assert len(storage.kept) == (1 if stops else 0)


async def test_a_row_is_told_of_an_early_file_before_anything_is_stored(tmp_path: Path) -> None:
    source, row, heard = Backend(png()), task(), asyncio.Event()

    async def tell(file: OutputFile) -> None:
        assert file == output_file()
        assert storage.puts == 0
        heard.set()

    async with writing(tmp_path, storage := Failing()) as parts, parts.storing(row) as storing:
        storing.begin_early(output_file(), source, tell)
        await until(lambda: parts.board.artefacts(row.id) != ())
    assert heard.is_set()


async def test_a_stale_attempt_stores_nothing_early(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def tell(_: OutputFile) -> None:
        asked.set()
        raise StaleClaim("another one is live")

    source = Backend(png())
    async with writing(tmp_path, storage := Failing()) as parts, parts.storing(task()) as storing:
        storing.begin_early(output_file(), source, tell)
        await asked.wait()
        await storing.no_more_early()
    assert (source.asked, storage.puts) == (0, 0)


async def test_what_an_earlier_process_was_told_of_is_forgotten_with_the_attempt(tmp_path: Path) -> None:
    row = task()
    async with writing(tmp_path, storage := Failing()) as parts:
        async with parts.storing(row) as storing:
            (artefact,) = await storing.finish([output_file()], Backend(png()))
        assert list(storage.kept) == [artefact.key]
        with pytest.raises(StorageError):
            await failing(parts.storing(row, output_file()))
    assert storage.kept == {}


async def failing(storing: Storing) -> None:
    async with storing:
        raise StorageError("the attempt failed")
