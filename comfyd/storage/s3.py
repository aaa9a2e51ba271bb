"""Amazon S3, servers that speak its protocol, and Cloudflare R2; never a whole file in memory.

The digest of every request's body goes with it, so that a server which stored other bytes has to say so; the
signature leaves the body out, which would have to be read twice and hashed on the event loop.
"""

import asyncio
import base64
import hashlib
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import IO, Any, Final

import aioboto3
import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    InvalidRegionError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    SSLError,
)
from botocore.exceptions import (
    ConnectionError as DriverConnectionError,
)
from botocore.loaders import create_loader
from botocore.parsers import ResponseParserError

from comfyd.config import R2StorageConfig, S3StorageConfig
from comfyd.disk import opened
from comfyd.errors import FileNotFound, StorageError
from comfyd.storage.base import LocalFile, StoredFile, nothing
from comfyd.storage.objects import cache_control, disposition, media_type, object_name, public_url
from comfyd.storage.parts import Part
from comfyd.storage.s3_errors import Explainer, NotS3, Refusal, told
from comfyd.storage.s3_uploads import MultipartUploads, Pace

LARGE: Final = 16 << 20
"""Bytes from which on a file goes in parts."""
CONNECTIONS: Final = 32
CONNECT_TIMEOUT: Final = 10.0
READ_TIMEOUT: Final = 60.0
"""Seconds without a byte of an answer."""
BLOCK: Final = 1 << 18
"""Bytes read in one go from an answer, at most."""
_MODELS: Final = create_loader()
"""The driver's descriptions of S3. To read them is most of the work of opening: once, and on a thread."""
_PROBE: Final = b"comfyd"
_NO_FILE: Final = frozenset({"NoSuchKey", "404", "NotFound"})
_FAILURES: Final = (BotoCoreError, ClientError, ResponseParserError, NotS3, aiohttp.ClientError, TimeoutError)


class S3Storage:
    """One bucket, or the part of it below a prefix. Made by `open_s3` and `open_r2`."""

    def __init__(self, client: Any, table: S3StorageConfig, name: str, words: Explainer, pace: Pace) -> None:
        self.name = name
        self._client = client
        self._bucket = words.bucket
        self._prefix = table.prefix
        self._public_url = table.public_url
        self._expires = int(table.url_expires)
        self._words = words
        self._pace = pace
        self._uploads = MultipartUploads(client, words.bucket, pace, _FAILURES)

    async def put(self, key: str, file: LocalFile) -> str | None:
        """See `Storage`. The server compares the MD5 of each request; at the end the size is asked for."""
        name = object_name(self._prefix, key)
        what = f"cannot store {key}"
        async with opened(what, lambda: file.path.open("rb", buffering=0)) as source, self._explained(what):
            if os.fstat(source.fileno()).st_size != file.size_bytes:
                raise StorageError(f"{what}: the file to store is not {file.size_bytes} bytes long")
            if file.size_bytes < LARGE:
                tag = await self._put_whole(name, file, source)
            else:
                tag = await self._uploads.send(name, file, source, self._headers(file))
            if tag != file.md5:  # encrypting servers tag with something else, and parts have a tag of tags
                head = await self._pace.within(0, self._client.head_object(Bucket=self._bucket, Key=name))
                size = int(told(head, "ContentLength"))
                if size != file.size_bytes:
                    raise StorageError(f"{what}: {size} of {file.size_bytes} bytes arrived")
        return None

    @asynccontextmanager
    async def open(self, key: str, start: int = 0, length: int | None = None) -> AsyncIterator[StoredFile]:
        """See `Storage`."""
        name = object_name(self._prefix, key)
        what = f"cannot read {key}"
        async with self._explained(what, missing=FileNotFound(f"there is no file {key}")):
            size, stream = await self._get(name, start, length)
        if stream is None:
            yield StoredFile(size_bytes=size, chunks=nothing())
            return
        async with stream:
            yield StoredFile(size_bytes=size, chunks=self._read(what, stream))

    async def delete(self, key: str) -> None:
        """See `Storage`."""
        name = object_name(self._prefix, key)
        async with self._explained(f"cannot delete {key}"):
            await self._uploads.abort_left(name)
            await self._pace.within(0, self._client.delete_object(Bucket=self._bucket, Key=name))

    async def url(self, key: str, location: str | None) -> str | None:  # noqa: ARG002 - the key says it
        """See `Storage`. Signed without asking anybody, in about 0.15 ms."""
        object_key = object_name(self._prefix, key)
        if self._public_url is not None:
            return public_url(self._public_url, object_key)
        async with self._explained(f"cannot make a url of {key}"):
            url = await self._client.generate_presigned_url(
                "get_object", Params={"Bucket": self._bucket, "Key": object_key}, ExpiresIn=self._expires
            )
        return str(url)

    async def ping(self) -> None:
        """See `Storage`."""
        place = {"Bucket": self._bucket, "Key": object_name(self._prefix, f".probe-{secrets.token_hex(8)}")}
        async with self._explained(self.name):
            await self._pace.within(0, self._client.put_object(**place, Body=_PROBE, ContentMD5=_md5(_PROBE)))
            try:
                stream = (await self._pace.within(0, self._client.get_object(**place)))["Body"]
                async with stream:
                    found = await stream.read()
            finally:
                await self._pace.within(0, self._client.delete_object(**place))
        if found != _PROBE:
            raise self._words.error(
                self.name, "endpoint", "the server gives back other bytes than were written"
            )

    async def _put_whole(self, name: str, file: LocalFile, source: IO[bytes]) -> str:
        """One request; the tag that the server gave it."""
        answer = await self._pace.within(
            file.size_bytes,
            self._client.put_object(
                Bucket=self._bucket,
                Key=name,
                Body=Part(source, 0, file.size_bytes),
                ContentMD5=base64.b64encode(bytes.fromhex(file.md5)).decode(),
                **self._headers(file),
            ),
        )
        return str(answer.get("ETag", "")).strip('"')

    async def _get(self, name: str, start: int, length: int | None) -> tuple[int, Any]:
        """The file's size and a stream of what is asked for; None where that is nothing."""
        place = {"Bucket": self._bucket, "Key": name}
        try:
            if length is None and start == 0:
                answer = await self._pace.within(0, self._client.get_object(**place))
                return int(told(answer, "ContentLength")), answer["Body"]
            if length != 0:
                last = "" if length is None else str(start + length - 1)
                answer = await self._pace.within(
                    0, self._client.get_object(**place, Range=f"bytes={start}-{last}")
                )
                return int(told(answer, "ContentRange").rpartition("/")[2]), answer["Body"]
        except ClientError as exc:
            if exc.response["Error"].get("Code") not in {"InvalidRange", "416"}:
                raise
        head = await self._pace.within(0, self._client.head_object(**place))
        return int(told(head, "ContentLength")), None

    async def _read(self, what: str, stream: Any) -> AsyncIterator[bytes]:
        while True:
            async with self._explained(what):
                block = await stream.read(BLOCK)
            if not block:
                return
            yield block

    def _headers(self, file: LocalFile) -> dict[str, str]:
        return {
            "ContentType": media_type(file.content_type),
            "ContentDisposition": disposition(file),
            "CacheControl": cache_control(public=self._public_url is not None),
        }

    @asynccontextmanager
    async def _explained(self, what: str, missing: FileNotFound | None = None) -> AsyncIterator[None]:
        """Let the driver's errors leave as `StorageError`; `missing` where there is no such object."""
        try:
            yield
        except ClientError as exc:
            if missing is not None and exc.response["Error"].get("Code") in _NO_FILE:
                raise missing from None
            raise self._words.refused(what, _refusal(exc)) from exc
        except _FAILURES as exc:
            raise _explain(self._words, what, exc) from exc


@asynccontextmanager
async def open_s3(config: S3StorageConfig, *, read_timeout: float = READ_TIMEOUT) -> AsyncIterator[S3Storage]:
    """The bucket of `[storage.s3]`, within the block; it is not asked anything yet. Raises `StorageError`."""
    async with _open(config, "s3", config.endpoint, read_timeout) as bucket:
        yield bucket


@asynccontextmanager
async def open_r2(config: R2StorageConfig, *, read_timeout: float = READ_TIMEOUT) -> AsyncIterator[S3Storage]:
    """The bucket of `[storage.r2]`, within the block; it is not asked anything yet. Raises `StorageError`."""
    table = S3StorageConfig(
        bucket=config.bucket,
        region="auto",
        endpoint=config.endpoint or f"https://{config.account_id}.r2.cloudflarestorage.com",
        access_key=config.access_key,
        secret_key=config.secret_key,
        prefix=config.prefix,
        public_url=config.public_domain,
        url_expires=config.url_expires,
    )
    async with _open(table, "r2", config.endpoint, read_timeout) as bucket:
        yield bucket


@asynccontextmanager
async def _open(
    table: S3StorageConfig, name: str, endpoint: str | None, read_timeout: float
) -> AsyncIterator[S3Storage]:
    """`endpoint` is the one that was configured, for messages."""
    words = Explainer(
        storage=name,
        bucket=table.bucket or "",
        endpoint=endpoint,
        region=table.region,
        secrets=tuple(secret for secret in (table.secret_key, table.access_key) if secret),
    )
    if table.bucket is None:
        raise words.error(name, "bucket", "no bucket is configured")
    if (table.access_key is None) != (table.secret_key is None):
        key = "access_key" if table.access_key is None else "secret_key"
        raise words.error(name, key, "access key and secret key must both be configured, or neither")
    async with AsyncExitStack() as stack:
        try:
            session = await _session(table)
            client = await stack.enter_async_context(
                session.client("s3", endpoint_url=table.endpoint, config=_driver_config(table, read_timeout))
            )
        except (BotoCoreError, ValueError) as exc:
            raise _explain(words, name, exc) from exc
        client.meta.events.register("before-call.s3", _stay)
        yield S3Storage(client, table, name, words, Pace(answer=read_timeout, connect=CONNECT_TIMEOUT))


async def _session(table: S3StorageConfig) -> aioboto3.Session:
    driver = AioSession()
    driver.register_component("data_loader", _MODELS)
    for model in ("service-2", "endpoint-rule-set-1"):
        await asyncio.to_thread(_MODELS.load_service_model, "s3", model)
    return aioboto3.Session(
        table.access_key, table.secret_key, region_name=table.region, botocore_session=driver
    )


def _driver_config(table: S3StorageConfig, read_timeout: float) -> AioConfig:
    # A bucket's name with a dot in it does not fit Amazon's certificate.
    own = table.endpoint is not None or "." in (table.bucket or "")
    return AioConfig(
        signature_version="s3v4",
        s3={"addressing_style": "path" if own else "virtual", "payload_signing_enabled": False},
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=read_timeout,
        max_pool_connections=CONNECTIONS,
        retries={"total_max_attempts": 1},  # whoever calls repeats, and knows how long there is to wait
        request_checksum_calculation="when_required",  # R2 and others do not know the trailers
        response_checksum_validation="when_required",
        ignore_configured_endpoint_urls=True,  # the configuration says where, not the environment
    )


def _stay(context: dict[str, Any], **_: Any) -> None:
    """Keep the driver from asking around for the bucket's right region: urls would name the wrong one."""
    context.get("s3_redirect", {})["redirected"] = True


def _refusal(exc: ClientError) -> Refusal:
    answer = exc.response
    error = answer.get("Error", {})
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return Refusal(
        code=str(error.get("Code") or ""),
        said=str(error.get("Message") or ""),
        region=error.get("Region") or headers.get("x-amz-bucket-region"),
    )


def _explain(words: Explainer, what: str, exc: Exception) -> StorageError:
    """What it means when the driver did not get as far as an answer."""
    match exc:
        case NoCredentialsError() | PartialCredentialsError():
            return words.error(
                what, "access_key", "there is neither a key nor any credentials on this machine"
            )
        case ProfileNotFound():
            return words.error(
                what, "access_key", "there is no AWS profile as this machine's AWS_PROFILE names it"
            )
        case CredentialRetrievalError():
            return words.error(what, "access_key", "the credentials of this machine cannot be had")
        case ParamValidationError():
            return words.refused(what, Refusal(code="InvalidBucketName", said="", region=None))
        case InvalidRegionError():
            return words.error(what, "region", f"{words.region!r} cannot be the name of a region")
        case ResponseParserError() | NotS3():
            return words.unreachable(what, "does not speak S3")
        case SSLError():
            return words.unreachable(what, "cannot be trusted: it has no valid certificate")
        case ReadTimeoutError() | TimeoutError():
            return words.unreachable(what, "does not answer in time")
        case aiohttp.ClientError() | HTTPClientError() | DriverConnectionError() | IncompleteReadError():
            return words.unreachable(what, "cannot be reached, or broke off")
        case ValueError():
            return words.error(what, "endpoint", f"{words.place} is not a url that can be used")
        case _:
            return words.error(what, None, f"the driver says {type(exc).__name__}")


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
