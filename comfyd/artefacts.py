"""Output files become artefacts: from ComfyUI to this machine's disk, and from there into a storage.

Never a whole file in memory, never a GPU run for a storage's sake: what is here waits for its storage.
"""

import asyncio
import contextlib
import hashlib
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import Final

import msgspec
import structlog

from comfyd import failpoints, media
from comfyd.clock import Clock
from comfyd.comfy.files import OutputStream
from comfyd.comfy.outputs import content_type
from comfyd.disk import Digest, digest_of, on_disk, write_stream
from comfyd.errors import (
    BackendUnclear,
    BackendUnreachable,
    MediaError,
    NotAccepted,
    OutputUnavailable,
    StorageError,
)
from comfyd.loops import Health
from comfyd.metrics import Metrics
from comfyd.scratch import Scratch
from comfyd.storage.base import LocalFile
from comfyd.storage.opening import Storages
from comfyd.tasks import Artefact, OutputFile, OutputOptions, OutputType, PictureFormat

log = structlog.get_logger("comfyd.artefacts")

SPOOLED_AT_ONCE: Final = 16
"""Files of all tasks that come from ComfyUI at the same time: after a restart hundreds may wait for that."""
SHAPED_AT_ONCE: Final = 2
"""Files that are converted or stripped at the same time: a picture lies in memory whole meanwhile."""
TRIES: Final = 5
"""How often a file is asked of a ComfyUI that answers without giving it."""
FIRST_PAUSE_MS: Final = 200
MOST_PAUSE_MS: Final = 5_000
STORAGE_PAUSE_MS: Final = 30_000
"""The longest pause between two tries at a storage."""
INLINE_TEXT: Final = 65_536
"""Characters of a text output that the task itself shows."""

_WHAT: Final = "cannot use data.dir"
_CONVERTIBLE: Final = frozenset(
    f"image/{kind}" for kind in ("png", "apng", "jpeg", "webp", "avif", "gif", "bmp", "tiff")
)

_TOLD_APART: Final = re.compile(r"-[0-9a-f]{8}$")

STORAGE: Final = "storage:"
"""What the names of storages begin with where `Health` says that results wait for one."""

Say = Callable[[str], None]
Source = Callable[[OutputFile], AbstractAsyncContextManager[OutputStream]]
"""Opens an output file where it is."""


def _nothing(_: str) -> None:
    """What is said where nobody listens."""


class _Ready(LocalFile, frozen=True, kw_only=True):
    """A finished file, and what it is known by as an asset."""

    blake3: str


class StoringTerms(msgspec.Struct, frozen=True, kw_only=True):
    """How long artefacts wait for a storage, and how much of them tasks show."""

    retry_ms: int
    """0 is 'no limit'."""
    inline_bytes: int


class ArtefactWriter:
    """Stores output files. Lives as long as the process and keeps nothing between files."""

    def __init__(
        self,
        storages: Storages,
        scratch: Scratch,
        health: Health,
        metrics: Metrics,
        clock: Clock,
        terms: StoringTerms,
    ) -> None:
        self._storages = storages
        self._scratch = scratch
        self._health = health
        self._metrics = metrics
        self._clock = clock
        self._terms = terms
        self.inline_bytes = terms.inline_bytes
        """Of the outputs of one attempt."""
        self._spooling = asyncio.Semaphore(SPOOLED_AT_ONCE)
        self._shaping = asyncio.Semaphore(SHAPED_AT_ONCE)
        self._waiting: dict[str, str] = {}

    async def write(
        self, path: str, file: OutputFile, options: OutputOptions, source: Source, say: Say = _nothing
    ) -> Artefact:
        """Store one file; `path` is what comes before its own part of the key, which is the same on a repeat.

        `say` is told what is being waited for.

        Waits while ComfyUI is down: its files outlive it. Waits while the storage fails, as long as is
        configured. Raises `OutputUnavailable`, `BackendUnclear`, `StorageError`, `MediaError`.
        """
        async with self._scratch.file() as raw, self._scratch.file() as made:
            local = spooled = await self._spooled(file, source, raw)
            if options.format is not None or options.strip:
                local = await self._shaped(spooled, file, options, made)
            facts = await asyncio.to_thread(media.facts, local.path, local.content_type)
            failpoints.reach("output.fetched")
            key = f"{path}/{_own_part(file, local.name)}"
            storage, location = await self._stored(options.storage or self._storages.default, key, local, say)
            small = options.inline and local.size_bytes <= self._terms.inline_bytes
            data = await on_disk(_WHAT, local.path.read_bytes) if small else None
            failpoints.reach("output.stored")
        self._metrics.stored(local.size_bytes)
        return Artefact(
            node_id=file.node_id,
            index=file.index,
            name=local.name,
            type=_type(file, local.content_type),
            content_type=local.content_type,
            size_bytes=local.size_bytes,
            sha256=local.sha256,
            blake3=local.blake3,
            key=key,
            storage=storage,
            location=location,
            width=facts.width,
            height=facts.height,
            duration=facts.duration,
            text=file.text if file.text is not None and len(file.text) <= INLINE_TEXT else None,
            data=data,
        )

    async def forget(
        self,
        path: str,
        files: Sequence[OutputFile],
        options: OutputOptions,
        kept: Sequence[OutputFile] = (),
    ) -> None:
        """Delete what there may be of these files, but nothing that may be one of those that are kept."""
        storages = {options.storage or self._storages.default, self._storages.fallback}
        keys = _keys(path, files, options) - _keys(path, kept, options)
        await self._storages.delete([(storage, key) for storage in storages for key in sorted(keys)])

    async def _spooled(self, file: OutputFile, source: Source, raw: Path) -> _Ready:
        """Bring the file from where it is to `raw`."""
        pause, tried, since = FIRST_PAUSE_MS, 0, self._clock.monotonic()
        while True:
            try:
                async with self._spooling, source(file) as stream:
                    digest = await write_stream(_WHAT, raw, stream.chunks, md5=True, blake3=True)
                if digest.size_bytes == 0 and file.text is None:
                    raise OutputUnavailable(f"ComfyUI serves {file.filename} empty")
                name = PurePosixPath(file.filename).name
                media_type = stream.content_type
                if file.text is None:
                    media_type = await asyncio.to_thread(_true_type, raw, name, media_type)
                    if not await on_disk(_WHAT, media.is_whole, raw):
                        raise OutputUnavailable(f"ComfyUI serves {file.filename} cut short")
                return _ready(raw, digest, media_type, name)
            except BackendUnreachable as exc:
                log.info("artefact.waits", file=file.filename, reason=exc.message)
            except StorageError as exc:  # this machine's own disk
                self._refuse_patience(exc, since)
                log.warning("artefact.waits", file=file.filename, reason=exc.message)
            except (OutputUnavailable, BackendUnclear) as exc:
                tried += 1
                if tried == TRIES or (
                    isinstance(exc, OutputUnavailable) and exc.details.get("status") == 404
                ):
                    raise
                log.info("artefact.again", file=file.filename, reason=exc.message, tried=tried)
            await asyncio.to_thread(raw.unlink, missing_ok=True)
            await self._clock.sleep(pause)
            pause = min(pause * 2, MOST_PAUSE_MS)

    async def _shaped(self, spooled: _Ready, file: OutputFile, options: OutputOptions, made: Path) -> _Ready:
        """The file as the client wants it; waits while this machine's own disk fails."""
        pause, since = FIRST_PAUSE_MS, self._clock.monotonic()
        while True:
            try:
                async with self._shaping:
                    return await _shaped_on_a_thread(spooled, file, options, made)
            except StorageError as exc:
                self._refuse_patience(exc, since)
                log.warning("artefact.waits", file=file.filename, reason=exc.message)
            await self._clock.sleep(pause)
            pause = min(pause * 2, MOST_PAUSE_MS)

    async def _stored(self, name: str, key: str, file: LocalFile, say: Say) -> tuple[str, str | None]:
        """Put the file where it belongs, however long that takes; the storage that took it, and its word."""
        try:
            return await self._put(name, key, file, say)
        except asyncio.CancelledError:
            sick = self._waiting.pop(key, None)
            if sick is not None and sick not in self._waiting.values():  # nobody would see it get well
                self._health.well(f"{STORAGE}{sick}")
            raise
        finally:
            self._waiting.pop(key, None)

    async def _put(self, name: str, key: str, file: LocalFile, say: Say) -> tuple[str, str | None]:
        pause, since = FIRST_PAUSE_MS, self._clock.monotonic()
        while True:
            try:
                location = await (await self._storages.get(name)).put(key, file)
            except NotAccepted as exc:
                if self._waiting.pop(key, None) is not None:  # it answers again
                    self._health.well(f"{STORAGE}{name}")
                if name == self._storages.fallback:
                    raise
                log.info("artefact.falls_back", key=key, storage=name, reason=exc.message)
                name = self._storages.fallback
                continue
            except StorageError as exc:
                self._waiting[key] = name
                self._health.sick(f"{STORAGE}{name}", exc.message)
                say(f"waits for storage {name}: {exc.message}")
                self._metrics.storage_failed(name)
                self._refuse_patience(exc, since)
                log.warning("artefact.waits", key=key, storage=name, reason=exc.message)
            else:
                self._health.well(f"{STORAGE}{name}")
                return name, location
            await self._clock.sleep(round(pause * (0.5 + self._clock.jitter() / 2)))
            pause = min(pause * 2, STORAGE_PAUSE_MS)

    def _refuse_patience(self, error: StorageError, since: int) -> None:
        """Raise the error when it has lasted too long. Another run would only bring the same file here."""
        if self._terms.retry_ms and self._clock.monotonic() - since >= self._terms.retry_ms:
            error.retryable = False
            raise error


@asynccontextmanager
async def from_memory(data: bytes, media_type: str) -> AsyncIterator[OutputStream]:
    """Bytes that are here already, as a source opens them."""

    async def chunks() -> AsyncIterator[bytes]:
        yield data

    yield OutputStream(size_bytes=len(data), content_type=media_type, chunks=chunks())


def text_source(file: OutputFile) -> AbstractAsyncContextManager[OutputStream]:
    """The source of a text output."""
    return from_memory((file.text or "").encode(), content_type(file.filename))


async def _shaped_on_a_thread(local: _Ready, file: OutputFile, options: OutputOptions, made: Path) -> _Ready:
    """See `_shaped`. Canceled it does not wait for the thread, which then deletes what it still makes."""
    dropped = threading.Event()

    def work() -> _Ready:
        try:
            return _shaped(local, file, options, made)
        except OSError as exc:
            raise StorageError(f"{_WHAT}: {exc.strerror or exc}") from exc
        finally:
            if dropped.is_set():
                made.unlink(missing_ok=True)

    try:
        return await _on_a_daemon(work)
    except asyncio.CancelledError:
        dropped.set()
        raise


async def _on_a_daemon(work: Callable[[], _Ready]) -> _Ready:
    """Run this on a thread that does not hold up the end of the process: an encoder cannot be stopped."""
    loop = asyncio.get_running_loop()
    made: asyncio.Future[_Ready] = loop.create_future()

    def tell(result: _Ready | None, error: BaseException | None) -> None:
        if made.done():  # canceled meanwhile
            return
        if error is not None:
            made.set_exception(error)
        elif result is not None:
            made.set_result(result)

    def run() -> None:
        result, failed = None, None
        try:
            result = work()
        except BaseException as exc:  # noqa: BLE001 - raised again where it is waited for
            failed = exc
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, result, failed)

    threading.Thread(target=run, name="comfyd-shaping", daemon=True).start()
    return await made


def _shaped(local: _Ready, file: OutputFile, options: OutputOptions, made: Path) -> _Ready:
    """The file as the client wants it: itself, or another one at `made`. `MediaError`; for a thread."""
    if file.text is not None:
        return local
    wanted = options.format
    if (
        wanted is not None
        and local.content_type in _CONVERTIBLE
        and media.convert(local.path, made, wanted, options.quality)
    ):
        # Nothing but the picture is taken over, so there is nothing to strip.
        name = _renamed(local.name, wanted)
        return _ready(made, _digest(made), f"image/{wanted}", name)
    if options.strip and media.strip(local.path, made):
        return _ready(made, _digest(made), local.content_type, local.name)
    return local


def _type(file: OutputFile, media_type: str) -> OutputType:
    """What it is in the words of the API: by its name, and by its content where that says otherwise."""
    major = media_type.partition("/")[0]
    if file.text is None and major in {"image", "video", "audio"}:
        return OutputType(major)
    shown = {OutputType.IMAGE, OutputType.VIDEO, OutputType.AUDIO}
    return OutputType.FILE if file.type in shown else file.type


def _true_type(path: Path, name: str, named: str) -> str:
    """The media type by the name, unless the content is of another kind altogether; for a thread."""
    try:
        found = media.sniff(path, name)
    except MediaError:
        return named
    # the frames of an mp3 begin like much else: its word counts less than a name's
    other = found.kind in {"image", "video"} and found.kind != named.partition("/")[0]
    return found.content_type if other or found.content_type == "text/html" else named


def _digest(path: Path) -> Digest:
    return digest_of(path, md5=True, blake3=True)


def _ready(path: Path, digest: Digest, media_type: str, name: str) -> _Ready:
    return _Ready(
        path=path,
        size_bytes=digest.size_bytes,
        sha256=digest.sha256,
        md5=digest.md5 or "",
        blake3=digest.blake3 or "",
        content_type=media_type,
        name=name,
    )


def _renamed(name: str, wanted: PictureFormat) -> str:
    """The name with the extension of what it has become."""
    extension = "jpg" if wanted == "jpeg" else wanted
    return f"{PurePosixPath(name).stem}.{extension}"


def _names(file: OutputFile, options: OutputOptions) -> Iterator[str]:
    """What the file may be called once it is stored. What it is, and not its name, made it a picture."""
    name = PurePosixPath(file.filename).name
    yield name
    if options.format is not None and file.text is None:
        yield _renamed(name, options.format)


def _keys(path: str, files: Sequence[OutputFile], options: OutputOptions) -> set[str]:
    """All keys that these may have been given."""
    return {f"{path}/{_own_part(file, name)}" for file in files for name in _names(file, options)}


def _own_part(file: OutputFile, name: str) -> str:
    """`node_index_name`, in safe ASCII: what ComfyUI calls a file is data, never a path."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-120:].lstrip(".") or "file"
    node = re.sub(r"[^A-Za-z0-9-]+", "-", file.node_id)[:60]
    # What was lost may be all that tells two nodes apart; and nobody else may look as if something was.
    if node != file.node_id or _TOLD_APART.search(node):
        node = f"{node}-{hashlib.sha256(file.node_id.encode()).hexdigest()[:8]}"
    return f"{node}_{file.index}_{safe}"
