"""Addresses of inputs, and graphs made from graphs; never changes the graph it is given and never judges
it."""

import difflib
import hashlib
import json
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comfyd.errors import InvalidInputs
from comfyd.graphs.problems import shorten
from comfyd.graphs.structure import Graph, is_link, links, title

_PREFIX = "filename_prefix"
_DEFAULT_PREFIX = "ComfyUI"
_PART_BYTES = 150  # a file name ends at 255 bytes, and ComfyUI adds a counter and an extension
_PREFIX_PARTS = 8


@dataclass(frozen=True, kw_only=True)
class Address:
    """One input of one node."""

    node_id: str
    name: str


def find_node(graph: Graph, name: str) -> str:
    """Return the id of the node with this id or, none having it, with this title.

    Raises `LookupError`, its text a full message, when there is none or when several have the title.
    """
    if name in graph:
        return name
    found = [node_id for node_id in graph if title(graph, node_id) == name]
    if len(found) == 1:
        return found[0]
    if found:
        candidates = ", ".join(f"{node_id} ({graph[node_id]['class_type']})" for node_id in found[:10])
        raise LookupError(
            f"{len(found)} nodes have the title {shorten(name)!r}: name one by its id: {candidates}"
        )
    known = [candidate for node_id in graph for candidate in (node_id, title(graph, node_id))]
    raise LookupError(f"no node has the id or the title {shorten(name)!r}{_hint(name, known)}")


def parse_address(graph: Graph, address: str) -> Address:
    """Read `"node_id.input"` or `"Node title.input"`; ids, titles and inputs may themselves hold dots.

    The input must be there in the graph. Raises `InvalidInputs` with the address as the wrong input's name.
    """
    cuts = [match.start() for match in re.finditer(r"\.", address[:400])]
    problem = 'an address is "node_id.input" or "Node title.input"'
    for cut in reversed(cuts):
        node_name, name = address[:cut], address[cut + 1 :]
        try:
            node_id = find_node(graph, node_name)
        except LookupError as error:
            problem = str(error)
            continue
        inputs = graph[node_id]["inputs"]
        if name in inputs:
            return Address(node_id=node_id, name=name)
        owner = f"node {node_id} ({graph[node_id]['class_type']})"
        problem = f"{owner} has no input {shorten(name)!r}{_hint(name, list(inputs))}"
        break
    raise InvalidInputs(
        f"No such input: {shorten(address)}: {problem}.", details={"inputs": {shorten(address): [problem]}}
    )


def set_input(graph: Graph, address: Address, value: Any) -> Graph:
    """Return the graph with one input replaced; all else is shared with the one given."""
    node = graph[address.node_id]
    return {**graph, address.node_id: {**node, "inputs": {**node["inputs"], address.name: value}}}


def replace_texts(graph: Graph, replacements: Mapping[str, str]) -> Graph:
    """Return the checked graph with these texts replaced wherever one is the whole of a value in an input,
    however deep; links and names stay, and what holds none of them is shared with the one given."""
    replaced = dict(graph)
    for node_id, node in graph.items():
        inputs = {
            name: value if is_link(value) else _with_texts(value, replacements)
            for name, value in node["inputs"].items()
        }
        if any(inputs[name] is not value for name, value in node["inputs"].items()):
            replaced[node_id] = {**node, "inputs": inputs}
    return replaced


def _with_texts(value: Any, replacements: Mapping[str, str]) -> Any:
    """The value itself where there is nothing to replace. As deep as a checked graph, which has a limit."""
    if isinstance(value, str):
        return replacements.get(value, value)
    if isinstance(value, list):
        items = [_with_texts(inner, replacements) for inner in value]
        return value if all(map(operator.is_, items, value)) else items
    if isinstance(value, dict):
        members = {name: _with_texts(inner, replacements) for name, inner in value.items()}
        return value if all(map(operator.is_, members.values(), value.values())) else members
    return value


def rewrite_prefixes(graph: Graph, folder: str) -> Graph:
    """Return the graph, each literal `filename_prefix` moved under `folder`: no two runs share one.

    The files are then the attempt's own, and ComfyUI's cache cannot answer with those of an earlier run
    (Q12). A prefix that is a link stays as it is.
    """
    rewritten = dict(graph)
    for node_id, node in graph.items():
        value = node["inputs"].get(_PREFIX)
        if isinstance(value, dict):
            value = value.get("__value__")
        if isinstance(value, str | int | float):
            inputs = {**node["inputs"], _PREFIX: f"{folder}/{safe_prefix(str(value))}"}
            rewritten[node_id] = {**node, "inputs": inputs}
    return rewritten


def safe_prefix(prefix: str) -> str:
    """Return the prefix as a relative path that stays where it is put, on any operating system.

    Tokens such as `%date%` or `%width%` stay. Backslashes are separators, `.`, `..` and drives are dropped.
    """
    parts = []
    for part in prefix.replace("\\", "/").split("/"):
        # Windows takes "..  " and "..." for "..".
        clean = "".join(c if c.isprintable() else "_" for c in part)
        clean = re.sub(r"^(?:\s*[A-Za-z]:)+", "", clean).strip()
        clean = clean.encode(errors="replace")[:_PART_BYTES].decode(errors="ignore").rstrip(" .")
        if clean:
            parts.append(clean)
    return "/".join(parts[-_PREFIX_PARTS:]) or _DEFAULT_PREFIX


def shape_key(graph: Graph) -> str:
    """Return the same 32 hexadecimal digits for graphs that differ only in literal values, titles and order.

    It stands for 'the same workflow' where run times are learned.
    """
    shape = [
        [node_id, graph[node_id]["class_type"], sorted(links(graph[node_id]))] for node_id in sorted(graph)
    ]
    return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:32]


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name[:100], [candidate[:100] for candidate in known[:300]], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
