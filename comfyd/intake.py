"""What a request asks to run is held against what the ComfyUIs can do, and its files against their inputs.

Never fetches a url: what a request is refused for is what it says, and what the files are that it brings.
"""

import asyncio
import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

import msgspec
import structlog

from comfyd import graphs
from comfyd.clock import Clock
from comfyd.comfy.backend import Backend
from comfyd.errors import BackendError, ComfydError, InputError, InvalidWorkflow
from comfyd.guard import Guard
from comfyd.store.base import Store
from comfyd.tasks import Graph, JsonObject
from comfyd.uploads import Received, Upload, Uploads, parse_reference

log = structlog.get_logger("comfyd.intake")

REFRESH_MS: Final = 5_000
"""How long what a ComfyUI said of its classes is believed before a refusal makes it be asked again."""
ASK_SECONDS: Final = 5.0
"""How long a ComfyUI may keep a client waiting with its classes: then the task is taken unchecked."""


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """A graph whose files were looked at. The data URIs in it have become references of uploads."""

    graph: Graph
    needed_nodes: int
    """How many of its nodes will run."""
    remote: frozenset[tuple[str, str]] = frozenset()
    """The inputs (node id, name) whose files are to be brought."""
    files: tuple[str, ...] = ()
    """The uploads that the graph names."""
    received: tuple[Received, ...] = ()
    """Those that came with the request itself, and are not kept yet."""
    references: dict[str, str] = {}
    """Data URI -> the reference that stands in its place."""
    judged: bool = True
    """Whether it was known which inputs take files: then a data URI that is still in the graph is a text."""

    def named(self, inputs: JsonObject | None) -> JsonObject | None:
        """The values that a client gave, with references in place of data URIs."""
        if not inputs or not self.references:
            return inputs
        return {name: self._named(value) for name, value in inputs.items()}

    def _named(self, value: Any) -> Any:
        inner = value.get("__value__") if isinstance(value, dict) else value
        return self.references.get(inner.strip(), value) if isinstance(inner, str) else value


class GraphChecker:
    """Holds graphs against what the ComfyUIs can do. Lives as long as the process."""

    def __init__(self, backends: Sequence[Backend], clock: Clock, patience: float = ASK_SECONDS) -> None:
        self._backends = backends
        self._patience = patience
        self._clock = clock
        self._refreshed: dict[str, int] = {}

    async def known_classes(self) -> Mapping[str, Any] | None:
        """What the first ComfyUI that answers says of its classes; None while none does."""
        for backend in self._backends:
            with contextlib.suppress(BackendError, TimeoutError):
                async with asyncio.timeout(self._patience):
                    return await backend.object_info()
        return None

    async def needed_nodes(self, graph: Graph, remote: Container[tuple[str, str]] = ()) -> int:
        """How many of the graph's nodes will run. A graph is right if one ComfyUI can run it.

        `remote` are the inputs whose files are still to be brought. While no ComfyUI answers nothing can be
        said, and the task is to wait: all nodes count. Raises `InvalidWorkflow`.
        """
        refusal: InvalidWorkflow | None = None
        for backend in self._backends:
            try:
                async with asyncio.timeout(self._patience):
                    return await self._needed_on(backend, graph, remote)
            except (BackendError, TimeoutError):
                continue
            except InvalidWorkflow as exc:
                refusal = refusal or exc
        if refusal is not None:
            raise refusal
        return len(graph)

    async def _needed_on(self, backend: Backend, graph: Graph, remote: Container[tuple[str, str]]) -> int:
        """The same for one ComfyUI. Before a refusal it is asked anew: a model may be new there."""
        replaceable = await backend.replaceable_classes()
        known = await backend.object_info()
        try:
            graphs.check_against(graph, known, replaceable=replaceable, remote=remote)
        except InvalidWorkflow:
            now, asked = self._clock.monotonic(), self._refreshed.get(backend.name)
            if asked is not None and now - asked < REFRESH_MS:
                raise
            self._refreshed[backend.name] = now
            known = await backend.object_info(refresh=True)
            graphs.check_against(graph, known, replaceable=replaceable, remote=remote)
        return len(graphs.executable_nodes(graph, known))


class Intake:
    """Looks at graphs and their files. Lives as long as the process and keeps nothing between requests."""

    def __init__(self, checker: GraphChecker, guard: Guard, uploads: Uploads, store: Store) -> None:
        self._checker = checker
        self._guard = guard
        self._uploads = uploads
        self._store = store

    async def take(self, graph: Graph, stack: AsyncExitStack) -> Taken:
        """Look at a graph and at every file that it names. What it brings is on the disk until `stack` ends.

        Raises `InvalidWorkflow`, and `InputError` whose `details["input"]` names the input.
        """
        found: list[graphs.FileInput] = []
        judged = True
        if graphs.remote_values(graph):
            known = await self._checker.known_classes()
            found, judged = graphs.remote_inputs(graph, known), known is not None
        received: dict[str, Received] = {}
        files: dict[str, None] = {}
        for wanted in found:
            try:
                upload = await self._looked_at(wanted, received, stack)
            except InputError as exc:
                exc.details.setdefault("input", f"{wanted.node_id}.{wanted.name}")
                raise
            if upload is not None:
                files[upload.file] = None
                address = graphs.Address(node_id=wanted.node_id, name=wanted.name)
                graph = graphs.set_input(graph, address, upload.reference)
        if not judged:  # any of these may turn out to be a file: the task has to keep it until then
            for file in _uploads_named(graph):
                await stack.enter_async_context(self._uploads.hold(f"upload:{file}"))
                files[file] = None
        remote = frozenset((wanted.node_id, wanted.name) for wanted in found)
        return Taken(
            graph=graph,
            needed_nodes=await self._checker.needed_nodes(graph, remote),
            remote=remote,
            files=tuple(files),
            received=tuple(received.values()),
            references={source: given.upload.reference for source, given in received.items()},
            judged=judged,
        )

    def check_callback(self, url: str) -> None:
        """Judge a url that is to be called later, asking nobody. Raises `InvalidUrl`, `BlockedAddress`."""
        self._guard.check_url(url)

    async def _looked_at(
        self, wanted: graphs.FileInput, received: dict[str, Received], stack: AsyncExitStack
    ) -> Upload | None:
        """The upload that the input names, if it fits; None for a url, of which only the text is known."""
        source = wanted.value.strip()
        if not source[:7].lower().startswith(("data:", "upload:")):
            self._guard.check_url(source)
            return None
        upload = await self._upload(source, received, stack)
        graphs.check_kind(wanted, upload.kind, upload.content_type)
        return upload

    async def _upload(self, source: str, received: dict[str, Received], stack: AsyncExitStack) -> Upload:
        if source[:5].lower() == "data:":
            if source not in received:
                receiving = self._uploads.receive_data_uri(source)
                received[source] = await stack.enter_async_context(receiving)
            return received[source].upload
        await stack.enter_async_context(self._uploads.hold(source))
        return await self._uploads.find(source)

    async def keep(self, taken: Taken, stack: AsyncExitStack) -> None:
        """Keep what the request brought; what no task names when `stack` ends is forgotten again."""
        if not taken.received:
            return
        files = [given.upload.file for given in taken.received if not given.known]

        async def forget_unused() -> None:
            try:
                await self._uploads.forget(files, self._store.unused_uploads)
            except ComfydError as exc:  # the task may be a row by now; the sweep comes by later
                log.warning("upload.left", files=files, reason=exc.message)

        stack.push_async_callback(forget_unused)
        for given in taken.received:
            await stack.enter_async_context(self._uploads.hold(given.upload.reference))
            await self._uploads.keep(given)


def _uploads_named(graph: Graph) -> Iterator[str]:
    """The files of all values that look like references of uploads."""
    for node in graph.values():
        for value in node["inputs"].values():
            inner = value.get("__value__") if isinstance(value, dict) else value
            file = parse_reference(inner.strip()) if isinstance(inner, str) else None
            if file is not None:
                yield file
