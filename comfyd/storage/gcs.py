"""Google Cloud Storage through gcloud-aio-storage; never a whole file in memory.

The driver authorises, downloads, deletes and looks. Its uploads are not used: they repeat themselves, read
files of up to 5 MB whole, and leave a broken session open for a week.
"""

import asyncio
import base64
import io
import math
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import quote

import aiohttp
import msgspec
from aiohttp import payload
from gcloud.aio.auth import Token
from gcloud.aio.auth.token import TokenResponse
from gcloud.aio.storage import Storage as Driver
from gcloud.aio.storage import StreamResponse
from yarl import URL

from comfyd.clock import Clock
from comfyd.config import GcsStorageConfig
from comfyd.disk import opened, to_its_end
from comfyd.errors import ComfydError, ConfigError, FileNotFound, NotAccepted, StorageError
from comfyd.storage.base import LocalFile, StoredFile, nothing
from comfyd.storage.gcs_errors import (
    BUCKET,
    CREDENTIALS,
    ENDPOINT,
    REGION,
    failed,
    reason,
    translated,
    unreached,
)
from comfyd.storage.gcs_signing import Signing, signing
from comfyd.storage.objects import cache_control, disposition, media_type, object_name, public_url

GOOGLE: Final = "https://storage.googleapis.com"
SCOPE: Final = "https://www.googleapis.com/auth/devstorage.read_write"
LARGEST: Final = 5 << 40
"""Bytes of the largest object that Google takes."""
WHOLE: Final = 8 << 20
"""Bytes of the largest file that goes in one request."""
PIECE: Final = 16 << 20
"""Bytes of one request of a larger file; a multiple of 256 KiB, as the protocol wants."""
CONNECTIONS: Final = 32
TOKEN_SECONDS: Final = 10

# Typed as Any: the driver asks for an int, and hands these on as they are.
_PIECE_TIME: Final[Any] = aiohttp.ClientTimeout(total=300, sock_connect=10, sock_read=60)
"""The total ends a piece that is taken at less than 56 kB/s, or not at all: no other time watches over it."""
_READ_TIME: Final[Any] = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
_SHORT_TIME: Final[Any] = aiohttp.ClientTimeout(total=30, sock_connect=10)
_BEGIN_TIME: Final[Any] = aiohttp.ClientTimeout(total=10)
_CANCEL_TIME: Final[Any] = aiohttp.ClientTimeout(total=5)


class GcsStorage:
    """A bucket as a storage. Made by `open_gcs`."""

    name = "gcs"

    def __init__(
        self, config: GcsStorageConfig, bucket: "Bucket", signing: Signing | None, clock: Clock
    ) -> None:
        self._config = config
        self._bucket = bucket
        self._signing = signing
        self._clock = clock

    async def put(self, key: str, file: LocalFile) -> str | None:
        """See `Storage`. Google itself compares the digest, and keeps nothing of what differs."""
        what = f"cannot store {key}"
        if file.size_bytes > LARGEST:
            raise NotAccepted(f"{what}: Google Cloud Storage takes files of up to {LARGEST >> 40} TiB")
        digest = base64.b64encode(bytes.fromhex(file.md5)).decode()
        about = {
            "name": self._object(key),
            "contentType": media_type(file.content_type),
            "contentDisposition": disposition(file),
            "cacheControl": cache_control(public=self._config.public_url is not None),
            "md5Hash": digest,
        }
        send = self._bucket.insert_file if file.size_bytes <= WHOLE else self._bucket.upload
        stored = await send(what, about, file)
        if stored.get("size") != str(file.size_bytes) or stored.get("md5Hash", digest) != digest:
            raise StorageError(f"{what}: the storage holds other bytes than were sent")
        return None

    @asynccontextmanager
    async def open(self, key: str, start: int = 0, length: int | None = None) -> AsyncIterator[StoredFile]:
        """See `Storage`."""
        name = self._object(key)
        missing = FileNotFound(f"there is no file {key}")
        async with self._bucket.read(f"cannot read {key}", name, start, length, missing) as file:
            yield file

    async def delete(self, key: str) -> None:
        """See `Storage`."""
        await self._bucket.delete(f"cannot delete {key}", self._object(key))

    async def url(self, key: str, location: str | None) -> str | None:  # noqa: ARG002 - the key says it
        """See `Storage`. None where there is no private key to sign it with."""
        stored = self._object(key)
        if self._config.public_url is not None:
            return public_url(self._config.public_url, stored)
        if self._signing is None:
            return None
        return self._signing.url(stored, self._clock.now(), math.ceil(self._config.url_expires))

    async def ping(self) -> None:
        """See `Storage`. Where a region is configured, the bucket must be there."""
        region = self._config.region
        if region is not None:
            location = await self._bucket.location()
            if location.casefold() != region.casefold():
                raise failed(f"bucket {self._config.bucket} is in {location}, not in {region}", REGION)
        key = f".probe/{self._clock.new_id()}"
        about = {"name": self._object(key), "contentType": "text/plain"}
        await self._bucket.insert("cannot write a probe", about, key.encode())
        try:
            async with self.open(key) as file:
                found = b"".join([chunk async for chunk in file.chunks])
        except FileNotFound:
            found = b""
        finally:
            await self.delete(key)
        if found != key.encode():
            raise StorageError(f"bucket {self._config.bucket} gives back other bytes than were written")

    def _object(self, key: str) -> str:
        return object_name(self._config.prefix, key)


class Bucket:
    """What is asked of Google about one bucket. Lives as long as its storage."""

    def __init__(self, name: str, root: str, driver: Driver, access: "Access | None") -> None:
        self._name = name
        self._objects = f"{root}/upload/storage/v1/b/{quote(name, safe='')}/o"
        self._driver = driver
        self._access = access

    async def insert(self, what: str, about: dict[str, str], content: bytes) -> dict[str, Any]:
        """Create an object in one request. What Google then knows of it."""
        return await self._insert(
            what, about, payload.BytesPayload(content, content_type=about["contentType"])
        )

    async def insert_file(self, what: str, about: dict[str, str], file: LocalFile) -> dict[str, Any]:
        """Create an object in one request, from a file that is not large."""
        async with opened(what, partial(_open, file, 0)) as source:
            body = payload.BufferedReaderPayload(source, filename=None, content_type=about["contentType"])
            return await self._insert(what, about, body)

    async def _insert(self, what: str, about: dict[str, str], body: aiohttp.Payload) -> dict[str, Any]:
        with self._translated(what), aiohttp.MultipartWriter("related") as parts:
            parts.append_json(about)
            parts.append_payload(body)
            url = f"{self._objects}?uploadType=multipart"
            headers = await self._headers()
            async with self._request("POST", url, headers, _PIECE_TIME, parts) as response:
                return _object_of(await response.read())

    async def upload(self, what: str, about: dict[str, str], file: LocalFile) -> dict[str, Any]:
        """Create an object piece by piece. What Google then knows of it.

        What was begun and cannot be finished is taken back; if that fails too, Google forgets it in a week.
        """
        sessions: list[str] = []
        try:
            with self._translated(what):
                headers = await self._headers()
                # Canceled meanwhile, nobody would know what to take back.
                await to_its_end(self._begin(headers, about, file.size_bytes, sessions))
            with self._translated(what, StorageError(f"{what}: Google Cloud Storage ended the upload")):
                return await self._send(what, sessions[0], file)
        except BaseException:
            for session in sessions:
                await self._take_back(session)
            raise

    async def _begin(
        self, headers: dict[str, str], about: dict[str, str], size: int, sessions: list[str]
    ) -> None:
        """Open a session for one upload: a url that needs no other authority, and so is a secret."""
        headers = headers | {
            "Content-Type": "application/json; charset=UTF-8",
            "X-Upload-Content-Type": about["contentType"],
            "X-Upload-Content-Length": str(size),
        }
        url = f"{self._objects}?uploadType=resumable"
        body = msgspec.json.encode(about)
        async with self._request("POST", url, headers, _BEGIN_TIME, body) as response:
            sessions.append(response.headers["Location"])

    async def _send(self, what: str, session: str, file: LocalFile) -> dict[str, Any]:
        """Send the pieces in order. Google says after each how far it has them, and at last what it has."""
        start = 0
        while True:
            stop = min(start + PIECE, file.size_bytes)
            headers = {
                "Content-Type": media_type(file.content_type),
                "Content-Length": str(stop - start),
                "Content-Range": f"bytes {start}-{stop - 1}/{file.size_bytes}",
            }
            async with (
                opened(what, partial(_open, file, start)) as source,
                self._request("PUT", session, headers, _PIECE_TIME, source) as response,
            ):
                if response.status != 308:
                    return _object_of(await response.read())
                kept = int(response.headers.get("Range", "bytes=0--1").partition("-")[2]) + 1
            if not start < kept <= stop or kept == file.size_bytes:
                raise StorageError(f"{what}: Google Cloud Storage lost count of what was sent")
            start = kept

    async def _take_back(self, session: str) -> None:
        with suppress(aiohttp.ClientError, TimeoutError):
            async with self._request("DELETE", session, {}, _CANCEL_TIME):
                pass

    @asynccontextmanager
    async def read(
        self, what: str, name: str, start: int, length: int | None, missing: ComfydError
    ) -> AsyncIterator[StoredFile]:
        """Read a part of an object, within the block; see `Storage.open`."""
        with self._translated(what, missing):
            stream = await self._download(name, start, length)
        if stream is None:  # then nobody has said yet how large it is
            with self._translated(what, missing):
                about = await self._driver.download_metadata(self._name, name, timeout=_SHORT_TIME)
                size = int(about["size"])
            yield StoredFile(size_bytes=size, chunks=nothing())
        else:
            async with stream as response, aclosing(self._chunks(what, response)) as chunks:
                yield StoredFile(size_bytes=_whole_size(what, response, start), chunks=chunks)

    async def _download(self, name: str, start: int, length: int | None) -> StreamResponse | None:
        """This part of an object as it comes; None where there is nothing of it from `start` on."""
        if length is not None and length <= 0:
            return None
        headers = {"Accept-Encoding": "identity"}
        if start or length is not None:
            headers["Range"] = f"bytes={start}-{'' if length is None else start + length - 1}"
        try:
            return await self._driver.download_stream(self._name, name, headers=headers, timeout=_READ_TIME)
        except aiohttp.ClientResponseError as error:
            if error.status == 416:
                return None
            raise

    async def _chunks(self, what: str, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        with self._translated(f"{what} to its end"):
            async for chunk in response.content.iter_any():
                yield chunk

    async def delete(self, what: str, name: str) -> None:
        """Forget an object; one that is not there is forgotten already."""
        with suppress(FileNotFound), self._translated(what, FileNotFound(what)):
            await self._driver.delete(self._name, name, timeout=_SHORT_TIME)

    async def location(self) -> str:
        """The region that the bucket is in."""
        with self._translated("cannot see where the bucket is", forbidden=REGION):
            about = await self._driver.get_bucket_metadata(self._name, timeout=_SHORT_TIME)
            return str(about["location"])

    async def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {await self._access.get()}"} if self._access is not None else {}

    @asynccontextmanager
    async def _request(
        self, method: str, url: str, headers: dict[str, str], timeout: Any, body: Any = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request; an answer from 400 on raises `aiohttp.ClientResponseError`."""
        async with await self._driver.session.request(
            method, url, headers=headers, timeout=timeout, data=body, allow_redirects=False
        ) as response:
            yield response

    @contextmanager
    def _translated(
        self, what: str, missing: ComfydError | None = None, forbidden: str = CREDENTIALS
    ) -> Iterator[None]:
        """See `translated`; a 404 is a missing bucket by default."""
        no_bucket = failed(f"{what}: there is no bucket {self._name}", BUCKET)
        with translated(what, missing or no_bucket, forbidden):
            try:
                yield
            except aiohttp.ClientResponseError as error:
                if error.status == 401 and self._access is not None:
                    self._access.forget()
                raise


class _Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """What every file of credentials has; without it the driver would take the machine's."""

    type: str


class Access(Token):
    """The driver's ways to a token, with a keeping of its own. Lives as long as its storage.

    The driver's keeping repeats itself for up to minutes, goes on after the session is closed, and cancels
    everybody who waits for a token together with the first of them.
    """

    def __init__(self, service: IO[str] | None, session: aiohttp.ClientSession, clock: Clock) -> None:
        super().__init__(service_file=service, session=session, scopes=[SCOPE])
        self._clock = clock
        self._asking = asyncio.Lock()
        self._token: str | None = None
        self._good_until = 0

    async def get(self) -> str:
        """A token that is good for a while yet. Raises `StorageError`."""
        async with self._asking:
            if self._token is None or self._clock.monotonic() >= self._good_until:
                answer = await self._ask()
                # Given up after nine tenths of its life, in milliseconds.
                self._good_until = self._clock.monotonic() + answer.expires_in * 900
                self._token = answer.value
            return self._token

    def forget(self) -> None:
        """Take a new token the next time."""
        self._token = None

    async def _ask(self) -> TokenResponse:
        try:
            return await self.refresh(timeout=TOKEN_SECONDS)
        except aiohttp.ClientResponseError as error:  # not chained: it holds the request
            raise failed(f"Google does not accept the credentials: {reason(error)}", CREDENTIALS) from None
        except (aiohttp.ClientError, TimeoutError) as error:
            if self.service_data:
                raise StorageError(f"cannot get a token: {unreached(error)}") from error
            message = f"there are no credentials, and this is no machine of Google's: {unreached(error)}"
            raise failed(message, CREDENTIALS) from error
        except (KeyError, TypeError, ValueError):  # not chained: it may hold a part of the file
            raise failed("cannot get a token with these credentials", CREDENTIALS) from None


@asynccontextmanager
async def open_gcs(config: GcsStorageConfig, clock: Clock) -> AsyncIterator[GcsStorage]:
    """The bucket, which is not asked anything yet.

    With an endpoint and no credentials nobody is asked for a token; otherwise the file's credentials are
    used, or the machine's. Raises `ConfigError` for an endpoint that is no url, and `StorageError` for
    credentials that cannot be used.
    """
    root = _root(config.endpoint)
    bucket = config.bucket or ""
    anonymous = config.endpoint is not None and config.credentials is None
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept-Encoding": "identity"},
        auto_decompress=False,
        trust_env=False,
    ) as session:
        access = await asyncio.to_thread(_access, config.credentials, anonymous, session, clock)
        signs = await asyncio.to_thread(_signing, access, root, bucket)
        driver = Driver(session=session, token=access, api_root=root, api_is_dev=anonymous)
        yield GcsStorage(config, Bucket(bucket, root, driver, None if anonymous else access), signs, clock)


def _root(endpoint: str | None) -> str:
    """The url that every request begins with; never from the environment, as the driver would have it."""
    try:
        url = URL((endpoint or GOOGLE).rstrip("/"))
    except ValueError:
        url = URL()
    if url.scheme not in {"http", "https"} or not url.host or url.user or url.password or url.query_string:
        raise ConfigError(
            f"{ENDPOINT} is not the url of a server, such as http://127.0.0.1:4443", details={"key": ENDPOINT}
        )
    return str(url).rstrip("/")


def _access(file: str | None, anonymous: bool, session: aiohttp.ClientSession, clock: Clock) -> Access:
    """With a file of credentials, with what the machine has, or with nothing. Raises `StorageError`."""
    whose = file or "the machine's file of credentials"
    try:
        if anonymous:
            return Access(io.StringIO("{}"), session, clock)  # the driver wants a token even if it asks none
        # Read here: where the driver cannot read a file, it takes the machine's credentials without a word.
        service = io.StringIO(_text(file)) if file is not None else None
        return Access(service, session, clock)
    except OSError as error:
        raise failed(f"cannot read {whose}: {error.strerror or error}", CREDENTIALS) from error
    except (KeyError, TypeError, ValueError, msgspec.DecodeError):  # not chained: it may hold a part of it
        raise failed(f"{whose} holds no credentials of Google's", CREDENTIALS) from None


def _text(file: str) -> str:
    """Raises `OSError`, `UnicodeDecodeError`, and `msgspec.DecodeError` for what is no object in JSON."""
    text = Path(file).read_text(encoding="utf-8")
    msgspec.json.decode(text, type=_Credentials)
    return text


def _signing(access: Access, root: str, bucket: str) -> Signing | None:
    """What signs urls, if anything. Raises `StorageError`."""
    try:
        return signing(access.service_data, root, bucket)
    except ValueError:  # not chained: it may hold a part of the key
        raise failed(
            "the service account's file holds no private key that can be used", CREDENTIALS
        ) from None


def _open(file: LocalFile, start: int) -> IO[bytes]:
    """The file, to be read from `start` on; one of another size would leave the storage waiting."""
    source = file.path.open("rb")
    if os.fstat(source.fileno()).st_size != file.size_bytes:
        source.close()
        raise OSError("the file has another size than when it was made")
    source.seek(start)
    return source


def _object_of(body: bytes) -> dict[str, Any]:
    return msgspec.json.decode(body, type=dict[str, Any])


def _whole_size(what: str, response: aiohttp.ClientResponse, start: int) -> int:
    """The size of the whole object, of which this answer brings a part."""
    if response.status == 206:
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        size = response.headers.get("Content-Length", "") if start == 0 else ""
    if not size.isdecimal():
        raise StorageError(f"{what}: Google Cloud Storage does not say how large it is")
    return int(size)
