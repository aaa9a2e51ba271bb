"""Files to and from one ComfyUI, streamed; never a whole file in memory, never a path of this machine."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import aiohttp
import msgspec

from comfyd.comfy.client import Answer, Client, read_object
from comfyd.comfy.outputs import DEFAULT_CONTENT_TYPE, content_type
from comfyd.errors import BackendRejected, BackendUnclear, ComfydError, OutputUnavailable
from comfyd.tasks import OutputFile

_SAFE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_LONGEST_REFUSAL: Final = 64 * 1024


class OutputStream(msgspec.Struct, frozen=True, kw_only=True):
    """An output file as it comes. Valid inside its context only; `chunks` can be read once."""

    size_bytes: int | None
    """As announced; None where ComfyUI does not say. A body of another length is `OutputUnavailable`."""
    content_type: str
    chunks: AsyncIterator[bytes]


class Files:
    """The files of one ComfyUI. Lives as long as the backend."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @asynccontextmanager
    async def open_output(self, file: OutputFile) -> AsyncIterator[OutputStream]:
        """See `Backend.open_output`."""
        url = self._client.url(
            "/view", {"filename": file.filename, "subfolder": file.subfolder, "type": file.folder}
        )
        async with self._client.exchange("GET", url) as response:
            if response.status != 200:
                raise OutputUnavailable(
                    f"ComfyUI does not serve {file.filename!r}: it answered {response.status}",
                    details={"node_id": file.node_id, "status": response.status},
                )
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise OutputUnavailable(f"ComfyUI sends {file.filename!r} encoded, which was not asked for")
            known = content_type(file.filename)
            yield OutputStream(
                size_bytes=response.content_length,
                content_type=response.content_type if known == DEFAULT_CONTENT_TYPE else known,
                chunks=self._checked(response, file),
            )

    async def _checked(self, response: aiohttp.ClientResponse, file: OutputFile) -> AsyncIterator[bytes]:
        length = 0
        try:
            async for chunk in self._client.chunks(response):
                length += len(chunk)
                yield chunk
        except BackendUnclear as error:
            raise _short(file, length, response.content_length) from error
        if response.content_length not in {None, length}:
            raise _short(file, length, response.content_length)

    async def upload_input(self, filename: str, chunks: AsyncIterator[bytes]) -> str:
        """See `Backend.upload_input`."""
        if not _SAFE_NAME.fullmatch(filename):
            raise ValueError(f"{filename!r} is not a safe name for an input")
        source = _Source(chunks)
        # quoted fields would be stored percent-encoded (Q18)
        form = aiohttp.FormData(quote_fields=False)
        form.add_field("image", source.read(), filename=filename, content_type=DEFAULT_CONTENT_TYPE)
        try:
            async with self._client.exchange(
                "POST", self._client.url("/upload/image"), data=form
            ) as response:
                with self._client.translated("POST /upload/image"):
                    body = await response.content.read(_LONGEST_REFUSAL)
        except BackendUnclear:
            if source.error is not None:
                raise source.error from None  # it was not ComfyUI that broke off
            raise
        if response.status == 413:
            raise BackendRejected("The input is larger than ComfyUI accepts (its --max-upload-size)")
        stored = read_object(Answer(status=response.status, body=body), "POST /upload/image")
        name, subfolder = stored.get("name"), stored.get("subfolder")
        if not isinstance(name, str) or not name:
            raise BackendUnclear("ComfyUI took an upload without naming it")
        return f"{subfolder}/{name}" if isinstance(subfolder, str) and subfolder else name


class _Source:
    """What is uploaded. aiohttp reports an error in here as one of the connection: kept, to be told apart."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self.error: ComfydError | OSError | None = None

    async def read(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._chunks:
                yield chunk
        except (ComfydError, OSError) as error:
            self.error = error
            raise


def _short(file: OutputFile, length: int, announced: int | None) -> OutputUnavailable:
    return OutputUnavailable(
        f"ComfyUI broke off {file.filename!r} after {length} bytes",
        details={"node_id": file.node_id, "received": length, "announced": announced},
    )
