"""Is a JSON value an API-format graph that cannot hurt ComfyUI? Never asks which node classes exist."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from comfyd.errors import InvalidWorkflow, WorkflowFormatUi
from comfyd.graphs.problems import Problems, shorten

Graph = dict[str, Any]

_HOW_TO_EXPORT = "open it in ComfyUI and export it with Workflow > Export (API)"
_MAX_ID = 100
_CYCLE_SHOWN = 20
# What a JSON document can hold and every reader of it keeps exactly: ComfyUI's own seeds end at 2**64 - 1.
_MIN_INTEGER, _MAX_INTEGER = -(2**63), 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class GraphLimits:
    """How big a graph may be. `depth` counts nested objects and lists, the graph itself being 1."""

    nodes: int = 5_000
    depth: int = 64
    string_length: int = 1_000_000  # characters
    data_uri_length: int = 33_554_432  # characters of a string that begins with `data:`
    size_bytes: int = 33_554_432  # of its JSON text, about

    def __post_init__(self) -> None:
        """Keep the walk below Python's own recursion limit."""
        if not 4 <= self.depth <= 200:
            raise ValueError("depth must be 4 to 200: a graph with links is 4 deep")


def is_link(value: object) -> TypeGuard[list[Any]]:
    """Whether this input value is a link `["node_id", slot]`."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int)
        and not isinstance(value[1], bool)
    )


def links(node: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """The links of one node of a checked graph: input name, source node id, source slot."""
    for name, value in node["inputs"].items():
        if is_link(value):
            yield name, value[0], value[1]


def title(graph: Graph, node_id: str) -> str:
    """The node's title, or its class where it has none."""
    node = graph[node_id]
    found = node["_meta"].get("title")
    return found if isinstance(found, str) and found else str(node["class_type"])


def class_types(graph: Graph) -> set[str]:
    """Every class that the graph names."""
    return {node["class_type"] for node in graph.values()}


def check_structure(value: object, limits: GraphLimits) -> Graph:
    """Return the graph that `value` is: a deep copy, each node with exactly `class_type`, `inputs` and
    `_meta`.

    `_meta` is `{}` where it is missing or no object: newer ComfyUIs answer 500 without it. Other keys of a
    node mean nothing to ComfyUI and are dropped. Raises `WorkflowFormatUi` for the editor's format and
    `InvalidWorkflow` with every problem found (up to a bound) for all else; nothing but these two, whatever
    JSON value comes.
    """
    nodes = _node_table(value)
    problems = Problems()
    if len(nodes) > limits.nodes:
        problems.graph(
            "too_many_nodes", f"it has {len(nodes)} nodes and may have {limits.nodes}", limit=limits.nodes
        )
        raise problems.error()
    graph: Graph = {}
    copier = _Copier(limits)
    for node_id, node in nodes.items():
        if problems.full:
            raise problems.error()
        try:
            _add_node(graph, node_id, node, copier, problems)
        except _TooMuch as too_much:
            problems.graph(too_much.kind, str(too_much), limit=too_much.limit)
            raise problems.error() from None
    for node_id, node in graph.items():
        _check_links(node_id, node, nodes, problems)
    _check_cycles(graph, problems)
    if problems:
        raise problems.error()
    return graph


def _node_table(value: object) -> dict[Any, Any]:
    """Return the object that should map node ids to nodes, or say what it is instead."""
    empty: dict[str, Any] = {"node_errors": {}}
    if not isinstance(value, dict):
        kind = _kind(value)
        raise InvalidWorkflow(
            f"The workflow must be an object of nodes in API format, not {kind}: {_HOW_TO_EXPORT}.",
            details=empty,
        )
    if not value:
        raise InvalidWorkflow(
            "The workflow is empty: it has no nodes.",
            details={**empty, "errors": [{"type": "prompt_no_outputs", "message": "it has no nodes"}]},
        )
    if isinstance(value.get("nodes"), list):
        raise WorkflowFormatUi(
            "This is the format of ComfyUI's editor (nodes and links), which only the editor can read. "
            f"To get the API format, {_HOW_TO_EXPORT}.",
            details=empty,
        )
    for wrapper in ("prompt", "workflow"):
        inner = value.get(wrapper)
        if isinstance(inner, dict) and "class_type" not in inner:
            if isinstance(inner.get("nodes"), list):
                _node_table(inner)
            raise InvalidWorkflow(
                f'The graph is wrapped in another object: send only what is under "{wrapper}".', details=empty
            )
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return "a list" if isinstance(value, list) else "a string" if isinstance(value, str) else "a plain value"


class _TooMuch(Exception):
    """A limit that ends the whole check."""

    def __init__(self, kind: str, message: str, limit: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.limit = limit


class _Unfit(Exception):
    """A value that no JSON document can hold."""


class _Copier:
    """Copies JSON values while counting what they cost; lives for one check."""

    def __init__(self, limits: GraphLimits) -> None:
        self._limits = limits
        self._size = 2

    def text(self, value: str) -> str:
        """Count and return a string."""
        length = len(value)
        limit = self._limits.data_uri_length if value[:5].lower() == "data:" else self._limits.string_length
        if length > limit:
            raise _TooMuch(
                "string_too_long", f"a string of {length} characters is longer than {limit}", limit
            )
        if value.isascii():
            self.count(length + 3)
            return value
        try:
            self.count(len(value.encode()) + 3)
        except UnicodeEncodeError:
            raise _Unfit("text with half of a surrogate pair is no valid Unicode") from None
        return value

    def count(self, size: int) -> None:
        """Add so many bytes."""
        self._size += size
        if self._size > self._limits.size_bytes:
            limit = self._limits.size_bytes
            raise _TooMuch("workflow_too_large", f"it is larger than {limit} bytes", limit)

    def copy(self, value: object, depth: int) -> Any:
        """Return a deep copy of a JSON value that stands `depth` objects and lists deep."""
        if isinstance(value, str):
            return self.text(value)
        if value is None or isinstance(value, bool):
            self.count(5)
            return value
        if isinstance(value, int):
            self.count(8)
            if not _MIN_INTEGER <= value <= _MAX_INTEGER:
                raise _Unfit("an integer beyond 64 bits")
            return value
        if isinstance(value, float):
            self.count(8)
            if value - value != 0.0:
                raise _Unfit("a number that is not finite")
            return value
        if not isinstance(value, dict | list):
            raise _Unfit(f"a value of the kind {type(value).__name__} is no JSON")
        if depth >= self._limits.depth:
            limit = self._limits.depth
            raise _TooMuch("nested_too_deep", f"it is nested deeper than {limit} objects and lists", limit)
        self.count(2)
        if isinstance(value, list):
            return [self.copy(item, depth + 1) for item in value]
        return {self.key(name): self.copy(item, depth + 1) for name, item in value.items()}

    def key(self, name: object) -> str:
        """Count and return the name of a member."""
        if not isinstance(name, str):
            raise _Unfit("an object whose key is no string is no JSON")
        return self.text(name)


def _add_node(graph: Graph, node_id: object, node: object, copier: _Copier, problems: Problems) -> None:
    """Copy one node into `graph`, or say why it is none."""
    if not isinstance(node_id, str) or not 1 <= len(node_id) <= _MAX_ID or not node_id.isprintable():
        rule = f"a node id is a string of 1 to {_MAX_ID} printable characters"
        problems.graph("invalid_node_id", f"{rule}, not {shorten(node_id)!r}")
        return
    copier.count(len(node_id) + 30)
    if not isinstance(node, dict):
        message = 'must be an object with "class_type" and "inputs"'
        problems.node(node_id, node, "invalid_node", message)
        return
    class_type = node.get("class_type")
    if not isinstance(class_type, str) or not class_type:
        message = "has no class_type" if "class_type" not in node else "class_type must be a string"
        problems.node(node_id, node, "missing_node_type", message)
    inputs = node.get("inputs")
    if not isinstance(inputs, dict):
        # One such node, even if nothing is linked to it, stops ComfyUI's worker for good (Q9).
        message = (
            "has no inputs: an object is needed, if only {}" if inputs is None else "inputs must be an object"
        )
        problems.node(node_id, node, "invalid_inputs", message)
    meta = node.get("_meta")
    copied: dict[str, Any] = {}
    for name, value in inputs.items() if isinstance(inputs, dict) else ():
        try:
            copied[copier.key(name)] = copier.copy(value, 3)
        except _Unfit as unfit:
            problems.node(node_id, node, "invalid_input_type", f"holds {unfit}", name=str(name))
    try:
        class_type = copier.text(class_type) if isinstance(class_type, str) else ""
        meta = copier.copy(meta, 2) if isinstance(meta, dict) else {}
    except _Unfit as unfit:
        problems.node(node_id, None, "invalid_node", f"holds {unfit}")
        return
    graph[node_id] = {"class_type": class_type, "inputs": copied, "_meta": meta}


def _check_links(node_id: str, node: dict[str, Any], nodes: dict[Any, Any], problems: Problems) -> None:
    """Every list of two is a link for ComfyUI; one that leads nowhere is an exception inside it."""
    for name, value in node["inputs"].items():
        if not isinstance(value, list) or len(value) != 2:
            continue
        source, slot = value
        if not isinstance(source, str):
            message = (
                f'a link names its node as a string: ["{shorten(source)}", ...]; '
                'a list that is no link is written {"__value__": [...]}'
            )
        elif isinstance(slot, bool) or not isinstance(slot, int) or slot < 0:
            message = f"a link's second part is the number of an output slot from 0, not {shorten(slot)}"
        elif source not in nodes:
            message = f"is linked to node {shorten(source)}, which does not exist"
        else:
            continue
        problems.node(node_id, node, "bad_linked_input", message, name=name)


def _check_cycles(graph: Graph, problems: Problems) -> None:
    """Name each cycle once, on every node of it, as the newer ComfyUIs do. Walks without recursion."""
    sources = {
        node_id: [link[1] for link in links(node) if link[1] in graph] for node_id, node in graph.items()
    }
    done: set[str] = set()
    told: set[str] = set()
    for start in graph:
        if start in done:
            continue
        path, on_path, pending = [start], {start}, [iter(sources[start])]
        while pending:
            source = next(pending[-1], None)
            if source is None:
                pending.pop()
                finished = path.pop()
                on_path.discard(finished)
                done.add(finished)
            elif source in on_path:
                cycle = path[path.index(source) :]
                if told.isdisjoint(cycle):
                    told.update(cycle)
                    _tell_cycle(graph, cycle, problems)
            elif source not in done:
                path.append(source)
                on_path.add(source)
                pending.append(iter(sources[source]))


def _tell_cycle(graph: Graph, cycle: list[str], problems: Problems) -> None:
    named = [
        f"{shorten(node_id)} ({shorten(graph[node_id]['class_type'])})" for node_id in (*cycle, cycle[0])
    ]
    if len(named) > 12:
        named[6:-5] = [f"{len(named) - 11} more"]
    # The path was walked against the links: say it as the data would flow.
    message = "is part of a cycle: " + " -> ".join(reversed(named))
    for node_id in cycle:
        problems.node(
            node_id,
            graph[node_id],
            "dependency_cycle",
            message,
            cycle_nodes=list(reversed(cycle[:_CYCLE_SHOWN])),
        )
