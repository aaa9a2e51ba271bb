"""What a client brings is one file for one content, whole or not there, and found while it is of use."""

import asyncio
import base64
import errno
import hashlib
import os
import stat
import struct
import textwrap
import threading
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
from blake3 import blake3

from comfyd.config import InputsConfig
from comfyd.disk import BLOCK
from comfyd.errors import (
    DiskFull,
    InputNotFound,
    InputTooLarge,
    InvalidDataUri,
    StorageError,
    StoreUnavailable,
    UnsupportedContent,
)
from comfyd.graphs import is_reference
from comfyd.media import Sniffed, sniff
from comfyd.uploads import Uploads, open_uploads, parse_reference
from tests.support.clock import HandClock
from tests.support.logs import captured_logs

MEGABYTE = 1 << 20


def picture(width: int = 3, height: int = 2) -> bytes:
    """A PNG of that size; larger ones announce more than they hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + b"\x7f\x10\x20" * min(width, 8) for _ in range(min(height, 8)))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


PNG = picture()
NAME = f"{hashlib.sha256(PNG).hexdigest()}.png"


class Rig:
    """Uploads in a folder of their own, with a clock turned by hand."""

    def __init__(self, uploads: Uploads, folder: Path, clock: HandClock) -> None:
        self.uploads = uploads
        self.folder = folder
        self.clock = clock

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())

    def unfinished(self) -> list[str]:
        return [path.name for path in (self.folder / ".unfinished").iterdir()]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    clock = HandClock()
    folder = tmp_path / "data" / "inputs"
    async with open_uploads(folder, InputsConfig(max_bytes=8 * MEGABYTE, pixels=10_000), clock) as uploads:
        yield Rig(uploads, folder, clock)
    assert list((folder / ".unfinished").iterdir()) == []


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def all_unused(files: Sequence[str]) -> Sequence[str]:
    """As if no task named any."""
    return files


async def read(uploads: Uploads, file: str) -> bytes:
    return await asyncio.to_thread(uploads.path(file).read_bytes)


async def test_a_file_is_named_and_described_by_its_content(rig: Rig) -> None:
    upload = await rig.uploads.add(chunks(PNG[:10], b"", PNG[10:]), "holiday.jpeg")
    assert upload.reference == f"upload:{NAME}"
    assert (upload.file, upload.sha256) == (NAME, hashlib.sha256(PNG).hexdigest())
    assert (upload.content_type, upload.kind, upload.size_bytes) == ("image/png", "image", len(PNG))
    assert (upload.width, upload.height) == (3, 2)
    assert await read(rig.uploads, upload.file) == PNG
    assert rig.uploads.path(upload.file).read_bytes() == PNG
    assert rig.files() == [NAME]


async def test_what_no_reader_knows_is_a_file(rig: Rig) -> None:
    upload = await rig.uploads.add(chunks(b"\0\1\2 something else \xff"))
    assert (upload.kind, upload.width, upload.height) == ("file", None, None)
    assert await rig.uploads.find(upload.reference) == upload


async def test_the_folders_are_for_nobody_else(rig: Rig) -> None:
    for folder in (rig.folder, rig.folder / ".unfinished"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


async def test_the_same_content_is_one_file_and_counts_as_just_used(rig: Rig) -> None:
    first = await rig.uploads.add(chunks(PNG), "a.png")
    rig.clock.advance(90_000_000)
    second = await rig.uploads.add(chunks(PNG), "b.png")
    assert first == second
    assert rig.files() == [NAME]
    assert await rig.uploads.sweep(all_unused, 5) == 0


async def test_concurrent_adds_of_one_content_are_one_file(rig: Rig) -> None:
    content = os.urandom(3 * MEGABYTE)
    parts = [content[start : start + 70_000] for start in range(0, len(content), 70_000)]
    made = await asyncio.gather(*(rig.uploads.add(chunks(*parts), f"{n}.bin") for n in range(6)))
    assert len({upload.reference for upload in made}) == 1
    assert rig.files() == [made[0].file]
    assert await read(rig.uploads, made[0].file) == content


async def test_too_many_bytes_are_refused_as_soon_as_they_are_known(rig: Rig) -> None:
    given = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += MEGABYTE
            yield bytes(MEGABYTE)

    with pytest.raises(InputTooLarge, match=r"8388608 bytes that inputs\.max_bytes allows") as caught:
        await rig.uploads.add(endless())
    assert caught.value.details == {"limit": 8 * MEGABYTE}
    assert given == 9 * MEGABYTE
    assert (rig.files(), rig.unfinished()) == ([], [])


async def test_as_many_bytes_as_are_allowed_are_taken(rig: Rig) -> None:
    upload = await rig.uploads.add(chunks(bytes(8 * MEGABYTE)))
    assert upload.size_bytes == 8 * MEGABYTE


async def test_too_many_pixels_are_refused(rig: Rig) -> None:
    assert (await rig.uploads.add(chunks(picture(100, 100)))).width == 100
    with pytest.raises(InputTooLarge, match="101 x 100 pixels") as caught:
        await rig.uploads.add(chunks(picture(101, 100)))
    assert caught.value.details == {"limit": 10_000, "width": 101, "height": 100}
    with pytest.raises(InputTooLarge, match="30000 x 30000"):
        await rig.uploads.add(chunks(picture(30_000, 30_000)))
    assert len(rig.files()) == 1
    assert rig.unfinished() == []


async def test_an_empty_file_is_refused(rig: Rig) -> None:
    for parts in ((), (b"",), (b"", b"")):
        with pytest.raises(UnsupportedContent, match="empty"):
            await rig.uploads.add(chunks(*parts), "a.png")
    assert rig.files() == []


async def test_a_source_that_breaks_off_leaves_nothing(rig: Rig) -> None:
    async def breaking() -> AsyncIterator[bytes]:
        yield bytes(3 * BLOCK)
        raise ConnectionResetError("the source broke off")

    with pytest.raises(ConnectionResetError):
        await rig.uploads.add(breaking())
    assert (rig.files(), rig.unfinished()) == ([], [])


async def test_canceled_while_the_client_is_silent_leaves_nothing(rig: Rig) -> None:
    silent = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield PNG
        yield bytes(2 * BLOCK)
        silent.set()
        await asyncio.Event().wait()

    adding = asyncio.create_task(rig.uploads.add(slow()))
    await silent.wait()
    assert len(rig.unfinished()) == 1
    adding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await adding
    assert (rig.files(), rig.unfinished()) == ([], [])


async def test_canceled_at_any_moment_and_twice_leaves_a_whole_file_or_none(rig: Rig) -> None:
    finished = 0
    for moment in range(40):
        content = struct.pack(">Q", moment) * (BLOCK // 6)
        adding = asyncio.create_task(rig.uploads.add(chunks(content[:BLOCK], content[BLOCK:])))
        for _ in range(moment * 3):
            await asyncio.sleep(0.0001 if moment % 2 else 0)
        adding.cancel()
        await asyncio.sleep(0)
        adding.cancel()
        with suppress(asyncio.CancelledError):
            await adding
        assert rig.unfinished() == []
        finished += not adding.cancelled()
    for file in rig.files():
        assert hashlib.sha256(await read(rig.uploads, file)).hexdigest() == file.partition(".")[0]
    assert finished <= len(rig.files())


async def test_memory_is_bounded_however_long_the_file_is(tmp_path: Path) -> None:
    async def long() -> AsyncIterator[bytes]:
        for _ in range(1024):
            yield os.urandom(65_536)

    async with open_uploads(tmp_path, InputsConfig(), HandClock()) as uploads:
        await uploads.add(chunks(PNG))
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            upload = await uploads.add(long())
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert upload.size_bytes == 64 * MEGABYTE
    assert peak - before < 8 * MEGABYTE


async def test_what_is_received_but_not_kept_is_forgotten(rig: Rig) -> None:
    async with rig.uploads.receive(chunks(PNG), "a.png") as received:
        assert received.upload.reference == f"upload:{NAME}"
        assert received.path.read_bytes() == PNG
        assert not received.known
        assert rig.files() == []
        with pytest.raises(InputNotFound):
            await rig.uploads.find(received.upload.reference)
    assert (rig.files(), rig.unfinished()) == ([], [])
    await rig.uploads.add(chunks(PNG))
    async with rig.uploads.receive(chunks(PNG)) as received:
        assert received.known


async def test_what_is_received_is_known_by_the_hash_that_assets_have(rig: Rig) -> None:
    content = os.urandom(BLOCK + 1)
    async with rig.uploads.receive(chunks(content[:9], content[9:])) as received:
        assert received.blake3 == blake3(content).hexdigest()
    async with rig.uploads.receive_data_uri(f"data:;base64,{base64.b64encode(PNG).decode()}") as received:
        assert received.blake3 == blake3(PNG).hexdigest()


@pytest.mark.parametrize("used", [True, False])
async def test_what_is_kept_for_a_block_stays_if_that_made_something_that_names_it(
    rig: Rig, *, used: bool
) -> None:
    async def unused(files: Sequence[str]) -> Sequence[str]:
        return [] if used else files

    async with rig.uploads.receive(chunks(PNG)) as received:
        async with rig.uploads.keeping(received, unused) as upload:
            assert upload == received.upload
            assert await rig.uploads.forget([NAME], all_unused) == 0
            assert rig.files() == [NAME]
        assert rig.files() == ([NAME] if used else [])


async def test_what_was_there_before_stays_whatever_becomes_of_the_block(rig: Rig) -> None:
    await rig.uploads.add(chunks(PNG))
    async with rig.uploads.receive(chunks(PNG)) as received:
        with pytest.raises(ConnectionResetError):
            async with rig.uploads.keeping(received, all_unused):
                raise ConnectionResetError
    assert rig.files() == [NAME]


async def test_what_cannot_be_forgotten_is_left_to_the_sweep(rig: Rig) -> None:
    async def unused(_: Sequence[str]) -> Sequence[str]:
        raise StoreUnavailable("no answer")

    with captured_logs() as lines:
        async with rig.uploads.receive(chunks(PNG)) as received, rig.uploads.keeping(received, unused):
            pass
    assert [line["reason"] for line in lines if line["event"] == "upload.left"] == ["no answer"]
    assert rig.files() == [NAME]


async def test_an_upload_is_read_from_anywhere_and_to_its_end_though_it_is_forgotten(rig: Rig) -> None:
    content = os.urandom(BLOCK + 1_000)
    upload = await rig.uploads.add(chunks(content))
    assert await rig.uploads.is_there(upload.file)
    for start, length in ((0, None), (5, 10), (BLOCK - 1, 2), (BLOCK, 5_000), (len(content), None), (3, 0)):
        async with rig.uploads.open(upload.file, start, length) as parts:
            end = None if length is None else start + length
            assert b"".join([part async for part in parts]) == content[start:end]
    async with rig.uploads.open(upload.file) as parts:
        assert await rig.uploads.forget([upload.file], all_unused) == 1
        assert b"".join([part async for part in parts]) == content
    assert not await rig.uploads.is_there(upload.file)
    assert not await rig.uploads.is_there("../uploads")
    with pytest.raises(InputNotFound):
        async with rig.uploads.open(upload.file):
            pass


async def test_a_file_of_known_length_is_refused_before_it_comes(rig: Rig) -> None:
    rig.uploads.check_size(8 * MEGABYTE)
    with pytest.raises(InputTooLarge):
        rig.uploads.check_size(8 * MEGABYTE + 1)


async def test_an_upload_is_found_by_its_reference_and_counts_as_just_used(rig: Rig) -> None:
    upload = await rig.uploads.add(chunks(PNG))
    rig.clock.advance(90_000_000)
    assert await rig.uploads.find(upload.reference) == upload
    assert await rig.uploads.sweep(all_unused, 5) == 0


async def test_what_is_no_upload_is_not_found(rig: Rig) -> None:
    upload = await rig.uploads.add(chunks(PNG))
    outside = rig.folder.parent / NAME
    outside.write_bytes(PNG)
    wrong = (
        "",
        NAME,
        "upload:",
        f"upload:{'0' * 64}.png",
        f"{upload.reference}\n",
        f" {upload.reference}",
        upload.reference.upper(),
        upload.reference.replace(".png", ".jpg"),
        upload.reference.replace(".png", ""),
        f"upload:../{NAME}",
        f"upload:{outside}",
        "upload:.unfinished",
        f"upload:{NAME}/../../{NAME}",
        f"upload:{NAME}\0",
    )
    for reference in wrong:
        with pytest.raises(InputNotFound):
            await rig.uploads.find(reference)
    for file in ("", f"./{NAME}", f"{'0' * 64}.PNG", ".unfinished", f"{NAME}\0"):
        with pytest.raises(InputNotFound):
            rig.uploads.path(file)
    with pytest.raises(InputNotFound):
        rig.uploads.path("../x.png")


def test_only_a_reference_is_parsed_as_one() -> None:
    assert parse_reference(f"upload:{NAME}") == NAME
    for text in (
        "photo.png",
        "upload:photo.png",
        f"xupload:{NAME}",
        f"upload:{NAME}/",
        f"upload:{'g' * 64}.png",
    ):
        assert parse_reference(text) is None
        assert not is_reference(text)
    assert is_reference(f"upload:{NAME}")  # graphs know the same ones


async def test_a_sweep_forgets_what_was_of_no_use_for_long(rig: Rig) -> None:
    made = []
    for content in (b"first", b"second", b"third", b"fourth"):
        made.append((await rig.uploads.add(chunks(content))).file)
        rig.clock.advance(1000)
    (rig.folder / "README").write_text("somebody else's")
    assert await rig.uploads.sweep(all_unused, 10) == 0
    rig.clock.advance(86_400_000 - 2000)  # the fourth is not old enough by a second
    assert await rig.uploads.sweep(all_unused, 2) == 2
    assert rig.files() == sorted(["README", *made[2:]])
    assert await rig.uploads.sweep(all_unused, 2) == 1
    assert rig.files() == sorted(["README", made[3]])


async def test_what_tasks_name_does_not_stand_before_the_rest_in_a_sweep(rig: Rig) -> None:
    used = [(await rig.uploads.add(chunks(content))).file for content in (b"first", b"second")]
    rig.clock.advance(1000)
    idle = await rig.uploads.add(chunks(b"third"))
    asked: list[list[str]] = []

    async def unused(files: Sequence[str]) -> Sequence[str]:
        asked.append(sorted(files))
        return [file for file in files if file not in used]

    rig.clock.advance(86_400_000)
    assert [await rig.uploads.sweep(unused, 2) for _ in range(3)] == [0, 1, 0]
    assert asked == [sorted(used), [idle.file]]
    assert rig.files() == sorted(used)


async def test_a_sweep_spares_what_comes_to_be_of_use_meanwhile(rig: Rig) -> None:
    upload = await rig.uploads.add(chunks(PNG))
    rig.clock.advance(86_400_001)

    async def unused(files: Sequence[str]) -> Sequence[str]:
        assert await rig.uploads.add(chunks(PNG)) == upload
        return files

    assert await rig.uploads.sweep(unused, 5) == 0
    assert rig.files() == [upload.file]


async def test_forgotten_files_are_gone_unless_a_task_names_them(rig: Rig) -> None:
    named = await rig.uploads.add(chunks(b"named"))
    gone = await rig.uploads.add(chunks(b"gone"))

    async def unused(files: Sequence[str]) -> Sequence[str]:
        return [file for file in files if file != named.file]

    assert await rig.uploads.forget([named.file, gone.file, f"{'0' * 64}.png"], unused) == 1
    assert rig.files() == [named.file]
    with pytest.raises(InputNotFound):
        await rig.uploads.find(gone.reference)
    assert await rig.uploads.forget([gone.file], unused) == 0


async def test_what_somebody_holds_is_not_forgotten(rig: Rig) -> None:
    upload = await rig.uploads.add(chunks(PNG))
    async with rig.uploads.hold(upload.reference):
        async with rig.uploads.hold(upload.reference):
            assert await rig.uploads.forget([upload.file], all_unused) == 0
        assert await rig.uploads.forget([upload.file], all_unused) == 0
        rig.clock.advance(90_000_000)
        assert await rig.uploads.sweep(all_unused, 5) == 0
    assert rig.files() == [upload.file]
    assert await rig.uploads.forget([upload.file], all_unused) == 1
    with pytest.raises(InputNotFound):
        async with rig.uploads.hold("photo.png"):
            pass


async def test_nobody_comes_to_hold_what_is_being_forgotten(rig: Rig) -> None:
    upload = await rig.uploads.add(chunks(PNG))
    asked, answer = asyncio.Event(), asyncio.Event()

    async def unused(files: Sequence[str]) -> Sequence[str]:
        asked.set()
        await answer.wait()
        return files

    async def use() -> str:
        async with rig.uploads.hold(upload.reference):
            return (await rig.uploads.find(upload.reference)).file

    forgetting = asyncio.create_task(rig.uploads.forget([upload.file], unused))
    await asked.wait()
    using = asyncio.create_task(use())
    await asyncio.sleep(0)
    answer.set()
    assert await forgetting == 1
    with pytest.raises(InputNotFound):
        await using


async def test_opening_forgets_what_was_not_finished_and_keeps_the_rest(tmp_path: Path) -> None:
    config, clock = InputsConfig(), HandClock()
    async with open_uploads(tmp_path, config, clock) as uploads:
        upload = await uploads.add(chunks(PNG))
    (tmp_path / ".unfinished" / "rest").write_bytes(b"half")
    async with open_uploads(tmp_path, config, clock) as uploads:
        assert list((tmp_path / ".unfinished").iterdir()) == []
        assert await uploads.find(upload.reference) == upload


async def test_a_disk_that_fails_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"data\.dir"):
        async with open_uploads(tmp_path / "file", InputsConfig(), HandClock()):
            pass
    async with open_uploads(tmp_path / "gone", InputsConfig(), HandClock()) as uploads:
        (tmp_path / "gone" / ".unfinished").rmdir()
        with pytest.raises(StorageError, match="No such file"):
            await uploads.add(chunks(PNG))


async def test_a_full_disk_is_insufficient_storage(tmp_path: Path) -> None:
    def full(_path: Path, _name: str | None) -> Sniffed:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with open_uploads(tmp_path, InputsConfig(), HandClock(), full) as uploads:
        with pytest.raises(DiskFull):
            await uploads.add(chunks(PNG))
    assert list((tmp_path / ".unfinished").iterdir()) == []


async def test_a_file_that_goes_while_it_is_looked_at_is_not_found(tmp_path: Path) -> None:
    def look(path: Path, name: str | None) -> Sniffed:
        if path.parent == tmp_path:
            path.unlink()
        return sniff(path, name)

    async with open_uploads(tmp_path, InputsConfig(), HandClock(), look) as uploads:
        upload = await uploads.add(chunks(PNG))
        with pytest.raises(InputNotFound):
            await uploads.find(upload.reference)


async def test_a_name_only_decides_where_the_content_does_not(rig: Rig) -> None:
    table = await rig.uploads.add(chunks(b"a,b\n1,2\n"), "table.csv")
    text = await rig.uploads.add(chunks(b"a,b\n1,2\n"), "table.png")
    assert (table.file.rpartition(".")[2], text.file.rpartition(".")[2]) == ("csv", "txt")
    assert [await rig.uploads.find(each.reference) for each in (table, text)] == [table, text]


async def test_files_are_looked_at_on_a_thread(tmp_path: Path) -> None:
    threads = []

    def look(_path: Path, _name: str | None) -> Sniffed:
        threads.append(threading.get_ident())
        return Sniffed(content_type="x/y", extension="x", kind="file", width=None, height=None)

    async with open_uploads(tmp_path, InputsConfig(), HandClock(), look) as uploads:
        await uploads.find((await uploads.add(chunks(b"x"))).reference)
    assert len(threads) == 2
    assert threading.get_ident() not in threads


SAMPLE = bytes(range(256)) + b"\xfb\xff\xbf" * 30  # + and / in its base64
TEXT = base64.b64encode(SAMPLE).decode()
GOOD_DATA_URIS = {
    "as browsers make it": f"data:image/png;base64,{TEXT}",
    "no media type": f"data:;base64,{TEXT}",
    "an untrue media type": f"data:video/mp4;base64,{TEXT}",
    "a charset": f"data:text/plain;charset=utf-8;base64,{TEXT}",
    "two parameters": f"data:text/plain;charset=utf-8;name=a.txt;base64,{TEXT}",
    "capitals": f"DATA:IMAGE/PNG;BASE64,{TEXT}",
    "blanks around base64": f"data:image/png; base64 ,{TEXT}",
    "no padding": f"data:image/png;base64,{TEXT.rstrip('=')}",
    "url-safe": f"data:image/png;base64,{base64.urlsafe_b64encode(SAMPLE).decode()}",
    "percent-encoded": f"data:image/png;base64,{quote(TEXT, safe='')}",
    "lines": "data:image/png;base64,\n" + "\n".join(textwrap.wrap(TEXT, 76)) + "\n",
    "lines as in mail": "data:image/png;base64," + "\r\n".join(textwrap.wrap(TEXT, 76)),
    "percent-encoded in small letters": f"data:image/png;base64,{quote(TEXT, safe='').replace('%2B', '%2b')}",
    "percent-encoded line breaks": "data:image/png;base64," + "%0D%0A".join(textwrap.wrap(TEXT, 76)),
    "blanks around it": f"  data:image/png;base64,{TEXT} \t\n",
}
BAD_DATA_URIS = {
    "nothing": "",
    "no data": "data:",
    "no comma": f"data:image/png;base64{TEXT}",
    "not base64": "data:text/plain,hello",
    "percent-encoded text": "data:text/plain;charset=utf-8,%68i",
    "base64 as media type": f"data:base64,{TEXT}",
    "another scheme": f"date:image/png;base64,{TEXT}",
    "base64 before the type": f"data:;base64;image/png,{TEXT}",
    "a foreign character": f"data:image/png;base64,{TEXT[:8]}!{TEXT[9:]}",
    "a letter that is not ASCII": f"data:image/png;base64,{TEXT[:8]}ä{TEXT[9:]}",
    "a blank that was a plus": f"data:image/png;base64,{TEXT.replace('+', ' ')}",
    "an escaped foreign character": f"data:image/png;base64,{TEXT[:8]}%00{TEXT[8:]}",
    "half an escape": f"data:image/png;base64,{TEXT.rstrip('=')}%3",
    "cut off": "data:image/png;base64,QUJDR",
    "one letter": "data:image/png;base64,Q",
    "padding alone": "data:image/png;base64,====",
    "too much padding": "data:image/png;base64,QQ===",
    "padding inside": "data:image/png;base64,QQ==QUJD",
    "padding in a group": "data:image/png;base64,Q=QUJD",
    "a fragment": f"data:image/png;base64,{TEXT}#top",
    "a head without end": f"data:{'x' * 2000};base64,{TEXT}",
}


@pytest.mark.parametrize("name", GOOD_DATA_URIS)
async def test_good_data_uris_are_taken(rig: Rig, name: str) -> None:
    upload = await rig.uploads.add_data_uri(GOOD_DATA_URIS[name])
    assert await read(rig.uploads, upload.file) == SAMPLE


@pytest.mark.parametrize("name", BAD_DATA_URIS)
async def test_bad_data_uris_are_refused_and_leave_nothing(rig: Rig, name: str) -> None:
    with pytest.raises(InvalidDataUri) as caught:
        await rig.uploads.add_data_uri(BAD_DATA_URIS[name])
    assert len(caught.value.message) < 120
    assert "\n" not in caught.value.message
    assert (rig.files(), rig.unfinished()) == ([], [])


async def test_the_type_that_a_data_uri_announces_is_not_believed(rig: Rig) -> None:
    text = f"data:text/html;base64,{base64.b64encode(PNG).decode()}"
    assert (await rig.uploads.add_data_uri(text)).reference == f"upload:{NAME}"


async def test_a_data_uri_without_content_is_an_empty_file(rig: Rig) -> None:
    for text in ("data:image/png;base64,", "data:image/png;base64,\n\n"):
        with pytest.raises(UnsupportedContent, match="empty"):
            await rig.uploads.add_data_uri(text)


@pytest.mark.parametrize("spelling", ["plain", "lines", "escaped"])
async def test_long_data_uris_are_decoded_across_pieces(rig: Rig, spelling: str) -> None:
    content = (b"\xff" * 999 + b"0") * 3150 + b"1"  # mostly slashes in base64
    assert len(content) > 3 * BLOCK
    text = base64.b64encode(content).decode()
    if spelling == "lines":
        text = "\r\n".join(text[start : start + 77] for start in range(0, len(text), 77))
    elif spelling == "escaped":
        text = quote(text, safe="")
    upload = await rig.uploads.add_data_uri(f"data:;base64,{text}")
    assert upload.sha256 == hashlib.sha256(content).hexdigest()


async def test_padding_at_the_end_of_a_piece_ends_the_data(rig: Rig) -> None:
    text = base64.b64encode(bytes(BLOCK // 4 * 3 - 1)).decode()
    assert len(text) == BLOCK
    assert text.endswith("=")
    with pytest.raises(InvalidDataUri, match="after its padding"):
        await rig.uploads.add_data_uri(f"data:;base64,{text}{text}")


@pytest.mark.parametrize("lines", [False, True])
async def test_a_data_uri_of_too_many_bytes_is_too_large(rig: Rig, lines: bool) -> None:
    text = "A" * (8 * MEGABYTE // 3 * 4 + 8)
    if lines:
        text = f"{text[:100]}\n{text[100:]}"
    with pytest.raises(InputTooLarge):
        await rig.uploads.add_data_uri(f"data:;base64,{text}")
    assert (rig.files(), rig.unfinished()) == ([], [])


async def test_a_data_uri_of_as_many_bytes_as_are_allowed_is_taken(rig: Rig) -> None:
    text = base64.b64encode(bytes(8 * MEGABYTE)).decode()
    for padded in (text, text.rstrip("=")):
        assert (await rig.uploads.add_data_uri(f"data:;base64,{padded}")).size_bytes == 8 * MEGABYTE
