"""Google Cloud Storage that checks tokens and digests, refuses, keeps less than was sent and breaks off."""

import asyncio
import hashlib
import io
import traceback
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web

from comfyd.config import GcsStorageConfig
from comfyd.errors import FileNotFound, StorageError
from comfyd.storage.base import LocalFile, Storage
from comfyd.storage.gcs import WHOLE, Access, open_gcs
from comfyd.storage.gcs_errors import translated
from tests.storage.stands import local_file, random_sample
from tests.support.clock import HandClock
from tests.support.strict_gcs import Google, account_file, always, refusal, serving

MB = 1 << 20
CREDENTIALS = "storage.gcs.credentials"


def made(folder: Path, data: bytes) -> LocalFile:
    return local_file(folder / "made", data, "a.bin", "application/octet-stream")


async def read(storage: Storage, key: str, start: int = 0) -> bytes:
    async with storage.open(key, start) as file:
        return b"".join([chunk async for chunk in file.chunks])


def key_of(caught: pytest.ExceptionInfo[StorageError]) -> str | None:
    """The key that the error names; and it is one line."""
    assert "\n" not in caught.value.message
    return caught.value.details.get("key")


@pytest.fixture
async def google() -> AsyncIterator[Google]:
    made = Google()
    async with serving(made):
        yield made


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def storage(google: Google, tmp_path: Path, clock: HandClock) -> AsyncIterator[Storage]:
    """A storage with a service account, in front of `google`."""
    credentials = account_file(tmp_path, token_uri=f"{google.url}/token")
    config = GcsStorageConfig(bucket="b", endpoint=google.url, credentials=credentials, region="eu")
    async with open_gcs(config, clock) as opened:
        yield opened


async def test_one_token_serves_many_and_is_renewed_before_its_end(
    google: Google, storage: Storage, clock: HandClock, tmp_path: Path
) -> None:
    file = made(tmp_path, b"hello")
    await asyncio.gather(*[storage.put(f"t/1/{number}", file) for number in range(8)])
    assert len(google.tokens) == 1
    assert google.stored["t/1/7"] == (5, file.md5)
    clock.advance(3_239_000)
    await storage.put("t/1/a", file)
    assert len(google.tokens) == 1
    clock.advance(1_000)
    await storage.put("t/1/a", file)
    assert len(google.tokens) == 2


async def test_a_token_that_is_refused_is_not_used_again(
    google: Google, storage: Storage, tmp_path: Path
) -> None:
    file = made(tmp_path, b"hello")
    await storage.put("t/1/a", file)
    google.tokens.append("another")  # the first is good no more
    with pytest.raises(StorageError, match="the credentials are not accepted: Invalid Credentials") as caught:
        await storage.put("t/1/a", file)
    assert key_of(caught) == CREDENTIALS
    await storage.put("t/1/a", file)


async def test_who_gives_up_waiting_for_a_token_takes_nobody_along(
    google: Google, storage: Storage, tmp_path: Path
) -> None:
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def slow(_: web.Request) -> web.Response:
        asked.set()
        await may_answer.wait()
        google.tokens.append("good")
        return web.json_response({"access_token": "good", "expires_in": 3600})

    google.token_handler = slow
    file = made(tmp_path, b"hello")
    puts = [asyncio.create_task(storage.put(f"t/1/{number}", file)) for number in range(3)]
    await asyncio.wait_for(asked.wait(), 10)
    puts[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await puts[0]
    may_answer.set()
    await asyncio.gather(*puts[1:])
    assert set(google.stored) == {"t/1/1", "t/1/2"}


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (
            400,
            {"error": "invalid_grant", "error_description": "Account not found"},
            "not accept .*: Account not found",
        ),
        (400, {"error": "invalid_grant"}, "not accept .*: invalid_grant"),
        (500, "no json", "not accept .*: Internal Server Error"),
        (200, {}, "cannot get a token with these credentials"),
    ],
)
async def test_a_token_that_is_not_given_is_a_matter_of_credentials(
    google: Google, storage: Storage, tmp_path: Path, status: int, body: object, said: str
) -> None:
    google.token_handler = always(lambda: web.json_response(body, status=status))
    with pytest.raises(StorageError, match=said) as caught:
        await storage.put("t/1/a", made(tmp_path, b"hello"))
    assert key_of(caught) == CREDENTIALS
    assert "assertion" not in "".join(traceback.format_exception(caught.value))


async def test_a_token_service_that_is_not_there_is_named(tmp_path: Path) -> None:
    google = Google()
    async with serving(google):
        port = google.url.rpartition(":")[2]  # where nobody listens afterwards
    credentials = account_file(tmp_path, token_uri=f"{google.url}/token")
    async with open_gcs(GcsStorageConfig(bucket="b", credentials=credentials), HandClock()) as storage:
        with pytest.raises(
            StorageError, match=f"cannot get a token: cannot reach 127.0.0.1:{port}"
        ) as caught:
            await storage.put("t/1/a", made(tmp_path, b"hello"))
        assert key_of(caught) is None
    async with aiohttp.ClientSession() as session:
        access = Access(io.StringIO("{}"), session, HandClock())
        access.token_uri = google.url  # for metadata.google.internal
        with pytest.raises(
            StorageError, match="no credentials, and this is no machine of Google's"
        ) as caught:
            await access.get()
        assert key_of(caught) == CREDENTIALS


@pytest.mark.parametrize("size", [1000, WHOLE + 1])
@pytest.mark.parametrize(
    ("status", "mended"),
    [
        (403, (CREDENTIALS, "the credentials do not allow it: comfyd has no storage.objects.create")),
        (401, (CREDENTIALS, "the credentials are not accepted: comfyd has no")),
        (503, (None, "Google Cloud Storage answered 503: comfyd has no")),
        (404, ("storage.gcs.bucket", "there is no bucket b")),
    ],
)
async def test_refusals_say_what_mends_them_and_no_secret(
    google: Google, storage: Storage, tmp_path: Path, size: int, status: int, mended: tuple[str | None, str]
) -> None:
    google.scripted["POST"] = always(lambda: refusal(status, "comfyd has no\n storage.objects.create"))
    with pytest.raises(StorageError, match=f"cannot store t/1/a: {mended[1]}") as caught:
        await storage.put("t/1/a", made(tmp_path, bytes(size)))
    assert key_of(caught) == mended[0]
    assert caught.value.retryable
    assert "T0KEN" not in "".join(traceback.format_exception(caught.value))


async def test_who_may_not_see_the_bucket_leaves_the_region_out(google: Google, storage: Storage) -> None:
    google.scripted["GET"] = always(lambda: refusal(403, "no storage.buckets.get"))
    with pytest.raises(StorageError, match="cannot see where the bucket is") as caught:
        await storage.ping()
    assert key_of(caught) == "storage.gcs.region"


async def test_a_probe_that_comes_back_otherwise_fails_the_ping(google: Google, storage: Storage) -> None:
    google.scripted["DELETE"] = always(lambda: web.Response(status=204))
    google.scripted["POST"] = always(lambda: web.json_response({}))

    async def get(request: web.Request) -> web.Response:
        if "alt" not in request.query:
            return web.json_response({"location": "EU"})
        return answers.pop()

    google.scripted["GET"] = get
    answers = [web.Response(body=b"something else"), web.Response(status=404)]
    for _ in range(2):
        with pytest.raises(StorageError, match="gives back other bytes"):
            await storage.ping()


@pytest.mark.parametrize("size", [1000, WHOLE + 1])
async def test_google_compares_the_digest(
    google: Google, storage: Storage, tmp_path: Path, size: int
) -> None:
    file = msgspec.structs.replace(made(tmp_path, bytes(size)), md5="00" * 16)
    with pytest.raises(StorageError, match=r"answered 400: Provided MD5 hash AAAA.* doesn't match"):
        await storage.put("t/1/a", file)
    assert google.stored == {}


@pytest.mark.parametrize("answer", [{"size": "999"}, {}, {"size": "1000", "md5Hash": "AAAA"}])
async def test_an_object_of_another_size_or_digest_is_an_error(
    google: Google, storage: Storage, tmp_path: Path, answer: dict[str, str]
) -> None:
    google.scripted["POST"] = always(lambda: web.json_response(answer))
    with pytest.raises(StorageError, match="holds other bytes than were sent"):
        await storage.put("t/1/a", made(tmp_path, bytes(1000)))


@pytest.mark.parametrize("keeps", [256 * 1024 * 40, 1_000_000])
async def test_what_google_did_not_keep_is_sent_again(
    google: Google, storage: Storage, tmp_path: Path, keeps: int
) -> None:
    google.keeps = keeps
    file = made(tmp_path, random_sample(1, 12 * MB))
    await storage.put("t/1/a", file)
    assert google.stored["t/1/a"] == (file.size_bytes, file.md5)
    assert google.taken_back == []


async def test_an_upload_that_does_not_get_on_is_taken_back(
    google: Google, storage: Storage, tmp_path: Path
) -> None:
    google.keeps = 0
    with pytest.raises(StorageError, match="lost count of what was sent"):
        await storage.put("t/1/a", made(tmp_path, bytes(12 * MB)))
    assert google.taken_back == ["/session/0"]


@pytest.mark.parametrize("status", [404, 410])
async def test_a_session_that_has_ended_is_not_a_missing_bucket(
    google: Google, storage: Storage, tmp_path: Path, status: int
) -> None:
    google.scripted["PUT"] = always(lambda: refusal(status, "gone"))
    with pytest.raises(StorageError, match="ended the upload") as caught:
        await storage.put("t/1/a", made(tmp_path, bytes(12 * MB)))
    assert key_of(caught) is None
    assert "S3CRET" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("size", [1000, WHOLE + 1])
async def test_a_server_that_is_not_googles_is_told_apart(
    google: Google, storage: Storage, tmp_path: Path, size: int
) -> None:
    google.scripted["POST"] = always(lambda: web.Response(text="<h1>It works</h1>"))
    with pytest.raises(StorageError, match="the answer is not one of Google Cloud Storage") as caught:
        await storage.put("t/1/a", made(tmp_path, bytes(size)))
    assert key_of(caught) == "storage.gcs.endpoint"


async def test_a_download_that_breaks_off_is_a_storage_error(google: Google, storage: Storage) -> None:
    async def breaking(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"half")
        assert request.transport is not None
        request.transport.close()
        return response

    google.scripted["GET"] = breaking
    async with storage.open("t/1/a") as file:
        assert file.size_bytes == 1000
        with pytest.raises(StorageError, match="cannot read t/1/a to its end: the connection broke off"):
            assert [chunk async for chunk in file.chunks] == [b"half"]


async def test_a_readers_own_errors_are_left_alone(google: Google, storage: Storage) -> None:
    google.scripted["GET"] = always(lambda: web.Response(body=b"hello"))
    for error in (
        aiohttp.ClientError("the reader's"),
        TimeoutError("the reader's"),
        ValueError("the reader's"),
    ):
        with pytest.raises(type(error), match="the reader's"):
            async with storage.open("t/1/a"):
                raise error


@pytest.mark.parametrize(
    ("start", "answer"),
    [
        (0, lambda: web.Response(status=206, body=b"x", headers={"Content-Range": "bytes 0-0/*"})),
        (3, lambda: web.Response(status=200, body=b"all of it")),
    ],
)
async def test_a_download_of_unknown_size_or_place_is_refused(
    google: Google, storage: Storage, start: int, answer: Callable[[], web.Response]
) -> None:
    google.scripted["GET"] = always(answer)
    with pytest.raises(StorageError, match="does not say how large it is"):
        await read(storage, "t/1/a", start)


async def test_other_refusals_of_a_read_or_a_delete_are_storage_errors(
    google: Google, storage: Storage
) -> None:
    google.scripted["GET"] = google.scripted["DELETE"] = always(lambda: refusal(503, "Backend Error"))
    with pytest.raises(
        StorageError, match="cannot read t/1/a: Google Cloud Storage answered 503: Backend Error"
    ):
        await read(storage, "t/1/a")
    with pytest.raises(StorageError, match="cannot delete t/1/a: Google Cloud Storage answered 503"):
        await storage.delete("t/1/a")


def test_silence_is_told_apart_from_a_server_that_is_not_there() -> None:
    silences = [
        (aiohttp.ConnectionTimeoutError("to http://host/upload?upload_id=S3CRET"), "storage.gcs.endpoint"),
        (aiohttp.SocketTimeoutError("while reading"), None),
        (TimeoutError(), None),
    ]
    for silence, key in silences:
        with (
            pytest.raises(StorageError, match="cannot store a: there is no answer in time") as caught,
            translated("cannot store a", FileNotFound("a")),
        ):
            raise silence
        assert key_of(caught) == key
        assert "S3CRET" not in "".join(traceback.format_exception(caught.value))


async def test_a_large_upload_takes_little_memory(google: Google, storage: Storage, tmp_path: Path) -> None:
    size = 256 * MB
    path = tmp_path / "sparse"
    with path.open("wb") as sparse:
        sparse.truncate(size)
    digest = hashlib.md5(usedforsecurity=False)
    for _ in range(size // MB):
        digest.update(bytes(MB))
    file = msgspec.structs.replace(made(tmp_path, b""), path=path, size_bytes=size, md5=digest.hexdigest())
    tracemalloc.start()
    try:
        await storage.put("t/1/a", file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert google.stored["t/1/a"] == (size, file.md5)
    assert peak < 24 * MB, "with the server, which runs in the same process"


async def test_an_upload_canceled_while_it_begins_is_taken_back(
    google: Google, storage: Storage, tmp_path: Path
) -> None:
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def slow(_: web.Request) -> web.Response:
        asked.set()
        await may_answer.wait()
        return web.Response(headers={"Location": f"{google.url}/session/0"})

    async def taken_back(request: web.Request) -> web.Response:
        google.taken_back.append(request.path)
        return web.Response(status=499)

    google.scripted["POST"] = slow
    google.scripted["DELETE"] = taken_back
    putting = asyncio.create_task(storage.put("t/1/a", made(tmp_path, bytes(12 * MB))))
    await asyncio.wait_for(asked.wait(), 10)
    putting.cancel()
    await asyncio.sleep(0)
    may_answer.set()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert google.taken_back == ["/session/0"]
