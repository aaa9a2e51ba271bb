"""A simulator lives, crashes and comes back as a real server would."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiohttp
import pytest

from comfyd.simulator import read_log
from tests.conformance import graphs
from tests.simulator.rig import MODERN, node, picture, rig, tiles, until

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("flavor", ["0.3.75", MODERN])
async def test_the_nine_graphs_end_as_they_should(flavor: str) -> None:
    async with rig(flavor=flavor) as running:
        form = aiohttp.FormData()
        item = await running.image_item()
        form.add_field("image", (await running.server.view(item)).body, filename="comfyd-input.png")
        await running.server.post("/upload/image", data=form)
        for name in graphs.NAMES:
            run = await running.server.run(graphs.named(name), previews=True)
            expected = "execution_error" if name == "fail-at-runtime" else "execution_success"
            assert run.verdict == expected, name
            for kinds in run.outputs.values():
                for found in [
                    entry for items in kinds.values() for entry in items if isinstance(entry, dict)
                ]:
                    answer = await running.server.view(found)
                    assert (answer.status, len(answer.body) > 50) == (200, True)


async def test_after_a_crash_only_files_and_log_are_left(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "executions.jsonl"
    async with rig(directory=tmp_path, execution_log=log) as running:
        server, simulator = running.server, running.simulator
        item = await running.image_item()
        preview = {"1": picture()["1"], "9": node("PreviewImage", images=["1", 0])}
        temp = (await server.run(preview)).outputs["9"]["images"][0]
        port = simulator.port
        await simulator.crash()
        assert simulator.crashed.is_set()
        with pytest.raises(aiohttp.ClientConnectionError):
            await server.get("/queue")
        await simulator.restart()
        assert simulator.port == port
        assert (await server.get("/history")).json() == {}
        assert (await server.view(item)).status == 200
        assert (await server.view(temp)).status == 404
        answer = await server.post("/prompt", {"prompt": picture(color=5)})
        assert answer.json()["number"] == 0
        await server.finished(answer.json()["prompt_id"])
        assert len(simulator.executions) == 6
    assert len(read_log(log)) == 6


async def test_a_crash_breaks_what_runs_and_every_connection() -> None:
    async with rig(step_seconds=0.05) as running:
        async with running.server.socket() as socket:
            prompt_id = await running.server.submit(tiles(), client_id=socket.client_id)
            await running.server.running(prompt_id)
            await running.simulator.crash()
            with pytest.raises(ConnectionError):
                await socket.until(lambda message: message.kind == "execution_success")
        await running.simulator.restart()
        assert await running.server.queue() == ([], [])
        assert [entry.event for entry in running.simulator.executions] == ["start"]


async def test_listening_can_stop_while_open_connections_go_on() -> None:
    async with rig() as running, running.server.socket() as socket:
        await running.simulator.stop_listening()
        async with aiohttp.ClientSession(running.simulator.url) as other:
            with pytest.raises(aiohttp.ClientConnectionError):
                await other.get("/queue")
            assert await socket.pending() == []
            await running.simulator.start_listening()
            await running.simulator.start_listening()  # twice does no harm
            async with other.get("/queue") as answer:
                assert answer.status == 200


async def test_sockets_are_counted() -> None:
    async with rig() as running:
        async with running.server.socket(), running.server.socket():
            assert running.simulator.sockets.open == 2
        await until(lambda: running.simulator.sockets.open == 0)
        count = running.simulator.sockets
        assert (count.peak, count.total) == (2, 2)


async def test_dropped_sockets_end_at_once() -> None:
    async with rig() as running, running.server.socket() as socket:
        assert running.simulator.drop_sockets() == 1
        with pytest.raises(ConnectionError):
            await socket.receive()


async def test_leaving_ends_a_running_prompt() -> None:
    async with asyncio.timeout(10):
        async with rig(step_seconds=5) as running:
            prompt_id = await running.server.submit(tiles())
            await running.server.running(prompt_id)
