"""The WebSocket: who gets which message, in which order, with which fields."""

from __future__ import annotations

import uuid
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from tests.conformance import graphs
from tests.conformance.raw_client import ends, kind_is, status_is, tokens

if TYPE_CHECKING:
    from tests.conformance.raw_client import Message, Server

END = ["success", "status 0", "executing null"]


async def test_the_first_message_is_the_status_with_the_socket_id(server: Server) -> None:
    client_id = uuid.uuid4().hex
    async with server.socket(client_id) as socket:
        (hello,) = socket.messages
        assert hello.kind == "status"
        assert hello.data == {"status": {"exec_info": {"queue_remaining": 0}}, "sid": client_id}
        assert await socket.pending() == []


async def test_a_socket_without_client_id_gets_one(server: Server) -> None:
    async with server.http.ws_connect("/ws") as connection:
        hello = await connection.receive_json(timeout=10)
    assert len(hello["data"]["sid"]) == 32
    assert int(hello["data"]["sid"], 16) >= 0


async def test_the_socket_is_there_under_the_api_prefix_too(server: Server) -> None:
    async with server.http.ws_connect("/api/ws", params={"clientId": "prefixed"}) as connection:
        hello = await connection.receive_json(timeout=10)
    assert hello["data"]["sid"] == "prefixed"


async def test_order_of_a_normal_run(server: Server) -> None:
    run = await server.run(graphs.chain())
    assert tokens(run.messages) == [
        "status 1",
        "status 1",
        "start",
        "cached",
        "state 1=running",
        "executing 1",
        "state 1=finished",
        "state 1=finished 2=running",
        "executing 2",
        "state 1=finished 2=finished",
        "state 1=finished 2=finished 9=running",
        "executing 9",
        "executed 9",
        "state 1=finished 2=finished 9=finished",
        *END,
    ]


async def test_order_of_a_fully_cached_run(server: Server) -> None:
    graph = graphs.chain()
    first = await server.run(graph)
    again = await server.run(graph)
    assert tokens(again.messages) == [
        "status 1",
        "status 1",
        "start",
        "cached 1 2 9",
        "executed 9",
        "state 9=finished",
        *END,
    ]
    assert again.of_kind("executed")[0]["output"] == first.of_kind("executed")[0]["output"]


async def test_order_of_a_partly_cached_run(server: Server) -> None:
    graph = graphs.chain()
    await server.run(graph)
    graph["9"]["inputs"]["filename_prefix"] = graphs.prefix()
    again = await server.run(graph)
    assert tokens(again.messages) == [
        "status 1",
        "status 1",
        "start",
        "cached 1 2",
        "state 9=running",
        "executing 9",
        "executed 9",
        "state 9=finished",
        *END,
    ]


async def test_order_of_a_failing_run(server: Server) -> None:
    run = await server.run(graphs.failing())
    assert tokens(run.messages) == [
        "status 1",
        "status 1",
        "start",
        "cached",
        "state 1=running",
        "executing 1",
        "state 1=finished",
        "state 1=finished 2=running",
        "executing 2",
        "error",
        "status 0",
        "executing null",
    ]


async def test_order_of_an_interrupted_run(server: Server) -> None:
    async with server.socket() as socket:
        prompt_id = await server.submit(graphs.blocker(), client_id=socket.client_id)
        before = await socket.until(kind_is("progress"))
        assert tokens(before)[:4] == ["status 1", "status 1", "start", "cached"]
        await server.post("/interrupt", {"prompt_id": prompt_id})
        after = await socket.until(ends(prompt_id))
    assert tokens(after)[-3:] == ["interrupted", "status 0", "executing null"]
    assert {message.kind for message in after[:-3]} <= {"progress", "progress_state"}
    event = after[-3].data
    assert set(event) == {"prompt_id", "node_id", "node_type", "executed", "timestamp"}
    assert (event["prompt_id"], event["node_id"], event["node_type"]) == (prompt_id, "4", "VAEDecodeTiled")
    assert sorted(event["executed"]) == ["1", "2", "3"]


async def test_order_of_two_prompts_of_one_client(server: Server) -> None:
    async with server.socket() as socket:
        first = await server.submit(graphs.blocker(), client_id=socket.client_id)
        await socket.until(kind_is("progress"))
        second = await server.submit(graphs.picture(), client_id=socket.client_id)
        await socket.until(status_is(2))
        await server.post("/interrupt", {"prompt_id": first})
        await socket.until(kind_is("execution_interrupted"))
        rest = await socket.until(ends(second))
    assert tokens(rest)[:4] == ["status 1", "executing null", "status 1", "start"]
    assert tokens(rest)[-3:] == END
    assert rest[1].prompt_id == first
    assert {message.prompt_id for message in rest[3:] if message.kind != "status"} == {second}


async def test_fields_of_every_message_of_a_run(server: Server) -> None:
    run = await server.run(graphs.chain())
    for message in run.messages:
        if message.kind != "status":
            assert message.prompt_id == run.prompt_id
        else:
            assert set(message.data) == {"status"}
    (start,) = run.of_kind("execution_start")
    (cached,) = run.of_kind("execution_cached")
    (success,) = run.of_kind("execution_success")
    assert set(start) == set(success) == {"prompt_id", "timestamp"}
    assert set(cached) == {"nodes", "prompt_id", "timestamp"}
    assert start["timestamp"] <= cached["timestamp"] <= success["timestamp"]
    assert start["timestamp"] > 1_600_000_000_000, "milliseconds since the epoch"
    for executing in run.of_kind("executing")[:-1]:
        assert set(executing) == {"node", "display_node", "prompt_id"}
        assert executing["node"] == executing["display_node"]
    assert run.of_kind("executing")[-1] == {"node": None, "prompt_id": run.prompt_id}
    (executed,) = run.of_kind("executed")
    assert set(executed) == {"node", "display_node", "output", "prompt_id"}
    assert executed["output"] == run.outputs["9"]


async def test_fields_of_progress_state(server: Server) -> None:
    run = await server.run(graphs.chain())
    for state in run.of_kind("progress_state"):
        assert set(state) == {"prompt_id", "nodes"}
        for node_id, node in state["nodes"].items():
            assert node["state"] in {"running", "finished"}
            assert (node["value"], node["max"]) == ((0, 1) if node["state"] == "running" else (1, 1))
            assert {name: node[name] for name in node if name not in {"state", "value", "max"}} == {
                "node_id": node_id,
                "prompt_id": run.prompt_id,
                "display_node_id": node_id,
                "parent_node_id": None,
                "real_node_id": node_id,
            }


async def test_fields_of_an_execution_error(server: Server) -> None:
    graph = graphs.failing()
    run = await server.run(graph)
    (error,) = run.of_kind("execution_error")
    assert set(error) == {
        "prompt_id",
        "node_id",
        "node_type",
        "executed",
        "exception_message",
        "exception_type",
        "traceback",
        "current_inputs",
        "current_outputs",
        "timestamp",
    }
    assert (error["node_id"], error["node_type"], error["executed"]) == ("2", "RegexReplace", ["1"])
    assert error["exception_type"] == "re.error"
    assert error["exception_message"].endswith("\n")
    assert "unterminated subpattern" in error["exception_message"]
    assert all(isinstance(line, str) for line in error["traceback"])
    assert error["traceback"]
    assert error["current_inputs"]["regex_pattern"] == ["(unclosed"]
    assert error["current_inputs"]["string"] == ["a" + graph["1"]["inputs"]["string_b"]]
    assert set(error["current_outputs"]) <= {"1", "2", "9"}


async def test_executed_is_only_sent_by_nodes_with_something_to_show(server: Server) -> None:
    run = await server.run(graphs.text("hello"))
    (executed,) = run.of_kind("executed")
    assert executed["node"] == "9"
    (shown,) = executed["output"]["text"]
    assert shown.startswith("hello ")


async def test_progress_counts_to_its_maximum(server: Server) -> None:
    async with server.socket() as socket:
        prompt_id = await server.submit(graphs.stepping(), client_id=socket.client_id)
        messages = await socket.until(ends(prompt_id))
    steps = [message.data for message in messages if message.kind == "progress"]
    values = [step["value"] for step in steps]
    (maximum,) = {step["max"] for step in steps}
    assert all(set(step) == {"value", "max", "prompt_id", "node"} for step in steps)
    assert {step["node"] for step in steps} == {"4"}
    assert maximum > 20
    assert values[-1] == maximum
    if server.facts.modern:
        assert values[0] == 1
        assert all(earlier < later for earlier, later in pairwise(values))
        assert len(values) < maximum, "at most about ten a second"
    else:
        assert values == list(range(1, maximum + 1))
    check_states_precede_progress(messages)


def check_states_precede_progress(messages: list[Message]) -> None:
    """Every `progress` comes right after a `progress_state` with the same value."""
    for before, message in pairwise(messages):
        if message.kind == "progress":
            assert before.kind == "progress_state"
            node = before.data["nodes"][message.data["node"]]
            assert (node["value"], node["max"]) == (message.data["value"], message.data["max"])


async def test_a_prompt_without_client_id_is_seen_only_by_its_broadcasts(server: Server) -> None:
    async with server.socket() as stranger:
        prompt_id = await server.submit(graphs.chain())
        await server.finished(prompt_id)
        await stranger.until(status_is(0))
        assert await stranger.pending() == []
    seen = stranger.messages[1:]
    assert [message.token for message in seen if message.kind == "status"] == [
        "status 1",
        "status 1",
        "status 0",
    ]
    assert {message.kind for message in seen} == {"status", "progress_state"}
    assert all(message.prompt_id == prompt_id for message in seen if message.kind == "progress_state")


async def test_an_interrupt_without_client_id_is_broadcast(server: Server) -> None:
    async with server.socket() as stranger:
        prompt_id = await server.submit(graphs.blocker())
        await stranger.until(kind_is("progress"))
        await server.post("/interrupt", {"prompt_id": prompt_id})
        seen = await stranger.until(status_is(0))
    assert tokens(seen)[-2:] == ["interrupted", "status 0"]
    assert seen[-2].prompt_id == prompt_id


async def test_a_prompt_with_client_id_is_hidden_from_others_but_for_the_status(server: Server) -> None:
    async with server.socket() as stranger:
        await server.run(graphs.named("websocket-image"))
        await stranger.pending()
    assert tokens(stranger.messages) == ["status 0", "status 1", "status 1", "status 0"]


async def test_nothing_is_kept_for_a_client_that_connects_late(server: Server) -> None:
    client_id = uuid.uuid4().hex
    prompt_id = await server.submit(graphs.picture(), client_id=client_id)
    await server.finished(prompt_id)
    await server.idle()
    async with server.socket(client_id) as socket:
        assert all(message.kind in {"status", "executing"} for message in await socket.pending())
        assert not any(ends(prompt_id)(message) for message in socket.messages[:1])


async def test_a_client_that_comes_back_in_mid_run_is_told_the_node_without_the_prompt(
    server: Server,
) -> None:
    async with server.socket() as socket:
        prompt_id = await server.submit(graphs.blocker(), client_id=socket.client_id)
        await socket.until(kind_is("progress"))
    async with server.socket(socket.client_id) as back:
        assert (await back.receive()).data == {"node": "4"}
        assert back.messages[-1].kind == "executing"
        await back.until(kind_is("progress"))
        await server.post("/interrupt", {"prompt_id": prompt_id})
        assert tokens(await back.until(ends(prompt_id)))[-3] == "interrupted"


async def test_a_reused_client_id_makes_the_new_socket_deaf_once_the_old_one_ends(server: Server) -> None:
    client_id = uuid.uuid4().hex
    async with server.socket(client_id) as old, server.socket(client_id) as new:
        prompt_id = await server.submit(graphs.picture(), client_id=client_id)
        await new.until(ends(prompt_id))
        assert await old.pending() == [], "the new socket has replaced it"
        await old.close()
        async with server.socket() as witness:
            later = await server.submit(graphs.picture(), client_id=client_id)
            await server.finished(later)
            await witness.until(status_is(0))
        assert await new.pending() == [], "deaf, and yet it answers a ping"


async def test_a_deleted_pending_prompt_leaves_only_statuses(server: Server) -> None:
    async with server.socket() as socket:
        first = await server.submit(graphs.blocker())
        await socket.until(kind_is("progress"))
        second = await server.submit(graphs.picture(), client_id=socket.client_id)
        await socket.until(status_is(2))
        await server.post("/queue", {"delete": [second]})
        await socket.until(status_is(1))
        await server.post("/interrupt", {"prompt_id": first})
        await socket.until(status_is(0))
        await socket.pending()
    assert not [message for message in socket.messages if message.prompt_id == second]
    assert await server.history(second) is None


async def test_a_refused_prompt_sends_nothing(server: Server) -> None:
    async with server.socket() as socket:
        graph = graphs.picture()
        del graph["9"]["inputs"]["images"]
        answer = await server.post("/prompt", {"prompt": graph, "client_id": socket.client_id})
        assert answer.status == 400
        assert await socket.pending() == []


async def test_the_feature_handshake_is_answered_once_per_connection(server: Server) -> None:
    async with server.socket() as socket:
        reply = await socket.announce_previews()
        assert reply.data == (await server.get("/features")).json()
        await socket.say('{"type": "feature_flags", "data": {}}')
        assert await socket.pending() == []


@pytest.mark.parametrize(("first", "answered"), [("no json", True), ('{"type": "hello"}', False)])
async def test_the_feature_handshake_must_be_the_first_json(
    server: Server, first: str, answered: bool
) -> None:
    async with server.socket() as socket:
        await socket.say(first)
        await socket.say('{"type": "feature_flags", "data": {"supports_preview_metadata": true}}')
        assert [message.kind for message in await socket.pending()] == ["feature_flags"] * answered
