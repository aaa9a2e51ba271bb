"""A url becomes a whole file or an error that says why; nothing is left of what failed."""

import asyncio
import email.utils
import hashlib
import random
import resource
import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from comfyd.clock import Clock, SystemClock
from comfyd.config import InputsConfig
from comfyd.errors import (
    BlockedAddress,
    ComfydError,
    FetchFailed,
    InputTooLarge,
    InputTooSlow,
    InvalidUrl,
    StorageError,
)
from comfyd.fetch import Fetched, Fetcher
from comfyd.guard import Guard, GuardedClient, open_client
from tests.support.clock import HandClock
from tests.support.trap import Script, answer, hang, head, open_trap, redirect

PATIENCE = 30.0
MIB = 1 << 20
CONFIG = InputsConfig(max_bytes=100 * MIB, timeout=PATIENCE)
BODY = random.Random(7).randbytes(3 * MIB + 17)


class StridingClock(HandClock):
    """Six seconds pass between any two looks at it."""

    def monotonic(self) -> int:
        """Six seconds later than last time."""
        self.advance(6000)
        return self.time


@pytest.fixture
async def client() -> AsyncIterator[GuardedClient]:
    """A way out that leads to this machine only."""
    async with open_client(Guard.of(["127.0.0.0/8"]), silence=PATIENCE) as opened:
        yield opened


class Desk:
    """A fetcher with a clock turned by hand, and a folder for what it fetches."""

    def __init__(self, client: GuardedClient, folder: Path) -> None:
        self.client = client
        self.folder = folder
        self.clock = HandClock()

    @property
    def target(self) -> Path:
        """Where files go."""
        return self.folder / "fetched"

    async def fetch(
        self, url: str, config: InputsConfig = CONFIG, clock: Clock | None = None, window: float = 10.0
    ) -> Fetched:
        """Fetch within a bound, in place of what was fetched before."""
        self.target.unlink(missing_ok=True)
        fetcher = Fetcher(config, self.client, clock or self.clock, window)
        async with asyncio.timeout(PATIENCE):
            return await fetcher.fetch(url, self.target)

    def empty(self) -> bool:
        """Whether nothing was left behind."""
        return not list(self.folder.iterdir())


@pytest.fixture
def desk(client: GuardedClient, tmp_path: Path) -> Desk:
    """Over an empty folder."""
    return Desk(client, tmp_path)


def raw(*parts: bytes, then: Script | None = None) -> Script:
    """These bytes one after the other, and perhaps something after them."""

    async def script(writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
        if then is not None:
            await then(writer)

    return script


async def abort(writer: asyncio.StreamWriter) -> None:
    """Break the connection."""
    writer.transport.abort()


def chunked(*parts: bytes) -> Script:
    """A body whose length is not announced."""
    framed = [b"%x\r\n%s\r\n" % (len(part), part) for part in parts]
    return raw(head(200, {"Transfer-Encoding": "chunked"}), *framed, b"0\r\n\r\n")


def sha256(data: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, len(BODY)])
async def test_file_arrives_with_its_size_and_hash(desk: Desk, size: int) -> None:
    body = BODY[:size]
    async with open_trap(answer(body)) as server:
        fetched = await desk.fetch(f"{server.url}/a/picture.png?sig=x")
    expected = Fetched(size_bytes=size, sha256=sha256(body), name="picture.png")
    assert fetched == expected
    assert desk.target.read_bytes() == body
    assert server.accepted == 1


@pytest.mark.parametrize("script", [chunked(BODY, b"more"), raw(head(200, {}), BODY, b"more")])
async def test_body_without_a_length_arrives_whole(desk: Desk, script: Script) -> None:
    async with open_trap(script) as server:
        fetched = await desk.fetch(f"{server.url}/")
    assert fetched.sha256 == sha256(BODY + b"more")
    assert fetched.name is None


async def test_redirect_is_followed_and_names_the_file(desk: Desk) -> None:
    async with open_trap(redirect("/b/new.webm?x"), answer(b"x"), redirect("/"), answer(b"x")) as server:
        assert (await desk.fetch(f"{server.url}/old.png")).name == "new.webm"
        assert (await desk.fetch(f"{server.url}/old.png")).name == "old.png"


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ('attachment; filename="a b.png"', "a b.png"),
        ("attachment; filename=a.png", "a.png"),
        ("attachment; filename*=UTF-8''b%C3%BCcher.png; filename=x.png", "bücher.png"),
        ('inline; filename="../../etc/passwd"', "passwd"),
        ('attachment; filename="C:\\dir\\a.png"', "a.png"),
        ('attachment; filename="a%00.png"', "a%00.png"),
        ("attachment; filename*=UTF-8''a%00%0A%E2%80%AE.png", "a.png"),
        ('attachment; filename=".."', "path name.png"),
        ('attachment; filename=""', "path name.png"),
        ("attachment", "path name.png"),
        ("attachment; filename=x.png; filename*=UTF-8''b%C3%BCcher.png", "bücher.png"),
        ("attachment; filename=bücher.png", "bücher.png"),
        ("attachment; filename*=nonsense''%ff%fe", "ÿþ"),
        ("attachment; filename*0=a; filename*1=.png", "a.png"),
        ('attachment; filename="' + "a" * 300 + '.png"', "a" * 251 + ".png"),
        (';;;=;"', "path name.png"),
    ],
)
async def test_name_is_data_without_a_path(desk: Desk, disposition: str, name: str) -> None:
    async with open_trap(answer(b"x", Content_Disposition=disposition)) as server:
        assert (await desk.fetch(f"{server.url}/a%2Fpath%20name.png")).name == name


async def test_announced_size_is_refused_before_a_byte_of_it(desk: Desk) -> None:
    config = InputsConfig(max_bytes=1000)
    async with open_trap(raw(head(200, {"Content-Length": "1001"}), then=hang)) as server:
        with pytest.raises(InputTooLarge, match="1000 bytes"):
            await desk.fetch(f"{server.url}/", config)
    assert desk.empty()
    assert server.accepted == 1


@pytest.mark.parametrize("script", [answer(BODY), chunked(BODY)])
async def test_largest_file_fits(desk: Desk, script: Script) -> None:
    async with open_trap(script) as server:
        fetched = await desk.fetch(f"{server.url}/", InputsConfig(max_bytes=len(BODY)))
    assert fetched.size_bytes == len(BODY)


async def test_size_that_was_not_announced_is_counted(desk: Desk) -> None:
    async with open_trap(chunked(BODY, b"x" * MIB)) as server:
        with pytest.raises(InputTooLarge):
            await desk.fetch(f"{server.url}/", InputsConfig(max_bytes=len(BODY)))
    assert desk.empty()


async def test_body_shorter_than_announced_is_tried_again_and_fails_in_the_end(desk: Desk) -> None:
    async with open_trap(answer(BODY, length=len(BODY) + 1)) as server:
        with pytest.raises(FetchFailed, match="broke off") as caught:
            await desk.fetch(f"{server.url}/", InputsConfig(attempts=3))
    assert caught.value.retryable
    assert server.accepted == 3
    assert desk.empty()


async def test_body_longer_than_announced_is_cut_or_refused(desk: Desk) -> None:
    async with open_trap(answer(BODY, length=1000)) as server:
        try:
            fetched = await desk.fetch(f"{server.url}/")
        except FetchFailed:
            assert desk.empty()
        else:
            assert (fetched.size_bytes, fetched.sha256) == (1000, sha256(BODY[:1000]))


@pytest.mark.parametrize(
    "broken",
    [
        raw(head(200, {"Content-Length": str(len(BODY))}), BODY[: 2 * MIB], then=abort),
        raw(head(200, {"Transfer-Encoding": "chunked"}), b"10\r\nabc", then=abort),
        answer(status=500),
        answer(status=503, Retry_After="soon"),
        answer(status=408),
        answer(status=425),
        answer(status=429),
    ],
)
async def test_what_fails_once_succeeds_on_the_second_try(desk: Desk, broken: Script) -> None:
    async with open_trap(broken, answer(BODY)) as server:
        fetched = await desk.fetch(f"{server.url}/")
    assert fetched.sha256 == sha256(BODY)
    assert desk.target.read_bytes() == BODY
    assert server.accepted == 2
    assert desk.clock.slept == [375]


async def test_connection_that_breaks_before_an_answer_is_tried_again(desk: Desk) -> None:
    # the first time by aiohttp itself, which knows that a GET may be repeated
    async with open_trap(abort, abort, answer(BODY)) as server:
        fetched = await desk.fetch(f"{server.url}/")
    assert fetched.sha256 == sha256(BODY)
    assert server.accepted == 3
    assert desk.clock.slept == [375]


@pytest.mark.parametrize("status", [204, 206, 304, 400, 401, 403, 404, 410, 451])
async def test_what_will_not_pass_is_not_tried_again(desk: Desk, status: int) -> None:
    async with open_trap(answer(status=status)) as server:
        with pytest.raises(FetchFailed, match=f"127.0.0.1 answered {status}") as caught:
            await desk.fetch(f"{server.url}/secret?secret")
    assert not caught.value.retryable
    assert caught.value.details == {"host": "127.0.0.1", "status": status}
    assert server.accepted == 1
    assert desk.empty()


async def test_pauses_double_until_the_tries_are_used_up(desk: Desk) -> None:
    async with open_trap(answer(status=502)) as server:
        with pytest.raises(FetchFailed, match="502") as caught:
            await desk.fetch(f"{server.url}/", InputsConfig(attempts=9))
    assert caught.value.retryable
    assert server.accepted == 9
    assert desk.clock.slept == [375, 750, 1500, 3000, 6000, 12000, 22500, 22500]


@pytest.mark.parametrize(
    ("wanted", "slept"),
    [
        ("7", 7000),
        ("0", 375),
        ("3600", 60_000),
        ("9" * 400, 60_000),
        (email.utils.formatdate(1_700_000_020, usegmt=True), 20_000),
        (email.utils.formatdate(1_700_000_020), 20_000),
        (email.utils.formatdate(1_600_000_000, usegmt=True), 375),
        ("Mon, 01 Jan 99999 00:00:00 GMT", 375),
        ("-1", 375),
    ],
)
async def test_retry_after_is_honoured_within_bounds(desk: Desk, wanted: str, slept: int) -> None:
    async with open_trap(answer(status=503, Retry_After=wanted), answer(b"x")) as server:
        await desk.fetch(f"{server.url}/", InputsConfig(timeout=300))
    assert desk.clock.slept == [slept]


async def test_no_pause_is_begun_that_outlasts_the_time(desk: Desk) -> None:
    async with open_trap(answer(status=503, Retry_After="20")) as server:
        with pytest.raises(FetchFailed, match="503") as caught:
            await desk.fetch(f"{server.url}/", InputsConfig(timeout=20))
    assert caught.value.details["retry_after"] == 20
    assert server.accepted == 1
    assert not desk.clock.slept


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "aws-chunked"])
async def test_encoded_body_is_refused(desk: Desk, encoding: str) -> None:
    async with open_trap(answer(b"x", Content_Encoding=encoding)) as server:
        with pytest.raises(FetchFailed, match="encoded") as caught:
            await desk.fetch(f"{server.url}/")
    assert not caught.value.retryable
    assert server.accepted == 1
    assert b"Accept-Encoding: identity\r\n" in server.heads[0]
    assert desk.empty()


async def test_encoding_of_no_effect_is_taken(desk: Desk) -> None:
    async with open_trap(answer(b"x", Content_Encoding="Identity")) as server:
        assert (await desk.fetch(f"{server.url}/")).size_bytes == 1


async def test_server_that_drips_is_too_slow(desk: Desk) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    config = InputsConfig(min_rate=10_000)
    async with open_trap(raw(head(200, {"Content-Length": "1000000"}), then=drip)) as server:
        with pytest.raises(InputTooSlow, match="min_rate"):
            await desk.fetch(f"{server.url}/", config, SystemClock(), window=0.2)
    assert server.accepted == 1
    assert desk.empty()


async def test_server_that_stops_is_too_slow_in_its_second_window(desk: Desk) -> None:
    stalls = raw(head(200, {"Content-Length": "1000"}) + b"x" * 999, then=hang)
    async with open_trap(stalls) as server:
        began = time.monotonic()
        with pytest.raises(InputTooSlow, match="min_rate"):
            await desk.fetch(f"{server.url}/", InputsConfig(min_rate=1), SystemClock(), window=0.1)
    assert time.monotonic() - began >= 0.2
    assert desk.empty()


async def test_rate_is_judged_window_by_window(desk: Desk) -> None:
    async with open_trap(answer(BODY)) as server:
        fetched = await desk.fetch(f"{server.url}/", InputsConfig(min_rate=1), StridingClock())
        assert fetched.sha256 == sha256(BODY)
        with pytest.raises(InputTooSlow):
            await desk.fetch(f"{server.url}/", InputsConfig(min_rate=MIB), StridingClock())
    assert desk.empty()


@pytest.mark.parametrize("script", [hang, raw(head(200, {"Content-Length": "9"}), b"x", then=hang)])
async def test_time_is_for_all_tries_together(desk: Desk, script: Script) -> None:
    async with open_trap(answer(status=500), script) as server:
        with pytest.raises(InputTooSlow, match=r"127\.0\.0\.1 took longer than the 0\.5 seconds"):
            await desk.fetch(f"{server.url}/?secret", InputsConfig(timeout=0.5, min_rate=0, attempts=9))
    assert desk.empty()


async def test_blocked_address_and_bad_url_are_not_tried_again(tmp_path: Path) -> None:
    async with open_trap() as server, open_client(Guard.of([])) as client:
        desk = Desk(client, tmp_path)
        for url, kind in ((f"{server.url}/", BlockedAddress), ("ftp://127.0.0.1/", InvalidUrl)):
            with pytest.raises(kind):
                await desk.fetch(url)
    assert server.accepted == 0
    assert not desk.clock.slept
    assert desk.empty()


async def until_there(path: Path) -> None:
    """Wait until something was written."""
    async with asyncio.timeout(PATIENCE):
        while not await asyncio.to_thread(lambda: path.exists() and path.stat().st_size):
            await asyncio.sleep(0.005)


async def test_cancellation_leaves_nothing(desk: Desk) -> None:
    stalls = raw(head(200, {"Content-Length": str(9 * MIB)}), BODY, then=hang)
    async with open_trap(stalls) as server:
        task = asyncio.create_task(desk.fetch(f"{server.url}/"))
        await until_there(desk.target)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert desk.empty()


async def test_cancellation_at_any_moment_leaves_nothing(desk: Desk) -> None:
    async with open_trap(answer(BODY)) as server:
        for turns in range(0, 120, 3):
            task = asyncio.create_task(desk.fetch(f"{server.url}/"))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            task.cancel()
            done = await asyncio.gather(task, return_exceptions=True)
            if isinstance(done[0], Fetched):
                desk.target.unlink()
            assert desk.empty()


async def test_full_disk_is_not_the_clients_fault(desk: Desk) -> None:
    async with open_trap(answer(BODY)) as server:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(BODY) // 2, hard))
        try:
            with pytest.raises(StorageError, match="an input cannot be written") as caught:
                await desk.fetch(f"{server.url}/")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.retryable
    assert server.accepted == 1
    assert desk.empty()


async def test_folder_that_is_missing_is_an_error_of_storage(client: GuardedClient, tmp_path: Path) -> None:
    desk = Desk(client, tmp_path / "missing")
    async with open_trap() as server:
        with pytest.raises(StorageError, match="cannot be written") as caught:
            await desk.fetch(f"{server.url}/")
    assert str(tmp_path) not in caught.value.message


async def test_many_fetches_at_once_keep_apart(client: GuardedClient, tmp_path: Path) -> None:
    async with open_trap(answer(BODY)) as server, asyncio.timeout(PATIENCE):
        fetcher = Fetcher(CONFIG, client, HandClock())
        jobs = [fetcher.fetch(f"{server.url}/{number}", tmp_path / str(number)) for number in range(10)]
        fetched = await asyncio.gather(*jobs)
    assert [file.name for file in fetched] == [str(number) for number in range(10)]
    assert {file.sha256 for file in fetched} == {sha256((tmp_path / "7").read_bytes())} == {sha256(BODY)}


async def test_memory_stays_flat_under_a_large_body(desk: Desk) -> None:
    block = BODY[: MIB // 4]

    async def send(writer: asyncio.StreamWriter) -> None:
        for _ in range(256):
            writer.write(block)
            await writer.drain()

    async with open_trap(raw(head(200, {"Content-Length": str(64 * MIB)}), then=send)) as server:
        tracemalloc.start()
        try:
            fetched = await desk.fetch(f"{server.url}/")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert fetched.sha256 == sha256(block * 256)
    assert peak < 8 * MIB


@pytest.mark.parametrize("script", [answer(status=404), answer(status=500), abort, answer(b"x", length=9)])
async def test_no_error_shows_the_rest_of_the_url(desk: Desk, script: Script) -> None:
    async with open_trap(script) as server:
        with pytest.raises(ComfydError) as caught:
            await desk.fetch(f"{server.url}/SECRET?SECRET", InputsConfig(attempts=1))
    assert "SECRET" not in f"{caught.value}{caught.value.details}"
