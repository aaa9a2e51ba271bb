"""What a backend says of itself, and what it remembers of its server."""

import asyncio
import contextlib
import socket
from collections.abc import Callable

import pytest
from aiohttp import web

from comfyd.clock import SystemClock
from comfyd.comfy import Backend
from comfyd.comfy.client import Client, open_session, server_url
from comfyd.comfy.health import SILENT_PROBES, Health
from comfyd.comfy.sightings import Ended
from comfyd.config import ComfyUIConfig
from comfyd.errors import BackendUnclear, BackendUnreachable, ConfigError
from comfyd.simulator import Simulator
from tests.comfy.stage import answering, backend_at, sees, serving, socket_open, tiny_graph
from tests.support.logs import captured_logs

STATS = {"system": {"comfyui_version": "9.9"}}


async def test_a_probe_finds_the_version_and_tells_of_the_change(simulator: Simulator) -> None:
    changes: list[bool] = []
    async with backend_at(simulator.url, on_change=lambda: changes.append(backend.state.ready)) as backend:
        assert (backend.name, backend.url, backend.in_flight) == ("comfyui", simulator.url, 2)
        assert (backend.state.ready, backend.state.reason) == (False, "not asked yet")
        await backend.probe()
        await backend.probe()
        state = backend.state
        assert (state.ready, state.reason, state.version, state.socket) == (True, None, "0.3.75", False)
        async with socket_open(backend):
            assert backend.state.socket
        await simulator.crash()
        await backend.probe()
        state = backend.state
        assert not state.ready
        assert state.reason == f"connection refused at {simulator.url}"
        assert state.version == "0.3.75"
        await simulator.restart()
        await backend.probe()
        assert backend.state.ready
    assert changes == [True, False, True]


async def test_any_refused_verb_makes_it_not_ready_at_once(simulator: Simulator, backend: Backend) -> None:
    await backend.probe()
    await simulator.crash()
    with pytest.raises(BackendUnreachable):
        await backend.queue_status()
    assert not backend.state.ready


async def test_a_time_out_is_counted_but_proves_nothing_until_it_lasts(simulator: Simulator) -> None:
    async with backend_at(simulator.url, timeout=0.15) as backend:
        await backend.probe()
        simulator.faults.http_delay_seconds = 30.0
        with pytest.raises(BackendUnclear, match="in time"):
            await backend.queue_status()
        assert (backend.state.ready, backend.state.timeouts) == (True, 1)
        for _ in range(SILENT_PROBES):
            assert backend.state.ready
            await backend.probe()
        assert not backend.state.ready
        assert "did not answer" in str(backend.state.reason)
        simulator.faults.http_delay_seconds = 0.0
        await backend.probe()
        assert (backend.state.ready, backend.state.timeouts) == (True, 0)


@pytest.mark.parametrize(("body", "status"), [("", 502), (b"<html>", 200), ([], 200)])
async def test_something_else_behind_the_url_is_not_ready(body: object, status: int) -> None:
    async with serving({"GET /system_stats": answering(body, status)}) as url, backend_at(url) as backend:
        await backend.probe()
        assert not backend.state.ready
        assert "GET /system_stats" in str(backend.state.reason)


@pytest.mark.parametrize("stats", [{}, {"system": 3}, {"system": {"comfyui_version": 4}}])
async def test_a_server_that_does_not_say_its_version_is_ready(stats: object) -> None:
    async with serving({"GET /system_stats": answering(stats)}) as url, backend_at(url) as backend:
        await backend.probe()
        assert (backend.state.ready, backend.state.version) == (True, None)
        assert await backend.system_stats() == stats


async def test_what_a_server_can_do_is_asked_once_per_life() -> None:
    asked: list[str] = []

    async def cancel(request: web.Request) -> web.StreamResponse:
        asked.append(request.match_info["id"])
        return web.json_response({"cancelled": False})

    routes = {"GET /system_stats": answering(STATS), "POST /api/jobs/{id}/cancel": cancel}
    async with serving(routes) as url, backend_at(url) as backend:
        for _ in range(3):
            await backend.probe()
        assert len(asked) == 1
        assert len(asked[0]) == 36


async def test_node_classes_are_remembered_until_the_server_is_a_new_one(
    simulator: Simulator, backend: Backend
) -> None:
    classes = await backend.object_info()
    assert "SaveImage" in classes
    assert await backend.object_info() is classes
    assert await backend.object_info(refresh=True) is not classes
    classes = await backend.object_info()
    async with socket_open(backend):
        again = await backend.object_info()
        assert again is not classes
        await simulator.crash()
        with pytest.raises(BackendUnreachable):
            await backend.queue()
        await simulator.restart()
        assert await backend.object_info() is not again


async def test_replaceable_classes_are_empty_on_an_older_server(
    backend: Backend, newer_backend: Backend
) -> None:
    assert await backend.replaceable_classes() == frozenset()
    assert isinstance(await newer_backend.replaceable_classes(), frozenset)
    body = {"OldLoader": [{"new_node_id": "NewLoader"}]}
    async with serving({"GET /node_replacements": answering(body)}) as url, backend_at(url) as other:
        assert await other.replaceable_classes() == {"OldLoader"}
    async with serving({"GET /node_replacements": answering("", 500)}) as url, backend_at(url) as other:
        with pytest.raises(BackendUnclear):
            await other.replaceable_classes()


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8188", "ftp://x", "http://", "http://x/?a=b", "http://x/#y", "http://[x"]
)
async def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        async with backend_at(url):
            pass
    assert caught.value.details == {"key": "comfyui.url"}


async def test_a_password_in_the_url_is_used_and_never_shown() -> None:
    seen: list[str] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append(request.headers.get("Authorization", ""))
        return web.json_response(STATS)

    async with serving({"GET /comfy/system_stats": handler}) as url:
        address = url.replace("http://", "http://ann:secret@") + "/comfy/"
        async with backend_at(address) as backend:
            await backend.probe()
            assert backend.state.ready
            assert backend.url == f"{url}/comfy"
            with pytest.raises(BackendUnclear) as caught:
                await backend.queue_status()
            assert "secret" not in str(caught.value)
    assert seen[0].startswith("Basic ")
    with pytest.raises(ConfigError) as refused:
        async with backend_at("ftp://ann:secret@x"):
            pass
    assert "secret" not in str(refused.value)


async def test_a_name_that_does_not_exist_is_plain_words() -> None:
    async with backend_at("http://comfyui.invalid:8188") as backend:
        await backend.probe()
        assert backend.state.reason == "no such host name at http://comfyui.invalid:8188"


async def test_what_the_system_says_is_plain_words() -> None:
    async with backend_at("http://255.255.255.255:8188") as backend:  # nothing is ever sent there over TCP
        await backend.probe()
        assert str(backend.state.reason).endswith(" at http://255.255.255.255:8188")
        assert not backend.state.ready


async def test_an_endless_answer_is_not_read_to_its_end() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b"x" * 1000)
                await asyncio.sleep(0)
        return response

    async with serving({"GET /queue": handler}) as url, open_session() as session:
        health = Health(SystemClock(), lambda: None)
        client = Client(session, server_url(url), 10.0, health, longest_answer=10_000)
        with pytest.raises(BackendUnclear, match="longer than 10000 bytes"):
            await client.call("GET", "/queue")


async def test_tls_towards_a_server_without_it_is_plain_words(simulator: Simulator) -> None:
    async with backend_at(simulator.url.replace("http:", "https:")) as backend:
        await backend.probe()
        assert str(backend.state.reason).startswith("the TLS connection failed at https://")


async def test_a_server_that_takes_no_connection_is_unreachable_but_not_called_dead() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        try:
            async with backend_at(f"http://127.0.0.1:{address[1]}", timeout=0.3) as backend:
                with pytest.raises(BackendUnreachable, match="no connection in time"):
                    await backend.queue_status()
                assert backend.state.timeouts == 1
                assert backend.state.reason == "not asked yet"
        finally:
            for filler in fillers:
                filler.close()


@pytest.mark.fault(19)
async def test_a_slow_answer_does_not_hold_up_the_others(simulator: Simulator, backend: Backend) -> None:
    simulator.faults.prompt_stall_seconds = 30.0
    slow = asyncio.create_task(backend.submit("p", "c", {}, {}))
    async with asyncio.timeout(5):
        assert await backend.queue_status() == {"queue_running": [], "queue_pending": []}
    slow.cancel()
    await asyncio.wait([slow])


async def test_a_queue_that_cannot_be_read_proves_nothing() -> None:
    routes = {
        "GET /system_stats": answering(STATS),
        "POST /api/jobs/{id}/cancel": answering({}),
        "GET /queue": answering({}, status=500),
    }
    async with serving(routes) as url, backend_at(url) as backend:
        for _ in range(5):
            await backend.probe()
        assert (backend.state.ready, backend.state.sick) == (True, False)


async def test_a_server_without_limits_is_not_asked_for_its_queue() -> None:
    asked: list[str] = []

    async def queue(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        return web.json_response({"queue_running": [], "queue_pending": []})

    routes = {
        "GET /system_stats": answering(STATS),
        "POST /api/jobs/{id}/cancel": answering({}),
        "GET /queue": queue,
    }
    async with serving(routes) as url:
        for limit, looks in ((30.0, 1), (0.0, 1)):
            config = ComfyUIConfig(url=url, stuck_after=limit, stop_timeout=limit)
            async with Backend.open(config, SystemClock()) as backend:
                await backend.probe()
                assert backend.state.ready
                assert backend.probe_every_ms == (5_000 if limit else None)
            assert len(asked) == looks


async def test_a_backend_says_when_it_turns_sick_and_well(simulator: Simulator) -> None:
    changes: list[tuple[bool, int]] = []

    def note() -> None:
        changes.append((backend.state.ready, backend.in_flight))

    config = ComfyUIConfig(url=simulator.url, stuck_after=0.06)
    async with Backend.open(config, SystemClock(), note) as backend:
        await backend.probe()
        simulator.faults.worker_dead = True
        with captured_logs() as lines:
            await backend.submit("8a1e2f64-0d1c-4b0e-9d43-0d8e5c1b2a3f", None, tiny_graph(), {})
            await probe_until(backend, lambda: backend.state.sick)
            assert not backend.state.ready
            await backend.cancel("8a1e2f64-0d1c-4b0e-9d43-0d8e5c1b2a3f")
            await probe_until(backend, lambda: backend.state.ready)
            simulator.faults.worker_dead = False
            await backend.submit("8a1e2f64-0d1c-4b0e-9d43-0d8e5c1b2a4f", None, tiny_graph(), {})
            await sees(lambda: backend.look("8a1e2f64-0d1c-4b0e-9d43-0d8e5c1b2a4f"), Ended)
            await backend.probe()
    assert changes == [(True, 2), (False, 2), (True, 1), (True, 2)]
    told = [line for line in lines if line["event"].startswith("backend.")]
    assert [(line["event"], line["log_level"], line["backend"]) for line in told] == [
        ("backend.sick", "warning", "comfyui"),
        ("backend.well", "info", "comfyui"),
    ]
    assert "nothing runs" in told[0]["reason"]
    assert told[1]["on_probation"]


async def probe_until(backend: Backend, true: Callable[[], bool]) -> None:
    """Probe often until it is so."""
    async with asyncio.timeout(10):
        while not true():
            await backend.probe()
            await asyncio.sleep(0.005)
