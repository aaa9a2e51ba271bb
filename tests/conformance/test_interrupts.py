"""Interrupt, delete and clear: whom they hit, whom they spare, and how little their answers say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance import graphs
from tests.conformance.graphs import node
from tests.conformance.raw_client import ends, kind_is, token_is

if TYPE_CHECKING:
    from tests.conformance.raw_client import Graph, Server


def verdict(entry: dict[str, dict[str, list[list[str]]]]) -> str:
    """The last message type of a history entry."""
    return entry["status"]["messages"][-1][0]


async def blocked(server: Server) -> str:
    """A prompt that runs and goes on running for seconds; gives its id."""
    prompt_id = await server.submit(graphs.blocker())
    await server.running(prompt_id)
    return prompt_id


async def test_a_targeted_interrupt_stops_its_target_only(server: Server) -> None:
    target = await blocked(server)
    innocent = await server.submit(graphs.picture())
    answer = await server.post("/interrupt", {"prompt_id": target})
    assert (answer.status, answer.body) == (200, b"")
    assert verdict(await server.finished(target)) == "execution_interrupted"
    assert verdict(await server.finished(innocent)) == "execution_success"


@pytest.mark.parametrize(
    "body", [b'{"prompt_id": ""}', b'{"prompt_id": null}', b"{}", b"", b"{", b'{"id": "x"}']
)
async def test_an_interrupt_that_names_nobody_hits_whatever_runs(server: Server, body: bytes) -> None:
    victim = await blocked(server)
    assert (await server.request("POST", "/interrupt", data=body)).status == 200
    assert verdict(await server.finished(victim)) == "execution_interrupted"


async def test_an_interrupt_of_a_waiting_or_unknown_prompt_does_nothing(server: Server) -> None:
    async with server.socket() as socket:
        running = await server.submit(graphs.blocker(), client_id=socket.client_id)
        await socket.until(kind_is("progress"))
        waiting = await server.submit(graphs.picture())
        for prompt_id in (waiting, "nobody"):
            answer = await server.post("/api/interrupt", {"prompt_id": prompt_id})
            assert (answer.status, answer.body) == (200, b"")
        for _ in range(5):  # a flag set by mistake would be read at the next step
            await socket.until(kind_is("progress"))
        assert await server.queue() == ([running], [waiting])
        await server.post("/interrupt", {"prompt_id": running})
        assert verdict(await server.finished(waiting)) == "execution_success"


async def test_an_interrupt_of_an_idle_server_is_lost(server: Server) -> None:
    for _ in range(3):
        assert (await server.post("/interrupt", {})).status == 200
        assert (await server.run(graphs.picture())).verdict == "execution_success"


async def test_an_interrupt_in_the_last_node_comes_too_late(server: Server) -> None:
    async with server.socket() as socket:
        prompt_id = await server.submit(graphs.picture(size=2048), client_id=socket.client_id)
        await socket.until(token_is("executing 9"))
        assert (await server.post("/interrupt", {"prompt_id": prompt_id})).status == 200
        await socket.until(ends(prompt_id))
    entry = await server.finished(prompt_id)
    assert verdict(entry) == "execution_success"
    assert len(entry["outputs"]["9"]["images"]) == 1


async def test_an_interrupt_that_was_too_late_does_not_hit_the_next(server: Server) -> None:
    for _ in range(10):
        first = await server.submit(graphs.picture())
        await server.post("/interrupt", {"prompt_id": first})
        second = await server.submit(graphs.picture())
        assert verdict(await server.finished(second)) == "execution_success"


async def test_outputs_made_before_an_interrupt_are_kept(server: Server) -> None:
    early: Graph = {"70": graphs.empty_image(), "80": node("PreviewImage", images=["70", 0])}
    async with server.socket() as socket:
        prompt_id = await server.submit({**early, **graphs.blocker()}, client_id=socket.client_id)
        before = await socket.until(kind_is("progress"))
        await server.post("/interrupt", {"prompt_id": prompt_id})
        await socket.until(ends(prompt_id))
    entry = await server.finished(prompt_id)
    ran = [message.data["node"] for message in before if message.kind == "executed"]
    assert list(entry["outputs"]) == ran  # which of two independent outputs runs first is not determined


async def test_delete_removes_a_waiting_prompt_without_a_trace(server: Server) -> None:
    await blocked(server)
    first, second = [await server.submit(graphs.picture()) for _ in range(2)]
    answer = await server.post("/queue", {"delete": [first]})
    assert (answer.status, answer.body) == (200, b"")
    assert (await server.queue())[1] == [second]
    assert await server.history(first) is None


async def test_delete_of_the_running_prompt_does_nothing(server: Server) -> None:
    async with server.socket() as socket:
        prompt_id = await server.submit(graphs.blocker(), client_id=socket.client_id)
        await socket.until(kind_is("progress"))
        assert (await server.post("/queue", {"delete": [prompt_id]})).status == 200
        await socket.until(kind_is("progress"))
        assert await server.queue() == ([prompt_id], [])


async def test_clear_drops_every_waiting_prompt_of_everybody(server: Server) -> None:
    running = await blocked(server)
    for client_id in ("one", "two"):
        await server.submit(graphs.picture(), client_id=client_id)
    assert len((await server.queue())[1]) == 2
    await server.post("/queue", {"clear": False})
    assert len((await server.queue())[1]) == 2
    assert (await server.post("/queue", {"clear": True})).status == 200
    assert await server.queue() == ([running], [])
