"""Output files become artefacts: streamed from ComfyUI into the storage; never a whole file in memory."""

import asyncio
import hashlib
import io
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import PurePosixPath
from typing import Final

import imagesize
import structlog

from comfyd.clock import Clock
from comfyd.comfy.files import OutputStream
from comfyd.comfy.outputs import content_type
from comfyd.errors import BackendUnclear, BackendUnreachable, OutputUnavailable, StorageError
from comfyd.metrics import Metrics
from comfyd.storage.base import Storage
from comfyd.tasks import Artefact, OutputFile, OutputType

log = structlog.get_logger("comfyd.artefacts")

AT_ONCE: Final = 4
"""Files of one task that are transferred at the same time."""
TRIES: Final = 5
FIRST_PAUSE_MS: Final = 200
MOST_PAUSE_MS: Final = 5_000
HEAD_BYTES: Final = 1 << 18
"""How much of a picture is kept to read its size from."""
INLINE_TEXT: Final = 65_536
"""Characters of a text output that the task itself shows."""

Source = Callable[[OutputFile], AbstractAsyncContextManager[OutputStream]]
"""Opens an output file where it is."""


class ArtefactWriter:
    """Stores the outputs of attempts. Lives as long as the process."""

    def __init__(self, storage: Storage, metrics: Metrics, clock: Clock) -> None:
        self._storage = storage
        self._metrics = metrics
        self._clock = clock

    async def write(
        self, task_id: str, number: int, files: Sequence[OutputFile], source: Source
    ) -> tuple[Artefact, ...]:
        """Store all files of attempt `number`, or none. The keys are the same on a repeat.

        Waits while ComfyUI is down: its files outlive it. Raises `OutputUnavailable`, `BackendUnclear` or
        `StorageError` when a file could not be had after several tries.
        """
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(file: OutputFile) -> Artefact:
            async with gate:
                return await self._persistently(file, _key(task_id, number, file), source)

        try:
            async with asyncio.TaskGroup() as group:
                waiting = [group.create_task(one(file)) for file in files]
        except ExceptionGroup as failed:
            await self.forget(task_id, number, files)
            raise failed.exceptions[0] from None
        return tuple(task.result() for task in waiting)

    async def forget(self, task_id: str, number: int, files: Sequence[OutputFile]) -> None:
        """Delete what there is of these files."""
        await forget(self._storage, [_key(task_id, number, file) for file in files])

    async def _persistently(self, file: OutputFile, key: str, source: Source) -> Artefact:
        pause, tried = FIRST_PAUSE_MS, 0
        while True:
            try:
                return await self._once(file, key, source)
            except BackendUnreachable as exc:
                log.info("artefact.waits", key=key, reason=exc.message)
            except (OutputUnavailable, BackendUnclear, StorageError) as exc:
                tried += 1
                if tried == TRIES or (
                    isinstance(exc, OutputUnavailable) and exc.details.get("status") == 404
                ):
                    raise
                log.info("artefact.again", key=key, reason=exc.message, tried=tried)
            await self._clock.sleep(pause)
            pause = min(pause * 2, MOST_PAUSE_MS)

    async def _once(self, file: OutputFile, key: str, source: Source) -> Artefact:
        head = bytearray()
        async with source(file) as stream:
            stored = await self._storage.put(key, _tee(stream.chunks, head), stream.content_type)
            if stored.size_bytes == 0 and file.text is None:
                await self._storage.delete(key)
                raise OutputUnavailable(f"ComfyUI serves {file.filename} empty")
        self._metrics.stored(stored.size_bytes)
        width, height = _dimensions(bytes(head)) if file.type is OutputType.IMAGE else (None, None)
        return Artefact(
            node_id=file.node_id,
            index=file.index,
            name=PurePosixPath(file.filename).name,
            type=file.type,
            content_type=stream.content_type,
            size_bytes=stored.size_bytes,
            sha256=stored.sha256,
            key=key,
            storage=self._storage.name,
            width=width,
            height=height,
            text=file.text if file.text is not None and len(file.text) <= INLINE_TEXT else None,
        )


async def forget(storage: Storage, keys: Sequence[str]) -> None:
    """Delete files that no row names any more. One that stays must not hold up what was decided."""
    for key in keys:
        try:
            await storage.delete(key)
        except StorageError as exc:
            log.warning("file.left", key=key, reason=exc.message)


@asynccontextmanager
async def from_memory(data: bytes, media_type: str) -> AsyncIterator[OutputStream]:
    """Bytes that are here already, as a source opens them."""

    async def chunks() -> AsyncIterator[bytes]:
        yield data

    yield OutputStream(size_bytes=len(data), content_type=media_type, chunks=chunks())


def text_source(file: OutputFile) -> AbstractAsyncContextManager[OutputStream]:
    """The source of a text output."""
    return from_memory((file.text or "").encode(), content_type(file.filename))


def _key(task_id: str, number: int, file: OutputFile) -> str:
    """`task/attempt/node_index_name`, in safe ASCII: what ComfyUI calls a file is data, never a path."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", PurePosixPath(file.filename).name)[-120:].lstrip(".") or "file"
    node = re.sub(r"[^A-Za-z0-9-]+", "-", file.node_id)[:60]
    if node != file.node_id:  # what was lost may be all that tells two nodes apart
        node = f"{node}-{hashlib.sha256(file.node_id.encode()).hexdigest()[:8]}"
    return f"{task_id}/{number}/{node}_{file.index}_{name}"


async def _tee(chunks: AsyncIterator[bytes], head: bytearray) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        if len(head) < HEAD_BYTES:
            head += chunk[: HEAD_BYTES - len(head)]
        yield chunk


def _dimensions(head: bytes) -> tuple[int | None, int | None]:
    """Width and height in pixels, from a picture's first bytes; None where it is of an unknown kind."""
    width, height = imagesize.get(io.BytesIO(head), exif_rotation=False)
    return (int(width), int(height)) if width > 0 and height > 0 else (None, None)
