"""What ComfyUI says against a prompt, in one shape for both flavors and without its paths."""

import json
from typing import Any

import pytest

from comfyd.comfy.rejections import cleaned_node_errors, rejection, summary

GRAPH = {
    "2": {"class_type": "Nope", "inputs": {}, "_meta": {"title": "Mine"}},
    "3": {"class_type": "LoadImage", "inputs": {}},
}


def refused(answer: Any, status: int = 400) -> Any:
    return rejection(status, json.dumps(answer).encode(), GRAPH)


OLD = {
    "type": "invalid_prompt",
    "message": "Cannot execute because node Nope does not exist.",
    "details": "Node ID '#2'",
}
NEW = {
    "type": "missing_node_type",
    "message": "Node 'Nope' not found.",
    "details": "Node ID '#2'",
    "extra_info": {"node_id": "2", "class_type": "Nope", "node_title": "Mine"},
}


@pytest.mark.parametrize("error", [OLD, NEW, {**OLD, "extra_info": {}}])
def test_an_unknown_class_is_told_alike_for_both_flavors(error: dict[str, Any]) -> None:
    said = refused({"error": error, "node_errors": []})
    assert said.details == {
        "node_errors": {
            "2": {
                "class_type": "Nope",
                "title": "Mine",
                "errors": [
                    {
                        "type": "missing_node_type",
                        "message": "This ComfyUI has no node class 'Nope'",
                        "input": None,
                    }
                ],
            }
        }
    }
    assert said.message == (
        "ComfyUI refuses the prompt: node 2 \"Mine\" (Nope): This ComfyUI has no node class 'Nope'"
    )


def test_an_unknown_class_of_an_unknown_node_keeps_comfyuis_words() -> None:
    said = refused({"error": {**OLD, "details": "Node ID '#77'"}})
    assert said.details["node_errors"]["77"]["errors"][0]["message"] == OLD["message"]
    said = refused({"error": {**OLD, "details": "somewhere"}})
    assert said.details["errors"] == [{"type": "invalid_prompt", "message": f"{OLD['message']}: somewhere"}]


def test_input_errors_name_node_input_and_value_but_no_path() -> None:
    errors = [
        {
            "type": "custom_validation_failed",
            "message": "Custom validation failed for node",
            "details": "image - Invalid image file: /srv/comfy/input/x.png",
            "extra_info": {
                "input_name": "image",
                "received_value": "/srv/comfy/x.png",
                "traceback": ["/srv/comfy/nodes.py"],
                "exception_type": "E",
            },
        },
        {"type": 3},
        "odd",
    ]
    said = refused(
        {
            "error": {"type": "prompt_outputs_failed_validation", "message": "failed", "details": ""},
            "node_errors": {"3": {"errors": errors, "dependent_outputs": ["9"], "class_type": "LoadImage"}},
        }
    )
    assert said.details == {
        "node_errors": {
            "3": {
                "class_type": "LoadImage",
                "title": None,
                "errors": [
                    {
                        "type": "custom_validation_failed",
                        "message": "Custom validation failed for node: image - Invalid image file: x.png",
                        "input": "image",
                        "received_value": "x.png",
                    },
                    {"type": "invalid", "message": "it gave no reason", "input": None},
                ],
            }
        }
    }
    assert "/srv" not in said.message


def test_a_cycle_is_told_of_the_graph_or_of_its_nodes() -> None:
    error = {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation"}
    old = refused({"error": error, "node_errors": {}})
    assert old.details["errors"] == [error]
    cycle = {
        "type": "dependency_cycle",
        "message": "Dependency cycle detected",
        "details": "2 (Nope) -> 2 (Nope)",
        "extra_info": {"node_id": "2", "cycle_nodes": ["2"]},
    }
    new = refused({"error": error, "node_errors": {"2": {"errors": [cycle], "class_type": "Nope"}}})
    assert new.details["node_errors"]["2"]["errors"][0]["cycle_nodes"] == ["2"]
    assert "errors" not in new.details


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "it gave no reason"),
        (b"<html>", "it gave no reason"),
        (b'{"error": "No prompt"}', "No prompt"),
        (b'{"error": 3, "node_errors": 4}', "it gave no reason"),
    ],
)
def test_a_400_without_sense_is_still_a_rejection(body: bytes, message: str) -> None:
    said = rejection(400, body, {})
    assert said.details == {"node_errors": {}, "errors": [{"type": "invalid_prompt", "message": message}]}


def test_a_prompt_too_long_for_comfyui_is_rejected() -> None:
    assert "length" in refused(None, 413).message


def test_odd_node_errors_are_survived() -> None:
    assert cleaned_node_errors([], {}) == {}
    assert cleaned_node_errors({"1": None, "2": {"errors": 3}}, {"2": {"class_type": "X"}}) == {
        "1": {"class_type": None, "title": None, "errors": []},
        "2": {"class_type": "X", "title": None, "errors": []},
    }
    assert len(cleaned_node_errors({str(number): {} for number in range(1000)}, {})) == 100
    assert summary({"1": {"class_type": None, "title": None, "errors": []}}) == "it gave no reason"
