"""When a server runs a node again and when it repeats an earlier result: the trap of equal prompts."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from aiohttp import FormData
from PIL import Image

from tests.conformance import graphs
from tests.conformance.graphs import node

if TYPE_CHECKING:
    from tests.conformance.raw_client import Graph, Run, Server
    from tests.support.comfyui import ComfyUIProcess


def cached(run: Run) -> list[str]:
    """The nodes that were not run."""
    return sorted(run.of_kind("execution_cached")[0]["nodes"])


def picture_of(color: tuple[int, int, int]) -> bytes:
    """A small PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


async def upload(server: Server, name: str, content: bytes) -> dict[str, Any]:
    """Upload, replacing what has that name."""
    form = FormData(quote_fields=False)
    form.add_field("image", content, filename=name)
    form.add_field("overwrite", "true")
    answer = await server.request("POST", "/upload/image", data=form)
    assert answer.status == 200
    document: dict[str, Any] = answer.json()
    return document


async def test_an_equal_prompt_names_the_old_file_and_writes_none(
    server: Server, process: ComfyUIProcess
) -> None:
    graph = graphs.picture()
    first = await server.run(graph)
    second = await server.run(graph)
    assert second.outputs == first.outputs
    assert second.entry["status"]["status_str"] == "success"
    assert cached(second) == ["1", "9"]
    (item,) = first.outputs["9"]["images"]
    assert len(list((process.output_dir / item["subfolder"]).iterdir())) == 1


async def test_a_deleted_file_is_still_named_and_not_found(server: Server, process: ComfyUIProcess) -> None:
    graph = graphs.picture()
    first = await server.run(graph)
    (item,) = first.outputs["9"]["images"]
    (process.output_dir / item["subfolder"] / item["filename"]).unlink()
    second = await server.run(graph)
    assert second.outputs == first.outputs
    assert second.verdict == "execution_success"
    assert (await server.view(item)).status == 404


async def test_the_name_of_a_deleted_file_is_used_again(server: Server, process: ComfyUIProcess) -> None:
    prefix = graphs.prefix()
    (first,) = (await server.run(graphs.picture(filename_prefix=prefix))).outputs["9"]["images"]
    (process.output_dir / first["subfolder"] / first["filename"]).unlink()
    (second,) = (await server.run(graphs.picture(filename_prefix=prefix))).outputs["9"]["images"]
    assert second == first
    (third,) = (await server.run(graphs.picture(filename_prefix=prefix))).outputs["9"]["images"]
    assert (first["filename"], third["filename"]) == ("image_00001_.png", "image_00002_.png")


async def test_a_cached_run_without_client_id_names_its_outputs_only_on_newer_servers(server: Server) -> None:
    graph = graphs.picture()
    _, first = await server.run_quietly(graph)
    _, second = await server.run_quietly(graph)
    assert second["status"]["status_str"] == "success"
    assert len(first["outputs"]["9"]["images"]) == 1
    assert second["outputs"] == (first["outputs"] if server.facts.modern else {})


async def test_a_cached_run_with_client_id_names_its_outputs_without_any_socket(server: Server) -> None:
    graph = graphs.picture()
    _, first = await server.run_quietly(graph)
    _, second = await server.run_quietly(graph, client_id="nobody-listens")
    assert second["outputs"] == first["outputs"]


async def test_only_what_depends_on_a_change_runs_again(server: Server) -> None:
    graph = graphs.chain()
    await server.run(graph)
    graph["9"]["inputs"]["filename_prefix"] = graphs.prefix()
    assert cached(await server.run(graph)) == ["1", "2"]
    graph["1"]["inputs"]["color"] = graphs.color()
    assert cached(await server.run(graph)) == []


async def test_unknown_inputs_are_part_of_what_is_compared(server: Server) -> None:
    graph = graphs.picture()
    await server.run(graph)
    graph["1"]["inputs"]["nobody_reads_this"] = 1
    again = await server.run(graph)
    assert cached(again) == []


async def test_titles_and_node_ids_are_not_compared(server: Server) -> None:
    graph = graphs.picture()
    first = await server.run(graph)
    renamed: Graph = {"40": {**graph["1"], "_meta": {"title": "renamed"}}, "50": dict(graph["9"])}
    renamed["50"]["inputs"] = {**graph["9"]["inputs"], "images": ["40", 0]}
    again = await server.run(renamed)
    assert cached(again) == ["40", "50"]
    assert again.outputs["50"] == first.outputs["9"]


async def test_only_the_most_recent_prompt_is_remembered(server: Server) -> None:
    graph = graphs.picture()
    first = await server.run(graph)
    await server.run(graphs.picture())
    again = await server.run(graph)
    assert cached(again) == []
    assert again.outputs != first.outputs


async def test_nodes_before_a_failure_are_remembered(server: Server) -> None:
    graph = graphs.failing()
    await server.run(graph)
    again = await server.run(graph)
    assert cached(again) == ["1"]
    assert again.verdict == "execution_error"


async def test_free_memory_forgets_results_but_no_history(server: Server) -> None:
    graph = graphs.picture()
    first = await server.run(graph)
    await server.post("/free", {"unload_models": True, "free_memory": True})
    again = await server.run(graph)
    if cached(again):  # the flag is looked at when the worker wakes: it may have come after this prompt
        again = await server.run(graph)
    assert cached(again) == []
    assert again.outputs != first.outputs
    assert await server.history(first.prompt_id) == first.entry


async def test_cached_previews_name_the_same_temporary_file(server: Server) -> None:
    graph: Graph = {"1": graphs.empty_image(), "9": node("PreviewImage", images=["1", 0])}
    first = await server.run(graph)
    (item,) = first.outputs["9"]["images"]
    assert (item["type"], item["subfolder"]) == ("temp", "")
    assert (await server.run(graph)).outputs == first.outputs


async def test_an_input_file_with_other_content_is_loaded_again(server: Server) -> None:
    name = f"{graphs.color()}-cached.png"
    await upload(server, name, picture_of((10, 20, 30)))
    graph: Graph = {
        "1": node("LoadImage", image=name),
        "9": node("SaveImage", images=["1", 0], filename_prefix=graphs.prefix()),
    }
    await server.run(graph)
    assert cached(await server.run(graph)) == ["1", "9"]
    await upload(server, name, picture_of((200, 100, 50)))
    again = await server.run(graph)
    assert cached(again) == []
    (item,) = again.outputs["9"]["images"]
    with Image.open(io.BytesIO((await server.view(item)).body)) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (200, 100, 50)
