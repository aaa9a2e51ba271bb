"""The queue and the history of ComfyUI, read as they are meant."""

import json
from typing import Any

import pytest

from comfyd.comfy.sightings import HistoryEntry, NodeFailure, QueueView, read_history, read_queue
from comfyd.comfy.wire import Undecodable


def queue_item(number: Any, prompt_id: str) -> list[Any]:
    return [number, prompt_id, {"1": {}}, {"client_id": "c"}, ["9"]]


def history(messages: list[Any], status_str: str | None = "success", **entry: Any) -> bytes:
    status = {"status_str": status_str, "completed": True, "messages": messages}
    return json.dumps(
        {"p": {"prompt": [], "outputs": {"9": {"images": []}}, "status": status, **entry}}
    ).encode()


def read(body: bytes) -> HistoryEntry:
    entry = read_history(body, "p")
    assert entry is not None
    return entry


def test_pending_prompts_are_in_the_order_in_which_they_run() -> None:
    body = json.dumps(
        {
            "queue_running": [queue_item(1, "r")],
            "queue_pending": [
                queue_item(5, "e"),
                queue_item(-2, "a"),
                queue_item(3.5, "c"),
                queue_item(3.5, "b"),
                queue_item("x", "z"),
                queue_item(float("nan"), "y"),
            ],
        }
    ).encode()
    assert read_queue(body) == QueueView(running=("r",), pending=("a", "b", "c", "e", "y", "z"))


@pytest.mark.parametrize("body", [b"", b"{}", b'{"queue_running": [[1]], "queue_pending": []}', b"[]"])
def test_what_is_no_queue_is_refused(body: bytes) -> None:
    with pytest.raises(Undecodable):
        read_queue(body)


def test_a_success_has_outputs_and_times() -> None:
    entry = read(
        history(
            [
                ["execution_start", {"timestamp": 100}],
                ["execution_cached", {}],
                ["execution_success", {"timestamp": 350}],
            ]
        )
    )
    assert entry == HistoryEntry(
        verdict="success", outputs={"9": {"images": []}}, started_at=100, ended_at=350
    )
    assert entry.execution_ms == 250


def test_an_error_says_where_and_why_without_paths() -> None:
    facts = {
        "node_id": "3",
        "node_type": "LoadImage",
        "exception_type": "OSError",
        "exception_message": "cannot open /home/ann/input/x.png\n",
        "timestamp": 9,
    }
    assert read(history([["execution_error", facts]], "error")).error == NodeFailure(
        node_id="3", node_class="LoadImage", exception_type="OSError", message="cannot open x.png"
    )


@pytest.mark.parametrize(
    ("messages", "status_str", "verdict"),
    [
        ([["execution_interrupted", {}]], "error", "interrupted"),
        ([["execution_error", {}]], "success", "error"),
        ([["execution_success", {}]], "error", "success"),
        (
            [["execution_error", {"exception_type": "ExecutionBlocked"}], ["execution_success", {}]],
            "success",
            "success",
        ),
        ([["execution_success", None], ["execution_error", {}]], "success", "error"),
        ([], "success", "success"),
        ([["execution_start", {}]], "error", "error"),
        ([], None, "error"),
    ],
)
def test_the_last_message_is_the_verdict_and_status_str_only_stands_in(
    messages: list[Any], status_str: str | None, verdict: str
) -> None:
    entry = read(history(messages, status_str))
    assert entry.verdict == verdict
    assert (entry.error is not None) == (verdict == "error")
    assert entry.execution_ms is None


def test_an_error_without_a_reason_says_so() -> None:
    assert read(history([["execution_error", {"node_id": 3}]])).error == NodeFailure(
        message="ComfyUI did not say why."
    )


def test_an_entry_without_status_or_outputs_is_an_error() -> None:
    entry = read(b'{"p": {"prompt": [], "outputs": null, "status": null}}')
    assert (entry.verdict, entry.outputs) == ("error", {})


@pytest.mark.parametrize("timestamp", ["x", True, None, float("inf")])
def test_odd_timestamps_are_no_times(timestamp: Any) -> None:
    entry = read(
        history([["execution_start", {"timestamp": timestamp}], ["execution_success", {"timestamp": 5}]])
    )
    assert (entry.started_at, entry.ended_at, entry.execution_ms) == (None, 5, None)


def test_a_clock_set_back_gives_no_negative_time() -> None:
    assert HistoryEntry(verdict="success", started_at=10, ended_at=5).execution_ms == 0


def test_an_empty_history_knows_nothing() -> None:
    assert read_history(b"{}", "p") is None
    assert read_history(history([]), "q") is None


def test_exotic_numbers_in_outputs_do_not_hide_an_entry() -> None:
    entry = read(history([["execution_success", {}]], outputs={"9": {"score": [float("nan")]}}))
    assert entry.outputs == {"9": {"score": [None]}}


@pytest.mark.parametrize(
    ("prompt", "targets"),
    [
        ([3, "p", {"1": {}}, {"client_id": "c"}, ["9", "12"]], ("9", "12")),
        ([3, "p", {"1": {}}, {}, ["9"], "from a later version"], ("9",)),
        ([float("nan"), "p", {"1": {"inputs": {"x": float("inf")}}}, {}, ["9"]], ("9",)),
        (None, None),
        ([], None),
        ([3, "p", {}, {}, [9]], None),
        ({"id": "p"}, None),
    ],
)
def test_an_entry_says_which_outputs_were_to_run(prompt: Any, targets: tuple[str, ...] | None) -> None:
    entry = read(history([["execution_success", {}]], prompt=prompt))
    assert entry.verdict == "success"
    assert entry.targets == targets
