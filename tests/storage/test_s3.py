"""What only S3 and R2 promise: urls that cannot be bent, no upload that stays, failures in plain words."""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import aiohttp
import msgspec
import pytest
from aiohttp import web

from comfyd.config import R2StorageConfig, S3StorageConfig
from comfyd.errors import NotAccepted, StorageError
from comfyd.storage.base import LocalFile
from comfyd.storage.s3 import LARGE, open_r2, open_s3
from comfyd.storage.s3_uploads import PART
from tests.storage.stand_s3 import r2_config, s3_config
from tests.storage.stands import local_file, random_sample
from tests.support import seaweed
from tests.support.seaweed import SeaweedServer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SECRET = "a-secret-of-mine"[2:]
PARTS = LARGE + PART // 2
"""Bytes of a file that goes in three parts, the last one short."""


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without credentials, where nobody asks the network for some."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))


@pytest.fixture
def own_server() -> Iterator[SeaweedServer]:
    """A server that a test may stop."""
    with seaweed.running() as server:
        yield server


@asynccontextmanager
async def contract_server(handler: Handler) -> AsyncIterator[str]:
    """A server that answers every request with this, and what it is reached under."""
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


def refusing(code: str, status: int = 400, extra: str = "", said: str = "No.", **headers: str) -> Handler:
    """S3's way of saying no, always."""

    async def answer(_: web.Request) -> web.Response:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{said}</Message>{extra}</Error>"
        return web.Response(status=status, text=text, content_type="application/xml", headers=headers)

    return answer


def xml(text: str) -> web.Response:
    return web.Response(text=f"<?xml version='1.0'?>{text}", content_type="application/xml")


def file(folder: Path, data: bytes = b"x", content_type: str = "image/png", name: str = "a.png") -> LocalFile:
    return local_file(folder, data, name, content_type)


def _config(endpoint: str) -> S3StorageConfig:
    return S3StorageConfig(bucket="bucket", endpoint=endpoint, access_key="key-of-mine", secret_key=SECRET)


class Watch:
    """What a stretch of work took: bytes of memory more than before, seconds of the loop in one go."""

    def __init__(self) -> None:
        self.memory = 0
        self.longest = 0.0


@asynccontextmanager
async def watched() -> AsyncIterator[Watch]:
    """Look at this process and its loop all the time."""
    seen = Watch()
    before = resident()

    async def look() -> None:
        # Processor time: what else the machine is busy with is not the storage's doing.
        last = time.thread_time()
        while True:
            await asyncio.sleep(0.002)
            seen.longest = max(seen.longest, time.thread_time() - last)
            seen.memory = max(seen.memory, resident() - before)
            last = time.thread_time()

    looking = asyncio.create_task(look())
    try:
        yield seen
    finally:
        looking.cancel()
        await asyncio.wait({looking})


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def status(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url, allow_redirects=False) as answer:
        return answer.status


async def failure(config: S3StorageConfig, **facts: float) -> StorageError:
    """How the probe of a storage fails."""
    with pytest.raises(StorageError) as caught:
        async with open_s3(config, **facts) as storage:
            await storage.ping()
    message = caught.value.message
    assert "\n" not in message
    assert len(message) < 300
    for secret in (config.secret_key, config.access_key):
        assert secret is None or secret not in message
    return caught.value


# urls


async def test_a_changed_url_is_refused(s3_server: SeaweedServer, tmp_path: Path) -> None:
    async with open_s3(s3_config(s3_server)) as storage:
        await storage.put("t/1/a", file(tmp_path))
        await storage.put("t/1/b", file(tmp_path))
        url = await storage.url("t/1/a", None)
    assert url is not None
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))

    def changed(**facts: str) -> str:
        return urlunsplit(parts._replace(query=urlencode({**query, **facts})))

    assert await status(url) == 200
    assert await status(changed()) == 200
    assert await status(url.replace("/t/1/a", "/t/1/b")) == 403
    assert await status(changed(**{"X-Amz-Signature": "0" * 64})) == 403
    assert await status(changed(**{"X-Amz-Expires": "86401"})) == 403
    assert await status(changed(**{"response-content-type": "text/html"})) == 403
    assert await status(urlunsplit(parts._replace(query=""))) == 403


async def test_an_expired_url_is_refused(s3_server: SeaweedServer, tmp_path: Path) -> None:
    async with open_s3(s3_config(s3_server, url_expires=1.0)) as storage:
        await storage.put("t/1/a", file(tmp_path))
        url = await storage.url("t/1/a", None)
    assert url is not None
    assert "X-Amz-Expires=1&" in url
    async with asyncio.timeout(10):
        while await status(url) != 403:
            await asyncio.sleep(0.1)


async def test_public_urls_are_quoted_and_not_signed(s3_server: SeaweedServer) -> None:
    config = s3_config(s3_server, prefix="out", public_url="https://cdn.example.com/media/")
    async with open_s3(config) as storage:
        assert await storage.url("t/1/a b+c.png", None) == (
            "https://cdn.example.com/media/out/t/1/a%20b%2Bc.png"
        )
    async with open_r2(r2_config(s3_server, prefix="", public_domain="https://img.example.com")) as storage:
        assert await storage.url("t/1/a.png", None) == "https://img.example.com/t/1/a.png"


@pytest.mark.parametrize(
    ("bucket", "region", "start"),
    [
        ("pictures", "us-east-1", "https://pictures.s3.amazonaws.com/t/1/a?"),
        ("pictures", "eu-west-1", "https://pictures.s3.eu-west-1.amazonaws.com/t/1/a?"),
        ("my.pictures", "eu-west-1", "https://s3.eu-west-1.amazonaws.com/my.pictures/t/1/a?"),
    ],
)
async def test_amazons_urls_name_the_region(bucket: str, region: str, start: str) -> None:
    config = S3StorageConfig(bucket=bucket, region=region, access_key="AK", secret_key=SECRET)
    async with open_s3(config) as storage:
        url = await storage.url("t/1/a", None)
    assert url is not None
    assert url.startswith(start)
    assert f"%2F{region}%2Fs3%2F" in url


async def test_r2_is_reached_under_its_account() -> None:
    config = R2StorageConfig(bucket="pictures", account_id="0123abcd", access_key="AK", secret_key=SECRET)
    async with open_r2(config) as storage:
        url = await storage.url("t/1/a.png", None)
    assert url is not None
    assert url.startswith("https://0123abcd.r2.cloudflarestorage.com/pictures/t/1/a.png?")
    assert "%2Fauto%2Fs3%2Faws4_request" in url


async def test_a_url_costs_less_than_a_millisecond(s3_server: SeaweedServer) -> None:
    async with open_s3(s3_config(s3_server)) as storage:
        await storage.url("t/1/a", None)
        began = time.thread_time()
        for _ in range(200):
            await storage.url("t/1/a", None)
        assert (time.thread_time() - began) / 200 < 0.001


async def test_the_machines_credentials_are_taken(
    s3_server: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweed.SECRET_KEY)
    async with open_s3(s3_config(s3_server, access_key=None, secret_key=None)) as storage:
        await storage.ping()


async def test_a_machine_whose_settings_are_broken_is_explained(
    s3_server: SeaweedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = s3_config(s3_server, access_key=None, secret_key=None)
    broken = tmp_path / "broken"
    await asyncio.to_thread(broken.write_text, "[[[")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(broken))
    assert "ConfigParseError" in (await failure(config)).message
    await asyncio.to_thread(broken.write_text, "[default]\ncredential_process = false\n")
    error = await failure(config)
    assert error.details == {"key": "storage.s3.access_key"}
    assert "cannot be had" in error.message
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "AWS_PROFILE" in (await failure(config)).message


# headers


async def test_what_a_browser_could_run_is_an_attachment(s3_server: SeaweedServer, tmp_path: Path) -> None:
    async with open_s3(s3_config(s3_server)) as storage, aiohttp.ClientSession() as session:
        for content_type, shown, stored in (
            ("image/png", "inline", "image/png"),
            ("video/webm", "inline", "video/webm"),
            ("image/svg+xml", "attachment", "image/svg+xml"),
            ("text/html", "attachment", "text/html"),
            ("application/octet-stream", "attachment", "application/octet-stream"),
            ("nonsense\r\nX-Evil: 1", "attachment", "application/octet-stream"),
        ):
            await storage.put("t/1/a", file(tmp_path, content_type=content_type, name='grün "a".png'))
            url = await storage.url("t/1/a", None)
            assert url is not None
            async with session.get(url) as answer:
                disposition = answer.headers["Content-Disposition"]
                assert disposition == f"{shown}; filename*=UTF-8''gr%C3%BCn%20%22a%22.png"
                assert answer.headers["Content-Type"] == stored
                assert answer.headers["Cache-Control"] == "private, no-cache"
                assert "X-Evil" not in answer.headers


async def test_large_files_have_the_same_headers(s3_server: SeaweedServer, tmp_path: Path) -> None:
    config = s3_config(s3_server, public_url="https://cdn.example.com")
    async with open_s3(config) as storage:
        await storage.put("t/1/a", file(tmp_path, random_sample(1, PARTS), "video/mp4", "a.mp4"))
    head = s3_server.client.head_object(Bucket=s3_server.bucket, Key=f"{config.prefix}/t/1/a")
    assert head["ContentType"] == "video/mp4"
    assert head["ContentDisposition"] == "inline; filename*=UTF-8''a.mp4"
    assert head["CacheControl"] == "public, no-cache"
    assert head["ETag"].endswith('-3"')


async def test_an_empty_file_is_a_file(s3_server: SeaweedServer, tmp_path: Path) -> None:
    async with open_s3(s3_config(s3_server)) as storage:
        await storage.put("t/1/a", file(tmp_path, b""))
        async with storage.open("t/1/a") as stored:
            assert stored.size_bytes == 0
            assert [block async for block in stored.chunks] == []


async def test_without_a_prefix_the_key_is_the_name(s3_server: SeaweedServer, tmp_path: Path) -> None:
    bucket = await asyncio.to_thread(s3_server.new_bucket)
    async with open_s3(s3_config(s3_server, bucket=bucket, prefix="")) as storage:
        await storage.put("t/1/a", file(tmp_path))
        assert await asyncio.to_thread(s3_server.held, bucket) == ["t/1/a"]


# what is not whole


@pytest.mark.parametrize("size", [5_000, PARTS])
async def test_bytes_that_are_not_those_of_the_digest_are_refused(
    s3_server: SeaweedServer, tmp_path: Path, size: int
) -> None:
    config = s3_config(s3_server)
    given = file(tmp_path, random_sample(1, size))
    wrong = msgspec.structs.replace(given, size_bytes=size + 1)
    async with open_s3(config) as storage:
        with pytest.raises(StorageError, match="the file to store is not"):
            await storage.put("t/1/a", wrong)
        if size < LARGE:
            with pytest.raises(StorageError, match="damaged"):
                await storage.put("t/1/a", msgspec.structs.replace(given, md5="0" * 32))
    assert await asyncio.to_thread(s3_server.held, s3_server.bucket, config.prefix) == []


async def test_a_failed_upload_is_aborted(s3_server: SeaweedServer, tmp_path: Path) -> None:
    """The source becomes shorter while it is sent, which no digest can make good."""
    config = s3_config(s3_server)
    given = file(tmp_path, random_sample(1, LARGE * 2))
    async with open_s3(config) as storage:
        putting = asyncio.create_task(storage.put("t/1/a", given))
        async with asyncio.timeout(20):
            while not await asyncio.to_thread(s3_server.held, s3_server.bucket, config.prefix):
                await asyncio.sleep(0)
        with given.path.open("r+b") as source:
            source.truncate(LARGE)
        with pytest.raises(StorageError):
            await putting
    assert await asyncio.to_thread(s3_server.held, s3_server.bucket, config.prefix) == []


async def test_a_canceled_upload_is_aborted(s3_server: SeaweedServer, tmp_path: Path) -> None:
    config = s3_config(s3_server)
    given = file(tmp_path, random_sample(1, LARGE * 2))
    async with open_s3(config) as storage:
        putting = asyncio.create_task(storage.put("t/1/a", given))
        async with asyncio.timeout(20):
            while not await asyncio.to_thread(s3_server.held, s3_server.bucket, config.prefix):
                await asyncio.sleep(0)
        putting.cancel()
        await asyncio.sleep(0)
        putting.cancel()  # impatience changes nothing
        with pytest.raises(asyncio.CancelledError):
            await putting
    assert await asyncio.to_thread(s3_server.held, s3_server.bucket, config.prefix) == []


async def test_a_put_that_is_canceled_while_its_upload_begins_or_is_aborted_leaves_none(
    tmp_path: Path,
) -> None:
    steps: asyncio.Queue[str] = asyncio.Queue()
    go_on = asyncio.Semaphore(0)

    async def slow(request: web.Request) -> web.Response:
        await request.read()
        await steps.put(request.method)
        await go_on.acquire()
        if request.method == "DELETE":
            return web.Response(status=204)
        return xml("<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>")

    async with asyncio.timeout(10), contract_server(slow) as endpoint, open_s3(_config(endpoint)) as storage:
        given = file(tmp_path, random_sample(1, PARTS))
        putting = asyncio.create_task(storage.put("t/1/a", given))
        assert await steps.get() == "POST"
        putting.cancel()
        go_on.release()
        assert await steps.get() == "DELETE"
        putting.cancel()
        await asyncio.wait({putting}, timeout=0.05)
        assert not putting.done()
        go_on.release()
        with pytest.raises(asyncio.CancelledError):
            await putting


async def test_an_abort_that_is_not_allowed_does_not_stop_the_next_put(tmp_path: Path) -> None:
    """The server forgets the digest of the first part, refuses to abort, and mends itself."""
    aborted: list[str] = []
    broken = True

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal broken
        body = await request.read()
        match request.method, broken:
            case "POST", _ if "uploads" in request.query:
                words = f"<UploadId>{'one' if broken else 'two'}</UploadId>"
                return xml(f"<InitiateMultipartUploadResult>{words}</InitiateMultipartUploadResult>")
            case "POST", _:
                return xml("<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>")
            case "PUT", False:
                return web.Response(headers={"ETag": hashlib.sha256(body).hexdigest()})
            case "PUT", _:
                return await refusing("BadDigest")(request)
            case "DELETE", _:
                aborted.append(request.query["uploadId"])
                return await refusing("AccessDenied", 403)(request)
            case _:
                return web.Response(headers={"Content-Length": str(PARTS)})

    async with contract_server(answer) as endpoint, open_s3(_config(endpoint)) as storage:
        given = file(tmp_path, random_sample(1, PARTS))
        with pytest.raises(StorageError, match="damaged"):
            await storage.put("t/1/a", given)
        broken = False
        await storage.put("t/1/a", given)
    assert aborted == ["one", "one"]


async def test_a_server_that_stops_in_mid_upload_gets_the_file_when_it_is_back(
    own_server: SeaweedServer, tmp_path: Path
) -> None:
    config = s3_config(own_server)
    given = file(tmp_path, random_sample(1, LARGE * 3))
    async with open_s3(config, read_timeout=5.0) as storage:
        putting = asyncio.create_task(storage.put("t/1/a", given))
        async with asyncio.timeout(20):
            # an upload whose id the server never told cannot be aborted: it dies after that
            while not await asyncio.to_thread(own_server.has_a_part, own_server.bucket, config.prefix):
                await asyncio.sleep(0)
        own_server.kill()
        with pytest.raises(StorageError) as caught:
            await putting
        assert caught.value.details == {"key": "storage.s3.endpoint"}
        assert caught.value.retryable
        await asyncio.to_thread(own_server.start)
        await storage.put("t/1/a", given)
        async with storage.open("t/1/a") as stored:
            digest = hashlib.sha256()
            async for block in stored.chunks:
                digest.update(block)
    assert digest.hexdigest() == given.sha256
    # The upload that could not be aborted then was aborted now.
    held = await asyncio.to_thread(own_server.held, own_server.bucket, config.prefix)
    assert held == [f"{config.prefix}/t/1/a"]


async def test_a_stream_that_breaks_off_is_a_storage_error() -> None:
    async def half(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Length": "100000"})
        await answer.prepare(request)
        await answer.write(b"x" * 1_000)
        assert request.transport is not None
        request.transport.close()
        return answer

    async with (
        contract_server(half) as endpoint,
        open_s3(_config(endpoint)) as storage,
        storage.open("t/1/a") as stored,
    ):
        assert stored.size_bytes == 100_000
        with pytest.raises(StorageError, match="broke off"):
            async for _ in stored.chunks:
                pass


async def test_a_server_that_keeps_silent_is_given_up(tmp_path: Path) -> None:
    quiet = asyncio.Event()

    async def silent(_: web.Request) -> web.StreamResponse:
        await quiet.wait()
        return web.Response()

    async with contract_server(silent) as endpoint, open_s3(_config(endpoint), read_timeout=0.2) as storage:
        for size in (10, PARTS):
            with pytest.raises(StorageError, match="does not answer in time") as caught:
                await storage.put("t/1/a", file(tmp_path, random_sample(1, size)))
            assert caught.value.details == {"key": "storage.s3.endpoint"}
        quiet.set()


async def test_a_size_that_is_not_the_files_is_noticed(tmp_path: Path) -> None:
    async def forgetful(request: web.Request) -> web.Response:
        await request.read()
        body = b"123" if request.method == "HEAD" else None
        return web.Response(body=body, headers={"ETag": '"of-an-encrypted-file"'})

    async with contract_server(forgetful) as endpoint, open_s3(_config(endpoint)) as storage:
        with pytest.raises(StorageError, match="3 of 5 bytes arrived"):
            await storage.put("t/1/a", file(tmp_path, b"12345"))


async def test_a_server_that_does_not_tell_what_s3_tells_is_none(tmp_path: Path) -> None:
    async def whole(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=b"<html></html>")

    async with contract_server(whole) as endpoint, open_s3(_config(endpoint)) as storage:
        with pytest.raises(StorageError, match="does not speak S3") as caught:
            async with storage.open("t/1/a", 3, 4):
                pass
        assert caught.value.details == {"key": "storage.s3.endpoint"}
        with pytest.raises(StorageError, match="does not speak S3"):
            await storage.put("t/1/a", file(tmp_path, random_sample(1, PARTS)))


async def test_a_server_that_gives_back_other_bytes_is_no_storage() -> None:
    async def other(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=b"other" if request.method == "GET" else None)

    async with contract_server(other) as endpoint:
        error = await failure(_config(endpoint))
    assert "other bytes" in error.message
    assert error.details == {"key": "storage.s3.endpoint"}


# failures in plain words


async def test_wrong_settings_are_named(s3_server: SeaweedServer, unused_tcp_port: int) -> None:
    for facts, key in (
        ({"access_key": "nobody-knows-this-one"}, "access_key"),
        ({"secret_key": "not-the-secret-of-this-key"}, "secret_key"),
        ({"bucket": "no-such-bucket"}, "bucket"),
        ({"bucket": "No Such Bucket!"}, "bucket"),
        ({"endpoint": f"http://127.0.0.1:{unused_tcp_port}"}, "endpoint"),
        ({"endpoint": "127.0.0.1:9000"}, "endpoint"),
        ({"endpoint": s3_server.endpoint.replace("http:", "https:")}, "endpoint"),
        ({"region": "no region"}, "region"),
        ({"access_key": None, "secret_key": None}, "access_key"),
        ({"secret_key": None}, "secret_key"),
        ({"access_key": None}, "access_key"),
        ({"bucket": None}, "bucket"),
        (
            {"access_key": seaweed.READER_ACCESS_KEY, "secret_key": seaweed.READER_SECRET_KEY},
            "access_key",
        ),
    ):
        error = await failure(s3_config(s3_server, **facts))
        assert error.details == {"key": f"storage.s3.{key}"}, error.message
        assert error.message.endswith(f"; see storage.s3.{key}")


async def test_r2_names_its_own_settings(s3_server: SeaweedServer, unused_tcp_port: int) -> None:
    for facts, key in (
        ({"secret_key": "not-the-secret-of-this-key"}, "secret_key"),
        ({"bucket": "no-such-bucket"}, "bucket"),
        ({"endpoint": f"http://127.0.0.1:{unused_tcp_port}"}, "endpoint"),
    ):
        with pytest.raises(StorageError) as caught:
            async with open_r2(r2_config(s3_server, **facts)) as storage:
                await storage.ping()
        assert caught.value.details == {"key": f"storage.r2.{key}"}


async def test_refusals_are_explained() -> None:
    elsewhere = {"x-amz-bucket-region": "eu-west-3"}
    answers = (
        (
            refusing("AuthorizationHeaderMalformed", extra="<Region>eu-west-3</Region>"),
            "region",
            "'eu-west-3'",
        ),
        (refusing("PermanentRedirect", 301, **elsewhere), "region", "'eu-west-3'"),
        (refusing("IllegalLocationConstraintException"), "region", "not in region 'us-east-1'"),
        (
            refusing("AccessDenied", 403, said="User x may not\n do it"),
            "access_key",
            "(User x may not do it)",
        ),
        (refusing("Unauthorized", 401), "access_key", "does not know"),
        (refusing("InvalidArgument", said="Credential access key has length 2"), "access_key", "length 2"),
        (refusing("RequestTimeTooSkewed", 403), None, "clock"),
        (refusing("SlowDown", 503), None, "fewer requests"),
        (refusing("InternalError", 500, said="We encountered an error"), None, "We encountered an error"),
        (refusing("Odd", said=f"about {SECRET} and key-of-mine"), None, "about *** and ***"),
        (refusing("Odd", said=""), None, "no reason given"),
    )
    current: tuple[Handler, str | None, str] = answers[0]

    async def answer(request: web.Request) -> web.StreamResponse:
        return await current[0](request)

    async with contract_server(answer) as endpoint, open_s3(_config(endpoint)) as storage:
        for current in answers:
            _, key, words = current
            with pytest.raises(StorageError) as caught:
                await storage.delete("t/1/a")
            assert words in caught.value.message
            assert caught.value.message.startswith("cannot delete t/1/a: ")
            assert caught.value.details == ({} if key is None else {"key": f"storage.s3.{key}"})


async def test_a_web_server_is_not_taken_for_s3() -> None:
    async def page(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=405, text="<html><body>No.", content_type="text/html")

    async with contract_server(page) as endpoint:
        error = await failure(_config(endpoint))
    assert "405" in error.message


async def test_a_file_that_is_too_large_for_the_server_is_not_accepted(tmp_path: Path) -> None:
    async with contract_server(refusing("EntityTooLarge")) as endpoint, open_s3(_config(endpoint)) as storage:
        with pytest.raises(NotAccepted) as caught:
            await storage.put("t/1/a", file(tmp_path))
        assert not caught.value.retryable


async def test_a_missing_bucket_is_not_a_missing_file(s3_server: SeaweedServer) -> None:
    async with open_s3(s3_config(s3_server, bucket="no-such-bucket")) as storage:
        with pytest.raises(StorageError, match="no bucket 'no-such-bucket'"):
            async with storage.open("t/1/a"):
                pass


async def test_a_password_in_the_endpoint_is_not_told(unused_tcp_port: int) -> None:
    error = await failure(_config(f"http://user:sesame@127.0.0.1:{unused_tcp_port}"))
    assert "sesame" not in error.message
    assert "***@127.0.0.1" in error.message


async def test_a_key_is_not_asked_for_twice(tmp_path: Path) -> None:
    """A verb does not repeat itself, and does not look for the bucket elsewhere."""
    asked: list[str] = []

    async def redirect(request: web.Request) -> web.StreamResponse:
        asked.append(f"{request.method} {request.path}")
        return await refusing("PermanentRedirect", 301, **{"x-amz-bucket-region": "eu-west-3"})(request)

    async with contract_server(redirect) as endpoint, open_s3(_config(endpoint)) as storage:
        with pytest.raises(StorageError, match="but in 'eu-west-3'"):
            await storage.put("t/1/a", file(tmp_path))
    assert asked == ["PUT /bucket/t/1/a"]


# what it costs


async def test_a_large_put_takes_little_memory_and_no_time_of_the_loop(
    s3_server: SeaweedServer, tmp_path: Path
) -> None:
    size = 264 << 20
    path = tmp_path / "sparse"
    with path.open("wb") as sparse:
        sparse.truncate(size)
    given = LocalFile(
        path=path, size_bytes=size, sha256="0" * 64, md5="0" * 32, content_type="video/mp4", name="a.mp4"
    )
    async with open_s3(s3_config(s3_server)) as storage:
        await storage.put("t/1/first", file(tmp_path, random_sample(1, PARTS)))
        async with watched() as seen:
            await storage.put("t/1/a", given)
        async with storage.open("t/1/a") as stored:
            assert stored.size_bytes == size
        await storage.delete("t/1/a")
    assert seen.memory <= 32 << 20
    assert seen.longest <= 0.05
