"""The REST client against a scripted comfyd."""

import asyncio
import hashlib
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from comfyd.commands.exits import DamagedDownload, ServerRefused, ServerUnreachable, UnreadableFile
from comfyd.commands.rest import PATIENCE_MS, TRIES, RestClient, connect, renewing, server_url
from comfyd.config import ClientConfig, Config, ServerConfig
from tests.commands.conftest import QuickClock
from tests.commands.fake_comfyd import TASK_ID, FakeComfyd, event, output, task
from tests.support.trap import Script, answer, hang, head, open_trap, redirect


@asynccontextmanager
async def client_of(fake: FakeComfyd, clock: QuickClock) -> AsyncIterator[RestClient]:
    async with connect(fake.url + "/", clock) as client:
        yield client


def names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


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
    data = b"data" * 300_000
    comfyd.files = [data]
    async with client_of(comfyd, clock) as client:
        path = await client.download(TASK_ID, output("a.png", data), tmp_path)
        whole = output("a.png", data, url=f"{comfyd.url}/api/files/two")
        other = await client.download(TASK_ID, whole, tmp_path)
    assert path.read_bytes() == data
    assert other.name == "a-2.png"


async def test_a_damaged_download_is_tried_again(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path
) -> None:
    comfyd.files = [b"dama", b"good"]
    async with client_of(comfyd, clock) as client:
        path = await client.download(TASK_ID, output("a.png", b"good"), tmp_path)
        assert path.read_bytes() == b"good"
        with pytest.raises(DamagedDownload):
            await client.download(TASK_ID, output("a.png", b"else"), tmp_path)


async def test_an_output_that_is_gone_is_refused(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path
) -> None:
    comfyd.files = [404]
    async with client_of(comfyd, clock) as client:
        with pytest.raises(ServerRefused):
            await client.download(TASK_ID, output("a.png", b""), tmp_path)


async def test_a_server_that_is_silent_is_given_up(clock: QuickClock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        async with connect(f"http://127.0.0.1:{deaf.getsockname()[1]}", clock, silence=0.05) as client:
            with pytest.raises(ServerUnreachable, match="does not answer in time"):
                await client.task(TASK_ID)


# --- uploads ------------------------------------------------------------------------------------------------


async def test_an_upload_is_named_by_its_reference(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path
) -> None:
    data = os.urandom(3_000_001)
    path = tmp_path / "a photo + ü&=#%2B.png"
    path.write_bytes(data)
    async with client_of(comfyd, clock) as client:
        assert await client.upload(path) == f"upload:{hashlib.sha256(data).hexdigest()}.png"
    assert comfyd.uploads == [("a photo + ü&=#%2B.png", data)]


async def test_a_name_that_is_not_unicode_is_no_obstacle(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path
) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.write_bytes(b"x")
    async with client_of(comfyd, clock) as client:
        await client.upload(path)
    assert comfyd.uploads == [("caf?.png", b"x")]


async def test_an_upload_that_is_not_answered_is_repeated_whole(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"data")
    comfyd.dropped_uploads = TRIES - 1
    async with client_of(comfyd, clock) as client:
        await client.upload(tmp_path / "a")
    assert comfyd.uploads == [("a", b"data")] * TRIES


async def test_an_upload_that_is_refused_is_not_sent_to_its_end(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path
) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(1 << 30)
    error = {"code": "body_too_large", "message": "the body is longer than 7 bytes", "details": {"limit": 7}}
    comfyd.upload_refusal = (413, {"error": error})
    async with asyncio.timeout(20), client_of(comfyd, clock) as client:
        with pytest.raises(ServerRefused, match=r"large\.png: the body is longer than 7 bytes") as caught:
            await client.upload(tmp_path / "large.png")
    assert caught.value.details["status"] == 413
    assert clock.slept == 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": {"code": "x", "message": "a.png: is empty"}}, "/a.png: is empty"),
        (
            "nginx",
            "/a.png: HTTP 413 and no answer of comfyd's: something before it takes no request that long",
        ),
    ],
)
async def test_a_refused_file_is_named_once(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path, body: object, words: str
) -> None:
    (tmp_path / "a.png").touch()
    comfyd.upload_refusal = (413, body)
    async with client_of(comfyd, clock) as client:
        with pytest.raises(ServerRefused) as caught:
            await client.upload(tmp_path / "a.png")
    assert caught.value.message == f"{tmp_path}{words}"


async def test_a_file_that_changes_while_it_is_sent_is_the_users_trouble(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path
) -> None:
    path = tmp_path / "large.png"
    path.touch()
    os.truncate(path, 1 << 28)
    comfyd.at_upload = lambda: os.truncate(path, 0)
    async with client_of(comfyd, clock) as client:
        with pytest.raises(UnreadableFile, match=r"large\.png changed while it was read"):
            await client.upload(path)
    assert comfyd.uploads == []
    assert clock.slept == 0


async def test_a_server_that_takes_no_more_of_a_file_is_given_up(clock: QuickClock, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.touch()
    os.truncate(path, 1 << 28)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        async with connect(f"http://127.0.0.1:{deaf.getsockname()[1]}", clock, silence=0.1) as client:
            with pytest.raises(ServerUnreachable, match="does not answer in time"):
                await client.upload(path)


async def test_patience_begins_anew_with_each_block() -> None:
    async def blocks() -> AsyncIterator[bytes]:
        yield b"1"
        yield b"2"

    async with asyncio.timeout(60) as patience:
        renewed = renewing(patience, 1_000, blocks())
        assert await anext(renewed) == b"1"
        assert (patience.when() or 0) < asyncio.get_running_loop().time() + 61
        assert await anext(renewed) == b"2"
        assert (patience.when() or 0) > asyncio.get_running_loop().time() + 900


async def test_what_is_posted_follows_no_redirect(clock: QuickClock) -> None:
    async with (
        open_trap() as elsewhere,
        open_trap(redirect(f"{elsewhere.url}/api/tasks", 307)) as trap,
        connect(trap.url, clock) as client,
    ):
        with pytest.raises(ServerRefused, match="HTTP 307 and no answer of comfyd's"):
            await client.submit({"workflow": "x"})
    assert elsewhere.accepted == 0


# --- outputs that lie elsewhere -----------------------------------------------------------------------------


def leading_on(location: str) -> Script:
    return answer(b"", 302, Location=location, Connection="close")


def picture(status: int = 200) -> Script:
    return answer(b"png", status, Content_Type="image/png", Connection="close")


@pytest.mark.parametrize(
    "path",
    [
        "/b/a%20b.png?X-Amz-Credential=K%2F20251123%2Fus-east-1%2Fs3%2Faws4_request&X-Amz-Signature=0a%3D",
        "/b/a+b%2Bc.png?e=a+b%20c&f=%7e~%3a:%2F/",
        "/b/%C3%BC%c3%bc%E7%94%BB.png",
        "/b//c/..%2f.././d;v=1?x=1&x=2&&y&z==",
        "/b/%41%2e?%3F?",
        "/b?",
    ],
)
async def test_a_signed_url_is_asked_for_as_it_stands(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path, path: str
) -> None:
    async with open_trap(picture()) as storage, client_of(comfyd, clock) as client:
        url = storage.url + path
        await client.download(TASK_ID, output("a.png", b"png", url=url), tmp_path)
        comfyd.files = [lambda: web.Response(status=302, headers={"Location": url})]
        await client.download(TASK_ID, output("a.png", b"png"), tmp_path)
    lines = [sent.split(b"\r\n")[0].decode() for sent in storage.heads]
    assert lines == [f"GET {path.removesuffix('?') if path == '/b?' else path} HTTP/1.1"] * 2


async def test_a_url_that_could_not_be_sent_as_it_stands_is_quoted(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path
) -> None:
    async with open_trap(picture()) as storage, client_of(comfyd, clock) as client:
        url = f"{storage.url}/a ü\r\nX: y.png"
        await client.download(TASK_ID, output("a.png", b"png", url=url), tmp_path)
    (sent,) = storage.heads
    assert sent.startswith(b"GET /a%20%C3%BC")
    assert b"\r\nX: y" not in sent


async def test_strangers_get_nothing_of_ours(comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path) -> None:
    async with open_trap(picture()) as storage:
        comfyd.files = [b"png", b"png", lambda: web.Response(status=302, headers={"Location": storage.url})]
        own = comfyd.url.replace("://", "://me:hid%40den@")
        async with connect(own, clock) as client:
            assert (await client.task(TASK_ID))["status"] == "COMPLETED"
            for url in (
                "/relative",
                f"{comfyd.url}/absolute",
                f"{comfyd.url}/leads-on",
                f"{storage.url}/foreign",
            ):
                await client.download(TASK_ID, output("a.png", b"png", url=url), tmp_path)
    assert [headers.get("Authorization") for headers in comfyd.headers] == ["Basic bWU6aGlkQGRlbg=="] * 3
    assert len(storage.heads) == 2
    for sent in storage.heads:
        assert b"\r\nAccept-Encoding: identity\r\n" in sent
        names = {line.split(b":")[0].lower() for line in sent.split(b"\r\n")[1:] if line}
        assert names == {b"host", b"accept", b"accept-encoding", b"user-agent"}


async def test_a_url_that_has_expired_is_asked_for_once_more(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path
) -> None:
    async with open_trap(picture(403), picture()) as storage, client_of(comfyd, clock) as client:
        stale = output("a.png", b"png", url=f"{storage.url}/a.png?signature=old")
        other = output("b.png", b"png", url=f"{storage.url}/b.png?signature=new")
        comfyd.states = [
            task("COMPLETED", outputs=[other, {**stale, "url": f"{storage.url}/a.png?signature=new"}])
        ]
        path = await client.download(TASK_ID, stale, tmp_path)
    assert path.read_bytes() == b"png"
    assert [sent.split()[1] for sent in storage.heads] == [b"/a.png?signature=old", b"/a.png?signature=new"]
    assert comfyd.asked == [f"/api/tasks/{TASK_ID}"]


@pytest.mark.parametrize(
    ("statuses", "later", "asked"),
    [
        ([403, 403], {"url": "/a.png?signature=new"}, 2),
        ([400, 404], {"url": "/a.png?signature=new"}, 2),
        ([403], {}, 1),
        ([403], {"url": "/a.png?signature=new", "sha256": "of another run"}, 1),
        ([404], {"url": "/a.png?signature=new"}, 1),
    ],
)
async def test_a_url_that_stays_refused_is_told_without_its_signature(
    comfyd: FakeComfyd,
    clock: QuickClock,
    tmp_path: Path,
    statuses: list[int],
    later: dict[str, str],
    asked: int,
) -> None:
    async with open_trap(*map(picture, statuses)) as storage, client_of(comfyd, clock) as client:
        stale = output("a.png", b"png", url=f"{storage.url}/a.png?signature=old")
        if "url" in later:
            later = {**later, "url": storage.url + later["url"]}
        comfyd.states = [task("COMPLETED", outputs=[{**stale, **later}])]
        with pytest.raises(ServerRefused) as caught:
            await client.download(TASK_ID, stale, tmp_path)
        assert len(storage.heads) == asked
    host = storage.url.removeprefix("http://")
    assert caught.value.message == f"{host}, which has the output, answers HTTP {statuses[-1]}"
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (leading_on("/a.png?signature=old"), "broke off: TooManyRedirects"),
        (leading_on("ftp://127.0.0.1/a?signature=old"), "broke off: NonHttpUrlRedirectClientError"),
        (hang, "does not answer in time"),
        (answer(b"pn", length=3), "broke off"),
    ],
)
async def test_a_storage_that_breaks_off_is_named_without_a_signature(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path, script: Script, words: str
) -> None:
    async with open_trap(script) as storage, connect(comfyd.url, clock, silence=0.2) as client:
        signed = output("a.png", b"png", url=f"{storage.url}/a.png?signature=old")
        with pytest.raises(ServerUnreachable) as caught:
            await client.download(TASK_ID, signed, tmp_path)
    host = storage.url.removeprefix("http://")
    assert f"{host}, which has the output, {words}" in caught.value.message
    assert "signature" not in caught.value.message
    assert names(tmp_path) == []


async def test_a_storage_that_cannot_be_reached_is_no_matter_of_comfyd_serve(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path
) -> None:
    async with client_of(comfyd, clock) as client:
        away = output("a.png", b"png", url=f"http://127.0.0.1:{closed_port()}/a.png")
        with pytest.raises(ServerUnreachable, match="which has the output, cannot be reached") as caught:
            await client.download(TASK_ID, away, tmp_path)
    assert "comfyd" not in caught.value.message


async def test_a_passing_trouble_of_a_storage_is_waited_for(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path
) -> None:
    async with (
        open_trap(picture(503), picture(500), picture()) as storage,
        client_of(comfyd, clock) as client,
    ):
        path = await client.download(TASK_ID, output("a.png", b"png", url=f"{storage.url}/a"), tmp_path)
    assert path.read_bytes() == b"png"


# --- pictures that are encoded anew -------------------------------------------------------------------------


def variant(url: str) -> dict[str, Any]:
    """What the task says of the original."""
    return output("a.png", b"the original", storage="cf_images", url=url)


def raw(body: bytes, **headers: str) -> Script:
    """Without a length of its own accord."""

    async def script(writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, {"Content-Type": "image/webp", "Connection": "close", **headers}) + body)
        await writer.drain()

    return script


@pytest.mark.parametrize(
    "script",
    [
        answer(b"variant", Content_Type="image/webp"),
        raw(b"7\r\nvariant\r\n0\r\n\r\n", **{"Transfer-Encoding": "Chunked"}),
    ],
)
async def test_a_picture_that_was_encoded_anew_is_saved(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path, script: Script
) -> None:
    async with open_trap(script) as network, client_of(comfyd, clock) as client:
        path = await client.download(TASK_ID, variant(f"{network.url}/hash/id/public"), tmp_path)
    assert path.read_bytes() == b"variant"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (answer(b"", Content_Type="image/png"), "a.png arrived empty"),
        (answer(b"<html>", Content_Type="text/html"), "a.png arrived as text/html"),
        (raw(b"variant"), "a.png arrived without a length"),
        (answer(b"varian", length=7, Content_Type="image/png"), "broke off"),
        (raw(b"7\r\nvariant\r\n", **{"Transfer-Encoding": "chunked"}), "broke off"),
    ],
)
async def test_a_part_of_a_picture_that_was_encoded_anew_is_not_saved(
    comfyd: FakeComfyd, clock: QuickClock, tmp_path: Path, script: Script, words: str
) -> None:
    async with open_trap(script) as network, client_of(comfyd, clock) as client:
        with pytest.raises((DamagedDownload, ServerUnreachable), match=words):
            await client.download(TASK_ID, variant(f"{network.url}/hash/id/public"), tmp_path)
        assert network.accepted == TRIES
    assert names(tmp_path) == []


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
