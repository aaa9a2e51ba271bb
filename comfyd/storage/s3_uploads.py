"""Files that go to an S3 server in parts: all or none; never a part in memory, never an upload that stays."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import IO, Any, Final, TypeVar

import msgspec

from comfyd.disk import on_disk, to_its_end
from comfyd.storage.base import LocalFile
from comfyd.storage.parts import Part
from comfyd.storage.s3_errors import told

T = TypeVar("T")

PART: Final = 8 << 20
"""Bytes of one part, unless there would be too many."""
MOST_PARTS: Final = 10_000
PARTS_AT_ONCE: Final = 3
ABORT_TIMEOUT: Final = 5.0
SLOWEST: Final = 32_768
"""Bytes per second below which a server does not take a file at all."""


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How long a server may take, in seconds."""

    answer: float
    connect: float

    async def within(self, size: int, request: Awaitable[T]) -> T:
        """The answer to a request with a body of this size. Raises `TimeoutError`.

        The driver looks at the time of answers only: a server that stops reading would be waited for forever.
        """
        async with asyncio.timeout(self.connect + self.answer + size / SLOWEST):
            return await request


class MultipartUploads:
    """The multipart uploads into one bucket. Lives as long as its storage."""

    def __init__(self, client: Any, bucket: str, pace: Pace, failures: tuple[type[Exception], ...]) -> None:
        self._client = client
        self._bucket = bucket
        self._pace = pace
        self._failures = failures
        self._left: dict[str, list[str]] = {}
        """Object and ids of uploads that could not be aborted when they failed."""

    async def send(self, name: str, file: LocalFile, source: IO[bytes], headers: dict[str, str]) -> str:
        """A few parts at a time, all or none; the tag that the server gave them together."""
        size = max(PART, -(-file.size_bytes // MOST_PARTS))
        starts = iter(enumerate(range(0, file.size_bytes, size), start=1))
        tags: dict[int, str] = {}

        async def some(upload: str) -> None:
            for number, start in starts:
                part = Part(source, start, min(size, file.size_bytes - start))
                tags[number] = await self._put_part(name, upload, number, part)

        async with self._upload(name, headers) as upload:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(PARTS_AT_ONCE):
                        group.create_task(some(upload))
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None
            answer = await self._pace.within(
                file.size_bytes,
                self._client.complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=name,
                    UploadId=upload,
                    MultipartUpload={
                        "Parts": [{"PartNumber": number, "ETag": tags[number]} for number in sorted(tags)]
                    },
                ),
            )
        return str(answer.get("ETag", "")).strip('"')

    async def _put_part(self, name: str, upload: str, number: int, part: Part) -> str:
        digest = await on_disk("cannot read what is to be stored", part.md5)
        answer = await self._pace.within(
            part.length,
            self._client.upload_part(
                Bucket=self._bucket,
                Key=name,
                UploadId=upload,
                PartNumber=number,
                Body=part,
                ContentMD5=digest,
            ),
        )
        return told(answer, "ETag")

    @asynccontextmanager
    async def _upload(self, name: str, headers: dict[str, str]) -> AsyncIterator[str]:
        """A multipart upload, which is aborted unless the block ends well: it would be kept, and paid for."""
        await self.abort_left(name)
        begun: list[str] = []
        complete = False
        try:
            await to_its_end(self._begin(name, headers, begun))  # its id must be known, whatever is canceled
            yield begun[0]
            complete = True
        finally:
            if begun and not complete:
                self._left.setdefault(name, []).extend(begun)
                await to_its_end(self.abort_left(name))

    async def _begin(self, name: str, headers: dict[str, str], begun: list[str]) -> None:
        answer = await self._pace.within(
            0, self._client.create_multipart_upload(Bucket=self._bucket, Key=name, **headers)
        )
        begun.append(told(answer, "UploadId"))

    async def abort_left(self, name: str) -> None:
        """Abort what `send` had begun for this object and could not complete, as far as the server lets."""
        uploads = self._left.pop(name, [])
        try:
            async with asyncio.timeout(ABORT_TIMEOUT):
                while uploads:
                    with suppress(self._client.exceptions.NoSuchUpload):
                        await self._client.abort_multipart_upload(
                            Bucket=self._bucket, Key=name, UploadId=uploads[-1]
                        )
                    uploads.pop()
        except self._failures:
            return  # the next `put` or `delete` of the object tries again
        finally:
            if uploads:
                self._left.setdefault(name, []).extend(uploads)
