"""The classic node cache: only results of the previous prompt, found again by what went into them.

Keys ignore node ids. Computing them walks the whole graph, stray nodes included, so a stray node without
`inputs` raises here and kills the worker, as it does in ComfyUI (Q9).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """The results of one executed node: its output slots, and its UI output with meta data if it has one."""

    outputs: tuple[Any, ...]
    ui: dict[str, Any] | None


class NodeCache:
    """Results by signature. Lives as long as the server process; emptied by `/free` and by a crash."""

    def __init__(self, change_mark: Callable[[str, dict[str, Any]], str | None]) -> None:
        """`change_mark(class, inputs)` is what ComfyUI's IS_CHANGED returns: part of the key, or None."""
        self._change_mark = change_mark
        self._entries: dict[bytes, CacheEntry] = {}
        self._keys: dict[str, bytes] = {}

    def use_prompt(self, prompt: dict[str, Any]) -> None:
        """Compute the keys of a prompt and drop every result it cannot use."""
        self._keys = {}
        for node_id in prompt:
            self._key(prompt, node_id)
        keys = set(self._keys.values())
        self._entries = {key: entry for key, entry in self._entries.items() if key in keys}

    def get(self, node_id: str) -> CacheEntry | None:
        """The result of a node of the present prompt, if known."""
        return self._entries.get(self._keys[node_id])

    def put(self, node_id: str, entry: CacheEntry) -> None:
        """Keep the result of a node of the present prompt."""
        self._entries[self._keys[node_id]] = entry

    def clear(self) -> None:
        """Forget every result."""
        self._entries.clear()

    def _key(self, prompt: dict[str, Any], start: str) -> bytes:
        """The key of a node, with those of everything upstream, without recursion: graphs may be deep."""
        pending = [start]
        entered: set[str] = set()
        while pending:
            node_id = pending[-1]
            if node_id in self._keys:
                pending.pop()
                continue
            inputs = prompt[node_id]["inputs"]
            sources = [value[0] for value in inputs.values() if is_link(value) and value[0] in prompt]
            missing = [source for source in sources if source not in self._keys and source not in entered]
            entered.add(node_id)
            if missing:
                pending += missing
                continue
            self._keys[node_id] = self._signature(prompt[node_id]["class_type"], inputs)
            pending.pop()
        return self._keys[start]

    def _signature(self, class_type: str, inputs: dict[str, Any]) -> bytes:
        parts: list[Any] = [class_type, self._change_mark(class_type, inputs)]
        for name in sorted(inputs.keys()):
            value = inputs[name]
            if is_link(value):
                # Inside a cycle of stray nodes a source has no key yet: any mark will do, it never runs.
                parts.append([name, self._keys.get(value[0], b"").hex(), value[1]])
            else:
                parts.append([name, [value]])
        try:
            encoded = orjson.dumps(parts)
        except TypeError:  # integers beyond 64 bit, lone surrogates
            encoded = json.dumps(parts).encode()
        return hashlib.sha1(encoded, usedforsecurity=False).digest()


def is_link(value: Any) -> bool:
    """Whether an input value is a link `[node id, slot]`."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], (int, float))
    )
