"""Every kind of output is found, named and typed; nothing else is."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.comfy.outputs import content_type, output_files, wanted, websocket_image_nodes
from comfyd.tasks import OutputFile, OutputType


def item(filename: str, folder: str = "output", subfolder: str = "") -> dict[str, Any]:
    return {"filename": filename, "subfolder": subfolder, "type": folder}


def found(kinds: Any) -> list[tuple[str, str]]:
    return [(file.kind, file.filename) for file in output_files({"1": kinds})]


@pytest.mark.parametrize(
    ("filename", "kind"),
    [
        ("a.png", OutputType.IMAGE),
        ("a.JPG", OutputType.IMAGE),
        ("a.webp", OutputType.IMAGE),
        ("a.svg", OutputType.IMAGE),
        ("a.apng", OutputType.IMAGE),
        ("a.webm", OutputType.VIDEO),
        ("a.mp4", OutputType.VIDEO),
        ("a.flac", OutputType.AUDIO),
        ("a.opus", OutputType.AUDIO),
        ("a.latent", OutputType.LATENT),
        ("a.txt", OutputType.TEXT),
        ("a.glb", OutputType.FILE),
        ("a.safetensors", OutputType.FILE),
        ("png", OutputType.FILE),
    ],
)
def test_the_extension_decides_the_type_whatever_the_key(filename: str, kind: OutputType) -> None:
    (file,) = output_files({"1": {"images": [item(filename)], "animated": [True]}})
    assert file.type is kind


def test_every_key_is_scanned_and_indices_are_unique_within_a_node() -> None:
    files = output_files(
        {
            "10": {"gifs": [{**item("b.mp4"), "format": "video/h264-mp4", "frame_rate": 8.0}]},
            "9": {
                "images": [item("a.png", "temp"), item("c.png", subfolder="x/y")],
                "audio": [item("d.flac")],
            },
            "5.0.3": {"3d": [item("e.glb")]},
        }
    )
    assert [(file.node_id, file.index, file.kind, file.filename) for file in files] == [
        ("5.0.3", 0, "3d", "e.glb"),
        ("9", 0, "images", "a.png"),
        ("9", 1, "images", "c.png"),
        ("9", 2, "audio", "d.flac"),
        ("10", 0, "gifs", "b.mp4"),
    ]
    assert (files[1].folder, files[2].subfolder) == ("temp", "x/y")


def test_texts_and_their_file_are_separate_outputs() -> None:
    files = output_files({"7": {"text": ["hi", "there"], "files": [item("x.txt")]}})
    assert [(file.index, file.filename, file.text) for file in files] == [
        (0, "text.txt", "hi"),
        (1, "text_1.txt", "there"),
        (2, "x.txt", None),
    ]
    assert {file.type for file in files} == {OutputType.TEXT}


def test_a_text_torn_into_characters_is_joined() -> None:
    (file,) = output_files({"7": {"text": ["h", "i"]}})
    assert file.text == "hi"


@pytest.mark.parametrize("kind", ["text", "texts", "string", "strings", "prompt_text"])
def test_bare_texts_under_text_kinds_are_taken(kind: str) -> None:
    (file,) = output_files({"7": {kind: "hello"}})
    assert (file.kind, file.text) == (kind, "hello")


@pytest.mark.parametrize(
    "kinds",
    [
        {"animated": [True], "images": None, "n": [3], "flag": False},
        {"result": ["3d/model.glb", {"position": [1, 2]}, None]},
        {"text": [3, None], "string": None},
        {"images": [None, 4, "a.png", {}, {"filename": 3}, {"filename": ""}, {"filename": " [temp]"}]},
        {},
        None,
        ["x"],
        "text",
    ],
)
def test_what_is_no_output_is_left_out(kinds: Any) -> None:
    assert output_files({"1": kinds}) == ()


def test_files_lie_at_any_sensible_depth() -> None:
    assert found({"ui": {"images": [[item("a.png")]]}, "one": item("b.png")}) == [
        ("ui", "a.png"),
        ("one", "b.png"),
    ]
    deep: Any = item("c.png")
    for _ in range(50):
        deep = [deep]
    assert found({"images": deep}) == []


def test_an_annotation_is_never_passed_on() -> None:
    files = output_files({"1": {"images": [item("a.png [temp]"), item("b.png[input]"), item("c [d].png")]}})
    assert [(file.filename, file.folder) for file in files] == [
        ("a.png", "temp"),
        ("b.png", "input"),
        ("c [d].png", "output"),
    ]


def test_odd_folders_are_comfyuis_default() -> None:
    files = output_files(
        {"1": {"images": [{"filename": "a.png"}, {"filename": "b.png", "type": "../x", "subfolder": 3}]}}
    )
    assert [(file.folder, file.subfolder) for file in files] == [("output", ""), ("output", "")]


def named(*files: OutputFile) -> list[str]:
    return [file.filename for file in files]


def test_temp_files_come_when_asked_for_or_when_no_file_was_saved() -> None:
    saved = output_files({"1": {"images": [item("s.png")]}, "2": {"images": [item("t.png", "temp")]}})
    assert named(*wanted(saved, include_temp=False)) == ["s.png"]
    assert named(*wanted(saved, include_temp=True)) == ["s.png", "t.png"]
    previews = output_files({"2": {"images": [item("t.png", "temp")]}, "3": {"text": ["x"]}})
    assert named(*wanted(previews, include_temp=False)) == ["t.png", "text.txt"]


def test_input_files_come_only_when_there_is_nothing_else() -> None:
    shown = output_files({"1": {"images": [item("i.png", "input")]}})
    assert named(*wanted(shown, include_temp=False)) == ["i.png"]
    both = output_files({"1": {"images": [item("i.png", "input")]}, "2": {"text": ["x"]}})
    assert named(*wanted(both, include_temp=True)) == ["text.txt"]
    assert wanted((), include_temp=True) == ()


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("a.webp", "image/webp"),
        ("a.AVIF", "image/avif"),
        ("a.glb", "model/gltf-binary"),
        ("a.latent", "application/octet-stream"),
        ("a.txt", "text/plain; charset=utf-8"),
        ("a.pdf", "application/pdf"),
        ("a.gz", "application/octet-stream"),
        ("a.unheard-of", "application/octet-stream"),
        ("a", "application/octet-stream"),
        ("", "application/octet-stream"),
    ],
)
def test_content_types_are_by_extension(filename: str, expected: str) -> None:
    assert content_type(filename) == expected


def test_websocket_images_are_known_by_their_class() -> None:
    graph = {"1": {"class_type": "SaveImageWebsocket"}, "2": {"class_type": "SaveImage"}, "3": None}
    assert websocket_image_nodes(graph) == {"1"}


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["filename", "type", "subfolder", "text", "x"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4))
def test_anything_is_read_and_indices_stay_unique(outputs: dict[str, Any]) -> None:
    files = output_files(json.loads(json.dumps(outputs)))
    assert len({(file.node_id, file.index) for file in files}) == len(files)
    assert all(
        file.filename and not file.filename.endswith((" [temp]", " [input]", " [output]")) for file in files
    )
    assert bool(wanted(files, include_temp=False)) == bool(files)
