"""ComfyUI's queue: a heap of pending prompts, the running one, and the history, all in memory only.

Nothing here survives a crash, and nothing checks that a prompt id is unique (Q5).
"""

from __future__ import annotations

import asyncio
import heapq
import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable


class QueueItem(NamedTuple):
    """A prompt in the queue, compared as a tuple: equal number and id compare the dicts and raise."""

    number: float
    prompt_id: str
    prompt: dict[str, Any]
    extra_data: Any
    outputs: list[str]
    sensitive: dict[str, Any]

    def public(self) -> list[Any]:
        """The five elements clients may see."""
        return list(self[:5])


class PromptQueue:
    """The queue and history of one server process. `changed` is called on every change of the queue."""

    def __init__(self, changed: Callable[[], None], max_history: int) -> None:
        self.pending: list[QueueItem] = []
        self.running: list[QueueItem] = []
        self.history: dict[str, dict[str, Any]] = {}
        self.max_history = max_history
        self.flags: dict[str, bool] = {}
        self.secrets: dict[str, dict[str, Any]] = {}  # by prompt id, for tests: no route shows them
        self.has_odd_numbers = False  # NaN or infinite numbers were accepted: JSON needs the tolerant encoder
        self._changed = changed
        self._wake = asyncio.Event()

    def remaining(self) -> int:
        """Pending and running prompts."""
        return len(self.pending) + len(self.running)

    def put(self, item: QueueItem) -> None:
        """Add a prompt. Equal number and id: TypeError, although the prompt stays queued (section 3)."""
        self.has_odd_numbers = self.has_odd_numbers or not math.isfinite(item.number)
        self._wake.set()
        self.secrets[item.prompt_id] = item.sensitive
        heapq.heappush(self.pending, item)
        self._changed()

    def set_flag(self, name: str, *, value: bool) -> None:
        """Leave a request of `/free` for the worker."""
        self.flags[name] = value
        self._wake.set()

    async def ready(self) -> None:
        """Wait until there is a prompt to take or a flag to handle."""
        while not self.pending and not self.flags:
            self._wake.clear()
            await self._wake.wait()

    def take(self) -> QueueItem:
        """Move the first pending prompt to running."""
        item = heapq.heappop(self.pending)
        self.running.append(item)
        self._changed()
        return item

    def take_flags(self) -> dict[str, bool]:
        """The flags set since the last call."""
        flags, self.flags = self.flags, {}
        return flags

    def finish(self, item: QueueItem, result: dict[str, Any], status: dict[str, Any]) -> None:
        """Move the running prompt to the history in one step, as ComfyUI does under one lock (Q1)."""
        self.running.remove(item)
        self.evict(self.max_history)
        self.history[item.prompt_id] = {
            "prompt": item.public(),
            "outputs": {},
            "status": status,
            **result,
        }
        self._changed()

    def evict(self, limit: int) -> None:
        """Drop the oldest history entry if there are more than `limit`."""
        if len(self.history) > limit:
            self.history.pop(next(iter(self.history)))

    def delete(self, prompt_id: str) -> bool:
        """Remove the first pending prompt with this id, and only the first (Q5)."""
        for index, item in enumerate(self.pending):
            if item.prompt_id == prompt_id:
                del self.pending[index]
                heapq.heapify(self.pending)
                self._changed()
                return True
        return False

    def clear(self) -> None:
        """Drop every pending prompt, whoever it belongs to."""
        self.pending.clear()
        self._changed()

    def page(self, max_items: int | None, offset: int) -> dict[str, Any]:
        """Part of the history: the newest `max_items`, or from `offset` counted from the oldest."""
        if offset < 0 and max_items is not None:
            offset = len(self.history) - max_items
        chosen: dict[str, Any] = {}
        for index, (prompt_id, entry) in enumerate(self.history.items()):
            if index < offset:
                continue
            chosen[prompt_id] = entry
            if max_items is not None and len(chosen) >= max_items:
                break
        return chosen
