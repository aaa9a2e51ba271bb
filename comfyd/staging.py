"""The files that a graph names by url or reference are brought to ComfyUI; never runs the graph.

First everything comes to this machine, before a slot is taken; then it goes to the ComfyUI that runs it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Self

import msgspec
import structlog

from comfyd import graphs, media
from comfyd.comfy.backend import Backend
from comfyd.config import InputsConfig
from comfyd.disk import read_blocks
from comfyd.errors import BackendUnclear, InputError, InputTooLarge, UnsupportedContent
from comfyd.fetch import Fetcher
from comfyd.metrics import Metrics
from comfyd.scratch import Scratch
from comfyd.tasks import Graph
from comfyd.uploads import Upload, Uploads

log = structlog.get_logger("comfyd.staging")


class Staged(msgspec.Struct, frozen=True, kw_only=True):
    """A file that is here: where, what it is, and what ComfyUI is to call it."""

    path: Path
    name: str
    kind: str
    content_type: str


class Stager:
    """Makes stagings. Lives as long as the process and keeps nothing between them."""

    def __init__(
        self, fetcher: Fetcher, uploads: Uploads, scratch: Scratch, metrics: Metrics, config: InputsConfig
    ) -> None:
        self._fetcher = fetcher
        self._uploads = uploads
        self._scratch = scratch
        self._metrics = metrics
        self._config = config

    @asynccontextmanager
    async def staging(self, graph: Graph, object_info: Mapping[str, Any] | None) -> AsyncIterator["Staging"]:
        """The files of one graph; what was fetched for it is gone when the block ends."""
        async with AsyncExitStack() as stack:
            yield Staging(self, graph, object_info, stack)

    async def bring(self, source: str, stack: AsyncExitStack) -> Staged:
        """One file, to this machine. Raises `InputError`."""
        kind = source[:7].lower()
        if not kind.startswith(("data:", "upload:")):
            return await self._fetched(source, await stack.enter_async_context(self._scratch.file()))
        upload = await self._uploaded(source, stack)
        return Staged(
            path=self._uploads.path(upload.file),
            name=upload.file,
            kind=upload.kind,
            content_type=upload.content_type,
        )

    async def _uploaded(self, source: str, stack: AsyncExitStack) -> Upload:
        """The upload, held until the stack ends: it may go with the last task that names it."""
        if source[:5].lower() != "data:":
            await stack.enter_async_context(self._uploads.hold(source))
            return await self._uploads.find(source)
        async with self._uploads.receive_data_uri(source) as received:
            await stack.enter_async_context(self._uploads.hold(received.upload.reference))
            return await self._uploads.keep(received)

    async def _fetched(self, url: str, target: Path) -> Staged:
        fetched = await self._fetcher.fetch(url, target)
        self._metrics.fetched(fetched.size_bytes)
        if not fetched.size_bytes:
            raise UnsupportedContent("the file is empty")
        found = await asyncio.to_thread(media.sniff, target, fetched.name)
        check_pixels(found.width, found.height, self._config.pixels)
        return Staged(
            path=target,
            name=f"{fetched.sha256}.{found.extension}",
            kind=found.kind,
            content_type=found.content_type,
        )

    @property
    def at_once(self) -> int:
        """How many files of one task are fetched at the same time."""
        return self._config.at_once


class Staging:
    """The remote files of one graph. Made by `Stager.staging`, ends with its block."""

    def __init__(
        self, stager: Stager, graph: Graph, object_info: Mapping[str, Any] | None, stack: AsyncExitStack
    ) -> None:
        self._stager = stager
        self._graph = graph
        self._inputs = graphs.remote_inputs(graph, object_info)
        self._references = graphs.references(graph)
        self._guessed = object_info is None and graphs.remote_values(graph)
        self._stack = stack
        self._files: dict[str, Staged] = {}
        self._names: dict[tuple[str, str | None], dict[str, str]] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to bring, or may be: some classes are known to ComfyUI alone."""
        return bool(self._inputs) or bool(self._references) or self._guessed

    async def fetch(self) -> Self:
        """Bring every file to this machine, each source once. Raises `InputError` that names the input."""
        users: dict[str, graphs.FileInput | graphs.Address] = {**self._references}
        users |= {wanted.value.strip(): wanted for wanted in reversed(self._inputs)}
        missing = {source: wanted for source, wanted in users.items() if source not in self._files}
        if missing:
            await self._bring(missing)
        for wanted in self._inputs:
            staged = self._files[wanted.value.strip()]
            graphs.check_kind(wanted, staged.kind, staged.content_type)
        return self

    async def _bring(self, users: Mapping[str, graphs.FileInput | graphs.Address]) -> None:
        gate = asyncio.Semaphore(self._stager.at_once)

        async def one(source: str) -> None:
            async with gate:
                self._files[source] = await self._stager.bring(source, self._stack)

        work = {source: asyncio.ensure_future(one(source)) for source in users}
        try:
            await asyncio.wait(work.values(), return_when=asyncio.FIRST_EXCEPTION)
            for source, task in work.items():
                if task.done() and (error := task.exception()) is not None:
                    raise _naming(error, users[source]) from None
        finally:
            for task in work.values():
                task.cancel()
            await asyncio.gather(*work.values(), return_exceptions=True)

    async def deliver(self, backend: Backend) -> Graph:
        """Give every file to this ComfyUI, each once; the graph with the names that it has there.

        Raises `BackendError`; and `InputError` where only this ComfyUI could tell that an input takes a file.
        """
        if self._guessed:
            await self._ask(backend)
        # One that was started anew since may have lost its files, and has another connection.
        names = self._names.setdefault((backend.name, backend.client_id), {})
        for staged in self._files.values():
            if staged.name not in names:
                names[staged.name] = await _given(staged, backend)
        graph = self._graph
        for wanted in self._inputs:
            address = graphs.Address(node_id=wanted.node_id, name=wanted.name)
            graph = graphs.set_input(graph, address, names[self._files[wanted.value.strip()].name])
        given = {reference: names[self._files[reference].name] for reference in self._references}
        return graphs.replace_texts(graph, given) if given else graph

    async def _ask(self, backend: Backend) -> None:
        """Learn which inputs take files. One that cannot tell is given what is known without it."""
        with contextlib.suppress(BackendUnclear):
            self._inputs = graphs.remote_inputs(self._graph, await backend.object_info())
            self._guessed = False
        await self.fetch()


def check_pixels(width: int | None, height: int | None, most: int) -> None:
    """Raise `InputTooLarge` for a picture that would fill the memory of whoever opens it."""
    if width is not None and height is not None and width * height > most:
        raise InputTooLarge(
            f"a picture of {width} x {height} pixels is larger than the {most} that inputs.pixels allows",
            details={"width": width, "height": height, "limit": most},
        )


async def _given(staged: Staged, backend: Backend) -> str:
    """The name of the file there. Repeated once: then a ComfyUI that went away is seen to be away."""
    try:
        return await backend.upload_input(staged.name, read_blocks("cannot read an input", staged.path))
    except BackendUnclear:
        return await backend.upload_input(staged.name, read_blocks("cannot read an input", staged.path))


def _naming(error: BaseException, wanted: graphs.FileInput | graphs.Address) -> BaseException:
    """The error, with the input whose file it is."""
    if isinstance(error, InputError):
        error.details.setdefault("input", f"{wanted.node_id}.{wanted.name}")
    return error
