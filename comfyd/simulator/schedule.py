"""Which node runs next: ComfyUI's order, outputs and previews as early as possible.

Knows the graph and what is cached; it runs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfyd.simulator.cache import is_link

if TYPE_CHECKING:
    from collections.abc import Callable


class Schedule:
    """The nodes of one prompt that are still to run. Lives for that prompt."""

    def __init__(
        self,
        prompt: dict[str, Any],
        is_output: Callable[[str], bool],
        is_cached: Callable[[str], bool],
    ) -> None:
        self._prompt = prompt
        self._is_output = is_output
        self._is_cached = is_cached
        self._sources: dict[str, set[str]] = {}  # pending node -> pending nodes it waits for
        self._users: dict[str, set[str]] = {}  # pending node -> pending nodes that wait for it

    def __bool__(self) -> bool:
        return bool(self._sources)

    def add(self, output_id: str) -> None:
        """Want a node: it and everything upstream that is not cached becomes pending."""
        pending = [output_id]
        while pending:
            node_id = pending.pop()
            if node_id in self._sources:
                continue
            self._sources[node_id] = set()
            self._users.setdefault(node_id, set())
            for value in self._prompt[node_id]["inputs"].values():
                if not is_link(value) or self._is_cached(value[0]):
                    continue
                self._sources[node_id].add(value[0])
                self._users.setdefault(value[0], set()).add(node_id)
                pending.append(value[0])

    def next(self) -> str:
        """The node to run now: an output first, else one close to an output, else the first that is ready."""
        ready = [node_id for node_id, sources in self._sources.items() if not sources]
        for distance in range(3):
            for node_id in ready:
                if self._output_within(node_id, distance):
                    return node_id
        return ready[0]

    def done(self, node_id: str) -> None:
        """A node has run: whoever waited for it waits no longer."""
        del self._sources[node_id]
        for user in self._users.pop(node_id):
            self._sources[user].discard(node_id)

    def _output_within(self, node_id: str, distance: int) -> bool:
        if distance == 0:
            return self._is_output(node_id)
        return any(self._output_within(user, distance - 1) for user in self._users[node_id])
