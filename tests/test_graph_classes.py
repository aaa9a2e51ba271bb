"""`comfyd.graphs.classes`: what a real 0.3.75 (and a made-up newer one) would run."""

import copy
import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comfyd.errors import InvalidWorkflow, UnsupportedContent
from comfyd.graphs import (
    Address,
    FileInput,
    Graph,
    GraphLimits,
    check_against,
    check_kind,
    check_structure,
    executable_nodes,
    file_inputs,
    file_name_problem,
    is_reference,
    is_remote,
    missing_classes,
    output_nodes,
    references,
    remote_inputs,
    remote_values,
)

# A loaded machine is slow, not wrong.
QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
HERE = Path(__file__).parent
LIMITS = GraphLimits()
INFO: dict[str, Any] = json.loads((HERE / "data" / "object_info-0.3.75.json").read_bytes())


def spec(kind: object, required: bool = True, **options: object) -> dict[str, Any]:
    """A class with one input `x` of this kind that is an output node."""
    group = "required" if required else "optional"
    return {"input": {group: {"x": [kind, options]}}, "output": [], "output_node": True}


def graph(**changes: object) -> Graph:
    """A plain graph: EmptyImage 1 -> ImageScale 2 -> SaveImage 9; `changes` are inputs of node 2."""
    scale = {
        "image": ["1", 0],
        "upscale_method": "area",
        "width": 8,
        "height": 8,
        "crop": "center",
        **changes,
    }
    inputs = {name: value for name, value in scale.items() if value != "DROP"}
    return check_structure(
        {
            "1": {
                "class_type": "EmptyImage",
                "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0},
            },
            "2": {"class_type": "ImageScale", "inputs": inputs, "_meta": {"title": "Resize"}},
            "9": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "a"}},
        },
        LIMITS,
    )


def refused(wrong: Graph, info: dict[str, Any] = INFO) -> InvalidWorkflow:
    with pytest.raises(InvalidWorkflow) as caught:
        check_against(wrong, info)
    orjson.dumps(caught.value.details)
    return caught.value


def problem(**changes: object) -> dict[str, Any]:
    errors = refused(graph(**changes)).details["node_errors"]["2"]
    assert (errors["class_type"], errors["title"]) == ("ImageScale", "Resize")
    (found,) = errors["errors"]
    return dict(found)


@pytest.mark.parametrize("path", sorted((HERE / "graphs").glob("*.json")), ids=lambda path: path.stem)
def test_a_graph_that_a_real_comfyui_runs_passes(path: Path) -> None:
    check_against(check_structure(json.loads(path.read_bytes()), LIMITS), INFO)


@pytest.mark.parametrize(
    ("changes", "kind", "name", "words"),
    [
        ({"width": "DROP"}, "required_input_missing", "width", "required and missing"),
        ({"image": "DROP"}, "required_input_missing", "image", "required and missing"),
        ({"width": "abc"}, "invalid_input_type", "width", "must be an integer, not abc"),
        ({"width": None}, "invalid_input_type", "width", "must be an integer, not None"),
        ({"width": {"a": 1}}, "invalid_input_type", "width", "must be an integer"),
        ({"width": {"__value__": [1, 2]}}, "invalid_input_type", "width", "must be an integer"),
        ({"width": "inf"}, "invalid_input_type", "width", "not inf"),
        ({"width": -1}, "value_smaller_than_min", "width", "at least 0, not -1"),
        ({"width": 16385}, "value_bigger_than_max", "width", "at most 16384, not 16385"),
        ({"width": "9" * 400}, "value_bigger_than_max", "width", "at most 16384, not 999"),
        ({"upscale_method": "areas"}, "value_not_in_list", "upscale_method", "did you mean area?"),
        ({"upscale_method": 5}, "value_not_in_list", "upscale_method", "5 is not one of nearest-exact"),
        ({"upscale_method": None}, "value_not_in_list", "upscale_method", "None is not one of"),
        ({"image": ["1", 1]}, "bad_linked_input", "image", "slot 1 of node 1 (EmptyImage), which has only 1"),
        ({"image": ["1", 0, 0]}, "bad_linked_input", "image", "a list is a link"),
        ({"image": []}, "bad_linked_input", "image", "a list is a link"),
        ({"width": ["1", 0]}, "return_type_mismatch", "width", "takes INT but node 1 (EmptyImage) gives"),
        ({"crop": ["1", 0]}, "return_type_mismatch", "crop", "takes a choice of values but"),
    ],
)  # fmt: skip
def test_a_wrong_input_is_named_with_its_node_and_comfyuis_type(
    changes: dict[str, Any], kind: str, name: str, words: str
) -> None:
    found = problem(**changes)
    assert (found["type"], found["input"]) == (kind, name)
    assert words in found["message"]


def test_a_link_to_a_node_without_outputs_is_refused() -> None:
    wrong = graph()
    wrong["5"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}, "_meta": {}}
    wrong["6"] = {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}, "_meta": {}}
    found = refused(wrong).details["node_errors"]["6"]["errors"][0]
    assert "slot 0 of node 5 (PreviewImage), which has none" in found["message"]


@pytest.mark.parametrize("value", ["64", 64.9, True, " 64 ", {"__value__": 64}, {"__value__": "64"}])
def test_comfyuis_own_coercion_is_no_error(value: object) -> None:
    check_against(graph(width=value), INFO)


@pytest.mark.parametrize("value", ["0.5", 1, True, "1e0", 0.5])
def test_a_number_may_come_as_text(value: object) -> None:
    check_against(_single("T", value), {"T": spec("FLOAT", min=0, max=1)})


@pytest.mark.parametrize(
    ("value", "kind"),
    [("x", "invalid_input_type"), ("nan", "invalid_input_type"), (1.5, "value_bigger_than_max"),
     ("-inf", "value_smaller_than_min"), (None, "invalid_input_type")],
)  # fmt: skip
def test_a_number_out_of_range_is_refused(value: object, kind: str) -> None:
    error = refused(_single("T", value), {"T": spec("FLOAT", min=0, max=1)})
    assert error.details["node_errors"]["1"]["errors"][0]["type"] == kind


def _single(class_type: str, value: object) -> Graph:
    return check_structure({"1": {"class_type": class_type, "inputs": {"x": value}}}, LIMITS)


def test_bounds_that_are_no_numbers_are_no_bounds() -> None:
    check_against(_single("T", 5), {"T": spec("INT", min=None, max="3")})
    check_against(_single("T", 5), {"T": spec("INT", max=False)})


@pytest.mark.parametrize(
    "kind", ["STRING", "BOOLEAN", "BOUNDING_BOX", "IMAGECOMPARE", "COMFY_DYNAMICCOMBO_V3"]
)
@pytest.mark.parametrize("value", ["x", 5, None, {"a": 1}, {"__value__": [1]}])
def test_kinds_that_take_anything_or_are_not_known_pass(kind: str, value: object) -> None:
    check_against(_single("T", value), {"T": spec(kind)})


@pytest.mark.parametrize("kind", ["COMFY_DYNAMICCOMBO_V3", "COMFY_AUTOGROW_V3", "COMFY_MATCHTYPE_V3"])
def test_a_dynamic_input_may_be_missing_under_its_own_name(kind: str) -> None:
    stray_name = check_structure({"1": {"class_type": "T", "inputs": {"x.image0": 5}}}, LIMITS)
    check_against(stray_name, {"T": spec(kind)})
    refused(stray_name, {"T": spec("IMAGE")})


def test_an_optional_input_may_be_missing_but_not_wrong() -> None:
    info = {"T": spec("INT", required=False, max=4)}
    check_against(check_structure({"1": {"class_type": "T", "inputs": {}}}, LIMITS), info)
    refused(_single("T", 5), info)


def test_new_style_choices_are_checked_where_the_old_server_would_not() -> None:
    info = {"T": spec("COMBO", options=["mp4", "webm"])}
    check_against(_single("T", "mp4"), info)
    found = refused(_single("T", "zzz"), info).details["node_errors"]["1"]["errors"][0]
    assert (found["type"], found["choices"], found["received"]) == (
        "value_not_in_list",
        ["mp4", "webm"],
        "zzz",
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"options": None},
        {"options": ["a"], "multiselect": True},
        {"options": ["a"], "remote": {"route": "/x"}},
        {"options": ["a"], "image_upload": True},
        {"options": ["a"], "video_upload": True},
        {"options": ["a"], "audio_upload": True},
        {"options": ["a"], "file_upload": True},
    ],
)
def test_choices_that_are_not_all_there_are_not_checked(options: dict[str, Any]) -> None:
    check_against(_single("T", "b.png"), {"T": spec("COMBO", **options)})
    listed = options.get("options") or []
    if set(options) - {"options"}:
        rest = {name: value for name, value in options.items() if name != "options"}
        check_against(_single("T", "b.png"), {"T": spec(listed, **rest)})


def test_a_model_that_is_not_installed_is_named() -> None:
    found = refused(_single("T", "sdxl.safetensors"), {"T": spec([])})
    assert "sdxl.safetensors is not there: ComfyUI has nothing to choose from" in found.message


def test_a_long_list_is_counted_and_not_repeated() -> None:
    names = [f"model-{number}.safetensors" for number in range(500)]
    found = refused(_single("T", "model-x"), {"T": spec(names)}).details["node_errors"]["1"]["errors"][0]
    assert "choices" not in found
    assert "one of the 500 values" in found["message"]
    assert "did you mean" in refused(_single("T", "model-1.safetensor"), {"T": spec(names[:100])}).message


def test_an_unknown_class_is_refused_by_name_but_not_one_that_the_server_replaces() -> None:
    wrong = graph()
    wrong["2"] = {**wrong["2"], "class_type": "imagescale"}
    wrong["3"] = {"class_type": "Nope", "inputs": {}, "_meta": {}}
    error = refused(wrong)
    assert error.details["node_errors"]["2"]["errors"][0]["type"] == "missing_node_type"
    assert "it has 'ImageScale'" in error.details["node_errors"]["2"]["errors"][0]["message"]
    assert "install the custom node" in error.details["node_errors"]["3"]["errors"][0]["message"]
    assert missing_classes(wrong, INFO) == {"imagescale", "Nope"}
    check_against(wrong, INFO, replaceable={"imagescale", "Nope"})
    assert missing_classes(graph(), INFO) == set()


def test_a_hundred_unknown_classes_are_enough() -> None:
    wrong = check_structure({str(n): {"class_type": "Nope", "inputs": {}} for n in range(300)}, LIMITS)
    assert len(refused(wrong).details["node_errors"]) == 100


def test_a_graph_without_an_output_node_is_refused() -> None:
    wrong = graph()
    del wrong["9"]
    error = refused(wrong)
    assert error.details["errors"][0]["type"] == "prompt_no_outputs"
    assert "no output node" in error.message


def test_a_stray_node_needs_no_more_than_a_known_class() -> None:
    stray = graph()
    stray["5"] = {"class_type": "ImageScale", "inputs": {"width": "abc"}, "_meta": {}}
    check_against(stray, INFO)
    stray["6"] = {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}, "_meta": {}}
    assert set(refused(stray).details["node_errors"]) == {"5"}


def test_every_output_counts_not_only_a_good_one() -> None:
    mixed = graph()
    mixed["8"] = {"class_type": "PreviewImage", "inputs": {}, "_meta": {}}
    assert set(refused(mixed).details["node_errors"]) == {"8"}


@pytest.mark.parametrize(
    ("given_type", "taken", "fits"),
    [
        ("IMAGE", "IMAGE", True),
        ("IMAGE", "LATENT", False),
        ("IMAGE", "IMAGE,MASK", True),
        ("FILE_3D_GLB,FILE_3D_GLTF", "FILE_3D_GLTF, FILE_3D", True),
        ("MASK", "IMAGE,LATENT", False),
        ("*", "LATENT", True),
        ("IMAGE", "*", True),
        ("COMFY_MATCHTYPE_V3", "IMAGE", True),
        ("IMAGE", "COMFY_MATCHTYPE_V3", True),
        (["a", "b"], ["a", "c"], True),
        ("COMBO", ["a", "c"], True),
        (["a"], "COMBO", True),
        ("STRING", ["a", "c"], False),
        (["a"], "IMAGE", False),
        ("*", ["a"], True),
    ],
)
def test_link_types_meet_as_comfyui_compares_them(given_type: object, taken: object, fits: bool) -> None:
    info = {"Source": {"input": {}, "output": [given_type]}, "T": spec(taken)}
    nodes = {"0": {"class_type": "Source", "inputs": {}}, "1": {"class_type": "T", "inputs": {"x": ["0", 0]}}}
    linked = check_structure(nodes, LIMITS)
    if fits:
        check_against(linked, info)
    else:
        found = refused(linked, info).details["node_errors"]["1"]["errors"][0]
        assert (found["type"], found["linked_node"]) == ("return_type_mismatch", ["0", 0])


def test_only_what_leads_to_an_output_runs() -> None:
    with_stray = graph()
    with_stray["5"] = {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}, "_meta": {}}
    assert output_nodes(with_stray, INFO) == ["9"]
    assert executable_nodes(with_stray, INFO) == {"1", "2", "9"}
    assert executable_nodes(with_stray, {}) == set()


def loaders() -> Graph:
    return check_structure(
        {
            "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
            "2": {
                "class_type": "LoadImageMask",
                "inputs": {"image": {"__value__": "b.png"}, "channel": "alpha"},
            },
            "3": {"class_type": "LoadVideo", "inputs": {"file": "c.mp4"}},
            "4": {"class_type": "Load3D", "inputs": {"model_file": "3d/d.glb"}},
            "5": {"class_type": "LoadImage", "inputs": {"image": ["4", 0]}},
            "6": {"class_type": "LoadImage", "inputs": {}},
            "7": {"class_type": "Custom", "inputs": {"a": "e.wav", "b": "f.webp", "c": "g"}},
        },
        LIMITS,
    )


def test_file_inputs_are_found_by_flag_and_without_it_by_well_known_names() -> None:
    flags = {"a": ["X", {"audio_upload": True}], "b": [[], {"animated_image_upload": True}], "c": ["STRING"]}
    info = {**INFO, "Custom": {"input": {"required": flags}}}
    found = [(item.node_id, item.name, item.value, item.kind) for item in file_inputs(loaders(), info)]
    assert found == [
        ("1", "image", "a.png", "image"),
        ("2", "image", "b.png", "image"),
        ("3", "file", "c.mp4", "video"),
        ("4", "model_file", "3d/d.glb", "file"),
        ("7", "a", "e.wav", "audio"),
        ("7", "b", "f.webp", "image"),
    ]
    blind = file_inputs(loaders(), None)
    assert [item.node_id for item in blind] == ["1", "2", "3"]
    assert blind[0] == FileInput(node_id="1", name="image", value="a.png", kind="image")
    assert file_inputs(loaders(), {}) == blind


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/etc/passwd", "absolute"),
        ("~/x.png", "absolute"),
        ("C:/x.png", "absolute"),
        ("a\\b.png", "backslash"),
        ("..", "leaves"),
        ("a/../../b.png", "leaves"),
        ("a/.. /b.png", "leaves"),
        ("../x.png [input]", "leaves"),
        (".. [temp]", "leaves"),
        ("", "no file"),
        ("  ", "no file"),
        (" [input]", "no file"),
        ("a\x00.png", "control"),
    ],
)
def test_a_file_name_that_leaves_comfyuis_folder_is_refused(name: str, words: str) -> None:
    assert words in (file_name_problem(name) or "")
    wrong = check_structure({"1": {"class_type": "T", "inputs": {"x": name}}}, LIMITS)
    found = refused(wrong, {"T": spec([], image_upload=True)}).details["node_errors"]["1"]["errors"][0]
    assert found["type"] == "custom_validation_failed"


@pytest.mark.parametrize(
    "name", ["a.png", "sub/a b.png", "clipspace/x.png [input]", "..a.png", "a..b/c", "ü.png"]
)
def test_a_plain_file_name_passes_though_the_file_is_not_listed(name: str) -> None:
    assert file_name_problem(name) is None
    info = copy.deepcopy(INFO)
    assert name not in info["LoadImage"]["input"]["required"]["image"][0]
    nodes = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    check_against(check_structure(nodes, LIMITS), info)


def test_a_file_input_that_is_no_text_is_left_to_comfyui() -> None:
    check_against(_single("T", 5), {"T": spec([], image_upload=True)})


@pytest.mark.parametrize(
    "odd",
    [
        None,
        [],
        "x",
        {"input": None},
        {"input": {"required": []}},
        {"input": {"required": {"x": None, "y": [], "z": "STRING"}}},
        {"input": {"required": {"x": ["INT", None]}}, "output": None},
    ],
)
def test_what_a_custom_node_may_say_of_itself_never_breaks_the_check(odd: object) -> None:
    nodes = {
        "1": {"class_type": "Odd", "inputs": {"x": 5}},
        "2": {"class_type": "T", "inputs": {"x": ["1", 7]}},
    }
    check_against(check_structure(nodes, LIMITS), {"Odd": odd, "T": spec("IMAGE")})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KINDS = st.sampled_from(["INT", "FLOAT", "STRING", "COMBO", "IMAGE", "*", "IMAGE,MASK", ["a", 1]]) | VALUES
OPTIONS = st.fixed_dictionaries(
    {}, optional={"min": VALUES, "max": VALUES, "options": VALUES, "image_upload": VALUES, "remote": VALUES}
)
CLASSES = st.fixed_dictionaries(
    {},
    optional={
        "input": st.fixed_dictionaries(
            {"required": st.dictionaries(st.sampled_from("xy"), st.tuples(KINDS, OPTIONS).map(list) | VALUES)}
        )
        | VALUES,
        "output": st.lists(KINDS, max_size=2) | VALUES,
        "output_node": st.just(True) | VALUES,
    },
)


@QUIET
@given(
    st.dictionaries(st.sampled_from(["A", "B"]), CLASSES | VALUES),
    st.dictionaries(
        st.sampled_from("xy"), st.tuples(st.sampled_from("01"), st.integers(0, 2)).map(list) | VALUES
    ),
)
def test_no_class_and_no_value_breaks_the_check(info: dict[str, Any], inputs: dict[str, Any]) -> None:
    try:
        odd = check_structure(
            {"0": {"class_type": "A", "inputs": {}}, "1": {"class_type": "B", "inputs": inputs}}, LIMITS
        )
        check_against(odd, info)
    except InvalidWorkflow as error:
        orjson.dumps(error.details)


# files from elsewhere

CHOICES: dict[str, Any] = {
    "Old": spec(["a.png", "https://a.example/v1"]),
    "New": spec("COMBO", options=["a.WAV", "https://a.example/v1"]),
    "Checkpoint": spec(["a.safetensors", "b.ckpt"]),
    "Sampler": spec("COMBO", options=["euler", "ddim"]),
    "Empty": spec("COMBO", options=[]),
    "Vague": spec("COMBO"),
    "Server": spec("COMBO", options=["a.png"], remote={"route": "/x"}),
    "Several": spec("COMBO", options=["a.png"], multiselect=True),
    "Text": spec("STRING"),
    "Image": spec(["a"], image_upload=True),
    "Model": spec("COMBO", options=["a"], file_upload=True),
}


def one(class_type: str, value: object, name: str = "x") -> Graph:
    return {"1": {"class_type": class_type, "inputs": {name: value}, "_meta": {}}}


@pytest.mark.parametrize("value", ["http://x/a", " HTTPS://x", "data:,x", "\nupload:x", "Data:x", "http:x"])
def test_values_that_name_a_file_elsewhere_are_remote(value: str) -> None:
    assert is_remote(value)
    for class_type, kind in (
        ("Image", "image"),
        ("Model", "file"),
        ("Old", "file"),
        ("New", "file"),
        ("Empty", "file"),
    ):
        (found,) = remote_inputs(one(class_type, value), CHOICES)
        assert found == FileInput(node_id="1", name="x", value=value, kind=kind)


@pytest.mark.parametrize(
    "value",
    ["a.png", "httpx:/a", "uploads/a.png", "database:x", "", None, 5, ["2", 0], {"a": 1}, "x http://y"],
)
def test_other_values_are_not_remote(value: object) -> None:
    assert not is_remote(value)
    assert not remote_values(one("Image", value))
    assert remote_inputs(one("Image", value), CHOICES) == []


def test_a_wrapped_value_is_remote_too() -> None:
    (found,) = remote_inputs(one("Image", {"__value__": "http://x/a"}), CHOICES)
    assert found.value == "http://x/a"


def test_a_url_that_is_one_of_the_choices_is_a_choice() -> None:
    offered = "https://a.example/v1"
    for class_type in ("Old", "New"):
        assert remote_inputs(one(class_type, offered), CHOICES) == []
        assert remote_inputs(one(class_type, offered + "/other"), CHOICES) != []
        check_against(one(class_type, offered), CHOICES)


@pytest.mark.parametrize(
    "class_type", ["Text", "Vague", "Server", "Several", "Checkpoint", "Sampler", "NoSuchClass"]
)
def test_a_url_is_left_alone_where_nothing_says_that_a_file_is_meant(class_type: str) -> None:
    assert remote_values(one(class_type, "http://x/a"))
    assert remote_inputs(one(class_type, "http://x/a"), CHOICES) == []


def test_an_address_that_is_never_fetched_is_found_where_a_file_is_meant_for_certain() -> None:
    for value in ("ftp://x/a", "file:///etc/passwd", " s3://bucket/a"):
        assert not is_remote(value)
        assert [found.value for found in remote_inputs(one("Image", value), CHOICES)] == [value]
        assert remote_inputs(one("New", value), CHOICES) == []
        assert remote_inputs(one("LoadAudio", value, "audio"), None) != []


def test_well_known_loaders_are_known_without_object_info() -> None:
    for class_type, name, kind in (
        ("LoadImage", "image", "image"),
        ("LoadImageMask", "image", "image"),
        ("LoadImageOutput", "image", "image"),
        ("LoadAudio", "audio", "audio"),
        ("LoadVideo", "file", "video"),
        ("LoadLatent", "latent", "file"),
    ):
        for info in (None, {}, INFO):
            (found,) = remote_inputs(one(class_type, "http://x/a", name), info)
            assert (found.name, found.kind) == (name, kind)


def test_inputs_whose_files_are_to_come_are_not_judged() -> None:
    value = one("Image", "upload:" + "0" * 64 + ".png")
    for class_type in ("Old", "New"):
        wrong = one(class_type, "http://x/a")
        check_against(wrong, CHOICES, remote={("1", "x")})
        with pytest.raises(InvalidWorkflow):
            check_against(wrong, CHOICES)
    check_against(value, CHOICES, remote={("1", "x")})


REFERENCE = "upload:" + "0" * 64 + ".png"


@pytest.mark.parametrize("class_type", ["Old", "New", "Checkpoint", "Sampler", "Empty", "Text", "Several"])
def test_a_reference_stands_for_a_name_wherever_one_may_stand(class_type: str) -> None:
    check_against(one(class_type, REFERENCE), {**CHOICES, class_type: runs(CHOICES[class_type])})
    check_against(one(class_type, {"__value__": REFERENCE}), {class_type: runs(CHOICES[class_type])})
    if class_type not in {"Text", "Several"}:
        with pytest.raises(InvalidWorkflow):
            check_against(one(class_type, f"{REFERENCE} "), {class_type: runs(CHOICES[class_type])})


@pytest.mark.parametrize("kind", ["INT", "FLOAT"])
def test_a_reference_is_no_number(kind: str) -> None:
    with pytest.raises(InvalidWorkflow):
        check_against(one("Number", REFERENCE), {"Number": runs(spec(kind))})


def runs(node_class: dict[str, Any]) -> dict[str, Any]:
    """The class as one for whose sake ComfyUI runs a graph."""
    return {**node_class, "output_node": True}


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        f" {REFERENCE}",
        f"{REFERENCE}/",
        f"see {REFERENCE}",
        REFERENCE.upper(),
        REFERENCE.replace("0", "g"),
        REFERENCE[:-4],
        REFERENCE + "x" * 14,
        [REFERENCE],
    ],
)
def test_what_only_holds_a_reference_is_none(value: object) -> None:
    assert is_reference(REFERENCE)
    assert not is_reference(value)


def test_references_are_found_however_deep_each_once_with_its_first_input() -> None:
    other = REFERENCE.replace("0", "1")
    found = references(
        {
            REFERENCE: {"class_type": "A", "inputs": {"x": [REFERENCE, 0], REFERENCE: 1}, "_meta": {}},
            "2": {
                "class_type": "B",
                "inputs": {"a": 1, "b": {"__value__": [[{"c": other, REFERENCE: 2}], f"{REFERENCE} "]}},
                "_meta": {"title": REFERENCE},
            },
            "3": {"class_type": "C", "inputs": {"d": REFERENCE, "e": [1, 2, other]}, "_meta": {}},
        }
    )
    assert found == {other: Address(node_id="2", name="b"), REFERENCE: Address(node_id="3", name="d")}


@pytest.mark.parametrize(
    ("wanted", "kind", "content_type", "fits"),
    [
        ("image", "image", "image/png", True),
        ("image", "video", "video/mp4", False),
        ("image", "file", "image/x-exr", False),
        ("audio", "video", "video/mp4", True),
        ("audio", "image", "image/gif", False),
        ("video", "image", "image/gif", True),
        ("video", "image", "image/webp", True),
        ("video", "image", "image/png", False),
        ("file", "file", "application/zip", True),
        ("file", "audio", "audio/wav", True),
    ],
)
def test_a_kind_fits_an_input_or_is_told(wanted: str, kind: str, content_type: str, fits: bool) -> None:
    found = FileInput(node_id="7", name="x", value="", kind=wanted)
    if fits:
        check_kind(found, kind, content_type)
        return
    with pytest.raises(UnsupportedContent) as caught:
        check_kind(found, kind, content_type)
    assert caught.value.details == {"input": "7.x", "content_type": content_type}
    assert content_type in caught.value.message
