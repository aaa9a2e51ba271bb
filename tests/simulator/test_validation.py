"""Every refusal of POST /prompt has ComfyUI's shape, in both flavors."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from comfyd.simulator.catalog import Catalog
from comfyd.simulator.folders import Folders
from comfyd.simulator.options import SimulatorOptions
from comfyd.simulator.validation import Verdict, check_prompt, type_name, types_match
from tests.simulator.rig import MODERN, node, picture

Graph = dict[str, Any]


@pytest.fixture
def folders(tmp_path: Any) -> Folders:
    return Folders(tmp_path)


def check(graph: Any, folders: Folders, flavor: Any = "0.3.75", targets: Any = None) -> Verdict:
    options = SimulatorOptions(flavor=flavor)
    catalog = Catalog(options, folders)
    return check_prompt(copy.deepcopy(graph), targets, catalog, folders, options.behaviour)


def saver(source: Any) -> Graph:
    return node("SaveImage", images=source, filename_prefix="x")


def image(**inputs: Any) -> Graph:
    given = {"width": 8, "height": 8, "batch_size": 1, "color": 0, **inputs}
    return node("EmptyImage", **{name: value for name, value in given.items() if value != "left out"})


def scaled(source: str, method: Any = "area") -> Graph:
    return node("ImageScale", image=[source, 0], upscale_method=method, width=8, height=8, crop="center")


def loaded(**inputs: Any) -> Graph:
    return {"1": node("LoadImage", **inputs), "9": saver(["1", 0])}


CASES: dict[str, tuple[Graph, str, str]] = {
    "missing": ({"1": image(width="left out"), "9": saver(["1", 0])}, "1", "required_input_missing"),
    "link length": ({"9": saver(["1"])}, "9", "bad_linked_input"),
    "mismatch": ({"1": node("VAELoader", vae_name="x"), "9": saver(["1", 0])}, "9", "return_type_mismatch"),
    "no such node": ({"9": saver(["7", 0])}, "9", "exception_during_validation"),
    "no such slot": ({"1": image(), "9": saver(["1", 3])}, "9", "exception_during_validation"),
    "inner": (
        {"1": {"class_type": "EmptyImage"}, "9": saver(["1", 0])},
        "1",
        "exception_during_inner_validation",
    ),
    "not a number": ({"1": image(width="x"), "9": saver(["1", 0])}, "1", "invalid_input_type"),
    "small": ({"1": image(width=0), "9": saver(["1", 0])}, "1", "value_smaller_than_min"),
    "large": ({"1": image(width=99999), "9": saver(["1", 0])}, "1", "value_bigger_than_max"),
    "combo": ({"1": image(), "2": scaled("1", "nope"), "9": saver(["2", 0])}, "2", "value_not_in_list"),
    "no file": (loaded(image="none.png"), "1", "custom_validation_failed"),
    "no file input": (loaded(), "1", "exception_during_inner_validation"),
    "file link": (loaded(image=["9", 0]), "1", "exception_during_inner_validation"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_input_problem_is_told_at_its_node(case: str, folders: Folders) -> None:
    graph, node_id, kind = CASES[case]
    verdict = check(graph, folders)
    assert verdict.error is not None
    assert verdict.error["type"] == "prompt_outputs_failed_validation"
    entry = verdict.node_errors[node_id]
    assert kind in [error["type"] for error in entry["errors"]]
    assert (entry["dependent_outputs"], entry["class_type"]) == (["9"], graph[node_id]["class_type"])


def test_values_are_coerced_in_place(folders: Folders) -> None:
    options = SimulatorOptions()
    graph = {"1": image(width="64", height=6.9, color={"__value__": 3}), "9": saver(["1", 0])}
    verdict = check_prompt(graph, None, Catalog(options, folders), folders, options.behaviour)
    assert verdict.outputs == ["9"]
    assert graph["1"]["inputs"] == {"width": 64, "height": 6, "batch_size": 1, "color": 3}


def test_long_lists_are_not_quoted(folders: Folders) -> None:
    graph = {
        "1": node("KSampler", seed=0, steps=1, cfg=1, sampler_name="nope", scheduler="simple", denoise=1),
        "2": node("VAELoader", vae_name="pixel_space"),
        "3": node("VAEDecode", samples=["1", 0], vae=["2", 0]),
        "9": saver(["3", 0]),
    }
    errors = check(graph, folders).node_errors["1"]["errors"]
    (wrong,) = [error for error in errors if error["type"] == "value_not_in_list"]
    assert wrong["extra_info"]["input_config"] is None
    assert "list of length" in wrong["details"]


@pytest.mark.parametrize("graph", [{}, {"1": image()}, []])
def test_nothing_to_show_is_refused(graph: Any, folders: Folders) -> None:
    error = check(graph, folders).error
    assert error is not None
    assert error["type"] == "prompt_no_outputs"


def test_targets_choose_the_outputs(folders: Folders) -> None:
    graph = picture() | {"8": saver(["1", 0])}
    assert check(graph, folders, targets=["8"]).outputs == ["8"]
    refused = check(graph, folders, targets=["1"]).error
    assert refused is not None


def test_valid_outputs_run_beside_broken_ones(folders: Folders) -> None:
    graph = picture() | {"8": node("SaveImage", images=["1", 0])}
    verdict = check(graph, folders)
    assert (verdict.error, verdict.outputs, list(verdict.node_errors)) == (None, ["9"], ["8"])


@pytest.mark.parametrize(
    ("unknown", "title"),
    [
        ({"inputs": {}}, None),
        ({"class_type": "Nope", "inputs": {}}, None),
        ({"class_type": "Nope", "inputs": {}, "_meta": {"title": "Mine"}}, "Mine"),
    ],
)
def test_unknown_classes_by_flavor(unknown: Graph, title: str | None, folders: Folders) -> None:
    graph = {"2": unknown}
    classic, modern = check(graph, folders).error, check(graph, folders, MODERN).error
    assert classic is not None
    assert modern is not None
    assert (classic["type"], classic["details"]) == ("invalid_prompt", "Node ID '#2'")
    assert modern["type"] == "missing_node_type"
    assert modern["extra_info"] == {
        "node_id": "2",
        "class_type": unknown.get("class_type"),
        "node_title": title,
    }


def test_cycles_by_flavor(folders: Folders) -> None:
    graph = {
        "1": node("ImageInvert", image=["2", 0]),
        "2": node("ImageInvert", image=["1", 0]),
        "9": saver(["1", 0]),
    }
    classic, modern = check(graph, folders), check(graph, folders, MODERN)
    assert classic.error is not None
    assert (classic.error["details"], classic.node_errors) == ("", {})
    assert set(modern.node_errors) == {"1", "2"}
    (error,) = modern.node_errors["1"]["errors"]
    assert error["type"] == "dependency_cycle"
    assert error["details"] == "1 (ImageInvert) -> 2 (ImageInvert) -> 1 (ImageInvert)"
    assert error["extra_info"] == {"node_id": "1", "cycle_nodes": ["1", "2"]}


def test_new_combos_are_only_checked_by_the_modern_flavor(folders: Folders) -> None:
    film = node("SaveWEBM", images=["1", 0], filename_prefix="x", codec="nope", fps=1, crf=1)
    graph = {"1": image(), "9": film}
    assert check(graph, folders).error is None
    assert check(graph, folders, MODERN).node_errors["9"]["errors"][0]["type"] == "value_not_in_list"


@pytest.mark.parametrize("inputs", [None, [], "x"])
def test_malformed_stray_nodes_raise_early_in_the_modern_flavor(inputs: Any, folders: Folders) -> None:
    graph = picture() | {"5": {"class_type": "ImageInvert", "inputs": inputs}}
    assert check(graph, folders).error is None
    with pytest.raises(AttributeError):
        check(graph, folders, MODERN)


def test_dynamic_combos_bring_their_inputs(folders: Folders) -> None:
    def video(**inputs: Any) -> Graph:
        return {
            "1": image(),
            "2": node("CreateVideo", images=["1", 0], fps=2),
            "9": node("SaveVideo", video=["2", 0], filename_prefix="x", **inputs),
        }

    for fine in ({"format": "mp4"}, {"format": "nope"}, {}, {"format": "mp4", "format.codec": "h264"}):
        assert check(video(**fine), folders, MODERN).error is None
    errors = check(video(format="mp4", **{"format.codec": "nope"}), folders, MODERN).node_errors["9"][
        "errors"
    ]
    assert errors[0]["extra_info"]["input_name"] == "format.codec"


def test_inputs_outside_the_folder_are_only_refused_by_the_modern_flavor(folders: Folders) -> None:
    (folders.directory / "secret.png").write_bytes(b"x")
    graph = loaded(image="../secret.png")
    assert check(graph, folders).error is None
    assert check(graph, folders, MODERN).error is not None


def test_types_match_as_sets() -> None:
    assert types_match("IMAGE", "IMAGE")
    assert types_match("A,B", "B, C")
    assert types_match("*", "IMAGE")
    assert not types_match("A", "B")
    assert not types_match("STRING", ["a", "b"])


def test_exception_types_are_spelled_as_comfyui_does() -> None:
    assert type_name(KeyError()) == "KeyError"
    assert type_name(Boom()) == f"{__name__}.Boom"


class Boom(Exception):
    pass
