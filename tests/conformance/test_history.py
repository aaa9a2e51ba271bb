"""What /history and /queue say, and what a client may conclude from looking at both."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.conformance import graphs
from tests.conformance.raw_client import PATIENCE, ends, kind_is

if TYPE_CHECKING:
    from tests.conformance.raw_client import Server


async def test_an_entry_of_a_success(server: Server) -> None:
    graph = graphs.picture()
    run = await server.run(graph)
    entry = run.entry
    assert set(entry) == {"prompt", "outputs", "meta", "status"}
    number, prompt_id, kept, extra, outputs = entry["prompt"]
    assert isinstance(number, int)
    assert (prompt_id, kept, outputs) == (run.prompt_id, graph, ["9"])
    assert set(extra) == {"client_id", "create_time"}
    assert entry["status"]["status_str"] == "success"
    assert entry["status"]["completed"] is True
    assert [name for name, _ in entry["status"]["messages"]] == [
        "execution_start",
        "execution_cached",
        "execution_success",
    ]
    assert all(data["prompt_id"] == prompt_id for _, data in entry["status"]["messages"])
    assert all(data["timestamp"] >= extra["create_time"] for _, data in entry["status"]["messages"])
    (item,) = entry["outputs"]["9"]["images"]
    assert set(item) == {"filename", "subfolder", "type"}
    assert entry["meta"] == {
        "9": {"node_id": "9", "display_node": "9", "parent_node": None, "real_node_id": "9"}
    }


async def test_the_messages_of_an_entry_are_those_of_the_socket(server: Server) -> None:
    for graph in (graphs.picture(), graphs.failing()):
        run = await server.run(graph)
        sent = [[message.kind, message.data] for message in run.messages if "timestamp" in message.data]
        assert run.entry["status"]["messages"] == sent


async def test_an_entry_of_a_failure(server: Server) -> None:
    run = await server.run(graphs.failing())
    assert run.verdict == "execution_error"
    assert run.entry["status"]["status_str"] == "error"
    assert run.entry["status"]["completed"] is False
    assert run.outputs == {}


async def test_an_entry_of_an_interruption(server: Server) -> None:
    async with server.socket() as socket:
        prompt_id = await server.submit(graphs.blocker(), client_id=socket.client_id)
        await socket.until(kind_is("progress"))
        await server.post("/interrupt", {"prompt_id": prompt_id})
        await socket.until(ends(prompt_id))
    entry = await server.history(prompt_id)
    assert entry is not None
    assert entry["status"]["status_str"] == "error"
    assert entry["status"]["completed"] is False
    name, data = entry["status"]["messages"][-1]
    assert (name, data["node_id"], data["node_type"]) == ("execution_interrupted", "4", "VAEDecodeTiled")
    assert entry["outputs"] == {}


async def test_an_unknown_id_is_an_empty_object(server: Server) -> None:
    for path in ("/history/nobody", "/api/history/nobody"):
        answer = await server.get(path)
        assert (answer.status, answer.json()) == (200, {})


async def test_the_list_is_cut_from_its_newest_or_oldest_end(server: Server) -> None:
    await server.post("/history", {"clear": True})
    ids = [(await server.run_quietly(graphs.picture()))[0] for _ in range(4)]

    async def listed(**parameters: str) -> list[str]:
        return list((await server.get("/history", params=parameters)).json())

    assert await listed() == ids
    assert await listed(max_items="2") == ids[2:]
    assert await listed(max_items="9") == ids
    assert await listed(max_items="0") == []
    assert await listed(max_items="2", offset="1") == ids[1:3]
    assert await listed(offset="3") == ids[3:]
    assert await listed(offset="9") == []
    for wrong in ("max_items", "offset"):
        assert (await server.get("/history", params={wrong: "abc"})).status == 500


async def test_entries_are_deleted_by_id_and_cleared_at_once(server: Server) -> None:
    first, _ = await server.run_quietly(graphs.picture())
    second, _ = await server.run_quietly(graphs.picture())
    answer = await server.post("/history", {"delete": [first, "nobody"]})
    assert (answer.status, answer.body) == (200, b"")
    assert await server.history(first) is None
    assert await server.history(second) is not None
    await server.post("/history", {"clear": False})
    assert await server.history(second) is not None
    await server.post("/history", {"clear": True})
    assert (await server.get("/history")).json() == {}


async def test_queue_then_history_never_loses_a_prompt(server: Server) -> None:
    looks = 0
    for _ in range(15):
        prompt_id = await server.submit(graphs.picture(), client_id="me")
        async with asyncio.timeout(PATIENCE):
            while True:
                queued = prompt_id in [waiting for part in await server.queue() for waiting in part]
                finished = await server.history(prompt_id) is not None
                assert queued or finished, "in neither, although it was accepted"
                looks += 1
                if finished:
                    break
    assert looks >= 15


async def test_the_entry_is_there_when_the_end_is_announced(server: Server) -> None:
    async with server.socket() as socket:
        for _ in range(15):
            prompt_id = await server.submit(graphs.picture(), client_id=socket.client_id)
            await socket.until(ends(prompt_id))
            assert await server.history(prompt_id) is not None
            assert await server.queue() == ([], [])


async def test_history_keeps_what_the_text_outputs_say(server: Server) -> None:
    run = await server.run(graphs.text("kept"))
    (words,) = run.outputs["9"]["text"]
    assert words.startswith("kept ")
