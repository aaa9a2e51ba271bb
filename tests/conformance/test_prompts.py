"""What POST /prompt makes of a prompt it takes: its id, its number, its values, its extra data, its twins."""

from __future__ import annotations

import io
import json
import math
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from tests.conformance import graphs
from tests.conformance.graphs import node

if TYPE_CHECKING:
    from tests.conformance.raw_client import Answer, Server


async def post(server: Server, **fields: Any) -> Answer:
    """POST a fresh picture with these fields."""
    return await server.post("/prompt", {"prompt": graphs.picture(), **fields})


async def test_a_prompt_is_answered_with_id_number_and_no_errors(server: Server) -> None:
    prompt_id = str(uuid.uuid4())
    answer = await post(server, prompt_id=prompt_id)
    assert answer.status == 200
    document = answer.json()
    assert set(document) == {"prompt_id", "number", "node_errors"}
    assert (document["prompt_id"], document["node_errors"]) == (prompt_id, {})
    assert isinstance(document["number"], int)


async def test_the_prompt_route_exists_under_the_api_prefix(server: Server) -> None:
    answer = await server.post("/api/prompt", {"prompt": graphs.picture()})
    assert answer.status == 200
    await server.finished(answer.json()["prompt_id"])


async def test_a_server_mints_a_canonical_id_for_a_prompt_without_one(server: Server) -> None:
    minted = (await post(server)).json()["prompt_id"]
    assert str(uuid.UUID(minted)) == minted


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc", "abc"), (123, "123"), ("a/b ?", "a/b ?"), ("", ""), (["x"], "['x']"), (True, "True")],
)
async def test_ids_that_are_no_uuid_are_kept_as_text_or_refused(
    server: Server, given: Any, kept: str
) -> None:
    answer = await post(server, prompt_id=given)
    if server.facts.modern:
        assert (answer.status, answer.json()["error"]["type"]) == (400, "invalid_prompt_id")
        assert answer.json()["node_errors"] == {}
    else:
        assert (answer.status, answer.json()["prompt_id"]) == (200, kept)


async def test_only_newer_servers_insist_on_the_canonical_spelling(server: Server) -> None:
    plain = str(uuid.uuid4())
    for spelling in (plain.upper(), plain.replace("-", ""), "{" + plain + "}"):
        answer = await post(server, prompt_id=spelling)
        assert answer.status == (400 if server.facts.modern else 200)
    assert (await post(server, prompt_id=str(uuid.UUID(int=0)))).status == 200


async def test_a_null_id_is_minted_anew_only_by_newer_servers(server: Server) -> None:
    given = (await post(server, prompt_id=None)).json()["prompt_id"]
    if server.facts.modern:
        assert str(uuid.UUID(given)) == given
    else:
        assert given == "None"


async def number_of(server: Server, **fields: Any) -> float:
    """The number a fresh prompt gets."""
    answer = await post(server, **fields)
    assert answer.status == 200
    number: float = answer.json()["number"]
    return number


async def test_numbers_count_up_and_front_negates(server: Server) -> None:
    first = await number_of(server)
    assert await number_of(server) == first + 1
    assert await number_of(server, front=True) == -(first + 2)
    assert await number_of(server, front=False) == first + 3
    assert (await server.post("/prompt", {"prompt": {}})).status == 400
    assert await number_of(server) == first + 5, "a refused prompt has taken a number too"


async def test_a_given_number_wins_and_is_not_counted(server: Server) -> None:
    first = await number_of(server)
    assert await number_of(server, number=1.5) == 1.5
    assert await number_of(server, number="7") == 7.0
    assert await number_of(server, number=3, front=True) == 3.0
    assert await number_of(server) == first + 1


@pytest.mark.parametrize("number", ["abc", None, []])
async def test_a_number_that_is_none_crashes_the_handler(server: Server, number: Any) -> None:
    assert (await post(server, number=number)).status == 500


@pytest.mark.parametrize(
    ("number", "written"), [("nan", b"NaN"), ("1e400", b"Infinity"), ("-inf", b"-Infinity")]
)
async def test_numbers_beyond_json_are_taken_and_answered_as_invalid_json(
    server: Server, number: str, written: bytes
) -> None:
    answer = await post(server, number=number)
    assert answer.status == 200
    assert b'"number": ' + written in answer.body
    assert not math.isfinite(answer.json()["number"])
    prompt_id = answer.json()["prompt_id"]
    await server.finished(prompt_id)
    await server.post("/history", {"delete": [prompt_id]})  # it would make later lists invalid JSON too


async def test_lower_numbers_run_first(server: Server) -> None:
    await server.post("/history", {"clear": True})
    blocking = await server.submit(graphs.blocker())
    await server.running(blocking)
    last = await server.submit(graphs.picture(), number=2_000_000)
    middle = await server.submit(graphs.picture(), number=1_000_000)
    early = await server.submit(graphs.picture(), front=True)
    earlier = await server.submit(graphs.picture(), front=True)
    assert set((await server.queue())[1]) == {last, middle, early, earlier}
    await server.post("/interrupt", {"prompt_id": blocking})
    await server.finished(last)
    history = (await server.get("/history", params={"max_items": "9"})).json()
    assert list(history) == [blocking, earlier, early, middle, last]


async def test_values_are_coerced_and_unknown_inputs_kept(server: Server) -> None:
    graph = graphs.picture()
    graph["1"]["inputs"].update(width="32", height=16.9, batch_size=True, extra="kept")
    graph["9"]["inputs"]["filename_prefix"] = graphs.prefix()
    _, entry = await server.run_quietly(graph)
    inputs = entry["prompt"][2]["1"]["inputs"]
    assert {name: inputs[name] for name in ("width", "height", "batch_size", "extra")} == {
        "width": 32,
        "height": 16,
        "batch_size": 1,
        "extra": "kept",
    }
    (item,) = entry["outputs"]["9"]["images"]
    with Image.open(io.BytesIO((await server.view(item)).body)) as image:
        assert image.size == (32, 16)


async def test_a_queue_item_has_five_parts_and_no_secrets(server: Server) -> None:
    blocking = await server.submit(graphs.blocker())
    await server.running(blocking)
    graph = graphs.picture()
    extra = {"api_key_comfy_org": "secret", "auth_token_comfy_org": "secret", "mine": {"a": 1}}
    answer = await server.post("/prompt", {"prompt": graph, "client_id": "me", "extra_data": extra})
    prompt_id = answer.json()["prompt_id"]
    item = await server.queue_item(prompt_id)
    number, listed_id, listed_graph, listed_extra, outputs = item
    assert (number, listed_id, listed_graph, outputs) == (answer.json()["number"], prompt_id, graph, ["9"])
    assert listed_extra["create_time"] > 1_600_000_000_000
    assert {**listed_extra, "create_time": 0} == {"mine": {"a": 1}, "client_id": "me", "create_time": 0}
    running = (await server.get("/queue")).json()["queue_running"]
    assert [len(item) for item in running] == [5]
    await server.post("/interrupt", {"prompt_id": blocking})
    entry = await server.finished(prompt_id)
    assert entry["prompt"] == item
    assert "secret" not in json.dumps(entry)


async def test_the_number_of_remaining_prompts_counts_running_and_pending(server: Server) -> None:
    blocking = await server.submit(graphs.blocker())
    await server.running(blocking)
    await server.submit(graphs.picture())
    await server.submit(graphs.picture())
    assert (await server.get("/prompt")).json() == {"exec_info": {"queue_remaining": 3}}
    running, pending = await server.queue()
    assert (running, len(pending)) == ([blocking], 2)


async def test_a_prompt_with_one_broken_output_runs_without_it(server: Server) -> None:
    graph = graphs.picture()
    graph["8"] = node("SaveImage", filename_prefix=graphs.prefix())
    prompt_id = str(uuid.uuid4())
    answer = await server.post("/prompt", {"prompt": graph, "prompt_id": prompt_id, "client_id": "me"})
    assert answer.status == 200
    assert list(answer.json()["node_errors"]) == ["8"]
    (error,) = answer.json()["node_errors"]["8"]["errors"]
    assert error["type"] == "required_input_missing"
    entry = await server.finished(prompt_id)
    assert entry["status"]["status_str"] == "success"
    assert (list(entry["outputs"]), entry["prompt"][4]) == (["9"], ["9"])


async def test_partial_targets_leave_the_other_outputs_out(server: Server) -> None:
    graph = graphs.picture()
    graph["8"] = node("PreviewImage", images=["1", 0])
    run = await server.run(graph, partial_execution_targets=["8"])
    assert list(run.outputs) == ["8"]
    assert run.entry["prompt"][4] == ["8"]
    assert set(run.entry["prompt"][2]) == {"1", "8", "9"}


async def test_the_same_id_again_while_pending_is_queued_twice_and_deleted_once(server: Server) -> None:
    blocking = await server.submit(graphs.blocker())
    await server.running(blocking)
    twin = str(uuid.uuid4())
    graph = graphs.picture()
    for _ in range(2):
        assert await server.submit(graph, prompt_id=twin) == twin
    assert (await server.queue())[1] == [twin, twin]
    await server.post("/queue", {"delete": [twin]})
    assert (await server.queue())[1] == [twin]


async def test_the_same_id_again_runs_again_and_replaces_its_history(server: Server) -> None:
    graph = graphs.picture()
    twin = str(uuid.uuid4())
    first = await server.run(graph, prompt_id=twin)
    other = await server.run(graphs.text("between"))
    graph["9"]["inputs"]["filename_prefix"] = graphs.prefix()
    second = await server.run(graph, prompt_id=twin)
    assert second.entry["prompt"][0] == first.entry["prompt"][0] + 2
    assert second.outputs != first.outputs
    history = (await server.get("/history")).json()
    assert list(history).index(twin) < list(history).index(other.prompt_id), "it keeps its place"


async def test_twins_that_wait_together_both_run_the_second_from_the_cache(server: Server) -> None:
    async with server.socket() as socket:
        blocking = await server.submit(graphs.blocker())
        await server.running(blocking)
        graph = graphs.picture()
        twin = await server.submit(graph, client_id=socket.client_id)
        await server.submit(graph, client_id=socket.client_id, prompt_id=twin)
        await server.post("/interrupt", {"prompt_id": blocking})
        cached: list[list[str]] = []
        while len(cached) < 2:
            message = await socket.receive()
            if message.kind == "execution_cached" and message.prompt_id == twin:
                cached.append(sorted(message.data["nodes"]))
    assert cached == [[], ["1", "9"]]


@pytest.mark.parametrize("client_id", [5, ""])
async def test_odd_client_ids_do_no_harm(server: Server, client_id: Any) -> None:
    prompt_id, entry = await server.run_quietly(graphs.picture(), client_id=client_id)
    assert entry["prompt"][1] == prompt_id
    assert entry["prompt"][3]["client_id"] == client_id


async def test_pictures_carry_the_prompt_and_the_extra_information(server: Server) -> None:
    graph = graphs.picture()
    workflow = {"id": "mine", "nodes": []}
    _, entry = await server.run_quietly(graph, extra_data={"extra_pnginfo": {"workflow": workflow}})
    (item,) = entry["outputs"]["9"]["images"]
    with Image.open(io.BytesIO((await server.view(item)).body)) as image:
        assert json.loads(image.info["prompt"]) == graph
        assert json.loads(image.info["workflow"]) == workflow
