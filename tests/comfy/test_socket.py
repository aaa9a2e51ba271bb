"""One socket for all: who hears what, and what happens when it goes."""

import asyncio
import contextlib
import json

import pytest
from aiohttp import WSMsgType, web

from comfyd.clock import SystemClock
from comfyd.comfy import (
    Backend,
    Ended,
    Executed,
    Executing,
    ExecutionCached,
    ExecutionError,
    ExecutionInterrupted,
    ExecutionStart,
    ExecutionSuccess,
    Message,
    NodeProgress,
    Preview,
    Running,
)
from comfyd.errors import BackendUnclear, BackendUnreachable
from comfyd.simulator import Simulator
from tests.comfy.stage import Handler, backend_at, fails, graph, sees, serving, socket_open, tiny_graph, until


def ignore(_message: Message) -> None:
    """Listens to nothing."""


def new_id() -> str:
    return SystemClock().new_id()


async def test_a_prompt_is_heard_from_start_to_end(backend: Backend) -> None:
    heard: list[Message] = []
    prompt_id = new_id()
    async with socket_open(backend):
        with backend.watch(prompt_id, heard.append) as watch:
            await backend.submit(prompt_id, watch.client_id, tiny_graph(), {})
            assert await watch.wait(10_000)
            assert (watch.ended, watch.connected, watch.heard) == (True, True, len(heard))
            assert isinstance(await backend.look(prompt_id, ended=True), Ended)
    kinds = [type(message) for message in heard]
    assert kinds[0] is ExecutionStart
    assert kinds[1] is ExecutionCached
    assert kinds[-2:] == [ExecutionSuccess, Executing]
    assert Executed in kinds
    assert {message.prompt_id for message in heard} == {prompt_id}


async def test_the_history_is_there_when_a_wait_ends(simulator: Simulator, backend: Backend) -> None:
    simulator.faults.history_delay_seconds = 0.05
    async with socket_open(backend):
        for colour in range(5):
            prompt_id, sent = new_id(), tiny_graph()
            sent["1"]["inputs"]["color"] = colour
            with backend.watch(prompt_id, ignore) as watch:
                await backend.submit(prompt_id, watch.client_id, sent, {})
                assert await watch.wait(10_000)
                assert isinstance(await backend.look(prompt_id, ended=True), Ended)


async def test_many_prompts_share_one_socket_and_hear_only_their_own(
    simulator: Simulator, backend: Backend
) -> None:
    async def one(colour: int) -> None:
        prompt_id, sent = new_id(), tiny_graph()
        sent["1"]["inputs"]["color"] = colour
        heard: list[Message] = []
        with backend.watch(prompt_id, heard.append) as watch:
            await backend.submit(prompt_id, watch.client_id, sent, {})
            assert await watch.wait(20_000)
        assert {message.prompt_id for message in heard} == {prompt_id}

    async with socket_open(backend):
        await asyncio.gather(*(one(number) for number in range(40)))
        assert simulator.sockets.peak == 1
    assert backend.connections == 1
    assert backend.malformed_messages == 0


async def test_websocket_images_and_progress_name_their_node(backend: Backend) -> None:
    heard: list[Message] = []
    prompt_id = new_id()
    async with socket_open(backend):
        with backend.watch(prompt_id, heard.append) as watch:
            await backend.submit(prompt_id, watch.client_id, graph("websocket-image"), {})
            assert await watch.wait(10_000)
    pictures = [message for message in heard if isinstance(message, Preview)]
    assert len(pictures) == 2
    assert all(picture.data.startswith(b"\x89PNG") for picture in pictures)
    assert {picture.node_id for picture in pictures} == {"9"}
    assert any(isinstance(message, NodeProgress) for message in heard)


async def test_an_error_ends_a_wait(backend: Backend) -> None:
    heard: list[Message] = []
    prompt_id = new_id()
    async with socket_open(backend):
        with backend.watch(prompt_id, heard.append) as watch:
            await backend.submit(prompt_id, watch.client_id, graph("fail-at-runtime"), {})
            assert await watch.wait(10_000)
            assert watch.ended
    assert isinstance(heard[-2], ExecutionError)


async def test_an_interrupt_ends_a_wait(simulator: Simulator, backend: Backend) -> None:
    simulator.faults.class_seconds["EmptyImage"] = 0.3
    heard: list[Message] = []
    prompt_id = new_id()
    async with socket_open(backend):
        with backend.watch(prompt_id, heard.append) as watch:
            await backend.submit(prompt_id, watch.client_id, tiny_graph(), {})
            await sees(lambda: backend.look(prompt_id), Running)
            await backend.cancel(prompt_id)
            assert await watch.wait(10_000)
            assert watch.ended
    assert isinstance(heard[-2], ExecutionInterrupted)


async def test_a_wait_that_hears_nothing_runs_out(backend: Backend) -> None:
    async with socket_open(backend):
        with backend.watch(new_id(), ignore) as watch:
            assert not await watch.wait(20)
            assert (watch.ended, watch.connected, watch.heard) == (False, True, 0)


async def test_two_watches_of_one_prompt_both_hear_and_leave_nothing_behind(backend: Backend) -> None:
    first: list[Message] = []
    second: list[Message] = []
    prompt_id = new_id()
    async with socket_open(backend):
        with backend.watch(prompt_id, first.append) as outer:
            with backend.watch(prompt_id, second.append) as inner:
                await backend.submit(prompt_id, outer.client_id, tiny_graph(), {})
                assert await inner.wait(10_000)
            assert await outer.wait(10_000)
    assert first == second != []


async def test_a_lost_socket_wakes_its_prompts_and_the_next_has_a_fresh_id(
    simulator: Simulator, backend: Backend
) -> None:
    simulator.faults.class_seconds["EmptyImage"] = 0.5
    prompt_id = new_id()
    async with socket_open(backend) as reader:
        first = backend.client_id
        with backend.watch(prompt_id, ignore) as watch:
            await backend.submit(prompt_id, watch.client_id, tiny_graph(), {})
            await until(lambda: watch.heard > 0)
            simulator.drop_sockets()
            assert await watch.wait(5_000)
            assert not watch.ended
            assert not watch.connected
            assert "lost" in str(await fails(reader))
            assert not backend.state.socket
            async with socket_open(backend):
                assert backend.client_id not in {None, first}
                assert not watch.connected
                # no message names it now, but the queue gets shorter when it ends
                assert await watch.wait(5_000)
                assert isinstance(await backend.look(prompt_id), Ended)
    assert backend.connections == 2


async def test_a_prompt_of_a_former_process_is_never_connected(
    simulator: Simulator, backend: Backend
) -> None:
    simulator.faults.class_seconds["EmptyImage"] = 0.2
    prompt_id = new_id()
    await backend.submit(prompt_id, "comfyd-former", tiny_graph(), {})
    async with socket_open(backend):
        with backend.watch(prompt_id, ignore, client_id="comfyd-former") as watch:
            assert watch.client_id == "comfyd-former"
            assert not watch.connected
            assert await watch.wait(5_000)
            assert not watch.ended


async def test_a_prompt_that_was_sent_under_no_connection_has_none(backend: Backend) -> None:
    async with socket_open(backend):
        with backend.watch(new_id(), ignore, client_id=None) as watch:
            assert watch.client_id is None
            assert not watch.connected


async def test_a_watch_without_a_socket_has_no_client_id(backend: Backend) -> None:
    with backend.watch(new_id(), ignore) as watch:
        assert watch.client_id is None
        assert not watch.connected
        async with socket_open(backend):
            assert not watch.connected


@pytest.mark.fault(9)
async def test_a_deaf_socket_is_given_up(simulator: Simulator, backend: Backend) -> None:
    prompt_id = new_id()
    async with socket_open(backend) as reader:
        simulator.faults.sockets = "deaf"
        with backend.watch(prompt_id, ignore) as watch:
            await backend.submit(prompt_id, watch.client_id, tiny_graph(), {})
            await sees(lambda: backend.look(prompt_id), Ended)
            assert (watch.heard, watch.connected) == (0, True)
            backend.reset_socket()
            backend.reset_socket()
            assert await watch.wait(5_000)
            assert not watch.connected
        assert "deaf" in str(await fails(reader))
    backend.reset_socket()  # nothing is open: nothing happens


@pytest.mark.parametrize("fault", ["hang", "deaf"])
async def test_a_socket_that_never_speaks_is_not_waited_for_for_ever(
    simulator: Simulator, fault: str
) -> None:
    simulator.faults.change({"sockets": fault})
    async with backend_at(simulator.url, timeout=0.3) as backend:
        with pytest.raises(BackendUnclear):
            await asyncio.wait_for(backend.run_socket(), 10)
        assert (backend.connections, backend.client_id) == (0, None)


async def test_a_socket_that_is_not_let_in_says_so(simulator: Simulator, backend: Backend) -> None:
    simulator.faults.sockets = "refuse"
    with pytest.raises(BackendUnclear):
        await asyncio.wait_for(backend.run_socket(), 10)


async def test_a_refused_socket_makes_the_backend_not_ready(simulator: Simulator, backend: Backend) -> None:
    await backend.probe()
    assert backend.state.ready
    await simulator.crash()
    with pytest.raises(BackendUnreachable):
        await backend.run_socket()
    assert not backend.state.ready


def speaking(*frames: str | bytes) -> Handler:
    """A server that sends these frames and then reads."""

    async def handler(request: web.Request) -> web.StreamResponse:
        websocket = web.WebSocketResponse()
        await websocket.prepare(request)
        hello = await websocket.receive()
        assert json.loads(hello.data) == {
            "type": "feature_flags",
            "data": {"supports_preview_metadata": True},
        }
        for frame in frames:
            await (websocket.send_str(frame) if isinstance(frame, str) else websocket.send_bytes(frame))
        with contextlib.suppress(ConnectionError):
            while (await websocket.receive()).type not in {
                WSMsgType.CLOSE,
                WSMsgType.CLOSED,
                WSMsgType.CLOSING,
            }:
                pass
        return websocket

    return handler


async def test_nonsense_is_counted_and_does_not_close_the_socket() -> None:
    frames = ("{", b"\0", '{"type":"execution_start","data":{"prompt_id":"p"}}')
    async with serving({"GET /ws": speaking(*frames)}) as url, backend_at(url) as backend:
        heard: list[Message] = []
        with backend.watch("p", heard.append):
            async with socket_open(backend):
                await until(lambda: bool(heard))
                assert backend.malformed_messages == 2


async def test_a_large_frame_does_not_close_the_socket() -> None:
    text = "x" * (8 * 1024 * 1024)
    frame = json.dumps(
        {"type": "executed", "data": {"prompt_id": "p", "node": "1", "output": {"text": [text]}}}
    )
    async with serving({"GET /ws": speaking(frame)}) as url, backend_at(url) as backend:
        heard: list[Message] = []
        with backend.watch("p", heard.append):
            async with socket_open(backend):
                await until(lambda: bool(heard))
    assert heard == [Executed(prompt_id="p", node="1", output={"text": [text]})]


async def test_a_verdict_without_the_last_word_still_ends_the_wait() -> None:
    frame = '{"type":"execution_success","data":{"prompt_id":"p"}}'
    async with serving({"GET /ws": speaking(frame)}) as url, backend_at(url) as backend:
        with backend.watch("p", ignore) as watch:
            async with socket_open(backend):
                assert await watch.wait(5_000)
                assert watch.ended
                assert not await watch.wait(20)


async def test_a_dead_link_is_noticed_by_its_silence() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        websocket = web.WebSocketResponse(autoping=False)
        await websocket.prepare(request)
        await websocket.send_str('{"type":"status","data":{}}')
        async for _frame in websocket:
            pass  # reads pings and answers none
        return websocket

    async with (
        serving({"GET /ws": handler}) as url,
        backend_at(url, timeout=0.2) as backend,
        socket_open(backend) as reader,
    ):
        assert isinstance(await fails(reader), BackendUnclear)
