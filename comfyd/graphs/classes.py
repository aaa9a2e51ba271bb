"""Would this ComfyUI run this graph, by what its `/object_info` says? Never changes a graph.

The rules are ComfyUI's own (its `validate_inputs`), with two differences. What ComfyUI would only find at
run time is found here: new-style combos, a bad value next to good outputs. And what cannot be judged from
`/object_info` passes: kinds of inputs that are not known here, and files that are uploaded later.
"""

import difflib
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from comfyd.graphs.problems import Problems, shorten
from comfyd.graphs.structure import Graph, is_link, links

ObjectInfo = Mapping[str, Any]

_WELL_KNOWN_FILES = {
    ("LoadImage", "image"): "image",
    ("LoadImageMask", "image"): "image",
    ("LoadImageOutput", "image"): "image",
    ("LoadAudio", "audio"): "audio",
    ("LoadVideo", "file"): "video",
    ("LoadLatent", "latent"): "file",
}
_LISTED = 20  # ComfyUI, too, lists no more than this many allowed values
_COMPARED = 300  # so many values are searched for a near match; model folders may hold thousands
_DYNAMIC = re.compile(r"COMFY_[A-Z0-9_]*_V\d+")  # their values lie under other names, such as "format.codec"
_ANY = "*"


@dataclass(frozen=True, kw_only=True)
class FileInput:
    """A literal input that names a file in one of ComfyUI's folders. `kind`: image, audio, video or file."""

    node_id: str
    name: str
    value: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """One input of a class. `kind` is a type name or, for an old-style combo, the list of values."""

    name: str
    kind: Any
    options: Mapping[str, Any]
    required: bool


def missing_classes(graph: Graph, object_info: ObjectInfo) -> set[str]:
    """The classes of the graph that this `/object_info` does not know; a stale one should be fetched anew."""
    return {node["class_type"] for node in graph.values() if node["class_type"] not in object_info}


def output_nodes(graph: Graph, object_info: ObjectInfo) -> list[str]:
    """The ids of the nodes for whose sake ComfyUI runs the graph, in the graph's order."""
    return [
        node_id
        for node_id, node in graph.items()
        if _class(object_info, node["class_type"]).get("output_node") is True
    ]


def executable_nodes(graph: Graph, object_info: ObjectInfo) -> set[str]:
    """The output nodes and every node upstream of one: what ComfyUI runs, and the denominator of progress."""
    return _upstream(graph, output_nodes(graph, object_info))


def file_inputs(graph: Graph, object_info: ObjectInfo | None) -> list[FileInput]:
    """The literal inputs that choose a file, by the upload flags of the class or, unknown, by well-known
    names."""
    found = []
    for node_id, node in graph.items():
        class_type = node["class_type"]
        kinds = {name: kind for (owner, name), kind in _WELL_KNOWN_FILES.items() if owner == class_type}
        if object_info is not None and class_type in object_info:
            for spec in _specs(_class(object_info, class_type)):
                kind = _file_kind(spec.options)
                if kind is not None:
                    kinds[spec.name] = kind
        for name, kind in kinds.items():
            value = _literal(node["inputs"].get(name))
            if isinstance(value, str):
                found.append(FileInput(node_id=node_id, name=name, value=value, kind=kind))
    return found


def file_name_problem(value: str) -> str | None:
    """Say why a name may not stand for a file in ComfyUI's folders, or return None.

    ComfyUI 0.3.75 takes absolute paths and `..` and would read any file of its machine (protocol, section
    10). The suffixes ` [input]`, ` [output]` and ` [temp]` choose the folder and are not judged here.
    """
    name = re.sub(r"\s*\[(?:input|output|temp)\]\s*$", "", value)
    if not name.strip():
        return "names no file"
    if re.search(r"[\x00-\x1f\x7f]", value):
        return "holds control characters"
    if "\\" in name:
        return "holds a backslash: folders are separated by /"
    if name.startswith(("/", "~")) or re.match(r"[A-Za-z]:", name):
        return "is an absolute path: name a file of ComfyUI's input folder"
    if any(part.strip() == ".." for part in name.split("/")):
        return "leaves ComfyUI's folder with .."
    return None


def check_against(graph: Graph, object_info: ObjectInfo, *, replaceable: Container[str] = ()) -> None:
    """Raise `InvalidWorkflow`, naming every node and input, unless this ComfyUI would run the checked graph
    as a whole.

    `object_info` is the whole answer of `/object_info`. A class in `replaceable` may be unknown: the server
    runs another in its place (protocol, section 15).
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
            for spec in _specs(_class(object_info, node["class_type"])):
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


def _class(object_info: ObjectInfo, class_type: str) -> Mapping[str, Any]:
    """What is said of a class; custom nodes may have made anything of it, so only objects count."""
    found = object_info.get(class_type)
    return found if isinstance(found, Mapping) else {}


def _specs(node_class: Mapping[str, Any]) -> Iterator[_Spec]:
    groups = node_class.get("input")
    if not isinstance(groups, Mapping):
        return
    for group in ("required", "optional"):
        members = groups.get(group)
        if not isinstance(members, Mapping):
            continue
        for name, spec in members.items():
            if isinstance(spec, list | tuple) and spec:
                options = spec[1] if len(spec) > 1 and isinstance(spec[1], Mapping) else {}
                yield _Spec(name=name, kind=spec[0], options=options, required=group == "required")


def _file_kind(options: Mapping[str, Any]) -> str | None:
    for key, value in options.items():
        if value is True and key.endswith("_upload"):
            # image_upload, animated_image_upload, video_upload, audio_upload, file_upload and later ones
            kind = key.removesuffix("_upload").rpartition("_")[2]
            return kind if kind in {"image", "audio", "video"} else "file"
    return None


def _literal(value: object) -> object:
    return value["__value__"] if isinstance(value, dict) and "__value__" in value else value


def _check_input(
    graph: Graph, node_id: str, spec: _Spec, object_info: ObjectInfo, problems: Problems
) -> None:
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
        found = _value_problem(node["class_type"], _literal(value), spec)
    if found is not None:
        kind, message, facts = found
        problems.node(node_id, node, kind, message, name=spec.name, **facts)


def _is_dynamic(kind: object) -> bool:
    return isinstance(kind, str) and _DYNAMIC.fullmatch(kind) is not None


_Problem = tuple[str, str, dict[str, Any]]


def _link_problem(graph: Graph, link: list[Any], spec: _Spec, object_info: ObjectInfo) -> _Problem | None:
    source, slot = link
    class_type = graph[source]["class_type"]
    outputs = _class(object_info, class_type).get("output")
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


def _value_problem(class_type: str, value: object, spec: _Spec) -> _Problem | None:
    if _file_kind(spec.options) is not None or (class_type, spec.name) in _WELL_KNOWN_FILES:
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


def _number_problem(value: Any, spec: _Spec) -> _Problem | None:
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


def _choice_problem(value: object, choices: object, spec: _Spec) -> _Problem | None:
    if not isinstance(choices, list) or spec.options.get("remote") or spec.options.get("multiselect"):
        return None
    if value in choices:
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
