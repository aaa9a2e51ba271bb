"""What a request asks to run is held against what the ComfyUIs can do, and its files against their inputs.

Never fetches a url: what a request is refused for is what it says, and what the files are that it brings.
"""

import asyncio
import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

import msgspec

from comfyd import graphs
from comfyd.clock import Clock
from comfyd.comfy.backend import Backend
from comfyd.errors import BackendError, InputError, InvalidWorkflow
from comfyd.guard import Guard
from comfyd.store.base import Store
from comfyd.tasks import Graph, JsonObject
from comfyd.uploads import Received, Upload, Uploads, parse_reference

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
        references = graphs.references(graph)
        found: list[graphs.FileInput] = []
        judged = True
        if graphs.remote_values(graph):
            known = await self._checker.known_classes()
            found, judged = graphs.remote_inputs(graph, known), known is not None
        named = _Named(self._uploads, stack)
        for wanted in found:
            with _naming(wanted):
                upload = await self._looked_at(wanted, named)
            if upload is not None:
                address = graphs.Address(node_id=wanted.node_id, name=wanted.name)
                graph = graphs.set_input(graph, address, upload.reference)
        for reference, place in references.items():
            with _naming(place):
                await named.upload(reference)
        if not judged:  # any of these may turn out to be a file: the task has to keep it until then
            for file in _padded_references(graph):
                await named.hold(file)
        remote = frozenset((wanted.node_id, wanted.name) for wanted in found)
        return Taken(
            graph=graph,
            needed_nodes=await self._checker.needed_nodes(graph, remote),
            remote=remote,
            files=tuple(named.files),
            received=tuple(named.received.values()),
            references={source: given.upload.reference for source, given in named.received.items()},
            judged=judged,
        )

    def check_callback(self, url: str) -> None:
        """Judge a url that is to be called later, asking nobody. Raises `InvalidUrl`, `BlockedAddress`."""
        self._guard.check_url(url)

    async def _looked_at(self, wanted: graphs.FileInput, named: "_Named") -> Upload | None:
        """The upload that the input names, if it fits; None for a url, of which only the text is known."""
        source = wanted.value.strip()
        if not source[:7].lower().startswith(("data:", "upload:")):
            self._guard.check_url(source)
            return None
        upload = await named.upload(source)
        graphs.check_kind(wanted, upload.kind, upload.content_type)
        return upload

    async def keep(self, taken: Taken, stack: AsyncExitStack) -> None:
        """Keep what the request brought; what no task names when `stack` ends is forgotten again."""
        for given in taken.received:
            await stack.enter_async_context(self._uploads.keeping(given, self._store.unused_uploads))


class _Named:
    """The uploads that one graph names or brings, held until `stack` ends. Lives as long as one `take`."""

    def __init__(self, uploads: Uploads, stack: AsyncExitStack) -> None:
        self._uploads = uploads
        self._stack = stack
        self._found: dict[str, Upload] = {}
        self.received: dict[str, Received] = {}
        """By their data URIs."""
        self.files: dict[str, None] = {}
        """All of them, each once, in order."""

    async def upload(self, source: str) -> Upload:
        """What a reference or a data URI stands for. Raises `InputError`."""
        if source not in self._found:
            self._found[source] = await self._looked_up(source)
            self.files[self._found[source].file] = None
        return self._found[source]

    async def hold(self, file: str) -> None:
        """One that may turn out to be a file of the task, whether it is there or not."""
        await self._stack.enter_async_context(self._uploads.hold(f"upload:{file}"))
        self.files[file] = None

    async def _looked_up(self, source: str) -> Upload:
        if source[:5].lower() == "data:":
            receiving = self._uploads.receive_data_uri(source)
            self.received[source] = await self._stack.enter_async_context(receiving)
            return self.received[source].upload
        await self._stack.enter_async_context(self._uploads.hold(source))
        return await self._uploads.find(source)


@contextlib.contextmanager
def _naming(wanted: graphs.FileInput | graphs.Address) -> Iterator[None]:
    """Let what is wrong with a file name its input."""
    try:
        yield
    except InputError as exc:
        exc.details.setdefault("input", f"{wanted.node_id}.{wanted.name}")
        raise


def _padded_references(graph: Graph) -> Iterator[str]:
    """The files of references with blanks around them: files where an input takes one, else texts."""
    for node in graph.values():
        for value in node["inputs"].values():
            inner = value.get("__value__") if isinstance(value, dict) else value
            file = parse_reference(inner.strip()) if isinstance(inner, str) else None
            if file is not None and not graphs.is_reference(inner):
                yield file
