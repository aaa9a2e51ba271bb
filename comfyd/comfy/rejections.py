"""ComfyUI's 'this prompt is invalid' as an error of ours, whichever version said it; never asks it.

`details["node_errors"]` is `{node_id: {"class_type", "title", "errors": [{"type", "message", "input",
...}]}}`; what is wrong with the graph as a whole stands in `details["errors"]`. Tracebacks and the server's
paths are left out.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from comfyd.comfy.redaction import clean, without_paths
from comfyd.comfy.wire import Undecodable, decode_object
from comfyd.credentials import NO_SECRETS, Secrets
from comfyd.errors import BackendRejected

_UNKNOWN_CLASS: Final = frozenset({"invalid_prompt", "missing_node_type"})
_NODE_ID = re.compile(r"Node ID '#(?P<node_id>.*)'", re.DOTALL)
_MOST_ERRORS: Final = 100
"""Nodes that are told of; a graph of thousands is answered with the first of them."""


def rejection(
    status: int, body: bytes, graph: Mapping[str, Any], secrets: Secrets = NO_SECRETS
) -> BackendRejected:
    """The error for an answer that refuses a prompt: 400, or 413 for one that is too long."""
    if status == 413:
        return BackendRejected(
            "ComfyUI refuses a prompt of this length (its --max-upload-size)", details={"node_errors": {}}
        )
    try:
        answer = decode_object(body)
    except Undecodable:
        answer = {}
    error = answer.get("error")
    error = error if isinstance(error, dict) else {"message": error if isinstance(error, str) else ""}
    node_errors = cleaned_node_errors(answer.get("node_errors"), graph, secrets)
    whole: list[dict[str, Any]] = []
    missing = _missing_class(error, graph, secrets)
    if missing is not None:
        node_errors = {**node_errors, **missing}
    elif not node_errors:
        whole.append(
            {"type": _text(error.get("type")) or "invalid_prompt", "message": _sentence(error, secrets)}
        )
    return BackendRejected(
        f"ComfyUI refuses the prompt: {_first(node_errors, whole)}",
        details={"node_errors": node_errors, **({"errors": whole} if whole else {})},
    )


def cleaned_node_errors(raw: Any, graph: Mapping[str, Any], secrets: Secrets = NO_SECRETS) -> dict[str, Any]:
    """ComfyUI's `node_errors` in our shape; empty for anything else than an object."""
    if not isinstance(raw, dict):
        return {}
    cleaned: dict[str, Any] = {}
    for node_id, entry in list(raw.items())[:_MOST_ERRORS]:
        entry = entry if isinstance(entry, dict) else {}  # noqa: PLW2901 - anything else says nothing
        errors = entry.get("errors")
        cleaned[node_id] = {
            "class_type": _text(entry.get("class_type")) or _class_type(graph, node_id),
            "title": _title(graph, node_id),
            "errors": [_error(error, secrets) for error in errors if isinstance(error, dict)]
            if isinstance(errors, list)
            else [],
        }
    return cleaned


def summary(node_errors: Mapping[str, Any]) -> str:
    """The first of the problems, for people."""
    for node_id, entry in node_errors.items():
        for error in entry["errors"]:
            name = f' "{entry["title"]}"' if entry["title"] else ""
            kind = f" ({entry['class_type']})" if entry["class_type"] else ""
            return f"node {node_id}{name}{kind}: {error['message']}"
    return "it gave no reason"


def _first(node_errors: Mapping[str, Any], whole: list[dict[str, Any]]) -> str:
    return whole[0]["message"] if whole else summary(node_errors)


def _error(error: dict[str, Any], secrets: Secrets) -> dict[str, Any]:
    extra = error.get("extra_info")
    extra = extra if isinstance(extra, dict) else {}
    facts = {name: clean(extra[name], secrets) for name in ("received_value", "cycle_nodes") if name in extra}
    return {
        "type": _text(error.get("type")) or "invalid",
        "message": _sentence(error, secrets),
        "input": _text(extra.get("input_name")),
        **facts,
    }


def _sentence(error: Mapping[str, Any], secrets: Secrets) -> str:
    """ComfyUI's message and details as one text: 'Value not in list: name: 'x' not in [...]'."""
    parts = (_text(error.get("message")), _text(error.get("details")))
    return ": ".join(without_paths(part, secrets) for part in parts if part) or "it gave no reason"


def _missing_class(
    error: Mapping[str, Any], graph: Mapping[str, Any], secrets: Secrets
) -> dict[str, Any] | None:
    """An unknown class: old servers name the node in `details` only, newer ones in `extra_info` too."""
    if error.get("type") not in _UNKNOWN_CLASS:
        return None
    extra = error.get("extra_info")
    node_id = _text(extra.get("node_id")) if isinstance(extra, dict) else None
    if node_id is None:
        match = _NODE_ID.search(_text(error.get("details")) or "")
        node_id = match["node_id"] if match else None
    if node_id is None:
        return None
    class_type = _class_type(graph, node_id)
    message = without_paths(_text(error.get("message")) or "", secrets)
    if class_type is not None:
        message = f"This ComfyUI has no node class {class_type!r}"
    facts = {"type": "missing_node_type", "message": message, "input": None}
    return {node_id: {"class_type": class_type, "title": _title(graph, node_id), "errors": [facts]}}


def _class_type(graph: Mapping[str, Any], node_id: str) -> str | None:
    node = graph.get(node_id)
    return _text(node.get("class_type")) if isinstance(node, dict) else None


def _title(graph: Mapping[str, Any], node_id: str) -> str | None:
    node = graph.get(node_id)
    meta = node.get("_meta") if isinstance(node, dict) else None
    return _text(meta.get("title")) if isinstance(meta, dict) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
