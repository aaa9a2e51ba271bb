"""Binary WebSocket frames: pictures with and without the names of their prompt and node."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

from tests.conformance import graphs
from tests.conformance.raw_client import status_is, token_is, tokens

if TYPE_CHECKING:
    from tests.conformance.raw_client import Run, Server

END = ["success", "status 0", "executing null"]
PNG = b"\x89PNG\r\n\x1a\n"


def picture_frames(run: Run) -> list[bytes]:
    """The binary frames of a run."""
    return [message.frame for message in run.messages if message.kind == "binary"]


async def test_image_frames_name_prompt_and_node_after_the_handshake(server: Server) -> None:
    run = await server.run(graphs.named("websocket-image"), previews=True)
    frames = picture_frames(run)
    assert len(frames) == 2
    for frame in frames:
        kind, length = struct.unpack_from(">II", frame)
        assert kind == 4
        metadata: dict[str, Any] = json.loads(frame[8 : 8 + length])
        assert metadata == {
            "node_id": "9",
            "prompt_id": run.prompt_id,
            "display_node_id": "9",
            "parent_node_id": None,
            "real_node_id": "9",
            "image_type": "image/png",
        }
        assert frame[8 + length :].startswith(PNG)
    assert run.outputs == {}


async def test_image_frames_name_nothing_without_the_handshake(server: Server) -> None:
    run = await server.run(graphs.named("websocket-image"))
    frames = picture_frames(run)
    assert [struct.unpack_from(">II", frame) for frame in frames] == [(1, 2), (1, 2)]
    assert all(frame[8:].startswith(PNG) for frame in frames)


async def test_order_of_image_frames(server: Server) -> None:
    with_metadata = await server.run(graphs.named("websocket-image"), previews=True)
    plain = await server.run(graphs.named("websocket-image"))
    running, finished = (f"state 1=finished 2=finished 9={state}" for state in ("running", "finished"))
    tail = [finished, *END]
    assert after(with_metadata, "executing 9") == [
        *(running, "binary 4", "progress 9 0/2"),
        *(running, "binary 4", "progress 9 1/2"),
        *tail,
    ]
    assert after(plain, "executing 9") == [
        *(running, "progress 9 0/2", "binary 1"),
        *(running, "progress 9 1/2", "binary 1"),
        *tail,
    ]


async def test_image_frames_are_sent_again_by_an_equal_prompt(server: Server) -> None:
    graph = graphs.named("websocket-image")
    await server.run(graph, previews=True)
    again = await server.run(graph, previews=True)
    assert len(picture_frames(again)) == 2
    assert again.of_kind("execution_cached")[0]["nodes"] == ["1", "2"]


def after(run: Run, token: str) -> list[str]:
    """The tokens of a run that follow the first one that reads so."""
    words = tokens(run.messages)
    return words[words.index(token) + 1 :]


async def test_frames_of_a_prompt_without_client_id_go_to_everybody(server: Server) -> None:
    async with server.socket() as stranger:
        await server.submit(graphs.named("websocket-image"))
        await stranger.until(token_is("progress 9 1/2"))
        await stranger.until(status_is(0))
    assert [message.kind for message in stranger.messages].count("binary") == 2
