"""What ComfyUI says of one prompt, turned into progress and previews; never decides how the prompt ended.

It remembers what was said of outputs and of the end: that is asked for only where ComfyUI itself forgot.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from comfyd.clock import Clock
from comfyd.comfy import messages
from comfyd.comfy.sightings import HistoryEntry, NodeFailure
from comfyd.progress import Board, Preview, ProgressTracker

REPORT_MS: Final = 40
"""How often progress within one node is reported at most: ComfyUI may send thousands of steps a second."""


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """An image that came over the socket: for some nodes the only way out (SaveImageWebsocket)."""

    node_id: str
    image_type: str
    data: bytes


class Listener:
    """Hears the messages of one attempt and lives as long. The socket's reader calls it, so it never waits.

    `nodes` are the needed nodes and their classes, `image_nodes` those whose images come over the socket,
    `targets` those for whose sake the others run; none where that is not known.
    """

    def __init__(
        self,
        task_id: str,
        nodes: Mapping[str, str],
        image_nodes: frozenset[str],
        board: Board,
        clock: Clock,
        targets: frozenset[str] = frozenset(),
    ) -> None:
        self._task_id = task_id
        self._nodes = frozenset(nodes)
        self._targets = targets
        self._tracker = ProgressTracker(nodes)
        self._image_nodes = image_nodes
        self._board = board
        self._clock = clock
        self._reported_at = 0
        self._announced: dict[str, int] = {}
        self._reached: set[str] = set()
        self._current: str | None = None
        self._states: Mapping[str, messages.NodeState] = {}
        self._outputs: dict[str, Any] = {}
        self._end: HistoryEntry | None = None
        self.frames: list[Frame] = []
        self.running = False
        self.started: Callable[[], None] = _nothing
        """Called at the first sign of execution."""
        self.made: Callable[[str, dict[str, Any]], None] = _nothing_made
        """Called with a node and its outputs, as history will have them, when it has run."""
        self.last_sign = clock.monotonic()

    def __call__(self, message: messages.Message) -> None:
        """Take one message."""
        self.last_sign = self._clock.monotonic()
        if not self.running:
            self.running = True
            self.started()
        match message:
            case messages.ExecutionCached(nodes=nodes):
                self._tracker.cached(nodes)
                self._reached.update(nodes)
                self.report()
            case messages.Executing(node=str(node)):
                self._tracker.started(node)
                self._reached.add(node)
                self._current = node
                self.report()
            case messages.Executed(node=node, output=output):
                self._tracker.finished(node)
                self._outputs[node] = output
                self.made(node, output)
                self.report()
            case messages.NodeProgress():
                self._announced[message.node] = int(message.maximum)
                self._tracker.stepped(message.node, message.value, message.maximum)
                self._report_sometimes()
            case messages.NodeStates(nodes=states):
                self._take_states(states)
            case messages.Preview():
                self._take_picture(message)
            case messages.ProgressText(node_id=node, text=text):
                self._board.publish(self._task_id, "log", {"node_id": node, "message": text})
            case messages.ExecutionSuccess():
                self._tracker.complete()
                self._end = HistoryEntry(verdict="success")
                self.report()
            case messages.ExecutionError():
                self._end = HistoryEntry(verdict="error", error=_failure(message))
            case messages.ExecutionInterrupted():
                self._end = HistoryEntry(verdict="interrupted")
            case _:
                pass  # the end is the poll's to judge; everything else says nothing of progress

    def _take_states(self, states: Mapping[str, messages.NodeState]) -> None:
        self._states = states
        for node, state in states.items():
            self._announced[node] = int(state.maximum)
            if state.state == "finished":
                self._tracker.finished(node)
            else:
                self._tracker.stepped(node, state.value, state.maximum)
        self._report_sometimes()

    def _take_picture(self, picture: messages.Preview) -> None:
        if picture.node_id is not None and picture.node_id in self._image_nodes:
            self.frames.append(
                Frame(node_id=picture.node_id, image_type=picture.image_type, data=picture.data)
            )
        shown = Preview(
            node_id=picture.node_id or self._current, image_type=picture.image_type, data=picture.data
        )
        self._board.show(self._task_id, shown)

    def say(self, message: str) -> None:
        """Tell the watchers what is being waited for."""
        self._tracker.say(message)
        self.report()

    def report(self) -> None:
        """Put the progress on the board."""
        self._reported_at = self._clock.monotonic()
        self._board.report(self._task_id, self._tracker.snapshot())

    def _report_sometimes(self) -> None:
        if self._clock.monotonic() - self._reported_at >= REPORT_MS:
            self.report()

    def verdict(self) -> HistoryEntry | None:
        """How the prompt ended, as far as was heard; None where that does not say it.

        It succeeded if ComfyUI said so, or if all targets told what they made and nothing else is at work:
        nothing of worth comes after that.
        """
        end = self._end
        if end is not None and end.verdict != "success":
            return end
        told = self._outputs.keys() if end is None else self._outputs.keys() | self._reached
        if not self._targets or not self._targets <= told or (end is None and self._may_go_on()):
            return None
        return HistoryEntry(verdict="success", outputs=dict(self._outputs))

    def _may_go_on(self) -> bool:
        """Whether something that was heard of has not told what it made. Unfolded nodes may be followed."""
        at_work = {node for node, state in self._states.items() if state.state == "running"}
        if self._current is not None:
            at_work.add(self._current)
        heard = self._reached | self._states.keys() | self._outputs.keys()
        return not heard <= self._nodes or not at_work <= self._outputs.keys()

    def whole(self, *, intact: bool) -> bool:
        """Whether every image that the socket was to bring has come.

        `intact` says that the connection held until the end: a node that said nothing then made nothing.
        """
        least = 0 if intact else 1
        return all(
            sum(frame.node_id == node for frame in self.frames) >= self._announced.get(node, least)
            for node in self._image_nodes
        )


def _failure(error: messages.ExecutionError) -> NodeFailure:
    return NodeFailure(
        node_id=error.node_id,
        node_class=error.node_type,
        exception_type=error.exception_type,
        message=error.exception_message or "ComfyUI did not say why.",
    )


def _nothing() -> None:
    """What happens at a start that nobody waits for."""


def _nothing_made(_: str, __: dict[str, Any]) -> None:
    """What happens to outputs that nobody waits for."""
