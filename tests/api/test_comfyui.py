"""ComfyUI behind comfyd: its own answers, an interrupt that hits one, and the rest passed through."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import pytest
from yarl import URL

from comfyd.config import LimitsConfig
from comfyd.simulator import Simulator, SimulatorOptions
from tests.api.conftest import GONE, PATIENCE, Edge, serving
from tests.support.service import configuration, sampled


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions(step_seconds=0.02)) as made:
        yield made


@pytest.fixture
async def edge(simulator: Simulator, tmp_path: Path) -> AsyncIterator[Edge]:
    """Two ComfyUIs, of which the first is away; nobody works the queue."""
    async with serving(configuration(tmp_path / "data", GONE, simulator.url)) as served:
        for backend in served.state.backends:
            await backend.probe()
        yield served


async def foreign_prompt(simulator: Simulator) -> str:
    """A prompt of somebody else, running."""
    async with aiohttp.ClientSession() as http:
        body = {"prompt": sampled(1, steps=2000), "client_id": "somebody"}
        async with http.post(f"{simulator.url}/prompt", json=body) as response:
            prompt_id = str((await response.json())["prompt_id"])
        async with asyncio.timeout(PATIENCE):
            while True:
                async with http.get(f"{simulator.url}/queue") as response:
                    if (await response.json())["queue_running"]:
                        return prompt_id
                await asyncio.sleep(0.01)


async def test_comfyui_answers_for_itself(edge: Edge) -> None:
    status, queue = await edge.call("GET", "/api/comfyui-queue-status")
    assert (status, queue) == (200, {"queue_running": [], "queue_pending": []})
    status, stats = await edge.call("GET", "/api/comfyui-system-stats")
    assert status == 200
    assert stats["system"]["comfyui_version"]


async def test_backend_is_chosen_by_name(edge: Edge) -> None:
    named = {"Comfyd-Backend": "comfyui-0"}
    status, answer = await edge.call("GET", "/api/comfyui-queue-status", headers=named)
    assert (status, answer["error"]["code"]) == (502, "backend_unreachable")
    named = {"Comfyd-Backend": "comfyui-1"}
    status, _ = await edge.call("GET", "/api/comfyui-queue-status", headers=named)
    assert status == 200
    status, answer = await edge.call("GET", "/api/comfyui-queue-status", headers={"Comfyd-Backend": "x"})
    assert (status, answer["error"]["code"]) == (404, "not_found")


async def test_interrupt_ends_what_runs_and_says_what_it_was(edge: Edge, simulator: Simulator) -> None:
    status, answer = await edge.call("POST", "/api/comfyui-interrupt")
    assert (status, answer) == (200, {"backend": "comfyui-1", "prompt_id": None, "task_id": None})
    prompt_id = await foreign_prompt(simulator)
    status, answer = await edge.call("POST", "/api/comfyui-interrupt")
    assert (status, answer) == (200, {"backend": "comfyui-1", "prompt_id": prompt_id, "task_id": None})
    async with asyncio.timeout(PATIENCE):
        while (await edge.state.backends[1].queue()).running:
            await asyncio.sleep(0.01)


async def test_interrupt_of_a_task_cancels_the_task(simulator: Simulator, tmp_path: Path) -> None:
    """Interrupted by itself its attempt would count as a stray, and run again."""
    async with serving(configuration(tmp_path / "data", simulator.url), works=True) as edge:
        task = await edge.bench.submit(sampled(2, steps=2000))
        async with asyncio.timeout(PATIENCE):
            while not (await edge.state.backends[0].queue()).running:
                await asyncio.sleep(0.01)
        status, answer = await edge.call("POST", "/api/comfyui-interrupt")
        assert (status, answer["task_id"]) == (200, task.id)
        _, read = await edge.call("GET", f"/api/tasks/{task.id}?wait=15")
        assert read["status"] == "CANCELED"
        assert [attempt["id"] for attempt in read["attempts"]] == [answer["prompt_id"]]


async def test_pass_through_answers_as_comfyui_does(edge: Edge, simulator: Simulator) -> None:
    async with edge.http.get(f"{edge.base}/api/comfyui/object_info/SaveImage") as response:
        through = await response.json()
        assert response.status == 200
        assert response.headers["X-Request-Id"]
    async with edge.http.get(f"{simulator.url}/object_info/SaveImage") as response:
        assert through == await response.json()
    async with edge.http.get(f"{edge.base}/api/comfyui/no/such/route") as response:
        assert response.status == 404
    async with edge.http.head(f"{edge.base}/api/comfyui/system_stats") as response:
        assert response.status == 200
    status, _ = await edge.call("POST", "/api/comfyui/queue", json={"delete": ["nothing"]})
    assert status == 200


async def test_upload_is_passed_through(edge: Edge) -> None:
    form = aiohttp.FormData()
    form.add_field("image", b"\x89PNG\r\n\x1a\n", filename="x.png", content_type="image/png")
    async with edge.http.post(f"{edge.base}/api/comfyui/upload/image", data=form) as response:
        assert response.status == 200
        assert (await response.json())["name"] == "x.png"
    async with edge.http.get(f"{edge.base}/api/comfyui/view?filename=x.png&type=input") as response:
        assert await response.read() == b"\x89PNG\r\n\x1a\n"


async def test_path_that_leaves_its_place_is_not_passed_on(edge: Edge) -> None:
    for path in ("../internal", "a/../b", "%2e%2e/x", "a//b", "/a", "a%5cb", "a%00b", "./a"):
        url = URL(f"{edge.base}/api/comfyui/{path}", encoded=True)
        async with edge.http.get(url) as response:
            assert response.status == 400, path
            assert (await response.json())["error"]["code"] == "invalid_request"


async def test_body_that_is_passed_through_is_bounded(simulator: Simulator, tmp_path: Path) -> None:
    async def chunked() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 100

    config = configuration(tmp_path / "data", simulator.url)
    small = msgspec.structs.replace(config, limits=LimitsConfig(body_bytes=2000))
    async with serving(small) as edge:
        for body in (b"x" * 2001, chunked()):
            status, answer = await edge.call("POST", "/api/comfyui/prompt", data=body)
            assert (status, answer["error"]["code"]) == (413, "body_too_large")


async def test_comfyui_that_is_away_is_502(tmp_path: Path) -> None:
    async with serving(configuration(tmp_path / "data", GONE)) as edge:
        for method, path in (
            ("GET", "/api/comfyui-system-stats"),
            ("POST", "/api/comfyui-interrupt"),
            ("GET", "/api/comfyui/queue"),
            ("POST", "/api/comfyui/queue"),
        ):
            status, answer = await edge.call(method, path)
            assert (status, answer["error"]["code"]) == (502, "backend_unreachable"), path
