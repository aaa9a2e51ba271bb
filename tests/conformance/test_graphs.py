"""The nine graphs of `tests/graphs`: which outputs they make, where, and of what kind the files are."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Final

import pytest
from aiohttp import FormData
from PIL import Image

from tests.conformance import graphs

if TYPE_CHECKING:
    from tests.conformance.raw_client import Answer, Run, Server
    from tests.support.comfyui import ComfyUIProcess

# node -> (key, number of items, type of the items, extension); text and no output are tested apart
FILES: Final[dict[str, dict[str, tuple[str, int, str, str]]]] = {
    "animated-and-video": {
        "10": ("images", 1, "output", ".webp"),
        "11": ("images", 1, "output", ".png"),
        "12": ("images", 1, "output", ".webm"),
        "13": ("images", 1, "output", ".mp4"),
    },
    "batch-images": {"9": ("images", 4, "output", ".png")},
    "image-generate": {"9": ("images", 1, "output", ".png")},
    "image-to-image": {"9": ("images", 1, "output", ".png")},
    "multi-output": {
        "10": ("images", 2, "output", ".png"),
        "11": ("images", 2, "output", ".png"),
        "12": ("images", 2, "temp", ".png"),
        "13": ("images", 1, "temp", ".png"),
        "15": ("latents", 1, "output", ".latent"),
    },
    "slow-nodes": {"30": ("images", 1, "output", ".png")},
    "slow-progress": {"9": ("images", 2, "output", ".png")},
}
PIXELS: Final = {
    "animated-and-video": (192, 128),
    "batch-images": (256, 256),
    "image-generate": (512, 512),
    "image-to-image": (384, 256),
    "slow-nodes": (128, 128),
    "slow-progress": (256, 256),
}
CONTENT_TYPES: Final = {
    ".png": "image/png",
    ".webp": "image/webp",
    ".webm": "video/webm",
    ".mp4": "video/mp4",
    ".latent": "application/octet-stream",
}


# Several tests look at the same run: a slow graph is run once per server, by whichever test comes first.
earlier_runs: Final[dict[tuple[ComfyUIProcess, str], Run]] = {}


async def run_once(server: Server, process: ComfyUIProcess, name: str) -> Run:
    """The first run of one of the nine on this server."""
    if (process, name) not in earlier_runs:
        earlier_runs[process, name] = await run_named(server, name)
    return earlier_runs[process, name]


async def run_named(server: Server, name: str) -> Run:
    """Run one of the nine anew, with its input uploaded."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 100, 0)).save(buffer, "PNG")
    form = FormData(quote_fields=False)
    form.add_field("image", buffer.getvalue(), filename="comfyd-input.png")
    form.add_field("overwrite", "true")
    assert (await server.request("POST", "/upload/image", data=form)).status == 200
    return await server.run(graphs.named(name), previews=True)


def check_file(answer: Answer, extension: str) -> None:
    """The bytes begin, and are declared, as a file with that extension should be."""
    assert answer.status == 200
    assert answer.headers["Content-Type"] == CONTENT_TYPES[extension]
    head = answer.body[:64]
    if extension == ".png":
        assert head.startswith(b"\x89PNG\r\n\x1a\n")
    elif extension == ".webp":
        assert (head[:4], head[8:12]) == (b"RIFF", b"WEBP")
    elif extension == ".webm":
        assert head.startswith(b"\x1a\x45\xdf\xa3")
    elif extension == ".mp4":
        assert head[4:8] == b"ftyp"
    else:
        length = int.from_bytes(head[:8], "little")
        assert "latent_tensor" in json.loads(answer.body[8 : 8 + length])


def meta_of(run: Run) -> set[str]:
    """The nodes in the entry's `meta`."""
    return set(run.entry["meta"])


@pytest.mark.parametrize("name", sorted(FILES))
async def test_a_graph_makes_its_files(server: Server, process: ComfyUIProcess, name: str) -> None:
    run = await run_once(server, process, name)
    assert run.verdict == "execution_success"
    texts = {"14"} if name == "multi-output" else set()
    assert set(run.outputs) == set(FILES[name]) | texts
    assert meta_of(run) == set(run.outputs)
    for node_id, (key, count, place, extension) in FILES[name].items():
        items = run.outputs[node_id][key]
        assert len(items) == count
        for item in items:
            assert set(item) == {"filename", "subfolder", "type"}
            assert (item["type"], item["filename"].endswith(extension)) == (place, True)
            answer = await server.view(item)
            check_file(answer, extension)
            if name in PIXELS and extension in {".png", ".webp"}:
                with Image.open(io.BytesIO(answer.body)) as image:
                    assert image.size == PIXELS[name]


async def test_outputs_hold_nothing_but_their_keys(server: Server) -> None:
    run = await run_named(server, "multi-output")
    keys = {node_id: set(output) for node_id, output in run.outputs.items()}
    flagged = {"images", "animated"} if server.facts.modern else {"images"}
    assert keys == {
        "10": {"images"},
        "11": {"images"},
        "12": {"images"},
        "13": flagged,
        "14": {"text"},
        "15": {"latents"},
    }
    assert run.outputs["14"]["text"] == ["hello comfyd"]
    assert {message["node"]: message["output"] for message in run.of_kind("executed")} == run.outputs


async def test_animations_and_videos_are_images_that_are_flagged(server: Server) -> None:
    run = await run_named(server, "animated-and-video")
    assert set(run.outputs) == {"10", "11", "12", "13"}
    for output in run.outputs.values():
        assert set(output) == {"images", "animated"}
        assert output["animated"] == [True]
    for node_id in ("10", "11"):
        (item,) = run.outputs[node_id]["images"]
        with Image.open(io.BytesIO((await server.view(item)).body)) as image:
            assert getattr(image, "n_frames", 1) == 12


async def test_names_count_up_from_the_prefix(server: Server) -> None:
    run = await run_named(server, "batch-images")
    assert [item["filename"] for item in run.outputs["9"]["images"]] == [
        f"batch_{number:05}_.png" for number in range(1, 5)
    ]
    assert all(item["subfolder"].endswith("/ref") for item in run.outputs["9"]["images"])


async def test_temporary_files_have_random_names_in_no_subfolder(server: Server) -> None:
    run = await run_named(server, "multi-output")
    for node_id in ("12", "13"):
        for number, item in enumerate(run.outputs[node_id]["images"], start=1):
            assert item["subfolder"] == ""
            assert item["filename"].startswith("ComfyUI_temp_")
            assert item["filename"].endswith(f"_{number:05}_.png")


async def test_progress_of_the_slow_graph(server: Server, process: ComfyUIProcess) -> None:
    run = await run_once(server, process, "slow-progress")
    steps = run.of_kind("progress")
    assert {step["node"] for step in steps} == {"4", "6"}
    assert {step["max"] for step in steps} == {230}
    if server.facts.modern:
        assert 4 <= len(steps) < 460
    else:
        assert len(steps) == 460
    nodes = [step["node"] for step in steps]
    assert nodes == sorted(nodes), "one bar after the other"
    assert run.of_kind("progress_state")[-1]["nodes"]["9"]["state"] == "finished"


async def test_the_failing_graph_names_the_failing_node(server: Server) -> None:
    run = await run_named(server, "fail-at-runtime")
    (error,) = run.of_kind("execution_error")
    assert (error["node_id"], error["node_type"], error["exception_type"]) == (
        "3",
        "RegexReplace",
        "re.error",
    )
    assert run.verdict == "execution_error"
    assert set(run.outputs) <= {"2"}, "whether the other branch came first differs from process to process"
    assert set(error["executed"]) <= {"1", "2"}


async def test_the_websocket_graph_leaves_no_output(server: Server) -> None:
    run = await run_named(server, "websocket-image")
    assert run.verdict == "execution_success"
    assert (run.outputs, run.entry["meta"]) == ({}, {})
    assert run.of_kind("executed") == []
    assert [message.token for message in run.messages].count("binary 4") == 2


@pytest.mark.parametrize("name", sorted({*FILES} - {"slow-nodes", "slow-progress"}))
async def test_a_graph_that_is_sent_again_is_cached_whole(server: Server, name: str) -> None:
    first = await run_named(server, name)
    again = await server.run(first.entry["prompt"][2])
    assert again.outputs == first.outputs
    assert not [message for message in again.messages if message.kind == "executing" and message.data["node"]]
