"""What POST /prompt refuses, and how it says so; never what happens to a prompt that was taken."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.conformance import graphs
from tests.conformance.graphs import node

if TYPE_CHECKING:
    from tests.conformance.raw_client import Graph, Server

FAILED = "prompt_outputs_failed_validation"


async def refusal(server: Server, prompt: Any, **fields: Any) -> dict[str, Any]:
    """The body of the 400 this prompt gets; its shape is checked."""
    answer = await server.post("/prompt", {"prompt": prompt, **fields})
    assert answer.status == 400, answer.body
    document: dict[str, Any] = answer.json()
    assert set(document) == {"error", "node_errors"}
    assert set(document["error"]) == {"type", "message", "details", "extra_info"}
    for problems in document["node_errors"].values():
        assert set(problems) == {"errors", "dependent_outputs", "class_type"}
        for error in problems["errors"]:
            assert set(error) == {"type", "message", "details", "extra_info"}
    return document


async def single_error(server: Server, prompt: Graph, culprit: str) -> dict[str, Any]:
    """The one error of the one node that is to blame."""
    document = await refusal(server, prompt)
    assert document["error"]["type"] == FAILED
    assert list(document["node_errors"]) == [culprit]
    problems = document["node_errors"][culprit]
    assert problems["dependent_outputs"] == ["9"]
    assert problems["class_type"] == prompt[culprit]["class_type"]
    (error,) = problems["errors"]
    found: dict[str, Any] = error
    return found


def saving(source: dict[str, Any], **more: dict[str, Any]) -> Graph:
    """`source` as node 1, saved by node 9."""
    return {"1": source, **more, "9": node("SaveImage", images=["1", 0], filename_prefix=graphs.prefix())}


async def test_a_body_without_prompt_is_refused(server: Server) -> None:
    bodies: list[Any] = [{}, [], "x", {"client_id": "c"}]
    for body in bodies:
        answer = await server.request("POST", "/prompt", json=body)
        assert answer.status == 400
        assert answer.json()["error"]["type"] == "no_prompt"
        assert answer.json()["node_errors"] == {}


async def test_a_class_that_is_not_there_is_refused(server: Server) -> None:
    graph = graphs.picture()
    graph["4"] = node("NoSuchNode")  # stray: the class is checked all the same
    graph["4"]["_meta"] = {"title": "my node"}
    document = await refusal(server, graph)
    error = document["error"]
    assert (error["details"], document["node_errors"]) == ("Node ID '#4'", {})
    if server.facts.modern:
        assert error["type"] == "missing_node_type"
        assert error["extra_info"] == {"node_id": "4", "class_type": "NoSuchNode", "node_title": "my node"}
    else:
        assert error["type"] == "invalid_prompt"
        assert "NoSuchNode" in error["message"]
        assert error["extra_info"] == {}


async def test_a_node_without_class_is_refused(server: Server) -> None:
    graph = graphs.picture()
    del graph["9"]["class_type"]
    document = await refusal(server, graph)
    error = document["error"]
    assert error["type"] == ("missing_node_type" if server.facts.modern else "invalid_prompt")
    assert (error["details"], document["node_errors"]) == ("Node ID '#9'", {})


@pytest.mark.parametrize("prompt", [{}, {"1": graphs.empty_image()}])
async def test_a_graph_without_outputs_is_refused(server: Server, prompt: Graph) -> None:
    document = await refusal(server, prompt)
    assert (document["error"]["type"], document["node_errors"]) == ("prompt_no_outputs", {})


@pytest.mark.parametrize("targets", [[], ["1"], ["nobody"]])
async def test_targets_that_are_no_outputs_are_refused(server: Server, targets: list[str]) -> None:
    document = await refusal(server, graphs.picture(), partial_execution_targets=targets)
    assert document["error"]["type"] == "prompt_no_outputs"


async def test_missing_required_input(server: Server) -> None:
    graph = graphs.picture()
    del graph["9"]["inputs"]["images"]
    error = await single_error(server, graph, "9")
    assert (error["type"], error["details"]) == ("required_input_missing", "images")
    assert error["extra_info"] == {"input_name": "images"}
    assert "images" in (await refusal(server, graph))["error"]["details"], (
        "filled because 9 is an output node"
    )


async def test_a_default_does_not_make_an_input_optional(server: Server) -> None:
    graph = graphs.picture()
    del graph["1"]["inputs"]["width"]
    error = await single_error(server, graph, "1")
    assert (error["type"], error["details"]) == ("required_input_missing", "width")
    assert (await refusal(server, graph))["error"]["details"] == ""


async def test_value_that_is_not_in_the_list(server: Server) -> None:
    graph = saving(
        node("ImageScale", image=["2", 0], upscale_method="nope", width=8, height=8, crop="disabled"),
        **{"2": graphs.empty_image()},
    )
    error = await single_error(server, graph, "1")
    assert error["type"] == "value_not_in_list"
    assert error["details"].startswith("upscale_method: 'nope' not in ['nearest-exact', ")
    assert error["extra_info"]["input_name"] == "upscale_method"
    assert error["extra_info"]["received_value"] == "nope"
    assert error["extra_info"]["input_config"][0][0] == "nearest-exact"


async def test_model_that_is_not_there(server: Server) -> None:
    graph: Graph = {
        "2": node("CheckpointLoaderSimple", ckpt_name="no-such-model.safetensors"),
        "3": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "1": node("VAEDecode", samples=["3", 0], vae=["2", 2]),
        "9": node("SaveImage", images=["1", 0], filename_prefix="x"),
    }
    error = await single_error(server, graph, "2")
    assert error["type"] == "value_not_in_list"
    assert error["details"].startswith("ckpt_name: 'no-such-model.safetensors' not in [")


async def test_input_file_that_is_not_there(server: Server) -> None:
    error = await single_error(server, saving(node("LoadImage", image="no-such-file.png")), "1")
    assert (error["type"], error["details"]) == (
        "custom_validation_failed",
        "image - Invalid image file: no-such-file.png",
    )
    assert error["extra_info"]["input_name"] == "image"


async def test_link_of_the_wrong_type(server: Server) -> None:
    graph = saving(node("EmptyLatentImage", width=64, height=64, batch_size=1))
    error = await single_error(server, graph, "9")
    assert (error["type"], error["details"]) == (
        "return_type_mismatch",
        "images, received_type(LATENT) mismatch input_type(IMAGE)",
    )
    assert error["extra_info"]["received_type"] == "LATENT"
    assert error["extra_info"]["linked_node"] == ["1", 0]
    assert error["extra_info"]["input_config"][0] == "IMAGE"


@pytest.mark.parametrize("value", ["abc", None, {"a": 1}])
async def test_value_that_is_no_number(server: Server, value: Any) -> None:
    graph = graphs.picture()
    graph["1"]["inputs"]["width"] = value
    error = await single_error(server, graph, "1")
    assert error["type"] == "invalid_input_type"
    assert error["details"].startswith("width, ")
    assert error["extra_info"]["input_name"] == "width"
    assert error["extra_info"]["received_value"] == value
    assert error["extra_info"]["exception_message"]


@pytest.mark.parametrize(
    ("value", "error_type"), [(0, "value_smaller_than_min"), (16385, "value_bigger_than_max")]
)
async def test_value_out_of_range(server: Server, value: int, error_type: str) -> None:
    graph = graphs.picture()
    graph["1"]["inputs"]["width"] = value
    error = await single_error(server, graph, "1")
    assert (error["type"], error["details"]) == (error_type, "width")
    assert error["extra_info"]["received_value"] == value
    assert str(value) in error["message"]


async def test_one_node_can_carry_several_errors(server: Server) -> None:
    graph = graphs.picture()
    graph["1"]["inputs"].update(width=0, height=16385, color="red")
    document = await refusal(server, graph)
    errors = document["node_errors"]["1"]["errors"]
    assert sorted(error["type"] for error in errors) == [
        "invalid_input_type",
        "value_bigger_than_max",
        "value_smaller_than_min",
    ]


@pytest.mark.parametrize("link", [["1"], [], ["1", 0, 0]])
async def test_link_that_is_no_pair(server: Server, link: list[Any]) -> None:
    graph = graphs.picture()
    graph["9"]["inputs"]["images"] = link
    error = await single_error(server, graph, "9")
    assert (error["type"], error["details"]) == ("bad_linked_input", "images")
    assert error["extra_info"]["received_value"] == link


@pytest.mark.parametrize(
    ("link", "exception", "details"),
    [
        (["7", 0], "KeyError", "'7'"),
        ([1, 0], "KeyError", "1"),
        (["1", 5], "IndexError", "tuple index out of range"),
        (["1", "0"], "TypeError", None),
    ],
)
async def test_link_to_nothing(server: Server, link: list[Any], exception: str, details: str | None) -> None:
    graph = graphs.picture()
    graph["9"]["inputs"]["images"] = link
    error = await single_error(server, graph, "9")
    assert error["type"] == "exception_during_validation"
    assert error["extra_info"]["exception_type"] == exception
    assert all(isinstance(line, str) for line in error["extra_info"]["traceback"])
    if details is not None:
        assert error["details"] == details


async def test_a_negative_slot_counts_from_the_end(server: Server) -> None:
    graph = graphs.picture()
    graph["9"]["inputs"]["images"] = ["1", -1]
    answer = await server.post("/prompt", {"prompt": graph})
    assert (answer.status, answer.json()["node_errors"]) == (200, {})


async def test_a_node_on_the_path_needs_inputs(server: Server) -> None:
    graph = graphs.picture()
    del graph["1"]["inputs"]
    error = await single_error(server, graph, "1")
    assert (error["type"], error["details"]) == ("exception_during_inner_validation", "'inputs'")
    assert error["extra_info"]["linked_node"] == ["1", 0]
    assert error["extra_info"]["exception_type"] == "KeyError"


async def test_an_output_node_needs_inputs(server: Server) -> None:
    graph = graphs.picture()
    del graph["9"]["inputs"]
    error = await single_error(server, graph, "9")
    assert (error["type"], error["details"]) == ("exception_during_validation", "'inputs'")


async def test_a_cycle_is_refused(server: Server) -> None:
    graph = saving(node("ImageInvert", image=["2", 0]), **{"2": node("ImageInvert", image=["1", 0])})
    document = await refusal(server, graph)
    assert document["error"]["type"] == FAILED
    if not server.facts.modern:
        assert (document["error"]["details"], document["node_errors"]) == ("", {})
        return
    assert set(document["node_errors"]) == {"1", "2"}
    for problems in document["node_errors"].values():
        (error,) = problems["errors"]
        assert error["type"] == "dependency_cycle"
        assert error["details"].count("(ImageInvert) -> ") == 2
        assert sorted(error["extra_info"]["cycle_nodes"]) == ["1", "2"]


async def test_a_cycle_among_stray_nodes_does_no_harm(server: Server) -> None:
    graph = graphs.picture()
    graph["4"] = node("ImageInvert", image=["5", 0])
    graph["5"] = node("ImageInvert", image=["4", 0])
    run = await server.run(graph)
    assert run.verdict == "execution_success"
    assert {message["node"] for message in run.of_kind("executing")} == {"1", "9", None}


async def test_inputs_of_stray_nodes_are_not_checked(server: Server) -> None:
    graph = graphs.picture()
    graph["4"] = node("ImageInvert", image=["nobody", 7])
    graph["5"] = node("ImageScale")
    assert (await server.run(graph)).verdict == "execution_success"


async def test_new_style_choices_are_checked_only_by_newer_servers(server: Server) -> None:
    graph: Graph = {
        "1": graphs.empty_image(64),
        "9": node(
            "SaveWEBM", images=["1", 0], filename_prefix=graphs.prefix(), codec="nope", fps=12.0, crf=32.0
        ),
    }
    answer = await server.post("/prompt", {"prompt": graph})
    spec = (await server.get("/object_info/SaveWEBM")).json()["SaveWEBM"]["input"]["required"]["codec"]
    if spec[0] == "COMBO" and not server.facts.modern:
        assert answer.status == 200
        entry = await server.finished(answer.json()["prompt_id"])
        assert entry["status"]["messages"][-1][0] == "execution_error"
    else:
        assert answer.status == 400
        (error,) = answer.json()["node_errors"]["9"]["errors"]
        assert error["type"] == "value_not_in_list"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"5",
        b"{",
        b"\xff\xfe",
        b'{"prompt": null}',
        b'{"prompt": "x"}',
        b'{"prompt": 5}',
        b'{"prompt": {"1": 5}}',
        b'{"prompt": {"1": null}}',
        b"[" * 200_000,
    ],
    ids=repr,
)
async def test_malformed_bodies_crash_the_handler(server: Server, body: bytes) -> None:
    answer = await server.request("POST", "/prompt", data=body)
    assert (answer.status, b"Server got itself in trouble" in answer.body) == (500, True)
    assert answer.headers["Content-Type"].startswith("text/plain")


async def test_a_workflow_in_ui_format_crashes_the_handler(server: Server) -> None:
    workflow = {"last_node_id": 9, "last_link_id": 9, "nodes": [{"id": 1}], "links": [], "version": 0.4}
    assert (await server.post("/prompt", {"prompt": workflow})).status == 500


async def test_a_list_as_prompt_never_passes(server: Server) -> None:
    answer = await server.post("/prompt", {"prompt": []})
    if server.facts.modern:
        assert answer.status == 500
    else:
        assert (answer.status, answer.json()["error"]["type"]) == (400, "prompt_no_outputs")


@pytest.mark.parametrize("extra", [[], "x", 5, None])
async def test_extra_data_must_be_an_object(server: Server, extra: Any) -> None:
    answer = await server.post("/prompt", {"prompt": graphs.picture(), "extra_data": extra})
    assert answer.status == 500
    assert await server.queue() == ([], [])


async def test_the_content_type_of_a_prompt_does_not_matter(server: Server) -> None:
    body = json.dumps({"prompt": graphs.picture()})
    answer = await server.request("POST", "/prompt", data=body, headers={"Content-Type": "text/plain"})
    assert answer.status == 200
