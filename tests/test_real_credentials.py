"""A key that comes with a task reaches the nodes of a real ComfyUI, and stays in neither queue nor history.

The server has one node class more: it gives the sha256 of the key that ComfyUI handed to it, as a text.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.comfyd import Client, ComfydProcess
from tests.support.comfyui import ComfyUIProcess

pytestmark = pytest.mark.comfyui

PATIENCE = 150.0
KEY = "comfyui-kanarienvogel/7f3a+=='\"é"
SHA256 = hashlib.sha256(KEY.encode()).hexdigest()
NODE = """
import hashlib, time


class KeyProbe:
    RETURN_TYPES = ()
    FUNCTION = "run"
    CATEGORY = "test"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"seconds": ("INT", {"default": 0}), "fails": ("BOOLEAN", {"default": False})},
            "hidden": {"api_key": "API_KEY_COMFY_ORG"},
        }

    @classmethod
    def IS_CHANGED(cls, **_):
        return time.time()

    def run(self, seconds, fails, api_key=None):
        time.sleep(seconds)
        if fails:
            raise RuntimeError(f"401: the key {api_key} is not known")
        return {"ui": {"text": [hashlib.sha256(api_key.encode()).hexdigest() if api_key else "none"]}}


NODE_CLASS_MAPPINGS = {"KeyProbe": KeyProbe}
"""


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUIProcess]:
    """A ComfyUI with the probe among its custom nodes."""
    folder = tmp_path_factory.mktemp("more")
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "key_probe.py").write_text(NODE)
    paths = folder / "paths.yaml"
    paths.write_text(f"probe:\n  base_path: {folder}\n  custom_nodes: custom_nodes\n")
    with ComfyUIProcess("real", options=["--extra-model-paths-config", str(paths)]) as process:
        yield process


@pytest.fixture(scope="module")
def comfyd(comfyui: ComfyUIProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfydProcess]:
    folder = tmp_path_factory.mktemp("comfyd")
    with ComfydProcess(folder, comfyui.url, COMFYD__LOG__LEVEL="debug") as process:
        yield process


@pytest.fixture
async def client(comfyd: ComfydProcess) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(session, comfyd.url)


@pytest.fixture
async def direct(comfyui: ComfyUIProcess) -> AsyncIterator[Client]:
    """ComfyUI itself."""
    async with aiohttp.ClientSession() as session:
        yield Client(session, comfyui.url)


def probing(**inputs: Any) -> dict[str, Any]:
    return {"1": {"class_type": "KeyProbe", "inputs": {"seconds": 0, "fails": False, **inputs}}}


async def probed(client: Client, **facts: Any) -> tuple[str, str]:
    """What the node saw, and the id of its prompt."""
    task = await client.submit(probing(), **facts)
    ended = await client.ended(task["task_id"], PATIENCE)
    assert ended["status"] == "COMPLETED", ended["error"]
    (output,) = ended["outputs"]
    return output["text"], ended["attempts"][0]["id"]


def traces(folder: Path) -> list[str]:
    """The files of comfyd that tell of the key."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert "comfyd.db" in {path.name for path in files}
    return [str(path) for path in files if b"kanarienvogel" in path.read_bytes()]


async def test_the_key_reaches_the_node_and_no_other_task(
    client: Client, direct: Client, comfyd: ComfydProcess
) -> None:
    seen, prompt_id = await probed(client, extra_data={"api_key_comfy_org": KEY})
    assert seen == SHA256
    assert (await probed(client))[0] == "none"
    status, history = await direct.call("GET", f"/history/{prompt_id}")
    assert (status, list(history)) == (200, [prompt_id])
    assert "kanarienvogel" not in json.dumps(history)
    assert traces(comfyd.folder) == []


async def test_a_node_that_tells_the_key_in_its_error_tells_comfyd_in_vain(
    client: Client, comfyd: ComfydProcess
) -> None:
    task = await client.submit(probing(fails=True), extra_data={"api_key_comfy_org": KEY})
    ended = await client.ended(task["task_id"], PATIENCE)
    assert ended["error"]["message"] == "node 1 (KeyProbe): 401: the key [removed] is not known"
    assert traces(comfyd.folder) == []


async def test_a_killed_comfyd_adopts_what_ran_and_runs_nothing_without_its_key(
    client: Client, direct: Client, comfyd: ComfydProcess
) -> None:
    extra = {"api_key_comfy_org": KEY}
    tasks = [await client.submit(probing(seconds=6), extra_data=extra)]
    async with asyncio.timeout(PATIENCE):
        while not (await direct.call("GET", "/queue"))[1]["queue_running"]:
            await asyncio.sleep(0.02)
    tasks += [await client.submit(probing(), extra_data=extra) for _ in range(4)]
    await asyncio.to_thread(comfyd.kill)
    await asyncio.to_thread(comfyd.start)
    ended = [await client.ended(task["task_id"], PATIENCE) for task in tasks]
    assert ended[0]["status"] == "COMPLETED"
    assert ended[0]["outputs"][0]["text"] == SHA256
    assert [len(task["attempts"]) for task in ended] == [1] * len(tasks)
    _, history = await direct.call("GET", "/history", params={"max_items": "1000"})
    for task in ended:
        if task["status"] == "COMPLETED":
            assert task["outputs"][0]["text"] == SHA256
        else:
            assert task["error"]["code"] == "credentials_lost"
            assert task["attempts"][0]["id"] not in history
    assert "FAILED" in {task["status"] for task in ended}
    assert traces(comfyd.folder) == []
