"""Uploads themselves: what is taken in, found again and forgotten; never how it lies on the disk."""

import asyncio
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Final

import msgspec
import structlog

from comfyd.clock import Clock
from comfyd.config import InputsConfig
from comfyd.disk import BLOCK, on_disk, opened, write_stream
from comfyd.errors import ComfydError, InputTooLarge, MediaError, UnsupportedContent
from comfyd.media import Kind, Sniffed, sniff
from comfyd.uploads.data_uris import DataUri
from comfyd.uploads.folder import FILE, Folder, not_found, there

log = structlog.get_logger("comfyd.uploads")

REFERENCE: Final = rf"upload:({FILE.pattern})"
"""What an input value that names an upload looks like; the group is the upload's file."""

_WHAT: Final = "cannot use the uploads below data.dir"
_REFERENCE: Final = re.compile(REFERENCE)

Sniff = Callable[[Path, str | None], Sniffed]
"""Says by its content what a file is; a name only helps where the content says nothing. Runs on a thread."""
Unused = Callable[[Sequence[str]], Awaitable[Sequence[str]]]
"""Those of these files that no task and no asset names."""


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """A file that a task may use."""

    reference: str
    """The input value that names it, in the form of `REFERENCE`."""
    sha256: str
    file: str
    """The safe name, `sha256.extension`; a given name only decides between kinds that look the same."""
    content_type: str
    kind: Kind
    size_bytes: int
    width: int | None
    height: int | None


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """A whole file that is no upload yet. Lives as long as the block of `Uploads.receive`."""

    path: Path
    upload: Upload
    """What it is once it is kept."""
    blake3: str
    """Of its bytes, hexadecimal."""
    known: bool
    """Whether there was an upload of this content already."""


def parse_reference(text: str) -> str | None:
    """The file that an input value refers to, whether there is one or not; None for any other value."""
    found = _REFERENCE.fullmatch(text)
    return found[1] if found else None


class Uploads:
    """The folder of uploads. Made by `open_uploads`; lives as long as the process, which has it for itself.

    A file's modification time says when it was last of use. Where the disk fails, verbs raise `StorageError`
    of which `DiskFull` is one.
    """

    def __init__(self, folder: Folder, config: InputsConfig, look: Sniff) -> None:
        self._folder = folder
        self._config = config
        self._look = look
        self._held: Counter[str] = Counter()
        # Between the look at whether a file is of use and its deletion nobody may come to rely on it.
        self._forgetting = asyncio.Lock()

    async def add(self, chunks: AsyncIterator[bytes], name: str | None = None) -> Upload:
        """Take a file whole or not at all; the same content twice is one file. Raises as `receive` does."""
        async with self.receive(chunks, name) as received:
            return await self.keep(received)

    async def add_data_uri(self, text: str) -> Upload:
        """Take the file inside a data URI whole or not at all. Raises as `receive_data_uri` does."""
        async with self.receive_data_uri(text) as received:
            return await self.keep(received)

    @asynccontextmanager
    async def receive(self, chunks: AsyncIterator[bytes], name: str | None = None) -> AsyncIterator[Received]:
        """A file on the disk that the end of the block deletes, unless it was kept before.

        Raises `InputTooLarge` as soon as there are too many bytes, or for a picture of too many pixels, and
        `UnsupportedContent` for an empty file.
        """
        unfinished = self._folder.unfinished()
        try:
            digest = await write_stream(_WHAT, unfinished, self._limited(chunks), sync=True, blake3=True)
            if digest.size_bytes == 0:
                raise UnsupportedContent("the file is empty")
            looked = await on_disk(_WHAT, self._look, unfinished, name)
            if looked.width and looked.height and looked.width * looked.height > self._config.pixels:
                raise too_many_pixels(looked.width, looked.height, self._config.pixels)
            file = f"{digest.sha256}.{looked.extension}"
            known = await on_disk(_WHAT, self.path(file).exists)
            upload = _upload(file, digest.size_bytes, looked)
            yield Received(path=unfinished, upload=upload, blake3=digest.blake3 or "", known=known)
        finally:
            await on_disk(_WHAT, unfinished.unlink, missing_ok=True)

    @asynccontextmanager
    async def receive_data_uri(self, text: str) -> AsyncIterator[Received]:
        """The same with the file inside a data URI in base64; the type that it announces is not believed.

        Raises `InvalidDataUri`, and what `receive` raises.
        """
        uri = DataUri(text)
        self.check_size(uri.least_bytes)
        async with self.receive(uri.chunks()) as received:
            yield received

    def check_size(self, size_bytes: int) -> None:
        """Raise `InputTooLarge` for a file that is known to have more bytes than may be taken in."""
        if size_bytes > self._config.max_bytes:
            raise too_large(self._config.max_bytes)

    async def keep(self, received: Received) -> Upload:
        """Make it an upload, in place of one of the same content; it is durable when this returns."""
        await on_disk(_WHAT, self._folder.place, received.path, received.upload.file)
        return received.upload

    @asynccontextmanager
    async def keeping(self, received: Received, unused: Unused) -> AsyncIterator[Upload]:
        """Make it an upload, for a block that makes what names it. If nothing does, it is forgotten again.

        One that was there before stays in any case.
        """
        try:
            async with self.hold(received.upload.reference):
                yield await self.keep(received)
        finally:
            if not received.known:
                try:
                    await self.forget([received.upload.file], unused)
                except ComfydError as exc:  # something may name it by now; the sweep comes by later
                    log.warning("upload.left", files=[received.upload.file], reason=exc.message)

    async def is_there(self, file: str) -> bool:
        """Whether there is an upload under this name; only whoever holds it can rely on that."""
        return FILE.fullmatch(file) is not None and await on_disk(_WHAT, self.path(file).exists)

    @asynccontextmanager
    async def open(
        self, file: str, start: int = 0, length: int | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes of an upload: `length` of them from `start`, within the block, even if it is forgotten.

        Entering it raises `InputNotFound`.
        """
        path = self.path(file)

        def existing() -> IO[bytes]:
            with there(file):
                return path.open("rb")

        async with opened(_WHAT, existing) as held:
            held.seek(start)
            yield _read(held, length)

    async def find(self, reference: str) -> Upload:
        """The upload of a reference, which from now counts as just used. Raises `InputNotFound`."""
        file = parse_reference(reference)
        if file is None:
            raise not_found(reference)

        def found() -> Upload:
            with there(file):
                size = self._folder.used(file)
                try:
                    looked = self._look(self.path(file), file)
                except MediaError:  # forgotten just now: whoever wants to be sure holds it
                    raise not_found(reference) from None
            return _upload(file, size, looked)

        return await on_disk(_WHAT, found)

    def path(self, file: str) -> Path:
        """Where an upload lies, whether it is there or not. Raises `InputNotFound` for no upload's name."""
        return self._folder.path(file)

    @asynccontextmanager
    async def hold(self, reference: str) -> AsyncIterator[None]:
        """Within the block nobody forgets the upload, whether it is there already or not.

        For whoever is about to make a task that names it. Raises `InputNotFound` for no reference.
        """
        file = parse_reference(reference)
        if file is None:
            raise not_found(reference)
        async with self._forgetting:
            self._held[file] += 1
        try:
            yield
        finally:
            self._held[file] -= 1
            self._held += Counter()  # keeps what is above zero

    async def forget(self, files: Iterable[str], unused: Unused) -> int:
        """Delete those of these files that nothing names and nobody holds; how many went."""
        async with self._forgetting:
            free = await self._free(files, unused)
            return await on_disk(_WHAT, self._folder.delete, free, sys.maxsize)

    async def sweep(self, unused: Unused, limit: int) -> int:
        """Forget what was of no use for `inputs.keep` seconds, the longest idle ones first; how many went.

        Looks at no more than `limit` files. One that is named counts as just used, so that it does not
        stand before the others the next time.
        """
        async with self._forgetting:
            latest, files = await on_disk(_WHAT, self._folder.idle, int(self._config.keep * 1000), limit)
            free = await self._free(files, unused)
            await on_disk(_WHAT, self._folder.touch, set(files) - set(free))
            return await on_disk(_WHAT, self._folder.delete, free, latest)

    async def _free(self, files: Iterable[str], unused: Unused) -> Sequence[str]:
        free = [file for file in files if file not in self._held]
        return await unused(free) if free else ()

    async def _limited(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The chunks, as long as there are not too many bytes."""
        size = 0
        async for chunk in chunks:
            size += len(chunk)
            if size > self._config.max_bytes:
                raise too_large(self._config.max_bytes)
            yield chunk


@asynccontextmanager
async def open_uploads(
    folder: Path, config: InputsConfig, clock: Clock, look: Sniff = sniff
) -> AsyncIterator[Uploads]:
    """Open the folder, and forget what an earlier process had not finished. Raises `StorageError`."""
    made = Folder(folder, clock)
    await on_disk(_WHAT, made.prepare)
    yield Uploads(made, config, look)


async def _read(file: IO[bytes], length: int | None) -> AsyncIterator[bytes]:
    left = sys.maxsize if length is None else length
    while left > 0 and (block := await on_disk(_WHAT, file.read, min(BLOCK, left))):
        left -= len(block)
        yield block


def too_large(limit: int) -> InputTooLarge:
    """The error that names the limit."""
    message = f"the file is larger than the {limit} bytes that inputs.max_bytes allows"
    return InputTooLarge(message, details={"limit": limit})


def too_many_pixels(width: int, height: int, limit: int) -> InputTooLarge:
    """The error that names the limit."""
    message = f"the picture has {width} x {height} pixels, more than the {limit} that inputs.pixels allows"
    return InputTooLarge(message, details={"limit": limit, "width": width, "height": height})


def _upload(file: str, size: int, looked: Sniffed) -> Upload:
    return Upload(
        reference=f"upload:{file}",
        sha256=file.partition(".")[0],
        file=file,
        content_type=looked.content_type,
        kind=looked.kind,
        size_bytes=size,
        width=looked.width,
        height=looked.height,
    )
