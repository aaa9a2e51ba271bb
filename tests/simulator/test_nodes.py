"""Nodes make what they promise."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from tests.simulator.rig import MODERN, Rig, node, painting, picture, rig, tiles

if TYPE_CHECKING:
    from tests.conformance.raw_client import Graph


async def files(running: Rig, graph: Graph) -> dict[str, bytes]:
    """Run a prompt; its files by kind and extension, such as `images.png`."""
    run = await running.server.run(graph)
    assert run.verdict == "execution_success", run.entry["status"]["messages"][-1]
    found = {}
    for kinds in run.outputs.values():
        for kind, items in kinds.items():
            for item in items:
                if isinstance(item, dict):
                    extension = item["filename"].rpartition(".")[2]
                    found[f"{kind}.{extension}"] = (await running.server.view(item)).body
    return found


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


async def test_a_picture_carries_its_prompt_and_workflow() -> None:
    async with rig() as running:
        graph = picture(color=0x112233)
        run = await running.server.run(graph, extra_data={"extra_pnginfo": {"workflow": {"id": "w"}}})
        shown = opened((await running.server.view(run.outputs["9"]["images"][0])).body)
        assert shown.getpixel((0, 0)) == (0x11, 0x22, 0x33)
        assert json.loads(shown.info["prompt"]) == graph
        assert json.loads(shown.info["workflow"]) == {"id": "w"}


async def test_a_sampled_picture_is_its_own_and_repeatable() -> None:
    async with rig() as running:
        first = (await files(running, painting(seed=1, size=128)))["images.png"]
        other = (await files(running, painting(seed=2, size=128)))["images.png"]
        again = (await files(running, painting(seed=1, size=128)))["images.png"]
        assert opened(first).tobytes() == opened(again).tobytes() != opened(other).tobytes()
        assert opened(first).size == (128, 128)


async def test_an_image_can_be_painted_over() -> None:
    async with rig() as running:
        graph = painting()
        graph["10"] = picture(size=64, color=0xFF0000)["1"]
        graph["4"] = node("VAEEncode", pixels=["10", 0], vae=["1", 2])
        graph["5"]["inputs"]["denoise"] = 0.1
        graph["11"] = node("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=-2)
        graph["2"]["inputs"]["clip"] = ["11", 0]
        red, *_ = opened((await files(running, graph))["images.png"]).getpixel((0, 0))  # type: ignore[misc]  # RGB
        assert red > 180


async def test_loras_pass_model_and_clip_on() -> None:
    async with rig() as running:
        graph = painting()
        lora = node("LoraLoader", model=["1", 0], clip=["1", 1], strength_model=1, strength_clip=1)
        graph["10"] = lora
        graph["5"]["inputs"]["model"] = ["10", 0]
        for name, expected in (("add-detail.safetensors", 200), ("nope.safetensors", 400)):
            lora["inputs"]["lora_name"] = name
            assert (await running.server.post("/prompt", {"prompt": graph})).status == expected


async def test_sound_is_saved_as_flac_and_mp3() -> None:
    async with rig() as running:
        graph = painting()
        graph["4"] = node("EmptyLatentAudio", seconds=1.0, batch_size=1)
        graph["6"] = node("VAEDecodeAudio", samples=["5", 0], vae=["1", 2])
        graph["7"] = node("EmptyAudio", duration=0.5, sample_rate=22050, channels=1)
        graph["8"] = node("VAEDecodeAudio", samples=["4", 0], vae=["1", 2])
        graph["9"] = node("SaveAudio", audio=["6", 0], filename_prefix="a/tune")
        graph["10"] = node("SaveAudioMP3", audio=["7", 0], filename_prefix="a/tune", quality="V0")
        graph["11"] = node("PreviewAudio", audio=["8", 0])
        found = await files(running, graph)
        assert found["audio.flac"].startswith(b"fLaC")
        assert found["audio.mp3"].startswith(b"\xff\xfb")
        assert set(found) == {"audio.flac", "audio.mp3"}


async def test_a_mesh_is_saved_as_glb() -> None:
    async with rig() as running:
        grid = {"num_chunks": 8000, "octree_resolution": 16}
        graph = {
            "1": node("CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors"),
            "2": node("EmptyLatentHunyuan3Dv2", resolution=8, batch_size=1),
            "3": node("VAEDecodeHunyuan3D", samples=["2", 0], vae=["1", 2], **grid),
            "4": node("VoxelToMeshBasic", voxel=["3", 0], threshold=0.5),
            "9": node("SaveGLB", mesh=["4", 0], filename_prefix="m/cube"),
        }
        assert (await files(running, graph))["3d.glb"].startswith(b"glTF")


async def test_a_loaded_picture_gives_its_alpha_as_mask() -> None:
    async with rig() as running:
        folder = running.simulator.folders.roots["input"]
        Image.new("RGBA", (6, 4), (255, 0, 0, 55)).save(folder / "clear.png")
        Image.new("RGB", (6, 4), (9, 0, 0)).save(folder / "plain.png")
        for graph, size, value in (
            ({"1": node("LoadImage", image="clear.png")}, (6, 4), 200),
            ({"1": node("LoadImage", image="plain.png")}, (64, 64), 0),
        ):
            graph["9"] = node("MaskPreview", mask=["1", 1])
            mask = opened((await files(running, graph))["images.png"])
            assert (mask.size, mask.getpixel((0, 0))) == (size, (value,) * 3)


@pytest.mark.parametrize(("channel", "value"), [("alpha", 200), ("red", 255), ("blue", 0)])
async def test_a_mask_can_be_any_channel(channel: str, value: int) -> None:
    async with rig() as running:
        folder = running.simulator.folders.roots["input"]
        Image.new("RGBA", (6, 4), (255, 0, 0, 55)).save(folder / "clear.png")
        graph = {
            "1": node("LoadImageMask", image="clear.png", channel=channel),
            "2": node("MaskToImage", mask=["1", 0]),
            "9": node("SaveImage", images=["2", 0], filename_prefix="x"),
        }
        assert opened((await files(running, graph))["images.png"]).getpixel((0, 0)) == (value,) * 3


async def test_a_changed_or_vanished_input_file_is_loaded_anew() -> None:
    async with rig() as running:
        path = running.simulator.folders.roots["input"] / "a.png"
        graph = {"1": node("LoadImage", image="a.png"), "9": node("PreviewImage", images=["1", 0])}
        Image.new("RGB", (4, 4)).save(path)
        await running.server.run(graph)
        assert (await running.server.run(graph)).of_kind("execution_cached")[0]["nodes"] == ["1", "9"]
        Image.new("RGB", (5, 5)).save(path)
        assert (await running.server.run(graph)).of_kind("execution_cached")[0]["nodes"] == []
        running.simulator.faults.worker_dead = True
        prompt_id = await running.server.submit(graph)
        path.unlink()
        running.simulator.faults.worker_dead = False
        entry = await running.server.finished(prompt_id)
        assert entry["status"]["messages"][-1][1]["exception_type"] == "FileNotFoundError"


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        ({"width": 10, "height": 0, "crop": "disabled"}, (10, 5)),
        ({"width": 0, "height": 10, "crop": "center"}, (20, 10)),
        ({"width": 0, "height": 0, "crop": "disabled"}, (40, 20)),
        ({"width": 7, "height": 7, "crop": "center"}, (7, 7)),
    ],
)
async def test_scaling(inputs: dict[str, Any], size: tuple[int, int]) -> None:
    async with rig() as running:
        graph = {
            "1": node("EmptyImage", width=40, height=20, batch_size=1, color=3),
            "2": node("ImageScale", image=["1", 0], upscale_method="lanczos", **inputs),
            "9": node("SaveImage", images=["2", 0], filename_prefix="x"),
        }
        assert opened((await files(running, graph))["images.png"]).size == size


async def test_scaling_by_a_factor() -> None:
    async with rig() as running:
        graph = picture(size=40)
        graph["2"] = node("ImageScaleBy", image=["1", 0], upscale_method="area", scale_by=0.5)
        graph["9"]["inputs"]["images"] = ["2", 0]
        assert opened((await files(running, graph))["images.png"]).size == (20, 20)


async def test_tiles_of_an_encoder_are_counted() -> None:
    async with rig() as running:
        graph = tiles()
        graph["3"] = node(
            "VAEEncodeTiled",
            pixels=["1", 0],
            vae=["2", 0],
            tile_size=64,
            overlap=0,
            temporal_size=64,
            temporal_overlap=8,
        )
        run = await running.server.run(graph)
        assert {step["max"] for step in run.of_kind("progress")} == {12}


async def test_an_empty_latent_decodes_to_a_picture_of_nothing() -> None:
    async with rig() as running:
        graph = painting()
        graph["6"]["inputs"]["samples"] = ["4", 0]
        assert opened((await files(running, graph))["images.png"]).size == (64, 64)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(True, "True"), (None, "None"), ({"a": 1}, '{\n    "a": 1\n}'), ("text", "text")],
)
async def test_any_value_is_shown_as_text(value: Any, shown: str) -> None:
    async with rig() as running:
        run = await running.server.run({"9": node("PreviewAny", source=value)})
        assert run.outputs == {"9": {"text": [shown]}}


async def test_a_picture_as_text_is_its_shape() -> None:
    async with rig() as running:
        graph = {"1": picture()["1"], "2": node("SolidMask", value=1, width=4, height=2)}
        graph |= {str(at): node("PreviewAny", source=[str(at - 2), 0]) for at in (3, 4)}
        run = await running.server.run(graph)
        assert run.outputs["3"] == {"text": ["tensor(shape=[1, 8, 8, 3])"]}
        assert run.outputs["4"] == {"text": ["tensor(shape=[1, 2, 4])"]}


async def test_primitives_and_regular_expressions() -> None:
    async with rig() as running:
        expression = {"string": "aXbX\ncX", "regex_pattern": "x$", "replace": "-"}
        graph = {
            "1": node("PrimitiveInt", value="5"),
            "2": node("RegexReplace", **expression, case_insensitive=True, multiline=True, dotall=True),
            "8": node("PreviewAny", source=["1", 0]),
            "9": node("PreviewAny", source=["2", 0]),
        }
        run = await running.server.run(graph)
        assert run.outputs == {"8": {"text": ["5"]}, "9": {"text": ["aXb-\nc-"]}}


async def test_texts_are_saved_by_the_modern_flavor() -> None:
    async with rig(flavor=MODERN) as running:
        graph = {"9": node("SaveText", text="hello", filename_prefix="t/x", format="txt")}
        for number in (1, 2):
            graph["9"]["inputs"]["text"] = f"hello {number}"
            run = await running.server.run(graph)
            (item,) = run.outputs["9"]["files"]
            assert run.outputs["9"]["text"] == [f"hello {number}"]
            assert item == {"filename": f"x_0000{number}.txt", "subfolder": "t", "type": "output"}


def film(**inputs: Any) -> Graph:
    return {
        "1": picture()["1"],
        "2": node("CreateVideo", images=["1", 0], fps=2),
        "9": node("SaveVideo", video=["2", 0], filename_prefix="x", **inputs),
    }


@pytest.mark.parametrize(
    ("flavor", "graph", "kind", "message"),
    [
        ("0.3.75", film(format="zzz", codec="auto"), "ValueError", "'zzz' is not a valid VideoContainer\n"),
        ("0.3.75", film(format="mp4", codec="zzz"), "ValueError", "Only H264 codec is supported for now\n"),
        (MODERN, film(format="zzz"), "TypeError", "missing 1 required positional argument"),
        (MODERN, film(), "TypeError", "missing 1 required positional argument"),
        ("0.3.75", picture(prefix="../../x"), "Exception", "Saving image outside the output folder"),
        (
            "0.3.75",
            {"1": node("EmptyAudio", duration=1e9, sample_rate=44100, channels=2)}
            | {"9": node("PreviewAudio", audio=["1", 0])},
            "RuntimeError",
            "can't allocate memory",
        ),
        (
            "0.3.75",
            {"1": node("EmptyImage", width=16384, height=16384, batch_size=4096, color=1)}
            | {"9": node("PreviewImage", images=["1", 0])},
            "RuntimeError",
            "can't allocate memory",
        ),
        (
            "0.3.75",
            {"1": picture()["1"]}
            | {"9": node("SaveWEBM", images=["1", 0], filename_prefix="x", codec="zzz", fps=2, crf=1)},
            "KeyError",
            "'zzz'\n",
        ),
    ],
)
async def test_failures_while_running(flavor: str, graph: Graph, kind: str, message: str) -> None:
    async with rig(flavor=flavor) as running:
        (error,) = (await running.server.run(graph)).of_kind("execution_error")
        assert error["exception_type"] == kind
        assert message in error["exception_message"]


async def test_a_text_named_png_cannot_be_identified() -> None:
    async with rig() as running:
        (running.simulator.folders.roots["input"] / "a.png").write_bytes(b"text")
        graph = {"1": node("LoadImage", image="a.png"), "9": node("PreviewImage", images=["1", 0])}
        (error,) = (await running.server.run(graph)).of_kind("execution_error")
        assert error["exception_type"] == "PIL.UnidentifiedImageError"


async def test_saved_pictures_can_be_padded() -> None:
    async with rig(output_bytes=100_000) as running:
        data = (await files(running, picture()))["images.png"]
        assert len(data) == 100_000
        assert opened(data).getpixel((0, 0)) == (0, 0, 1)
