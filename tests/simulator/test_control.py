"""The simulator's own routes show the log, set the switches and cause accidents."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from comfyd.simulator import Faults
from tests.simulator.rig import picture, rig, until


async def test_switches_are_read_and_set() -> None:
    async with rig() as running:
        changes = {"sockets": "deaf", "poison": ["B", "A"], "http_delay_seconds": 0, "worker_dead": True}
        answer = await running.server.post("/simulator/faults", changes)
        assert answer.json()["poison"] == ["A", "B"]
        assert (await running.server.get("/simulator/faults")).json() == running.simulator.faults.document()
        assert running.simulator.faults.poison == {"A", "B"}


@pytest.mark.parametrize("body", [b'{"nonsense": 1}', b'{"worker_dead": "maybe"}', b"[]", b"{"])
async def test_wrong_switches_are_400_and_change_nothing(body: bytes) -> None:
    async with rig() as running:
        assert (await running.server.request("POST", "/simulator/faults", data=body)).status == 400
        assert running.simulator.faults == Faults()


async def test_switches_do_not_touch_the_control_routes() -> None:
    async with rig() as running:
        running.simulator.faults.http_statuses = {"/simulator/faults": 503}
        assert (await running.server.get("/simulator/faults")).status == 200
        running.simulator.faults.http_statuses = {}
        assert (await running.server.get("/api/simulator/faults")).status == 404


async def test_executions_are_told() -> None:
    async with rig() as running:
        run = await running.server.run(picture())
        told = (await running.server.get("/simulator/executions")).json()["executions"]
        assert [(entry["event"], entry["prompt_id"]) for entry in told] == [
            ("start", run.prompt_id),
            ("end", run.prompt_id),
        ]


async def test_accidents_happen_on_request() -> None:
    async with rig() as running:
        url = "/simulator/accidents"
        async with running.server.socket() as socket:
            await running.server.post(url, {"accident": "drop_sockets"})
            with pytest.raises(ConnectionError):
                await socket.receive()
        await running.server.post(url, {"accident": "refuse", "seconds": 0.2})
        async with aiohttp.ClientSession(running.simulator.url) as other:
            await until_refused(other)
            async with asyncio.timeout(10):
                while await refused(other):
                    pass
        assert (await running.server.post(url, {"accident": "nonsense"})).status == 400
        assert (await running.server.post(url, {"accident": "refuse", "seconds": "x"})).status == 400
        await running.server.post(url, {"accident": "crash"})
        await until(running.simulator.crashed.is_set)


async def until_refused(other: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(10):
        while not await refused(other):
            pass


async def refused(other: aiohttp.ClientSession) -> bool:
    try:
        async with other.get("/queue"):
            return False
    except aiohttp.ClientConnectionError:
        return True


def test_a_counter_below_zero_never_ends() -> None:
    faults = Faults(interrupts_ignored=-1, prompt_answers_lost=1)
    assert [faults.use("interrupts_ignored") for _ in range(3)] == [True] * 3
    assert [faults.use("prompt_answers_lost") for _ in range(3)] == [True, False, False]
