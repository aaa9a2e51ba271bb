"""Progress of running tasks, and the board on which watchers see it; never durable, never asks anybody."""

import asyncio
import base64
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Final

import msgspec

from comfyd.tasks import Artefact, Status

EVENTS_HELD: Final = 256
"""How many events may wait for one slow watcher before it is closed."""
PREVIEWS_HELD: Final = 1
"""How many previews may wait for one watcher: only the newest picture is worth sending."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a task is. `value` is 0..1 over the needed nodes, and never falls within an attempt."""

    value: float = 0.0
    nodes_done: int = 0
    nodes_total: int = 0
    current_node: str | None = None
    current_node_class: str | None = None
    step: int | None = None
    """The current node's own step, of `steps`; None where the node reports none."""
    steps: int | None = None
    message: str | None = None


class Preview(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A picture that a running task shows on its way. It is encoded once, and only if somebody asks."""

    node_id: str | None = None
    """None where ComfyUI does not say whose it is."""
    image_type: str
    data: bytes

    @cached_property
    def base64(self) -> str:
        """The picture for JSON."""
        return base64.b64encode(self.data).decode()


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to a task: `name` is `status progress preview output log`; `data` is JSON bytes."""

    name: str
    data: bytes = b""
    """Empty where it is a preview that nobody has put into words yet."""
    final: bool = False
    """Whether nothing follows: the task has ended."""
    picture: Preview | None = None
    """The preview itself."""


class ProgressTracker:
    """Adds up what ComfyUI says of one attempt. Lives as long as the attempt.

    Each node that the graph needs weighs the same: ComfyUI does not say how long a node takes. A cached node
    counts as done at once. `nodes` maps the needed node ids to their classes.
    """

    def __init__(self, nodes: Mapping[str, str]) -> None:
        self._classes = dict(nodes)
        self._done: set[str] = set()
        self._fractions: dict[str, float] = {}
        self._steps: dict[str, tuple[int, int]] = {}
        self._current: str | None = None
        self._highest = 0.0
        self._message: str | None = None

    def cached(self, nodes: Iterable[str]) -> None:
        """These nodes need not run."""
        self._done.update(node for node in nodes if node in self._classes)

    def started(self, node: str) -> None:
        """ComfyUI went on to this node; what ran before it has ended."""
        if self._current is not None and self._current != node:
            self.finished(self._current)
        self._current = node

    def stepped(self, node: str, value: float, maximum: float) -> None:
        """A node reports its own progress."""
        if maximum <= 0 or node in self._done:
            return
        self._fractions[node] = min(max(value / maximum, 0.0), 1.0)
        self._steps[node] = (int(value), int(maximum))

    def finished(self, node: str) -> None:
        """A node has run."""
        if node in self._classes:
            self._done.add(node)
        self._fractions.pop(node, None)
        if self._current == node:
            self._current = None

    def say(self, message: str) -> None:
        """A sentence for people, such as what is being waited for."""
        self._message = message

    def complete(self) -> None:
        """Everything has run."""
        self._done.update(self._classes)
        self._current = None

    def snapshot(self) -> Progress:
        """The state now."""
        total = len(self._classes)
        running = sum(part for node, part in self._fractions.items() if node in self._classes)
        value = (len(self._done) + running) / total if total else 0.0
        self._highest = max(self._highest, min(value, 1.0))
        step, steps = self._steps.get(self._current or "", (None, None))
        return Progress(
            value=round(self._highest, 4),
            nodes_done=len(self._done),
            nodes_total=total,
            current_node=self._current,
            current_node_class=self._classes.get(self._current) if self._current else None,
            step=step,
            steps=steps,
            message=self._message,
        )


class Watcher:
    """One reader of one task's events, made by `Board.watch`. Bounded: previews go first, then the reader."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._pictures: deque[Event] = deque(maxlen=PREVIEWS_HELD)
        self._wake = asyncio.Event()
        self.overrun = False

    def put(self, event: Event) -> None:
        """Hand an event over; never waits."""
        if event.picture is not None:
            self._pictures.append(event)
        elif len(self._events) >= EVENTS_HELD:
            self._drop_progress(event)
        else:
            self._events.append(event)
        self._wake.set()

    def _drop_progress(self, event: Event) -> None:
        """Make room by forgetting progress that newer progress replaces; else the reader is too slow."""
        kept = [waiting for waiting in self._events if waiting.name != "progress"]
        if len(kept) >= EVENTS_HELD:
            self.overrun = True
            return
        self._events = deque(kept)
        self._events.append(event)

    async def next(self, timeout: float | None = None) -> Event | None:
        """The next event; None when `timeout` seconds have passed without one, or the reader was overrun."""
        while True:
            if self._events:
                return self._events.popleft()
            if self._pictures:
                return self._pictures.popleft()
            if self.overrun:
                return None
            self._wake.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            except TimeoutError:
                return None


class Board:
    """The latest progress per running task, for whoever watches. Lives as long as the process.

    Written by whoever knows (a worker, or the API for a cancel), read by the event streams and by polls.
    Events are encoded once and handed to every watcher of the task. Nothing here is needed for correctness.
    """

    def __init__(self) -> None:
        self._progress: dict[str, Progress] = {}
        self._artefacts: dict[str, dict[str, Artefact]] = {}
        self._previews: dict[str, Preview] = {}
        self._watchers: dict[str, set[Watcher]] = {}
        self._encoder = msgspec.json.Encoder()

    def progress(self, task_id: str) -> Progress | None:
        """The latest progress; None while nothing runs."""
        return self._progress.get(task_id)

    def report(self, task_id: str, progress: Progress) -> None:
        """A running task got further."""
        if self._progress.get(task_id) == progress:
            return
        self._progress[task_id] = progress
        self.publish(task_id, "progress", progress)

    def artefacts(self, task_id: str) -> tuple[Artefact, ...]:
        """What a running task has stored so far; its row has them when it succeeded."""
        return tuple(self._artefacts.get(task_id, {}).values())

    def running_artefacts(self) -> Iterator[tuple[str, Artefact]]:
        """What all running tasks have stored so far, each with the id of its task."""
        for task_id, stored in self._artefacts.items():
            for artefact in stored.values():
                yield task_id, artefact

    def stored(self, task_id: str, artefact: Artefact) -> None:
        """A running task has an output."""
        self._artefacts.setdefault(task_id, {})[artefact.key] = artefact
        self.publish(task_id, "output", artefact)

    def withdrawn(self, task_id: str, outputs: Container[tuple[str, int]] | None = None) -> None:
        """What a running task had stored is gone again: all, or what has these node ids and indices."""
        kept = {
            key: artefact
            for key, artefact in self._artefacts.pop(task_id, {}).items()
            if outputs is not None and (artefact.node_id, artefact.index) not in outputs
        }
        if kept:
            self._artefacts[task_id] = kept

    def status(self, task_id: str, status: Status) -> None:
        """A task's status has changed, durably."""
        if status is not Status.RUNNING:
            self._progress.pop(task_id, None)
            self._artefacts.pop(task_id, None)
            self._previews.pop(task_id, None)
        body = {"task_id": task_id, "status": status}
        event = Event(name="status", data=self._encoder.encode(body), final=status.terminal)
        self._hand_out(task_id, event)

    def preview(self, task_id: str) -> Preview | None:
        """The latest picture; None while there is none."""
        return self._previews.get(task_id)

    def show(self, task_id: str, preview: Preview) -> None:
        """A running task shows a picture."""
        self._previews[task_id] = preview
        self._hand_out(task_id, Event(name="preview", picture=preview))

    def publish(self, task_id: str, name: str, data: object) -> None:
        """Tell the watchers; `data` is encoded once, and only if there is one."""
        if task_id in self._watchers:
            self._hand_out(task_id, Event(name=name, data=self._encoder.encode(data)))

    def watched(self, task_id: str) -> bool:
        """Whether anybody watches: what costs something to make need not be made otherwise."""
        return task_id in self._watchers

    @property
    def watchers(self) -> int:
        """How many readers there are."""
        return sum(len(readers) for readers in self._watchers.values())

    def _hand_out(self, task_id: str, event: Event) -> None:
        for watcher in self._watchers.get(task_id, ()):
            watcher.put(event)

    @contextmanager
    def watch(self, task_id: str) -> Iterator[Watcher]:
        """Hear of all that happens to this task from now on: enter first, then read the task's row."""
        watcher = Watcher()
        self._watchers.setdefault(task_id, set()).add(watcher)
        try:
            yield watcher
        finally:
            readers = self._watchers[task_id]
            readers.discard(watcher)
            if not readers:
                del self._watchers[task_id]
