"""What `/object_info` says of node classes, as values; never whether a graph is right.

Custom nodes may have made anything of it: only what has the known shape counts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ObjectInfo = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One input of a class. `kind` is a type name or, for an old-style combo, the list of values."""

    name: str
    kind: Any
    options: Mapping[str, Any]
    required: bool


def class_of(object_info: ObjectInfo, class_type: str) -> Mapping[str, Any]:
    """What is said of a class; custom nodes may have made anything of it, so only objects count."""
    found = object_info.get(class_type)
    return found if isinstance(found, Mapping) else {}


def specs_of(node_class: Mapping[str, Any]) -> Iterator[Spec]:
    """The inputs of a class."""
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
                yield Spec(name=name, kind=spec[0], options=options, required=group == "required")


def literal(value: object) -> object:
    """The value itself of one that may be wrapped as `{"__value__": ...}`."""
    return value["__value__"] if isinstance(value, dict) and "__value__" in value else value
