"""Sending, looking and taking back, against a simulated ComfyUI of each flavor and against worse ones."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from comfyd.clock import SystemClock
from comfyd.comfy import Absent, Backend, Ended, Pending, QueueView, Running
from comfyd.errors import BackendRejected, BackendUnclear, BackendUnreachable, PartlyRejected
from comfyd.simulator import Simulator, SimulatorOptions
from tests.comfy.stage import Handler, answering, backend_at, graph, sees, serving, tiny_graph

EMPTY_QUEUE: dict[str, Any] = {"queue_running": [], "queue_pending": []}
CANCEL = "POST /api/jobs/{id}/cancel"


def new_id() -> str:
    return SystemClock().new_id()


async def run(backend: Backend, name_or_graph: Any = None) -> str:
    """Submit and return the id."""
    prompt_id = new_id()
    await backend.submit(prompt_id, "c", name_or_graph or tiny_graph(), {})
    return prompt_id


@pytest.fixture(params=["0.3.75", "0.33"])
async def either(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Simulator, Backend]]:
    options = SimulatorOptions(flavor=request.param)
    async with Simulator(options) as simulator, backend_at(simulator.url) as backend:
        yield simulator, backend


async def test_a_prompt_runs_to_its_end(backend: Backend) -> None:
    prompt_id = await run(backend)
    seen = await sees(lambda: backend.look(prompt_id), Ended)
    assert seen.entry.verdict == "success"
    assert list(seen.entry.outputs) == ["2"]
    assert seen.entry.execution_ms is not None
    assert await backend.look(prompt_id, ended=True) == seen


async def test_waiting_prompts_are_seen_in_their_order(simulator: Simulator, backend: Backend) -> None:
    simulator.faults.class_seconds["EmptyImage"] = 30.0
    first, second, third = [
        await run(backend, {**tiny_graph(), str(n): tiny_graph()["1"]}) for n in (5, 6, 7)
    ]
    await sees(lambda: backend.look(first), Running)
    assert await backend.look(second) == Pending(position=1)
    assert await backend.look(third, ended=True) == Pending(position=2)
    assert await backend.queue() == QueueView(running=(first,), pending=(second, third))
    status = await backend.queue_status()
    assert [item[1] for item in status["queue_pending"]] == [second, third]


@pytest.mark.parametrize("prompt_id", [new_id(), "../queue", "a?b#c d/ü"], ids=["uuid", "dots", "odd"])
async def test_an_unknown_prompt_is_absent(backend: Backend, prompt_id: str) -> None:
    assert await backend.look(prompt_id) == Absent()


async def test_cancelling_hits_exactly_its_target(either: tuple[Simulator, Backend]) -> None:
    simulator, backend = either
    simulator.faults.class_seconds["EmptyImage"] = 0.5
    running, waiting, innocent = [await run(backend) for _ in range(3)]
    await sees(lambda: backend.look(running), Running)
    await backend.cancel(waiting)
    assert await backend.look(waiting) == Absent()
    assert await backend.look(running) == Running()
    async with asyncio.timeout(10):
        while isinstance(await backend.look(running), Running):
            await backend.cancel(running)
            await asyncio.sleep(0.01)
    seen = await backend.look(running)
    assert isinstance(seen, Ended)
    assert seen.entry.verdict == "interrupted"
    seen = await sees(lambda: backend.look(innocent), Ended)
    assert seen.entry.verdict == "success"


async def test_cancelling_what_is_not_there_does_nothing(either: tuple[Simulator, Backend]) -> None:
    simulator, backend = either
    simulator.faults.class_seconds["EmptyImage"] = 0.3
    prompt_id = await run(backend)
    await sees(lambda: backend.look(prompt_id), Running)
    await backend.cancel(new_id())
    seen = await sees(lambda: backend.look(prompt_id), Ended)
    assert seen.entry.verdict == "success"


async def test_an_empty_id_is_never_sent(backend: Backend) -> None:
    with pytest.raises(ValueError, match="empty"):
        await backend.cancel("")


class Recorder:
    """Remembers what was asked of a server, and answers as told."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.bodies: list[Any] = []

    def says(self, body: Any, status: int = 200) -> Handler:
        async def handler(request: web.Request) -> web.StreamResponse:
            self.asked.append(f"{request.method} {request.path}")
            self.bodies.append(await request.json() if request.can_read_body else None)
            return await answering(body, status)(request)

        return handler


async def test_an_old_server_is_never_asked_to_interrupt_what_does_not_run() -> None:
    recorder = Recorder()
    queue = {"queue_running": [[1, "other"]], "queue_pending": []}
    routes = {
        CANCEL: recorder.says("", 405),
        "POST /queue": recorder.says(""),
        "GET /queue": recorder.says(queue),
        "POST /interrupt": recorder.says(""),
    }
    async with serving(routes) as url, backend_at(url) as backend:
        await backend.cancel("mine")
        assert recorder.asked[1:] == ["POST /queue", "GET /queue"]
        assert recorder.bodies[1] == {"delete": ["mine"]}
        await backend.cancel("other")
    assert recorder.asked[3:] == ["POST /queue", "GET /queue", "POST /interrupt"]
    assert recorder.bodies[-1] == {"prompt_id": "other"}


async def test_a_server_with_job_cancel_is_asked_for_nothing_else() -> None:
    recorder = Recorder()
    async with serving({CANCEL: recorder.says({"cancelled": False})}) as url, backend_at(url) as backend:
        await backend.cancel("a")
        await backend.cancel("b")
    assert recorder.asked[1:] == ["POST /api/jobs/a/cancel", "POST /api/jobs/b/cancel"]
    assert recorder.asked[0] not in recorder.asked[1:]


@pytest.mark.parametrize("failing", ["POST /queue", "GET /queue", "POST /interrupt"])
async def test_a_cancel_that_was_not_answered_well_is_unclear(failing: str) -> None:
    queue = {"queue_running": [[1, "mine"]], "queue_pending": []}
    routes = {"POST /queue": answering(""), "GET /queue": answering(queue), "POST /interrupt": answering("")}
    routes[failing] = answering("", 500)
    async with serving(routes) as url, backend_at(url) as backend:
        with pytest.raises(BackendUnclear):
            await backend.cancel("mine")


async def test_what_runs_is_interrupted_by_its_id(simulator: Simulator, backend: Backend) -> None:
    simulator.faults.class_seconds["EmptyImage"] = 0.3
    assert await backend.interrupt_running() is None
    prompt_id = await run(backend)
    await sees(lambda: backend.look(prompt_id), Running)
    assert await backend.interrupt_running() == prompt_id


async def test_a_foreign_prompt_without_an_id_is_not_interrupted() -> None:
    async with (
        serving({"GET /queue": answering({"queue_running": [[1, ""]], "queue_pending": []})}) as url,
        backend_at(url) as backend,
    ):
        assert await backend.interrupt_running() is None


# submitting


async def test_the_body_is_made_of_harmless_parts_only() -> None:
    recorder = Recorder()
    body = {"prompt_id": "p", "number": 1, "node_errors": {}}
    sent = {"1": {"class_type": "A", "inputs": {}, "_meta": None}, "2": {"class_type": "B", "inputs": {}}}
    async with serving({"POST /prompt": recorder.says(body)}) as url, backend_at(url) as backend:
        await backend.submit(
            "p", None, {**sent, "3": {"_meta": {"title": "T"}}, "4": 5}, {"extra_pnginfo": {}}
        )
    assert recorder.bodies == [
        {
            "prompt": {
                "1": {"class_type": "A", "inputs": {}, "_meta": {}},
                "2": {"class_type": "B", "inputs": {}, "_meta": {}},
                "3": {"_meta": {"title": "T"}},
                "4": 5,
            },
            "prompt_id": "p",
            "client_id": "comfyd-none",
            "extra_data": {"extra_pnginfo": {}},
        }
    ]


async def test_an_unknown_class_is_rejected_alike_by_both(either: tuple[Simulator, Backend]) -> None:
    simulator, backend = either
    bad = {**tiny_graph(), "3": {"class_type": "Nope", "inputs": {}}}
    with pytest.raises(BackendRejected) as caught:
        await run(backend, bad)
    (error,) = caught.value.details["node_errors"]["3"]["errors"]
    assert error["type"] == "missing_node_type"
    assert not caught.value.retryable
    assert simulator.executions == []


async def test_a_wrong_input_is_rejected_with_its_name(backend: Backend) -> None:
    bad = tiny_graph()
    bad["1"]["inputs"]["width"] = "abc"
    with pytest.raises(BackendRejected) as caught:
        await run(backend, bad)
    (error,) = caught.value.details["node_errors"]["1"]["errors"]
    assert (error["input"], error["received_value"]) == ("width", "abc")


async def test_a_partly_valid_prompt_is_taken_back_until_it_is_gone(
    either: tuple[Simulator, Backend],
) -> None:
    simulator, backend = either
    simulator.faults.class_seconds["EmptyImage"] = 0.3
    partly = {**tiny_graph(), "3": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
    prompt_id = new_id()
    with pytest.raises(PartlyRejected) as caught:
        await backend.submit(prompt_id, "c", partly, {})
    assert caught.value.details["taken_back"] is True
    assert list(caught.value.details["node_errors"]) == ["3"]
    seen = await backend.look(prompt_id)
    assert isinstance(seen, Absent) or (isinstance(seen, Ended) and seen.entry.verdict == "interrupted")


PARTLY = {"prompt_id": "p", "node_errors": {"3": {"errors": [], "class_type": "X"}}}


async def test_a_partly_valid_prompt_that_stays_is_said_to_have_stayed() -> None:
    routes = {
        "POST /prompt": answering(PARTLY),
        CANCEL: answering({"cancelled": True}),
        "GET /queue": answering({"queue_running": [[1, "p"]], "queue_pending": []}),
    }
    async with serving(routes) as url, backend_at(url, quick=True) as backend:
        with pytest.raises(PartlyRejected) as caught:
            await backend.submit("p", "c", tiny_graph(), {})
    assert caught.value.details["taken_back"] is False


async def test_taking_back_goes_on_over_unclear_answers() -> None:
    recorder = Recorder()
    routes = {
        "POST /prompt": answering(PARTLY),
        CANCEL: recorder.says("", 500),
        "POST /queue": answering("", 500),
    }
    async with serving(routes) as url, backend_at(url, quick=True) as backend:
        with pytest.raises(PartlyRejected) as caught:
            await backend.submit("p", "c", tiny_graph(), {})
    assert caught.value.details["taken_back"] is False


async def test_taking_back_ends_with_a_server_that_is_down() -> None:
    async def dies(_request: web.Request) -> web.StreamResponse:
        response = await answering(PARTLY)(_request)
        response.force_close()
        for site in tuple(sites):
            await site.stop()
        return response

    application = web.Application()
    application.router.add_post("/prompt", dies)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    sites = [web.TCPSite(runner, "127.0.0.1", 0)]
    await sites[0].start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with backend_at(url, quick=True) as backend:
            with pytest.raises(PartlyRejected) as caught:
                await backend.submit("p", "c", tiny_graph(), {})
            assert caught.value.details["taken_back"] is True
    finally:
        await runner.cleanup()


async def test_what_is_no_json_is_rejected_before_it_is_sent(backend: Backend) -> None:
    with pytest.raises(BackendRejected, match="cannot be written"):
        await run(backend, {"1": {"class_type": "\ud800", "inputs": {}}})
    with pytest.raises(BackendRejected, match="cannot be written"):
        await run(backend, {"1": {"class_type": "A", "inputs": {"x": object()}}})


async def test_a_refused_connection_proves_that_nothing_happened(
    simulator: Simulator, backend: Backend
) -> None:
    await simulator.stop_listening()
    with pytest.raises(BackendUnreachable, match="connection refused at http://127"):
        await run(backend)


async def test_a_lost_answer_proves_nothing_and_the_prompt_may_have_run(simulator: Simulator) -> None:
    simulator.faults.prompt_answers_lost = 1
    prompt_id = new_id()
    async with backend_at(simulator.url, timeout=0.5) as backend:
        with pytest.raises(BackendUnclear):
            await backend.submit(prompt_id, "c", tiny_graph(), {})
        await sees(lambda: backend.look(prompt_id), Ended)
        starts = [entry.prompt_id for entry in simulator.executions if entry.event == "start"]
        assert starts == [prompt_id]


async def test_an_answer_that_is_cut_off_proves_nothing(simulator: Simulator, backend: Backend) -> None:
    simulator.faults.prompt_answers_cut = 1
    prompt_id = new_id()
    with pytest.raises(BackendUnclear, match="broke off"):
        await backend.submit(prompt_id, "c", tiny_graph(), {})
    await sees(lambda: backend.look(prompt_id), Ended)


@pytest.mark.parametrize("status", [302, 403, 404, 429, 500, 502])
async def test_other_statuses_prove_nothing(simulator: Simulator, backend: Backend, status: int) -> None:
    simulator.faults.http_statuses["/prompt"] = status
    with pytest.raises(BackendUnclear, match=str(status)):
        await run(backend)


@pytest.mark.parametrize("body", [b"", b"[]", {"prompt_id": "other", "node_errors": {}}, {}])
async def test_a_200_that_does_not_name_the_prompt_proves_nothing(body: Any) -> None:
    async with serving({"POST /prompt": answering(body)}) as url, backend_at(url) as backend:
        with pytest.raises(BackendUnclear):
            await backend.submit("p", "c", tiny_graph(), {})


async def test_a_400_and_a_413_are_proof() -> None:
    async with serving({"POST /prompt": answering("", 413)}) as url, backend_at(url) as backend:
        with pytest.raises(BackendRejected, match="length"):
            await backend.submit("p", "c", tiny_graph(), {})


# looking


@pytest.mark.parametrize(
    "routes",
    [
        {"GET /queue": answering("", 500)},
        {"GET /queue": answering("[]")},
        {"GET /queue": answering(EMPTY_QUEUE), "GET /history/{id}": answering("", 502)},
        {"GET /queue": answering(EMPTY_QUEUE), "GET /history/{id}": answering({"p": 3})},
    ],
)
async def test_a_look_that_fails_is_unclear_and_never_absent(routes: dict[str, Handler]) -> None:
    async with serving(routes) as url, backend_at(url) as backend:
        with pytest.raises(BackendUnclear):
            await backend.look("p")


async def test_a_look_at_nothing_is_unreachable(simulator: Simulator, backend: Backend) -> None:
    await simulator.crash()
    with pytest.raises(BackendUnreachable):
        await backend.look("p")


async def test_looks_never_miss_a_prompt_that_runs(backend: Backend) -> None:
    for _ in range(20):
        prompt_id = await run(backend)
        seen: list[str] = []
        async with asyncio.timeout(10):
            while not seen or seen[-1] != "Ended":
                seen.append(type(await backend.look(prompt_id)).__name__)
        assert "Absent" not in seen


async def test_a_failed_prompt_says_where_and_why(backend: Backend) -> None:
    prompt_id = await run(backend, graph("fail-at-runtime"))
    seen = await sees(lambda: backend.look(prompt_id), Ended)
    assert seen.entry.verdict == "error"
    assert seen.entry.error.node_class == "RegexReplace"
    assert "/" not in seen.entry.error.message
