"""Alive, ready, in detail, and as figures."""

import dataclasses
from pathlib import Path
from typing import Any

import msgspec

from comfyd.api.state import State
from comfyd.config import ComfyUIConfig, Config
from comfyd.errors import StoreUnavailable
from comfyd.simulator import Simulator
from comfyd.tasks import Status
from tests.api.conftest import GONE, Edge, serving
from tests.support.service import configuration
from tests.support.values import GRAPH


class DeadStore:
    """A database that does not answer."""

    async def ping(self) -> None:
        """Nothing."""
        raise StoreUnavailable("the database does not answer")

    async def counts(self) -> dict[Status, int]:
        """Nothing."""
        raise StoreUnavailable("the database does not answer")


def without_store(state: State) -> State:
    store: Any = DeadStore()
    return dataclasses.replace(state, store=store)


async def test_alive_asks_nobody(config: Config) -> None:
    async with serving(config, state=without_store) as edge:
        status, answer = await edge.call("GET", "/api/health")
        assert (status, answer) == (200, {"status": "ok", "version": edge.state.version})
        async with edge.http.head(f"{edge.base}/api/health") as response:
            assert response.status == 200


async def test_not_ready_says_why_for_each_comfyui(edge: Edge) -> None:
    await edge.state.backends[0].probe()
    status, answer = await edge.call("GET", "/api/ready")
    assert status == 503
    assert answer["ready"] is False
    assert answer["checks"]["store"] == {"ok": True, "reason": None}
    (comfyui,) = answer["checks"]["comfyui"]
    assert (comfyui["name"], comfyui["url"], comfyui["ready"]) == ("comfyui-0", GONE, False)
    assert comfyui["reason"]


async def test_one_comfyui_of_two_is_enough(tmp_path: Path) -> None:
    async with (
        Simulator() as simulator,
        serving(configuration(tmp_path / "data", GONE, simulator.url)) as edge,
    ):
        for backend in edge.state.backends:
            await backend.probe()
        edge.state.health.sick("socket:comfyui-0", "refused")
        status, answer = await edge.call("GET", "/api/ready")
        assert (status, answer["ready"]) == (200, True)
        assert [comfyui["ready"] for comfyui in answer["checks"]["comfyui"]] == [False, True]
        assert answer["checks"]["loops"] == [{"name": "socket:comfyui-0", "reason": "refused"}]
        # A loop that serves all of comfyd is another matter.
        edge.state.health.sick("queue", "ValueError: broken")
        status, answer = await edge.call("GET", "/api/ready")
        assert (status, answer["ready"]) == (503, False)
        assert {"name": "queue", "reason": "ValueError: broken"} in answer["checks"]["loops"]


async def test_dead_database_is_not_ready_and_503(config: Config) -> None:
    async with serving(config, state=without_store) as edge:
        status, answer = await edge.call("GET", "/api/ready")
        assert status == 503
        assert answer["checks"]["store"] == {"ok": False, "reason": "the database does not answer"}
        async with edge.http.get(f"{edge.base}/api/status") as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) > 0
            assert (await response.json())["error"]["code"] == "store_unavailable"


async def test_status_tells_all_but_secrets(config: Config) -> None:
    secret = ComfyUIConfig(url="http://user:hunter2@127.0.0.1:9", name="gpu")
    async with serving(msgspec.structs.replace(config, comfyui=(secret,))) as edge:
        await edge.call("POST", "/api/tasks", json={"workflow": GRAPH})
        async with edge.http.get(f"{edge.base}/api/status") as response:
            text = await response.text()
    assert "hunter2" not in text
    answer = msgspec.json.decode(text)
    assert answer["tasks"] == {"PENDING": 1, "PROCESSING": 0, "COMPLETED": 0, "FAILED": 0, "CANCELED": 0}
    assert answer["queue"] == {"waiting": 1, "running": 0, "limit": 1_000_000}
    assert answer["uptime_seconds"] >= 0
    assert answer["watchers"] == 0
    assert answer["storage"] == "local"
    assert answer["workflows"] == 3
    assert answer["backends"][0]["name"] == "gpu"
    assert answer["configuration"]["comfyui"][0]["url"] == "http://***@127.0.0.1:9"


async def test_metrics_show_this_moment(edge: Edge) -> None:
    _, task = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH})
    async with edge.http.get(f"{edge.base}/api/tasks/{task['task_id']}/events") as stream:
        await stream.content.readline()
        async with edge.http.get(f"{edge.base}/metrics") as response:
            assert response.headers["Content-Type"].startswith("text/plain")
            text = await response.text()
    assert "comfyd_event_watchers 1.0" in text
    assert 'comfyd_backend_ready{backend="comfyui-0"} 0.0' in text
    assert "comfyd_tasks_submitted_total 1.0" in text
