"""What is wrong with a graph, collected per node; never decides what is wrong."""

from typing import Any

from comfyd.errors import InvalidWorkflow

# A graph of a thousand bad nodes is answered with the first of its problems, not with megabytes.
MAX_PROBLEMS = 100
_SHOWN = 120


def shorten(value: object) -> str:
    """The value as a message shows it: one line, at most about 120 characters."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(character if character.isprintable() else "?" for character in text[: _SHOWN + 1])
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


class Problems:
    """Collects the problems of one graph; lives for one check.

    `node_errors` has the shape of ComfyUI's own: `{node_id: {"class_type", "title", "errors": [...]}}`,
    each error `{"type", "message", "input", ...}` with ComfyUI's `type` where it has one and `input` null
    where no input is meant. `errors` holds those of the graph as a whole.
    """

    def __init__(self) -> None:
        self.node_errors: dict[str, dict[str, Any]] = {}
        self.errors: list[dict[str, Any]] = []
        self._count = 0

    def __bool__(self) -> bool:
        """Whether there is any."""
        return self._count > 0

    @property
    def full(self) -> bool:
        """Whether as many were found as will be told."""
        return self._count >= MAX_PROBLEMS

    def graph(self, kind: str, message: str, **facts: Any) -> None:
        """Something is wrong with the graph as a whole."""
        self._count += 1
        if self._count <= MAX_PROBLEMS:
            self.errors.append({"type": kind, "message": message, **facts})

    def node(
        self, node_id: str, node: object, kind: str, message: str, *, name: str | None = None, **facts: Any
    ) -> None:
        """Something is wrong with this node, or with its input `name`."""
        self._count += 1
        if self._count > MAX_PROBLEMS:
            return
        entry = self.node_errors.get(node_id)
        if entry is None:
            entry = {"class_type": _class_type(node), "title": _title(node), "errors": []}
            self.node_errors[node_id] = entry
        error = {"type": kind, "message": message, "input": None if name is None else shorten(name), **facts}
        entry["errors"].append(error)

    def error(self) -> InvalidWorkflow:
        """The error to raise: its message says the first problem and how many more there are."""
        if self.errors:
            first = self.errors[0]["message"]
        else:
            node_id, entry = next(iter(self.node_errors.items()))
            problem = entry["errors"][0]
            first = f"node {shorten(node_id)}"
            if entry["title"] is not None:
                first += f' "{entry["title"]}"'
            if entry["class_type"] is not None and entry["class_type"] != entry["title"]:
                first += f" ({entry['class_type']})"
            if problem["input"] is not None:
                first += f", input {problem['input']}"
            first += f": {problem['message']}"
        more = self._count - 1
        if more:
            first += f" (and {more} more {'problem' if more == 1 else 'problems'})"
        details: dict[str, Any] = {"node_errors": self.node_errors}
        if self.errors:
            details["errors"] = self.errors
        if self._count > MAX_PROBLEMS:
            details["not_listed"] = self._count - MAX_PROBLEMS
        return InvalidWorkflow(f"The workflow cannot run: {first}", details=details)


def _class_type(node: object) -> str | None:
    class_type = node.get("class_type") if isinstance(node, dict) else None
    return shorten(class_type) if isinstance(class_type, str) else None


def _title(node: object) -> str | None:
    meta = node.get("_meta") if isinstance(node, dict) else None
    title = meta.get("title") if isinstance(meta, dict) else None
    return shorten(title) if isinstance(title, str) and title else None
