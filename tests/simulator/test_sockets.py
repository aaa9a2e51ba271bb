"""WebSockets behave as ComfyUI's do, weaknesses included, and can be made to misbehave further."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from tests.conformance.raw_client import ends, kind_is
from tests.simulator.rig import node, picture, rig, tiles, until


async def test_a_deaf_socket_answers_pings_and_nothing_else() -> None:
    async with rig() as running:
        running.simulator.faults.sockets = "deaf"
        async with running.server.socket(hello=False) as socket:
            await socket.say('{"type": "feature_flags", "data": {}}')
            prompt_id = await running.server.submit(picture(), client_id=socket.client_id)
            await running.server.finished(prompt_id)
            assert await socket.pending() == []


async def test_sockets_can_be_refused() -> None:
    async with rig() as running:
        running.simulator.faults.sockets = "refuse"
        with pytest.raises(aiohttp.WSServerHandshakeError):
            async with running.server.socket():
                pass


async def test_sockets_can_hang_until_they_may_open() -> None:
    async with rig() as running:
        running.simulator.faults.sockets = "hang"
        opening = asyncio.create_task(_first_message(running.server.http))
        await running.server.get("/queue")
        assert not opening.done()
        running.simulator.faults.sockets = "none"
        assert "sid" in await opening


async def _first_message(http: aiohttp.ClientSession) -> str:
    async with asyncio.timeout(10), http.ws_connect("/ws") as connection:
        return str(await connection.receive_str())


async def test_a_reused_client_id_goes_deaf_when_the_old_socket_ends() -> None:
    async with (
        rig() as running,
        running.server.socket("twice") as old,
        running.server.socket("twice") as new,
    ):
        await old.close()
        await until(lambda: running.simulator.sockets.open == 1)
        prompt_id = await running.server.submit(picture(), client_id="twice")
        await running.server.finished(prompt_id)
        assert await new.pending() == []


async def test_a_client_that_does_not_read_blocks_everyone() -> None:
    async with rig() as running:
        images = {
            "1": node("EmptyImage", width=512, height=512, batch_size=24, color=3),
            "2": node("ImageAddNoise", image=["1", 0], seed=1, strength=1.0),
            "9": node("SaveImageWebsocket", images=["2", 0]),
        }
        reader, writer = await asyncio.open_connection("127.0.0.1", running.simulator.port, limit=2048)
        writer.write(
            b"GET /ws?clientId=sleeper HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        big = await running.server.submit(images, client_id="sleeper")
        await running.server.finished(big)
        async with running.server.socket() as other:
            prompt_id = await running.server.submit(picture(), client_id=other.client_id)
            await running.server.finished(prompt_id)
            assert await other.pending() == []
            writer.transport.abort()
            assert (await other.until(ends(prompt_id)))[-1].prompt_id == prompt_id


@pytest.mark.parametrize("client_id", [[], {"a": 1}])
async def test_an_unhashable_client_id_ends_the_process(client_id: object) -> None:
    async with rig() as running:
        await running.server.submit(picture(), client_id=client_id)
        async with asyncio.timeout(10):
            await running.simulator.crashed.wait()


async def test_reconnecting_names_the_running_node() -> None:
    async with rig(step_seconds=0.05) as running:
        prompt_id = await running.server.submit(tiles(), client_id="mine")
        await until(lambda: running.simulator.sockets.open == 0)
        await running.server.running(prompt_id)
        async with running.server.socket("mine") as socket:
            first = await socket.receive()
            assert (first.kind, set(first.data)) == ("executing", {"node"})
            await running.server.post("/interrupt", {})


async def test_only_the_first_json_frame_is_a_handshake() -> None:
    async with rig() as running, running.server.socket() as socket:
        await socket.say("not json")
        assert (await socket.announce_previews()).data["supports_preview_metadata"] is True
        await socket.say('{"type": "feature_flags", "data": {}}')
        assert await socket.pending() == []
    async with rig() as running, running.server.http.ws_connect("/ws") as connection:
        await connection.send_bytes(b"ignored")
        await connection.send_str("[]")
        assert (await connection.receive_json())["type"] == "status"


async def test_a_foreign_prompt_without_client_sprays_its_progress() -> None:
    async with rig() as running, running.server.socket() as socket:
        prompt_id, _ = await running.server.run_quietly(tiles())
        messages = await socket.pending()
        assert {message.kind for message in messages} == {"status", "progress", "progress_state"}
        assert {message.prompt_id for message in messages if message.kind == "progress"} == {prompt_id}
        assert not [message for message in messages if kind_is("executing")(message)]
