"""The nine graphs through the REST API, against the real ComfyUI: every kind of output, one run per task."""

import asyncio
import hashlib
import io
import json
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from struct import pack
from typing import Any

import aiohttp
import pytest
from PIL import Image

from tests.support.comfyd import Client, ComfydProcess
from tests.support.comfyui import ComfyUIProcess

pytestmark = pytest.mark.comfyui

GRAPHS = Path(__file__).parent / "graphs"
PATIENCE = 150.0


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUIProcess]:
    with ComfyUIProcess("real") as process:
        yield process


@pytest.fixture(scope="module")
def comfyd(comfyui: ComfyUIProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfydProcess]:
    with ComfydProcess(tmp_path_factory.mktemp("comfyd"), comfyui.url) as process:
        yield process


@pytest.fixture(scope="module")
def forgotten() -> set[str]:
    """Prompts of tasks that were deleted: ComfyUI still knows them, comfyd does not."""
    return set()


@pytest.fixture
async def client(comfyd: ComfydProcess) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(session, comfyd.url)


@pytest.fixture
async def direct(comfyui: ComfyUIProcess) -> AsyncIterator[Client]:
    """ComfyUI itself, for looking at what comfyd did there."""
    async with aiohttp.ClientSession() as session:
        yield Client(session, comfyui.url)


def graph(name: str, **inputs: Any) -> dict[str, Any]:
    """One of the nine, with inputs changed: `node__input=value`."""
    loaded = json.loads((GRAPHS / f"{name}.json").read_text())
    for address, value in inputs.items():
        node, _, field = address.partition("__")
        loaded[node.removeprefix("n")]["inputs"][field] = value
    assert isinstance(loaded, dict)
    return loaded


def png(color: tuple[int, int, int]) -> bytes:
    """A small picture."""
    row = b"\0" + bytes(color) * 40
    chunks = [
        (b"IHDR", pack(">IIBBBBB", 40, 30, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(row * 30)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        pack(">I", len(data)) + kind + data + pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


async def done(client: Client, workflow: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """A task that was completed, with every output read and checked."""
    task = await client.submit(workflow, **facts)
    ended = await client.ended(task["task_id"], PATIENCE)
    assert ended["status"] == "COMPLETED", ended["error"]
    for output in ended["outputs"]:
        data = await client.read(output["url"])
        assert len(data) == output["size_bytes"] > 0
        assert hashlib.sha256(data).hexdigest() == output["sha256"]
        check_bytes(output, data)
    return ended


def check_bytes(output: dict[str, Any], data: bytes) -> None:
    """The file is what its content type says."""
    begins = {
        "image/png": b"\x89PNG",
        "image/webp": b"RIFF",
        "video/webm": b"\x1a\x45\xdf\xa3",
        "text/plain; charset=utf-8": b"",
        "application/octet-stream": b"",
    }
    if output["content_type"] == "video/mp4":
        assert data[4:8] == b"ftyp"
    else:
        assert data.startswith(begins[output["content_type"]])
    if output["type"] == "image":
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (output["width"], output["height"])


def kinds(task: dict[str, Any]) -> list[tuple[str, str, str]]:
    return sorted((output["node_id"], output["type"], output["content_type"]) for output in task["outputs"])


async def test_image_generate(client: Client) -> None:
    task = await done(client, graph("image-generate"))
    assert kinds(task) == [("9", "image", "image/png")]
    assert task["outputs"][0]["name"].startswith("generate_")
    assert (task["outputs"][0]["width"], task["progress"]["value"]) == (512, 1.0)
    assert task["progress"]["nodes_total"] == 4


async def test_image_to_image(client: Client) -> None:
    form = aiohttp.FormData()
    form.add_field("image", png((200, 30, 30)), filename="comfyd-input.png")
    status, body = await client.call("POST", "/api/comfyui/upload/image", data=form)
    assert (status, body["name"]) == (200, "comfyd-input.png")
    task = await done(client, graph("image-to-image"))
    assert kinds(task) == [("9", "image", "image/png")]
    assert (task["outputs"][0]["width"], task["outputs"][0]["height"]) == (384, 256)


async def test_batch_images(client: Client) -> None:
    task = await done(client, graph("batch-images"))
    assert kinds(task) == [("9", "image", "image/png")] * 4
    assert len({output["sha256"] for output in task["outputs"]}) == 4


async def test_multi_output(client: Client) -> None:
    task = await done(client, graph("multi-output"))
    assert kinds(task) == [
        *[("10", "image", "image/png")] * 2,
        *[("11", "image", "image/png")] * 2,
        ("14", "text", "text/plain; charset=utf-8"),
        ("15", "latent", "application/octet-stream"),
    ]
    text = next(output for output in task["outputs"] if output["type"] == "text")
    assert text["text"] == "hello comfyd"
    everything = await done(client, graph("multi-output"), output={"include_temp": True})
    assert {"12", "13"} <= {output["node_id"] for output in everything["outputs"]}


async def test_animated_and_video(client: Client) -> None:
    assert kinds(await done(client, graph("animated-and-video"))) == [
        ("10", "image", "image/webp"),
        ("11", "image", "image/png"),
        ("12", "video", "video/webm"),
        ("13", "video", "video/mp4"),
    ]


async def test_websocket_image(client: Client) -> None:
    task = await done(client, graph("websocket-image"))
    assert kinds(task) == [("9", "image", "image/png")] * 2
    assert {output["width"] for output in task["outputs"]} == {64}


async def test_slow_nodes(client: Client) -> None:
    task = await done(client, graph("slow-nodes"))
    assert kinds(task) == [("30", "image", "image/png")]
    assert task["progress"]["nodes_done"] == task["progress"]["nodes_total"] == 9


async def test_fail_at_runtime_names_the_node_and_no_path(client: Client) -> None:
    task = await client.submit(graph("fail-at-runtime"))
    ended = await client.ended(task["task_id"], PATIENCE)
    assert ended["status"] == "FAILED"
    error = ended["error"]
    assert error["code"] == "execution_error"
    assert (error["details"]["node_id"], error["details"]["class_type"]) == ("3", "RegexReplace")
    assert "unterminated subpattern" in error["message"]
    assert "/" not in json.dumps(error)
    assert len(ended["attempts"]) == 1


async def test_slow_progress_rises_in_events(client: Client, comfyd: ComfydProcess) -> None:
    task = await client.submit(graph("slow-progress", n1__color=11))
    values: list[float] = []
    url = f"{comfyd.url}/api/tasks/{task['task_id']}/events"
    async with asyncio.timeout(PATIENCE), aiohttp.ClientSession() as session, session.get(url) as stream:
        name = ""
        async for line in stream.content:
            if line.startswith(b"event: "):
                name = line[7:].decode().strip()
            elif line.startswith(b"data: ") and name == "progress":
                values.append(json.loads(line[6:])["value"])
    assert values == sorted(values)
    assert len(set(values)) >= 20
    assert (await client.task(task["task_id"]))["status"] == "COMPLETED"


async def test_a_running_task_is_canceled_within_two_seconds(client: Client, direct: Client) -> None:
    victim = await client.submit(graph("slow-progress", n1__color=12))
    bystander = await client.submit(graph("image-generate", n1__color=13))
    async with asyncio.timeout(PATIENCE):
        while (await client.task(victim["task_id"]))["progress"]["value"] <= 0.3:
            await asyncio.sleep(0.05)
    asked = time.monotonic()
    await client.call("POST", f"/api/tasks/{victim['task_id']}/cancel")
    ended = await client.ended(victim["task_id"])
    assert time.monotonic() - asked < 2
    assert ended["status"] == "CANCELED"
    assert (await client.ended(bystander["task_id"], PATIENCE))["status"] == "COMPLETED"
    _, queue = await direct.call("GET", "/queue")
    assert queue == {"queue_running": [], "queue_pending": []}


async def test_the_same_prompt_twice_gives_two_results_also_after_a_deletion(
    client: Client, forgotten: set[str]
) -> None:
    first = await done(client, graph("image-generate", n1__color=21))
    second = await done(client, graph("image-generate", n1__color=21))
    status, _ = await client.call("DELETE", f"/api/tasks/{first['task_id']}")
    assert status == 204
    forgotten.add(first["attempts"][0]["id"])
    third = await done(client, graph("image-generate", n1__color=21))
    assert len({task["outputs"][0]["url"] for task in (first, second, third)}) == 3
    assert (await client.call("GET", f"/api/tasks/{first['task_id']}"))[0] == 404


async def test_a_killed_comfyd_adopts_the_running_prompt(
    client: Client, direct: Client, comfyd: ComfydProcess
) -> None:
    tasks = [await client.submit(graph("slow-nodes", n1__color=31))]
    tasks += [await client.submit(graph("image-generate", n1__color=100 + number)) for number in range(10)]
    async with asyncio.timeout(PATIENCE):
        while (await client.task(tasks[0]["task_id"]))["progress"]["value"] <= 0.1:
            await asyncio.sleep(0.05)
    await asyncio.to_thread(comfyd.kill)
    await asyncio.to_thread(comfyd.start)
    for task in tasks:
        ended = await client.ended(task["task_id"], PATIENCE)
        assert ended["status"] == "COMPLETED", ended["error"]
        assert len(ended["attempts"]) == 1
        await one_run(direct, ended)


async def one_run(direct: Client, task: dict[str, Any]) -> None:
    """ComfyUI's own history has exactly the prompt of the task's only attempt."""
    (attempt,) = task["attempts"]
    _, history = await direct.call("GET", f"/history/{attempt['id']}")
    assert list(history) == [attempt["id"]]


async def test_comfyui_ran_one_prompt_for_each_attempt_and_has_none_left(
    client: Client, direct: Client, forgotten: set[str]
) -> None:
    _, listed = await client.call("GET", "/api/tasks", params={"limit": "100"})
    attempts = [attempt["id"] for task in listed["tasks"] for attempt in task["attempts"]]
    assert len(attempts) == len(set(attempts)) == len(listed["tasks"]) > 0
    _, history = await direct.call("GET", "/history", params={"max_items": "1000"})
    assert set(history) - forgotten <= set(attempts)
    completed = [task for task in listed["tasks"] if task["status"] == "COMPLETED"]
    assert {task["attempts"][0]["id"] for task in completed} <= set(history)
    _, queue = await direct.call("GET", "/queue")
    assert queue == {"queue_running": [], "queue_pending": []}


async def test_a_wrong_graph_is_refused_with_the_nodes_that_are_wrong(client: Client) -> None:
    wrong = graph("image-generate", n1__width=-5, n2__strength="loud")
    wrong["3"]["class_type"] = "NoSuchClass"
    status, body = await client.call("POST", "/api/tasks", json={"workflow": wrong})
    assert (status, body["error"]["code"]) == (422, "invalid_workflow")
    assert set(body["error"]["details"]["node_errors"]) == {"1", "2", "3"}
