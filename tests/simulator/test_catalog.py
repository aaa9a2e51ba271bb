"""The catalog offers exactly the classes that can be run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from comfyd.simulator.catalog import Catalog
from comfyd.simulator.folders import Folders
from comfyd.simulator.nodes import registry
from comfyd.simulator.options import SimulatorOptions
from tests.simulator.rig import MODERN, rig

if TYPE_CHECKING:
    from pathlib import Path


def test_every_class_has_a_function_and_every_function_a_class(tmp_path: Path) -> None:
    catalog = Catalog(SimulatorOptions(flavor=MODERN), Folders(tmp_path))
    assert set(catalog.classes) == set(registry)


def test_only_the_modern_flavor_saves_texts(tmp_path: Path) -> None:
    assert "SaveText" not in Catalog(SimulatorOptions(), Folders(tmp_path)).classes


def test_checkpoints_are_those_of_the_options(tmp_path: Path) -> None:
    catalog = Catalog(SimulatorOptions(checkpoints=("mine.safetensors",)), Folders(tmp_path))
    entry = catalog.document("CheckpointLoaderSimple")
    assert entry is not None
    assert entry["input"]["required"]["ckpt_name"][0] == ["mine.safetensors"]


async def test_file_lists_follow_the_input_folder() -> None:
    async with rig() as running:
        for name in ("b.png", "a.txt"):
            (running.simulator.folders.roots["input"] / name).write_bytes(b"x")
        pictures = (await running.server.get("/object_info/LoadImage")).json()["LoadImage"]
        masks = (await running.server.get("/object_info")).json()["LoadImageMask"]
        assert pictures["input"]["required"]["image"] == [["b.png"], {"image_upload": True}]
        assert masks["input"]["required"]["image"][0] == ["a.txt", "b.png"]
        assert (await running.server.get("/object_info/Nope")).json() == {}


@pytest.mark.parametrize(
    ("path", "status", "answer"),
    [
        ("/models/checkpoints", 200, ["one.safetensors"]),
        ("/models/loras", 200, ["add-detail.safetensors"]),
        ("/models/vae", 200, []),
        ("/models/nope", 404, None),
        ("/embeddings", 200, []),
        ("/settings", 200, {}),
        ("/settings/x", 200, None),
    ],
)
async def test_lists_and_settings(path: str, status: int, answer: object) -> None:
    async with rig(checkpoints=("one.safetensors",)) as running:
        found = await running.server.get(path)
        assert found.status == status
        if status == 200:
            assert found.json() == answer


async def test_settings_are_kept() -> None:
    async with rig() as running:
        await running.server.post("/settings", {"a": 1})
        await running.server.post("/settings/b", 2)
        assert (await running.server.get("/settings")).json() == {"a": 1, "b": 2}


async def test_the_server_says_what_it_is() -> None:
    async with rig(flavor=MODERN) as running:
        system = (await running.server.get("/system_stats")).json()["system"]
        assert (system["os"], system["comfyui_version"]) == ("linux", "0.33.0")
        assert (await running.server.get("/features")).json()["assets"] is False
        assert b"simulator" in (await running.server.get("/")).body
        assert (await running.server.get("/nothing/here")).status == 404
        assert (await running.server.request("OPTIONS", "/prompt")).status == 200
