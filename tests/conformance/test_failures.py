"""How a server breaks: dead workers, dead processes, and what a new life remembers.

Each test has a process of its own and leaves it useless; the shared servers are never touched.
"""

from __future__ import annotations

import asyncio
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.conformance import graphs
from tests.conformance.conftest import facts, new_process
from tests.conformance.graphs import node
from tests.conformance.raw_client import PATIENCE, Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conformance.raw_client import Graph
    from tests.support.comfyui import ComfyUIProcess, ServerKind

ENOUGH_TO_RUN = 0.2  # seconds; an idle worker that lives has run a two-node prompt long before


@asynccontextmanager
async def speaking_to(process: ComfyUIProcess) -> AsyncIterator[Server]:
    """A session with a process that runs."""
    async with aiohttp.ClientSession(process.url) as http:
        yield Server(http, await facts(http))


async def works(server: Server) -> bool:
    """True when the server runs a prompt it is given now."""
    _, entry = await server.run_quietly(graphs.picture())
    return bool(entry["status"]["completed"])


async def is_dead(server: Server, **facts: Any) -> bool:
    """True when a prompt is accepted and waits as long as it would take to run it many times."""
    prompt_id = await server.submit(graphs.picture(), **facts)
    await asyncio.sleep(ENOUGH_TO_RUN)
    return prompt_id in (await server.queue())[1]


def with_stray(**stray: Any) -> Graph:
    """A good picture and a node, connected to nothing, that is not."""
    graph = graphs.picture()
    graph["5"] = {"class_type": "ImageInvert", **stray}
    return graph


async def test_a_stray_node_without_inputs_kills_the_worker_for_good(kind: ServerKind) -> None:
    async with new_process(kind) as process, speaking_to(process) as server:
        assert await works(server)
        poison = await server.submit(with_stray())
        await server.running(poison)
        assert (await server.post("/interrupt", {"prompt_id": poison})).status == 200
        assert await is_dead(server)
        assert (await server.queue())[0] == [poison], "it seems to run for ever"
        assert (await server.get("/system_stats")).status == 200
        if server.facts.modern:
            assert (await server.get(f"/api/jobs/{poison}")).json()["status"] == "in_progress"


async def test_a_stray_node_with_null_inputs_kills_the_worker_of_an_older_server(kind: ServerKind) -> None:
    async with new_process(kind) as process, speaking_to(process) as server:
        answer = await server.post("/prompt", {"prompt": with_stray(inputs=None)})
        if server.facts.modern:
            assert answer.status == 500
            assert await works(server)
        else:
            assert answer.status == 200
            assert await is_dead(server)


async def test_a_number_and_id_given_again_while_pending_kill_the_worker(kind: ServerKind) -> None:
    async with new_process(kind) as process, speaking_to(process) as server:
        blocking = await server.submit(graphs.blocker())
        await server.running(blocking)
        twin = {"prompt_id": str(uuid.uuid4()), "number": 7}
        statuses = [
            (await server.post("/prompt", {"prompt": graphs.picture(), **twin})).status for _ in range(3)
        ]
        assert statuses == [200, 500, 500]
        assert (await server.queue())[1] == [twin["prompt_id"]] * 3, "queued all the same"
        await server.post("/interrupt", {"prompt_id": blocking})
        await server.finished(blocking)
        # behind the twins: one before them might still be taken, if the worker is slow to look
        assert await is_dead(server, number=100)
        assert (await server.queue())[0] == []


async def test_a_client_id_that_is_an_object_ends_the_process(kind: ServerKind) -> None:
    async with new_process(kind) as process, speaking_to(process) as server:
        answer = await server.post("/prompt", {"prompt": graphs.picture(), "client_id": {"a": 1}})
        assert answer.status == 200
        assert process.wait_for_exit(PATIENCE) != 0


async def test_a_killed_server_remembers_only_its_output_files(kind: ServerKind) -> None:
    async with new_process(kind) as process:
        async with speaking_to(process) as server:
            graph = graphs.picture()
            graph["8"] = node("PreviewImage", images=["1", 0])
            run = await server.run(graph)
            assert await server.history(run.prompt_id) is not None
            (saved,) = run.outputs["9"]["images"]
            (preview,) = run.outputs["8"]["images"]
            assert ((await server.view(saved)).status, (await server.view(preview)).status) == (200, 200)
            blocking = await server.submit(graphs.blocker())
            await server.running(blocking)
            waiting = await server.submit(graphs.picture())
        process.kill()
        with pytest.raises(OSError, match="Cannot connect"):
            async with speaking_to(process):
                pass
        await process.start_async()
        async with speaking_to(process) as server:
            assert await server.queue() == ([], [])
            assert (await server.get("/history")).json() == {}
            for lost in (run.prompt_id, blocking, waiting):
                assert await server.history(lost) is None
            assert (await server.view(saved)).status == 200
            assert (await server.view(preview)).status == 404
            answer = await server.post("/prompt", {"prompt": graphs.picture()})
            assert answer.json()["number"] == 0, "the only sign of a new life"
