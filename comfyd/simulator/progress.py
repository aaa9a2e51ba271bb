"""Progress of the nodes of one prompt, and the messages that tell of it.

`progress_state` repeats every node seen so far each time; nothing here is remembered after the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comfyd.simulator.sockets import Sockets


class Progress:
    """Lives for one prompt."""

    def __init__(self, prompt_id: str, client_id: Any, sockets: Sockets) -> None:
        self._prompt_id = prompt_id
        self._client_id = client_id
        self._sockets = sockets
        self._nodes: dict[str, dict[str, Any]] = {}

    def start(self, node_id: str) -> None:
        """A node begins."""
        self._set(node_id, "running", 0.0, 1.0)

    def finish(self, node_id: str) -> None:
        """A node is done, or its cached result was used."""
        entry = self._nodes.get(node_id)
        maximum = entry["max"] if entry else 1.0
        self._set(node_id, "finished", maximum, maximum)

    def update(self, node_id: str, value: float, maximum: float, preview: tuple[str, bytes] | None) -> None:
        """A step of a node: state, preview with metadata, `progress`, old-style preview, in this order."""
        self._set(node_id, "running", value, maximum)
        metadata = preview is not None and self._sockets.takes_metadata(self._client_id)
        if preview is not None and metadata:
            self._sockets.send_metadata_preview(
                preview[1], preview[0], self._identity(node_id), self._client_id
            )
        step = {"value": value, "max": maximum, "prompt_id": self._prompt_id, "node": node_id}
        self._sockets.send("progress", step, self._client_id)
        if preview is not None and not metadata:
            self._sockets.send_preview(preview[1], preview[0], self._client_id)

    def _set(self, node_id: str, state: str, value: float, maximum: float) -> None:
        self._nodes[node_id] = {
            "value": value,
            "max": maximum,
            "state": state,
            **self._identity(node_id),
        }
        state_message = {"prompt_id": self._prompt_id, "nodes": self._nodes}
        self._sockets.send("progress_state", state_message, self._client_id)

    def _identity(self, node_id: str) -> dict[str, Any]:
        return {
            "node_id": node_id,
            "prompt_id": self._prompt_id,
            "display_node_id": node_id,
            "parent_node_id": None,
            "real_node_id": node_id,
        }
