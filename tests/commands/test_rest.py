"""The REST client against a scripted comfyd."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from comfyd.commands.exits import DamagedDownload, ServerRefused, ServerUnreachable
from comfyd.commands.rest import PATIENCE_MS, TRIES, RestClient, connect, server_url
from comfyd.config import ClientConfig, Config, ServerConfig
from tests.commands.conftest import QuickClock
from tests.commands.fake_comfyd import TASK_ID, FakeComfyd, event, output, task


@asynccontextmanager
async def client_of(fake: FakeComfyd, clock: QuickClock) -> AsyncIterator[RestClient]:
    async with connect(fake.url + "/", clock) as client:
        yield client


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def watched(fake: FakeComfyd, clock: QuickClock) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []
    async with client_of(fake, clock) as client:
        return await client.watch(TASK_ID, seen.append), seen


async def test_a_submission_that_is_not_answered_is_repeated_under_the_same_key(
    comfyd: FakeComfyd, clock: QuickClock
) -> None:
    comfyd.dropped_submissions = TRIES - 1
    async with client_of(comfyd, clock) as client:
        assert (await client.submit({"workflow": "x"}))["task_id"] == TASK_ID
    assert len(comfyd.submissions) == TRIES
    assert len(set(comfyd.keys)) == 1


async def test_a_submission_is_not_repeated_for_ever(comfyd: FakeComfyd, clock: QuickClock) -> None:
    comfyd.dropped_submissions = 100
    async with client_of(comfyd, clock) as client:
        with pytest.raises(ServerUnreachable, match="broke off"):
            await client.submit({"workflow": "x"})
    assert len(comfyd.submissions) == TRIES


async def test_a_server_that_does_not_run_is_said_at_once(clock: QuickClock) -> None:
    async with connect(f"http://me:hidden@127.0.0.1:{closed_port()}", clock) as client:
        with pytest.raises(ServerUnreachable, match="comfyd serve") as caught:
            await client.submit({"workflow": "x"})
    assert clock.slept == 0
    assert "hidden" not in caught.value.message


async def test_an_error_comes_with_its_code_and_details(comfyd: FakeComfyd, clock: QuickClock) -> None:
    error = {"code": "invalid_inputs", "message": "no", "details": {"inputs": {"a": ["b"]}}}
    comfyd.refusal = (422, {"error": error})
    async with client_of(comfyd, clock) as client:
        with pytest.raises(ServerRefused, match="no") as caught:
            await client.submit({"workflow": "x"})
    assert caught.value.details == {
        "status": 422,
        "code": "invalid_inputs",
        "details": {"inputs": {"a": ["b"]}},
    }


@pytest.mark.parametrize(
    ("status", "body"), [(502, b"<html>"), (404, b"{}"), (202, b"<html>"), (400, b'{"error": 1}')]
)
async def test_some_other_server_is_recognized(
    comfyd: FakeComfyd, clock: QuickClock, status: int, body: bytes
) -> None:
    comfyd.refusal = (status, body)
    async with client_of(comfyd, clock) as client:
        with pytest.raises(ServerRefused, match=f"HTTP {status} and no answer of comfyd's"):
            await client.submit({"workflow": "x"})


async def test_watching_follows_the_events_to_the_end(comfyd: FakeComfyd, clock: QuickClock) -> None:
    comfyd.states = [task("PENDING", queue_position=2), task("COMPLETED")]
    comfyd.streams = [
        [
            event("status", task("PENDING", queue_position=1)),
            event("progress", {"value": 0.5, "current_node_class": "KSampler"}),
            b": still here\n\n",
            event("preview", {"image": "..."}),
            event("status", task("COMPLETED")),
        ]
    ]
    ended, seen = await watched(comfyd, clock)
    assert ended["status"] == "COMPLETED"
    assert [(state["status"], (state["progress"] or {}).get("value")) for state in seen] == [
        ("PENDING", None),
        ("PENDING", None),
        ("PROCESSING", 0.5),
        ("COMPLETED", None),
    ]
    assert clock.slept == 0


@pytest.mark.parametrize("status", [200, 405, 502])
async def test_watching_polls_where_no_stream_can_be_had(
    comfyd: FakeComfyd, clock: QuickClock, status: int
) -> None:
    comfyd.states = [task("PENDING"), task("PROCESSING"), task("COMPLETED")]
    comfyd.streams = [status]
    ended, seen = await watched(comfyd, clock)
    assert ended["status"] == "COMPLETED"
    assert [state["status"] for state in seen] == ["PENDING", "PROCESSING", "COMPLETED"]
    assert comfyd.asked[2:] == [f"/api/tasks/{TASK_ID}?wait=5"] * 2


async def test_a_dropped_stream_is_taken_up_again(comfyd: FakeComfyd, clock: QuickClock) -> None:
    comfyd.states = [task("PROCESSING"), task("PROCESSING"), task("PROCESSING"), task("COMPLETED")]
    broken = [event("progress", {"value": 0.1}), b"!"]
    comfyd.streams = [broken, [], [b"data: nonsense\n\n"]]
    ended, _ = await watched(comfyd, clock)
    assert ended["status"] == "COMPLETED"
    assert clock.slept > 0


async def test_a_server_that_stays_away_ends_the_watch(clock: QuickClock) -> None:
    async with connect(f"http://127.0.0.1:{closed_port()}", clock) as client:
        with pytest.raises(ServerUnreachable):
            await client.watch(TASK_ID, lambda _: None)
    assert PATIENCE_MS <= clock.slept < 2 * PATIENCE_MS


async def test_a_task_that_is_forgotten_ends_the_watch(comfyd: FakeComfyd, clock: QuickClock) -> None:
    comfyd.states = [404]
    with pytest.raises(ServerRefused, match="refused with 404"):
        await watched(comfyd, clock)


async def test_errors_while_polling_end_the_watch(comfyd: FakeComfyd, clock: QuickClock) -> None:
    comfyd.states = [task("PENDING"), 500]
    comfyd.streams = [405]
    with pytest.raises(ServerRefused, match="refused with 500"):
        await watched(comfyd, clock)


async def test_an_output_is_saved(comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path) -> None:
    comfyd.files = [b"data" * 300_000]
    async with client_of(comfyd, clock) as client:
        path = await client.download(output("a.png", comfyd.files[0]), tmp_path)  # type: ignore[arg-type] # bytes
        whole = {**output("a.png", comfyd.files[0]), "url": f"{comfyd.url}/api/files/two"}  # type: ignore[arg-type] # bytes
        other = await client.download(whole, tmp_path)
    assert path.read_bytes() == comfyd.files[0]
    assert other.name == "a-2.png"


async def test_a_damaged_download_is_tried_again(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path
) -> None:
    comfyd.files = [b"dama", b"good"]
    async with client_of(comfyd, clock) as client:
        path = await client.download(output("a.png", b"good"), tmp_path)
        assert path.read_bytes() == b"good"
        with pytest.raises(DamagedDownload):
            await client.download(output("a.png", b"else"), tmp_path)


async def test_an_output_that_is_gone_is_refused(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path
) -> None:
    comfyd.files = [404]
    async with client_of(comfyd, clock) as client:
        with pytest.raises(ServerRefused):
            await client.download(output("a.png", b""), tmp_path)


async def test_a_server_that_is_silent_is_given_up(clock: QuickClock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        async with connect(f"http://127.0.0.1:{deaf.getsockname()[1]}", clock, silence=0.05) as client:
            with pytest.raises(ServerUnreachable, match="does not answer in time"):
                await client.task(TASK_ID)


@pytest.mark.parametrize(
    ("server", "client", "url"),
    [
        (ServerConfig(), ClientConfig(), "http://127.0.0.1:8000"),
        (ServerConfig(host="0.0.0.0", port=9), ClientConfig(), "http://127.0.0.1:9"),  # noqa: S104 - not bound
        (ServerConfig(host="::"), ClientConfig(), "http://[::1]:8000"),
        (ServerConfig(host="fd00::7"), ClientConfig(), "http://[fd00::7]:8000"),
        (ServerConfig(), ClientConfig(url="https://x/comfyd"), "https://x/comfyd"),
    ],
)
def test_commands_know_where_the_server_is(server: ServerConfig, client: ClientConfig, url: str) -> None:
    assert server_url(Config(server=server, client=client)) == url
