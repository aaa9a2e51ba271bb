"""What ComfyUI says of one prompt, as watchers hear it."""

from typing import Any

import msgspec
import pytest

from comfyd.comfy import messages
from comfyd.listener import Listener
from comfyd.progress import Board
from tests.support.clock import HandClock


async def test_a_sentence_of_a_node_is_a_log_event() -> None:
    board = Board()
    listener = Listener("t", {"1": "SomeApiNode"}, frozenset(), board, HandClock())
    with board.watch("t") as watcher:
        listener(messages.ProgressText(prompt_id="p", node_id="1", text="queued at the partner"))
        event = await watcher.next(timeout=1)
    assert event is not None
    assert event.name == "log"
    assert msgspec.json.decode(event.data) == {"node_id": "1", "message": "queued at the partner"}


GRAPH_NODES = {"5": "forLoopEnd", "9": "SaveImage", "10": "PreviewAny"}
SAVED: dict[str, Any] = {"images": [{"filename": "a_00001_.png"}]}


def hearing(*heard: messages.Message, targets: tuple[str, ...] = ("9",)) -> Listener:
    listener = Listener("t", GRAPH_NODES, frozenset(), Board(), HandClock(), frozenset(targets))
    for message in heard:
        listener(message)
    return listener


TOLD = messages.Executed(prompt_id="p", node="9", output=SAVED)


def test_a_prompt_whose_targets_all_told_what_they_made_has_succeeded() -> None:
    verdict = hearing(messages.Executing(prompt_id="p", node="9"), TOLD).verdict()
    assert verdict is not None
    assert (verdict.verdict, verdict.outputs) == ("success", {"9": SAVED})


def test_a_success_is_one_only_if_every_target_was_reached() -> None:
    success = messages.ExecutionSuccess(prompt_id="p")
    reached = messages.Executing(prompt_id="p", node="10")
    assert hearing(TOLD, success, targets=("9", "10")).verdict() is None
    assert hearing(TOLD, reached, success, targets=("9", "10")).verdict() is not None
    assert hearing(TOLD, targets=()).verdict() is None


def test_an_error_and_an_interrupt_that_were_heard_are_the_end() -> None:
    failed = messages.ExecutionError(prompt_id="p", node_id="5", node_type="X", exception_message="boom")
    verdict = hearing(failed).verdict()
    assert verdict is not None
    assert verdict.error is not None
    assert (verdict.verdict, verdict.error.message) == ("error", "boom")
    interrupted = hearing(TOLD, messages.ExecutionInterrupted(prompt_id="p")).verdict()
    assert interrupted is not None
    assert interrupted.verdict == "interrupted"


@pytest.mark.parametrize(
    "after",
    [
        messages.Executing(prompt_id="p", node="5"),
        messages.Executing(prompt_id="p", node="5.0.9"),  # the second round of a loop, which may save more
        messages.NodeStates(prompt_id="p", nodes={"5.0.9": messages.NodeState(0.0, 1.0, "running")}),
        messages.NodeStates(prompt_id="p", nodes={"10": messages.NodeState(0.0, 1.0, "running")}),
    ],
)
def test_while_something_may_still_be_saved_nothing_is_certain(after: messages.Message) -> None:
    assert hearing(TOLD, after).verdict() is None


async def test_picture_is_kept_whether_anybody_watches_and_names_its_node() -> None:
    board = Board()
    listener = Listener("t", GRAPH_NODES, frozenset(), board, HandClock())
    listener(messages.Executing(prompt_id="p", node="9"))
    for node_id in (None, "5"):
        preview = messages.Preview(prompt_id="p", node_id=node_id, image_type="image/jpeg", data=b"x")
        listener(preview)
        shown = board.preview("t")
        assert shown is not None
        assert (shown.node_id, shown.image_type, shown.data) == (node_id or "9", "image/jpeg", b"x")
