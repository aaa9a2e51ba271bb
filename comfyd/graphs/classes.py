"""Would this ComfyUI run this graph, by what its `/object_info` says? Never changes a graph.

The rules are ComfyUI's own (its `validate_inputs`), with two differences. What ComfyUI would only find at
run time is found here: new-style combos, a bad value next to good outputs. And what cannot be judged from
`/object_info` passes: kinds of inputs that are not known here, and files that are uploaded later, as those
of references are.
"""

import difflib
import re
from collections.abc import Container, Iterable
from typing import Any

from comfyd.graphs.files import WELL_KNOWN_FILES, file_kind, file_name_problem, is_reference
from comfyd.graphs.object_info import ObjectInfo, Spec, class_of, literal, specs_of
from comfyd.graphs.problems import Problems, shorten
from comfyd.graphs.structure import Graph, is_link, links

_LISTED = 20  # ComfyUI, too, lists no more than this many allowed values
_COMPARED = 300  # so many values are searched for a near match; model folders may hold thousands
_DYNAMIC = re.compile(r"COMFY_[A-Z0-9_]*_V\d+")  # their values lie under other names, such as "format.codec"
_ANY = "*"


def missing_classes(graph: Graph, object_info: ObjectInfo) -> set[str]:
    """The classes of the graph that this `/object_info` does not know; a stale one should be fetched anew."""
    return {node["class_type"] for node in graph.values() if node["class_type"] not in object_info}


def output_nodes(graph: Graph, object_info: ObjectInfo) -> list[str]:
    """The ids of the nodes for whose sake ComfyUI runs the graph, in the graph's order."""
    return [
        node_id
        for node_id, node in graph.items()
        if class_of(object_info, node["class_type"]).get("output_node") is True
    ]


def executable_nodes(graph: Graph, object_info: ObjectInfo) -> set[str]:
    """The output nodes and every node upstream of one: what ComfyUI runs, and the denominator of progress."""
    return _upstream(graph, output_nodes(graph, object_info))


def check_against(
    graph: Graph,
    object_info: ObjectInfo,
    *,
    replaceable: Container[str] = (),
    remote: Container[tuple[str, str]] = (),
) -> None:
    """Raise `InvalidWorkflow`, naming every node and input, unless this ComfyUI would run the checked graph
    as a whole.

    `object_info` is the whole answer of `/object_info`. A class in `replaceable` may be unknown: the server
    runs another in its place (protocol, section 15). The values of the inputs `remote` (node id, name) stand
    for files that are still to be brought, and are not judged.
    """
    problems = Problems()
    unknown = missing_classes(graph, object_info)
    for node_id, node in graph.items():
        class_type = node["class_type"]
        if class_type in unknown and class_type not in replaceable and not problems.full:
            _tell_unknown(node_id, node, object_info, problems)
    outputs = output_nodes(graph, object_info)
    # An unknown node may be the output; then that it is unknown is all there is to say.
    if not outputs and not unknown:
        problems.graph("prompt_no_outputs", "it has no output node, such as SaveImage or PreviewImage")
    # ComfyUI asks no more of a stray node than a known class.
    roots = [*outputs, *(node_id for node_id, node in graph.items() if node["class_type"] in unknown)]
    running = _upstream(graph, roots)
    for node_id, node in graph.items():
        if problems.full:
            break
        if node_id in running and node["class_type"] not in unknown:
            for spec in specs_of(class_of(object_info, node["class_type"])):
                if (node_id, spec.name) not in remote:
                    _check_input(graph, node_id, spec, object_info, problems)
    if problems:
        raise problems.error()


def _tell_unknown(node_id: str, node: dict[str, Any], object_info: ObjectInfo, problems: Problems) -> None:
    class_type = node["class_type"]
    folded = class_type.strip().casefold()
    near = next((name for name in object_info if name.casefold() == folded), None)
    message = f"ComfyUI has no node class {shorten(class_type)}: install the custom node that brings it"
    if near is not None:
        message = f"ComfyUI has no node class {shorten(class_type)!r}, but it has {near!r}"
    problems.node(node_id, node, "missing_node_type", message)


def _upstream(graph: Graph, roots: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    pending = list(roots)
    while pending:
        node_id = pending.pop()
        if node_id not in seen:
            seen.add(node_id)
            pending.extend(source for _, source, _ in links(graph[node_id]) if source in graph)
    return seen


def _check_input(graph: Graph, node_id: str, spec: Spec, object_info: ObjectInfo, problems: Problems) -> None:
    node = graph[node_id]
    if spec.name not in node["inputs"]:
        if spec.required and not _is_dynamic(spec.kind):
            message = "is required and missing (a default in the editor does not count)"
            problems.node(node_id, node, "required_input_missing", message, name=spec.name)
        return
    value = node["inputs"][spec.name]
    if is_link(value):
        found = _link_problem(graph, value, spec, object_info)
    elif isinstance(value, list):
        found = (
            "bad_linked_input",
            'a list is a link ["node id", slot]; a list that is no link is written {"__value__": [...]}',
            {},
        )
    else:
        found = _value_problem(node["class_type"], literal(value), spec)
    if found is not None:
        kind, message, facts = found
        problems.node(node_id, node, kind, message, name=spec.name, **facts)


def _is_dynamic(kind: object) -> bool:
    return isinstance(kind, str) and _DYNAMIC.fullmatch(kind) is not None


_Problem = tuple[str, str, dict[str, Any]]


def _link_problem(graph: Graph, link: list[Any], spec: Spec, object_info: ObjectInfo) -> _Problem | None:
    source, slot = link
    class_type = graph[source]["class_type"]
    outputs = class_of(object_info, class_type).get("output")
    if not isinstance(outputs, list | tuple):
        return None  # an unknown class: either told already or replaced by the server
    if slot >= len(outputs):
        many = f"only {len(outputs)}" if outputs else "none"
        message = f"is linked to output slot {slot} of node {source} ({class_type}), which has {many}"
        return "bad_linked_input", message, {"linked_node": link}
    received = outputs[slot]
    if _types_meet(received, spec.kind):
        return None
    shown = "a choice of values" if isinstance(spec.kind, list) else spec.kind
    message = f"takes {shown} but node {source} ({class_type}) gives {_type_name(received)}"
    return "return_type_mismatch", message, {"received_type": _type_name(received), "linked_node": link}


def _type_name(kind: object) -> str:
    return kind if isinstance(kind, str) else "a choice of values"


def _types_meet(received: object, wanted: object) -> bool:
    if received == wanted:
        return True
    if not isinstance(received, str) or not isinstance(wanted, str):
        # Choices meet choices: whether the lists are the same is not known before the run.
        return all(isinstance(kind, list) or kind in ("COMBO", _ANY) for kind in (received, wanted))
    if _is_dynamic(received) or _is_dynamic(wanted):
        return True
    given = {part.strip() for part in received.split(",")}
    taken = {part.strip() for part in wanted.split(",")}
    return _ANY in given or _ANY in taken or not given.isdisjoint(taken)


def _value_problem(class_type: str, value: object, spec: Spec) -> _Problem | None:
    if file_kind(spec.options) is not None or (class_type, spec.name) in WELL_KNOWN_FILES:
        problem = file_name_problem(value) if isinstance(value, str) else None
        return (
            None if problem is None else ("custom_validation_failed", problem, {"received": _received(value)})
        )
    if spec.kind in ("INT", "FLOAT"):  # a list cannot be looked up in a set
        return _number_problem(value, spec)
    if isinstance(spec.kind, list):
        return _choice_problem(value, spec.kind, spec)
    if spec.kind == "COMBO":
        return _choice_problem(value, spec.options.get("options"), spec)
    return None  # STRING and BOOLEAN take anything, other kinds are ComfyUI's to judge


def _received(value: object) -> object:
    return value if value is None or isinstance(value, int | float) else shorten(value)


def _number_problem(value: Any, spec: Spec) -> _Problem | None:
    try:
        # ComfyUI's own coercion: "64", 64.9 and true are integers for it.
        number = int(value) if spec.kind == "INT" else float(value)
    except (TypeError, ValueError, OverflowError):
        wanted = "an integer" if spec.kind == "INT" else "a number"
        return "invalid_input_type", f"must be {wanted}, not {shorten(value)}", {"received": _received(value)}
    for option, kind, words in (
        ("min", "value_smaller_than_min", "at least"),
        ("max", "value_bigger_than_max", "at most"),
    ):
        bound = spec.options.get(option)
        if not isinstance(bound, int | float) or isinstance(bound, bool):
            continue
        if number < bound if option == "min" else number > bound:
            return (
                kind,
                f"must be {words} {bound}, not {shorten(value)}",
                {
                    "received": _received(value),
                    option: bound,
                },
            )
    if number != number:  # noqa: PLR0124 (the only number that is not itself: "nan" as text)
        return "invalid_input_type", "must be a number, not nan", {"received": _received(value)}
    return None


def _choice_problem(value: object, choices: object, spec: Spec) -> _Problem | None:
    if not isinstance(choices, list) or spec.options.get("remote") or spec.options.get("multiselect"):
        return None
    if value in choices or is_reference(value):  # the name of a file will stand there
        return None
    if not choices:
        message = (
            f"{shorten(value)} is not there: ComfyUI has nothing to choose from (is the file installed?)"
        )
    elif len(choices) <= _LISTED:
        message = f"{shorten(value)} is not one of {', '.join(shorten(choice) for choice in choices)}"
    else:
        message = f"{shorten(value)} is not one of the {len(choices)} values that ComfyUI has"
    near = _nearest(value, choices)
    if near is not None:
        message += f"; did you mean {near}?"
    facts: dict[str, Any] = {"received": _received(value)}
    if len(choices) <= _LISTED:
        facts["choices"] = [shorten(choice) for choice in choices]
    return "value_not_in_list", message, facts


def _nearest(value: object, choices: list[Any]) -> str | None:
    if not isinstance(value, str) or len(value) > _COMPARED or len(choices) > _COMPARED:
        return None
    names = [choice for choice in choices if isinstance(choice, str) and len(choice) <= _COMPARED]
    near = difflib.get_close_matches(value, names, n=1)
    return shorten(near[0]) if near else None
