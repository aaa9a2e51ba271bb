"""Frames of ComfyUI's WebSocket become typed messages; nothing that is sent can stop the reader."""

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.comfy.messages import (
    Executed,
    Executing,
    ExecutionCached,
    ExecutionError,
    ExecutionInterrupted,
    ExecutionStart,
    ExecutionSuccess,
    MessageReader,
    NodeBlocked,
    NodeProgress,
    NodeState,
    NodeStates,
    Preview,
    ProgressText,
    QueueChanged,
)

P = "11111111-1111-4111-8111-111111111111"


def text(kind: str, data: Any) -> str:
    return json.dumps({"type": kind, "data": data})


STATE = {"value": 1, "max": 4.0, "state": "running", "node_id": "4", "prompt_id": P, "parent_node_id": None}


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("status", {"status": {"exec_info": {"queue_remaining": 3}}, "sid": "x"}, QueueChanged(remaining=3)),
        ("execution_start", {"prompt_id": P, "timestamp": 5}, ExecutionStart(prompt_id=P)),
        (
            "execution_cached",
            {"nodes": ["1", "2"], "prompt_id": P},
            ExecutionCached(prompt_id=P, nodes=("1", "2")),
        ),
        (
            "executing",
            {"node": "9", "display_node": "9", "prompt_id": P},
            Executing(prompt_id=P, node="9"),
        ),
        ("executing", {"node": None, "prompt_id": P}, Executing(prompt_id=P, node=None)),
        (
            "progress",
            {"value": 1, "max": 768, "prompt_id": P, "node": "4"},
            NodeProgress(prompt_id=P, node="4", value=1.0, maximum=768.0),
        ),
        (
            "progress_state",
            {"prompt_id": P, "nodes": {"4": STATE}},
            NodeStates(prompt_id=P, nodes={"4": NodeState(1.0, 4.0, "running")}),
        ),
        (
            "executed",
            {"node": "9", "output": {"images": [1]}, "prompt_id": P},
            Executed(prompt_id=P, node="9", output={"images": [1]}),
        ),
        ("executed", {"node": "9", "output": None, "prompt_id": P}, Executed(prompt_id=P, node="9")),
        ("execution_success", {"prompt_id": P}, ExecutionSuccess(prompt_id=P)),
        (
            "execution_interrupted",
            {"prompt_id": P, "node_id": "11"},
            ExecutionInterrupted(prompt_id=P, node_id="11"),
        ),
        (
            "execution_error",
            {
                "prompt_id": P,
                "node_id": "3",
                "node_type": "LoadImage",
                "exception_type": "OSError",
                "exception_message": "cannot read /home/ann/in/x.png\n",
                "traceback": ["/home/ann"],
            },
            ExecutionError(
                prompt_id=P,
                node_id="3",
                node_type="LoadImage",
                exception_type="OSError",
                exception_message="cannot read x.png",
            ),
        ),
        ("execution_error", {"prompt_id": P}, ExecutionError(prompt_id=P)),
        (
            "execution_error",
            {"prompt_id": P, "node_id": "3", "exception_type": "ExecutionBlocked"},
            NodeBlocked(prompt_id=P, node_id="3"),
        ),
    ],
)
def test_each_kind_becomes_its_message(kind: str, data: Any, message: object) -> None:
    reader = MessageReader()
    assert reader.text(text(kind, data)) == message
    assert reader.malformed == 0


@pytest.mark.parametrize(
    "frame",
    [
        text("logs", {"entries": []}),
        text("feature_flags", {"supports_preview_metadata": True}),
        text("executing", {"node": "10"}),
        '{"type": "custom"}',
    ],
)
def test_what_concerns_no_prompt_is_ignored(frame: str) -> None:
    reader = MessageReader()
    assert reader.text(frame) is None
    assert reader.malformed == 0


@pytest.mark.parametrize(
    "frame",
    [
        "",
        "[]",
        "{",
        "null",
        "[" * 100_000,
        '{"data": {}}',
        text("progress", {"value": "x", "max": 1, "prompt_id": P, "node": "4"}),
        text("progress", {"value": float("nan"), "max": 1, "prompt_id": P, "node": "4"}),
        '{"type":"progress","data":{"value":1e999,"max":1,"prompt_id":"p","node":"4"}}',
        f'{{"type":"progress","data":{{"value":{"9" * 400},"max":1,"prompt_id":"p","node":"4"}}}}',
        text("progress_state", {"prompt_id": P, "nodes": []}),
        text("executed", {"prompt_id": 3, "node": "9"}),
        text("execution_start", None),
        text("status", {}),
    ],
)
def test_what_makes_no_sense_is_ignored_and_counted(frame: str) -> None:
    reader = MessageReader()
    assert reader.text(frame) is None
    assert reader.malformed == 1


def test_exotic_numbers_in_an_output_do_not_lose_it() -> None:
    frame = text("executed", {"node": "9", "prompt_id": P, "output": {"score": [float("nan")], "n": [1]}})
    assert MessageReader().text(frame) == Executed(prompt_id=P, node="9", output={"score": [None], "n": [1]})


def test_a_node_without_finite_progress_does_not_hide_the_others() -> None:
    huge = f'{{"value":{"9" * 400},"max":1}}'
    frame = (
        '{"type":"progress_state","data":{"prompt_id":"p","nodes":'
        f'{{"1":{{"value":1,"max":2}},"2":{huge},"3":{{"value":1,"max":NaN}}}}}}}}'
    )
    assert MessageReader().text(frame) == NodeStates(
        prompt_id="p", nodes={"1": NodeState(1.0, 2.0, "running")}
    )


def old_preview(image_format: int = 1, data: bytes = b"jpeg") -> bytes:
    return struct.pack(">II", 1, image_format) + data


def new_preview(head: dict[str, Any], data: bytes = b"png") -> bytes:
    raw = json.dumps(head).encode()
    return struct.pack(">II", 4, len(raw)) + raw + data


def test_a_preview_with_metadata_names_its_prompt_and_node() -> None:
    frame = new_preview({"prompt_id": P, "node_id": "9", "image_type": "image/png", "extra": 1})
    assert MessageReader().binary(frame) == Preview(
        prompt_id=P, node_id="9", image_type="image/png", data=b"png"
    )


def test_an_old_preview_belongs_to_what_ran_last() -> None:
    reader = MessageReader()
    assert reader.binary(old_preview()) is None
    reader.text(text("executing", {"node": "4", "prompt_id": P}))
    assert reader.binary(old_preview()) == Preview(
        prompt_id=P, node_id="4", image_type="image/jpeg", data=b"jpeg"
    )
    reader.text(text("progress", {"value": 1, "max": 2, "prompt_id": "q", "node": "5"}))
    assert reader.binary(old_preview(2)) == Preview(
        prompt_id="q", node_id="5", image_type="image/png", data=b"jpeg"
    )
    reader.text(text("executing", {"node": None, "prompt_id": "q"}))
    assert reader.binary(old_preview()) is None
    assert reader.malformed == 0


def test_an_old_preview_after_a_start_or_node_states_has_a_prompt_but_no_node() -> None:
    reader = MessageReader()
    reader.text(text("execution_start", {"prompt_id": P}))
    preview = reader.binary(old_preview())
    assert isinstance(preview, Preview)
    assert (preview.prompt_id, preview.node_id) == (P, None)
    reader.text(text("progress_state", {"prompt_id": "q", "nodes": {}}))
    preview = reader.binary(old_preview())
    assert isinstance(preview, Preview)
    assert (preview.prompt_id, preview.node_id) == ("q", None)


def test_node_states_do_not_hide_the_running_node() -> None:
    reader = MessageReader()
    reader.text(text("executing", {"node": "4", "prompt_id": P}))
    reader.text(text("progress_state", {"prompt_id": P, "nodes": {}}))
    preview = reader.binary(old_preview())
    assert isinstance(preview, Preview)
    assert preview.node_id == "4"


def test_a_progress_text_belongs_to_what_runs() -> None:
    frame = struct.pack(">II", 3, 1) + b"4" + b"on /srv/x/y"
    reader = MessageReader()
    assert reader.binary(frame) is None
    reader.text(text("executing", {"node": "4", "prompt_id": P}))
    assert reader.binary(frame) == ProgressText(prompt_id=P, node_id="4", text="on y")


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\0\0",
        struct.pack(">I", 1),
        old_preview(7),
        struct.pack(">II", 3, 9) + b"4",
        struct.pack(">II", 4, 2**31) + b"{}",
        new_preview({"prompt_id": P, "image_type": "text/html"}),
        new_preview({"image_type": "image/png"}),
        struct.pack(">II", 4, 4) + b"NaN{",
    ],
)
def test_broken_binary_frames_are_ignored_and_counted(frame: bytes) -> None:
    reader = MessageReader()
    assert reader.binary(frame) is None
    assert reader.malformed == 1


def test_a_text_that_is_no_text_is_counted() -> None:
    reader = MessageReader()
    reader.text(text("executing", {"node": "4", "prompt_id": P}))
    assert reader.binary(struct.pack(">II", 3, 1) + b"4\xff") is None
    assert reader.malformed == 1


def test_unknown_binary_frames_are_ignored() -> None:
    reader = MessageReader()
    assert reader.binary(struct.pack(">I", 99) + b"x") is None
    assert reader.malformed == 0


@given(st.binary(max_size=40), st.text(max_size=40))
def test_no_frame_stops_the_reader(binary: bytes, frame: str) -> None:
    reader = MessageReader()
    reader.binary(binary)
    for kind in (1, 3, 4):
        reader.binary(struct.pack(">I", kind) + binary)
    reader.text(frame)
