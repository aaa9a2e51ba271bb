"""GET /object_info: the shape of every class, and every word on the classes the tests use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.conformance import graphs

if TYPE_CHECKING:
    from tests.conformance.raw_client import Server

# What the real 0.3.75 says about the classes of the nine graphs and of the conformance tests.
EXPECTED: Final[dict[str, dict[str, Any]]] = json.loads(
    (Path(__file__).parent / "object_info-0.3.75.json").read_text()
)
PRESENT_ALWAYS: Final = {
    "input",
    "input_order",
    "output",
    "output_is_list",
    "output_name",
    "name",
    "display_name",
    "description",
    "python_module",
    "category",
    "output_node",
}
FILE_LISTS: Final = {
    "LoadImage",
    "CheckpointLoaderSimple",
    "VAELoader",
}  # their choices are this server's files


@pytest.mark.parametrize("prefix", ["", "/api"])
async def test_every_class_has_the_same_shape(server: Server, prefix: str) -> None:
    answer = await server.get(f"{prefix}/object_info")
    assert answer.status == 200
    document = answer.json()
    assert set(EXPECTED) <= set(document)
    for name, spec in document.items():
        assert set(spec) >= PRESENT_ALWAYS, name
        assert spec["name"] == name
        assert isinstance(spec["output_node"], bool)
        assert len(spec["output_is_list"]) == len(spec["output"])
        for section, inputs in spec["input"].items():
            assert section in {"required", "optional", "hidden"}
            if section != "hidden":
                assert list(spec["input_order"][section]) == list(inputs)
                assert all(isinstance(kind[0], str | list) for kind in inputs.values()), name


@pytest.mark.parametrize("name", sorted(EXPECTED))
async def test_a_class_is_described_as_by_the_real_one(server: Server, name: str) -> None:
    answer = await server.get(f"/object_info/{name}")
    assert list(answer.json()) == [name]
    described, expected = answer.json()[name], EXPECTED[name]
    assert (described["output"], described["output_node"]) == (expected["output"], expected["output_node"])
    if server.facts.modern:
        assert {"is_input_list", "has_intermediate_output", "search_aliases"} <= set(described)
        return
    assert set(described) == set(expected)
    for part in ("input_order", "output_is_list", "output_name", "display_name", "category"):
        assert described[part] == expected[part]
    if name not in FILE_LISTS:
        assert described["input"] == expected["input"]


async def test_one_class_is_described_as_in_the_whole(server: Server) -> None:
    whole = (await server.get("/object_info")).json()
    for name in EXPECTED:
        assert (await server.get(f"/api/object_info/{name}")).json() == {name: whole[name]}


async def test_an_unknown_class_is_an_empty_object(server: Server) -> None:
    answer = await server.get("/object_info/NoSuchNode")
    assert (answer.status, answer.json()) == (200, {})


@pytest.mark.parametrize("name", graphs.NAMES)
async def test_every_class_of_the_nine_graphs_is_there(server: Server, name: str) -> None:
    known = (await server.get("/object_info")).json()
    assert {item["class_type"] for item in graphs.named(name).values()} <= set(known)


async def test_the_pixel_space_vae_needs_no_file(server: Server) -> None:
    spec = (await server.get("/object_info/VAELoader")).json()["VAELoader"]
    choices = spec["input"]["required"]["vae_name"]
    listed = choices[1]["options"] if choices[0] == "COMBO" else choices[0]
    assert "pixel_space" in listed
