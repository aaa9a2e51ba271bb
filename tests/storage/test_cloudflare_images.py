"""Cloudflare Images against a contract server: what it takes, what it answers, and its limit on calls."""

import asyncio
import os
import struct
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from comfyd.clock import SystemClock
from comfyd.config import CfImagesStorageConfig
from comfyd.errors import ConfigError, FileNotFound, NotAccepted, StorageError
from comfyd.storage.base import LocalFile
from comfyd.storage.cloudflare_api import PAUSE, TRIES, WINDOW, Allowance
from comfyd.storage.cloudflare_images import LARGEST, CloudflareImages, open_cloudflare_images
from tests.storage.stands import local_file, png_sample
from tests.support.cf_images_account import MEGABYTE, Account
from tests.support.cf_images_server import ImagesServer
from tests.support.clock import HandClock

KEY = "t/1/2_0_t_00001_.png"
ENCODED = "/t%2F1%2F2_0_t_00001_.png"


@pytest.fixture
def server(cf_images_server: ImagesServer) -> ImagesServer:
    return cf_images_server


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def account(server: ImagesServer, clock: HandClock) -> Account:
    account = server.new_account()
    account.now = lambda: clock.time / 1000
    return account


def config(server: ImagesServer, account: Account, **changed: Any) -> CfImagesStorageConfig:
    facts = {"account_id": account.id, "api_token": account.token, "endpoint": server.endpoint}
    return CfImagesStorageConfig(**(facts | changed))


def opened(
    server: ImagesServer, account: Account, clock: HandClock, **changed: Any
) -> AbstractAsyncContextManager[CloudflareImages]:
    return open_cloudflare_images(config(server, account, **changed), clock)


@pytest.fixture
async def storage(
    server: ImagesServer, account: Account, clock: HandClock
) -> AsyncIterator[CloudflareImages]:
    async with opened(server, account, clock) as images:
        yield images


def picture(folder: Path, number: int = 1, size: int | None = None) -> LocalFile:
    return local_file(folder, png_sample(number, size), "cat.png", "image/png")


async def content(
    storage: CloudflareImages, key: str = KEY, start: int = 0, length: int | None = None
) -> bytes:
    async with storage.open(key, start, length) as file:
        return b"".join([chunk async for chunk in file.chunks])


async def fetched(url: str | None) -> bytes:
    assert url is not None
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        assert response.status == 200
        return await response.read()


# ── what is stored, and where it is served ──────────────────────────────────────────────────────────────────


async def test_a_picture_is_stored_under_its_key_and_delivered_as_the_configured_variant(
    storage: CloudflareImages, server: ImagesServer, account: Account, tmp_path: Path
) -> None:
    file = picture(tmp_path)
    location = await storage.put(KEY, file)
    assert location == f"{server.delivery}/{account.hash}/{KEY}/public"
    assert await storage.url(KEY, location) == location
    assert await fetched(location) == file.path.read_bytes() == await content(storage)
    stored = account.images[KEY]
    assert (stored.filename, stored.content_type) == ("2_0_t_00001_.png", "image/png")
    assert stored.metadata == {"sha256": file.sha256}
    assert account.calls == ["POST ", f"GET {ENCODED}/blob"]


async def test_urls_name_the_own_domain_and_the_variant_of_today(
    storage: CloudflareImages, server: ImagesServer, account: Account, clock: HandClock, tmp_path: Path
) -> None:
    file = picture(tmp_path)
    location = await storage.put(KEY, file)
    changed = {"delivery_domain": f"{server.delivery}/", "variant": "thumbnail"}
    async with opened(server, account, clock, **changed) as own:
        url = await own.url(KEY, location)
        assert url == f"{server.delivery}/cdn-cgi/imagedelivery/{account.hash}/{KEY}/thumbnail"
        assert await fetched(url) == file.path.read_bytes()
        assert await own.url(KEY, None) is None
    async with opened(server, account, clock, delivery_domain="https://images.example.com") as named:
        url = await named.url(KEY, location)
        assert url == f"https://images.example.com/cdn-cgi/imagedelivery/{account.hash}/{KEY}/public"


async def test_a_variant_that_the_account_has_not_is_named_and_sends_nothing_twice(
    server: ImagesServer, account: Account, clock: HandClock, tmp_path: Path
) -> None:
    file = picture(tmp_path)
    async with opened(server, account, clock, variant="large") as storage:
        with pytest.raises(StorageError, match=r"no variant 'large', it has: public, thumbnail") as caught:
            await storage.put(KEY, file)
        assert caught.value.details["key"] == "storage.cf_images.variant"
        account.variants.append("large")
        assert (await storage.put(KEY, file)).endswith("/large")
    assert account.calls == ["POST ", "POST ", f"GET {ENCODED}"]


@pytest.mark.parametrize("unsized", [False, True])
async def test_a_part_of_an_original_is_read_from_where_it_is_asked(
    storage: CloudflareImages, account: Account, tmp_path: Path, *, unsized: bool
) -> None:
    account.unsized = unsized
    file = picture(tmp_path, size=300_000)
    await storage.put(KEY, file)
    whole = file.path.read_bytes()
    async with storage.open(KEY) as stored:
        assert stored.size_bytes == 300_000
    assert await content(storage) == whole
    assert await content(storage, start=150_001) == whole[150_001:]
    assert await content(storage, start=70_000, length=140_000) == whole[70_000:210_000]
    assert await content(storage, start=5, length=0) == await content(storage, start=300_000) == b""
    assert await content(storage, start=299_999, length=10) == whole[-1:]


async def test_what_is_not_there_is_not_found_and_can_be_deleted(
    storage: CloudflareImages, account: Account, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFound):
        await content(storage)
    await storage.delete(KEY)
    location = await storage.put(KEY, picture(tmp_path))
    await storage.delete(KEY)
    await storage.delete(KEY)
    assert account.images == {}
    with pytest.raises(FileNotFound):
        await content(storage)
    async with aiohttp.ClientSession() as session, session.get(location) as response:
        assert response.status == 404


async def test_errors_of_who_reads_a_file_stay_theirs(storage: CloudflareImages, tmp_path: Path) -> None:
    await storage.put(KEY, picture(tmp_path))
    with pytest.raises(ConnectionResetError, match="the reader left"):
        async with storage.open(KEY):
            raise ConnectionResetError("the reader left")


# ── repeats and replacements ────────────────────────────────────────────────────────────────────────────────


async def test_the_same_file_again_is_left_where_it_is(
    storage: CloudflareImages, account: Account, tmp_path: Path
) -> None:
    file = picture(tmp_path)
    first = await storage.put(KEY, file)
    before = account.images[KEY]
    assert await storage.put(KEY, file) == first
    assert account.images[KEY] is before
    assert account.calls == ["POST ", "POST ", f"GET {ENCODED}"]


async def test_another_file_under_the_same_key_replaces_the_older(
    storage: CloudflareImages, account: Account, tmp_path: Path
) -> None:
    await storage.put(KEY, picture(tmp_path, 1))
    newer = picture(tmp_path, 2)
    location = await storage.put(KEY, newer)
    assert await content(storage) == await fetched(location) == newer.path.read_bytes()
    assert account.calls[1:5] == ["POST ", f"GET {ENCODED}", f"DELETE {ENCODED}", "POST "]


async def test_a_file_whose_answer_was_lost_is_stored_by_the_repeat(
    storage: CloudflareImages, account: Account, tmp_path: Path
) -> None:
    file = picture(tmp_path)
    account.fail("lost")
    with pytest.raises(StorageError, match=r"127\.0\.0\.1 broke off"):
        await storage.put(KEY, file)
    assert KEY in account.images
    assert (await storage.put(KEY, file)).endswith(f"{KEY}/public")
    assert account.calls == ["POST ", "POST ", f"GET {ENCODED}"]


async def test_an_image_that_somebody_else_made_under_the_key_is_replaced(
    storage: CloudflareImages, account: Account, tmp_path: Path
) -> None:
    await storage.put(KEY, picture(tmp_path, 1))
    account.images[KEY].metadata.clear()
    newer = picture(tmp_path, 2)
    await storage.put(KEY, newer)
    assert await content(storage) == newer.path.read_bytes()


# ── what it never takes ─────────────────────────────────────────────────────────────────────────────────────


async def test_what_can_be_known_to_be_refused_is_not_sent(
    storage: CloudflareImages, account: Account, tmp_path: Path
) -> None:
    video = local_file(tmp_path, os.urandom(2000), "cat.mp4", "video/mp4")
    with pytest.raises(NotAccepted, match="does not take video/mp4"):
        await storage.put("t/1/cat.mp4", video)
    with pytest.raises(NotAccepted, match="at most 10 MB"):
        await storage.put(KEY, picture(tmp_path, size=11 * MEGABYTE))
    for key in ("x" * 1025, "0b5e1b0e-9c54-4c6e-8f5e-3a2b6f1d7c11"):
        with pytest.raises(NotAccepted, match="does not take the id"):
            await storage.put(key, picture(tmp_path))
    assert account.calls == []


async def test_a_file_of_exactly_ten_megabytes_is_taken(
    storage: CloudflareImages, account: Account, tmp_path: Path
) -> None:
    file = picture(tmp_path, size=LARGEST)
    await storage.put(KEY, file)
    assert account.images[KEY].path.read_bytes() == file.path.read_bytes()


@pytest.mark.parametrize("plain", [False, True])
async def test_what_the_server_refuses_for_its_content_is_not_accepted(
    storage: CloudflareImages, account: Account, tmp_path: Path, *, plain: bool
) -> None:
    account.plain_errors = plain
    text = local_file(tmp_path, b"not a picture" * 100, "cat.png", "image/png")
    with pytest.raises(NotAccepted, match=r"must have image/jpeg.*\(code 5455\)"):
        await storage.put(KEY, text)
    wide = bytearray(png_sample(1))
    wide[16:24] = struct.pack(">II", 12_001, 10)
    with pytest.raises(NotAccepted, match="maximum image area"):
        await storage.put(KEY, local_file(tmp_path, bytes(wide), "cat.png", "image/png"))
    assert account.images == {}


async def test_a_file_that_the_server_finds_too_large_while_it_is_sent_is_not_accepted(
    storage: CloudflareImages, account: Account, tmp_path: Path
) -> None:
    account.largest = 1 * MEGABYTE
    with pytest.raises(NotAccepted, match="Maximum image size"):
        await storage.put(KEY, picture(tmp_path, size=2 * MEGABYTE))
    assert account.images == {}


# ── what is wrong, in words that name what mends it ─────────────────────────────────────────────────────────


async def test_a_tampered_token_names_the_key_of_the_token(
    server: ImagesServer, account: Account, clock: HandClock, tmp_path: Path
) -> None:
    wrong = account.token[:-1] + ("a" if account.token[-1] != "a" else "b")
    async with opened(server, account, clock, api_token=wrong) as storage:
        for action in (
            storage.ping(),
            storage.put(KEY, picture(tmp_path)),
            storage.delete(KEY),
            content(storage),
        ):
            with pytest.raises(StorageError, match=r"the token is wrong .* \(code 9109\)") as caught:
                await action
            assert not isinstance(caught.value, NotAccepted)
            assert caught.value.details["key"] == "storage.cf_images.api_token"
    assert account.calls == []


async def test_a_token_of_another_account_names_the_key_of_the_token(
    server: ImagesServer, account: Account, clock: HandClock
) -> None:
    other = server.new_account()
    async with opened(server, account, clock, account_id=other.id) as storage:
        with pytest.raises(
            StorageError, match=r"for another account: Authentication error \(code 10000\)"
        ) as caught:
            await storage.ping()
    assert caught.value.details["key"] == "storage.cf_images.api_token"


async def test_an_account_that_there_is_not_names_its_key(
    server: ImagesServer, account: Account, clock: HandClock
) -> None:
    async with opened(server, account, clock, account_id="my account") as storage:
        for action in (storage.ping(), storage.delete(KEY), content(storage)):
            with pytest.raises(StorageError, match=r"no such account.*\(code 7003\)") as caught:
                await action
            assert caught.value.details["key"] == "storage.cf_images.account_id"


async def test_an_account_without_images_names_its_key(storage: CloudflareImages, account: Account) -> None:
    account.enabled = False
    with pytest.raises(StorageError, match=r"has no Cloudflare Images.*\(code 5403\)") as caught:
        await storage.ping()
    assert caught.value.details["key"] == "storage.cf_images.account_id"


async def test_an_endpoint_that_is_not_the_api_names_its_key(
    server: ImagesServer, account: Account, clock: HandClock
) -> None:
    async with opened(server, account, clock, endpoint=f"{server.origin}/client/v5/") as storage:
        for action in (storage.ping(), storage.delete(KEY), content(storage)):
            with pytest.raises(StorageError, match=r"does not answer as Cloudflare's API does") as caught:
                await action
            assert caught.value.details["key"] == "storage.cf_images.endpoint"


async def test_an_endpoint_that_cannot_be_reached_names_its_key(
    server: ImagesServer, account: Account, clock: HandClock, tmp_path: Path
) -> None:
    async with opened(server, account, clock, endpoint="http://127.0.0.1:1/client/v4") as storage:
        with pytest.raises(StorageError, match=r"cannot reach 127\.0\.0\.1") as caught:
            await storage.put(KEY, picture(tmp_path))
    assert caught.value.details["key"] == "storage.cf_images.endpoint"


async def test_a_full_account_is_said_in_plain_words(
    storage: CloudflareImages, account: Account, tmp_path: Path
) -> None:
    account.capacity = 0
    with pytest.raises(StorageError, match=r"is full: delete images or take a larger plan") as caught:
        await storage.put(KEY, picture(tmp_path))
    assert not isinstance(caught.value, NotAccepted)
    assert caught.value.retryable
    assert caught.value.details == {"status": 403, "codes": [5453]}


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"account_id": None}, "account_id"),
        ({"api_token": None}, "api_token"),
        ({"api_token": "line\nend-SECRET"}, "api_token"),
        ({"endpoint": "ftp://example.com"}, "endpoint"),
        ({"endpoint": "http://user:SECRET@example.com"}, "endpoint"),
        ({"endpoint": "http://example.com:SECRET/"}, "endpoint"),
        ({"endpoint": "http://example.com/?token=SECRET"}, "endpoint"),
    ],
)
async def test_a_configuration_that_cannot_work_is_refused_without_its_secrets(
    server: ImagesServer, account: Account, clock: HandClock, changed: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        async with opened(server, account, clock, **changed):
            pytest.fail("it was opened")
    assert caught.value.details == {"key": f"storage.cf_images.{key}"}
    assert "SECRET" not in caught.value.message


async def test_the_token_is_in_no_message_and_no_repr(storage: CloudflareImages, account: Account) -> None:
    account.fail("echo")
    with pytest.raises(StorageError, match=r"with Bearer \*\*\*") as caught:
        await storage.delete(KEY)
    assert "\n" not in caught.value.message
    assert account.token not in f"{caught.value!r} {caught.value.details} {storage!r} {vars(storage)!r}"


# ── a server that fails ─────────────────────────────────────────────────────────────────────────────────────


async def test_answers_that_are_no_envelope_are_errors_that_may_pass(
    storage: CloudflareImages, account: Account, tmp_path: Path
) -> None:
    account.fail("502")
    with pytest.raises(StorageError, match=r"127\.0\.0\.1 failed: status 502") as caught:
        await storage.put(KEY, picture(tmp_path))
    assert caught.value.retryable
    assert caught.value.details == {"status": 502, "codes": []}
    account.fail("500")
    with pytest.raises(StorageError, match=r"Internal Server Error \(code 5500\)"):
        await content(storage)
    account.fail("empty")
    with pytest.raises(StorageError, match="no variant 'public', it has: none"):
        await storage.put(KEY, picture(tmp_path))
    account.fail("endless")
    with pytest.raises(StorageError, match="does not answer as Cloudflare's API does"):
        await storage.put(KEY, picture(tmp_path))


async def test_an_upload_that_breaks_off_leaves_nothing(
    storage: CloudflareImages, account: Account, tmp_path: Path
) -> None:
    file = picture(tmp_path, size=4 * MEGABYTE)
    account.fail("reset")
    with pytest.raises(StorageError, match="cannot store"):
        await storage.put(KEY, file)
    assert account.images == {}
    await storage.put(KEY, file)
    assert await content(storage) == file.path.read_bytes()


async def test_a_download_that_breaks_off_is_an_error(
    storage: CloudflareImages, account: Account, tmp_path: Path
) -> None:
    await storage.put(KEY, picture(tmp_path))
    account.fail("cut")
    with pytest.raises(StorageError, match="broke off"):
        await content(storage)


async def test_a_server_that_is_silent_is_given_up(
    server: ImagesServer, account: Account, clock: HandClock, tmp_path: Path
) -> None:
    account.fail("slow", seconds=30)
    async with open_cloudflare_images(config(server, account), clock, timeout=0.2) as storage:
        with pytest.raises(StorageError, match="did not answer in time"):
            await storage.put(KEY, picture(tmp_path))


async def test_a_file_that_is_gone_from_the_disk_is_an_error(
    storage: CloudflareImages, tmp_path: Path
) -> None:
    file = picture(tmp_path)
    file.path.unlink()
    with pytest.raises(StorageError, match="No such file or directory"):
        await storage.put(KEY, file)


# ── the limit on calls ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_call_refused_for_a_while_is_repeated_after_it(
    storage: CloudflareImages, account: Account, clock: HandClock, tmp_path: Path
) -> None:
    file = picture(tmp_path, size=1 * MEGABYTE)
    account.fail("429", seconds=7)
    account.fail("429")
    await storage.put(KEY, file)
    assert clock.slept == [7000, PAUSE]
    assert account.calls == ["POST "] * 3
    account.fail("429", seconds=1)
    assert await content(storage) == file.path.read_bytes()
    assert clock.slept == [7000, PAUSE, 1000]


async def test_a_long_refusal_is_an_error_that_says_how_long_and_holds_for_every_call(
    storage: CloudflareImages, account: Account, clock: HandClock, tmp_path: Path
) -> None:
    account.fail("429", seconds=200)
    with pytest.raises(StorageError, match="takes no calls for 200 s") as caught:
        await storage.put(KEY, picture(tmp_path))
    assert caught.value.details == {"retry_after": 200}
    clock.advance(100_000)
    with pytest.raises(StorageError) as caught:
        await storage.delete(KEY)
    assert caught.value.details == {"retry_after": 100}
    assert account.calls == ["POST "]
    clock.advance(60_000)  # so little is left that it is worth waiting
    await storage.put(KEY, picture(tmp_path))
    assert clock.slept == [40_000]


async def test_refusals_without_end_are_an_error(
    storage: CloudflareImages, account: Account, clock: HandClock
) -> None:
    account.fail("429", times=TRIES, seconds=3)
    with pytest.raises(StorageError) as caught:
        await storage.delete(KEY)
    assert caught.value.details == {"retry_after": 3}
    assert account.calls == [f"DELETE {ENCODED}"] * TRIES
    assert clock.slept == [3000] * (TRIES - 1)


async def test_calls_wait_so_that_cloudflare_refuses_none(
    server: ImagesServer, account: Account, clock: HandClock
) -> None:
    account.allowed = 20
    async with open_cloudflare_images(config(server, account), clock, calls=20) as storage:
        begun = clock.time
        for number in range(50):
            await storage.delete(f"t/{number}")
    assert len(account.calls) == 50, "none was refused and repeated"
    assert clock.time - begun == 2 * WINDOW


async def test_one_call_too_many_is_refused_for_a_window_by_the_server(
    server: ImagesServer, account: Account, clock: HandClock
) -> None:
    account.allowed = 20
    async with open_cloudflare_images(config(server, account), clock) as storage:
        for number in range(20):
            await storage.delete(f"t/{number}")
        with pytest.raises(StorageError) as caught:
            await storage.delete("t/20")
        assert caught.value.details == {"retry_after": 300}
        clock.advance(300_000)
        await storage.delete("t/20")


async def test_the_allowance_is_1200_calls_in_five_minutes() -> None:
    clock = HandClock()
    allowance = Allowance(clock)
    for _ in range(1200):
        await allowance.take()
        clock.advance(100)
    assert clock.slept == []
    await asyncio.gather(*(allowance.take() for _ in range(3)))
    assert clock.slept == [WINDOW - 120_000, 100, 100]


# ── the probe ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_ping_stores_reads_and_deletes_a_picture(storage: CloudflareImages, account: Account) -> None:
    await storage.ping()
    assert [call.partition(" ")[0] for call in account.calls] == ["POST", "GET", "DELETE"]
    assert account.images == {}


async def test_a_ping_that_fails_says_why_and_leaves_nothing(
    storage: CloudflareImages, server: ImagesServer, account: Account, clock: HandClock
) -> None:
    account.originals = b"something else"
    with pytest.raises(StorageError, match="gives back something else"):
        await storage.ping()
    account.originals = b""
    with pytest.raises(StorageError, match="gives back something else"):
        await storage.ping()
    async with opened(server, account, clock, variant="large") as other:
        with pytest.raises(StorageError, match="no variant 'large'"):
            await other.ping()
    assert account.images == {}


async def test_a_ping_whose_picture_is_not_found_is_a_storage_error(
    storage: CloudflareImages, account: Account
) -> None:
    account.fail("slow", seconds=0)
    account.fail("404")
    with pytest.raises(StorageError, match="does not have what was just stored"):
        await storage.ping()
    assert account.images == {}


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_neither_way_holds_a_whole_file_in_memory(
    server: ImagesServer, account: Account, tmp_path: Path
) -> None:
    file = picture(tmp_path, size=LARGEST)
    account.now = SystemClock().monotonic
    async with open_cloudflare_images(config(server, account), SystemClock()) as storage:
        await storage.ping()
        tracemalloc.start()
        try:
            await storage.put(KEY, file)
            read = 0
            async with storage.open(KEY) as stored:
                async for chunk in stored.chunks:
                    read += len(chunk)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert read == LARGEST
    assert peak < LARGEST / 4, "of client and server together"
