"""Stored outputs over HTTP: whole and in ranges, under safe headers, and nothing else of the disk."""

import asyncio
import dataclasses
import hashlib
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import aiohttp
import msgspec
import orjson
import pytest
from yarl import URL

from comfyd.api.links import Links
from comfyd.api.state import State
from comfyd.config import Config, LocalStorageConfig, StorageConfig
from comfyd.signing import Signer, key_of
from comfyd.store.base import Store
from comfyd.tasks import Artefact, OutputType
from tests.api.conftest import Edge, serving
from tests.support.clock import HandClock
from tests.support.files import local_file
from tests.support.values import GRAPH, artefact

DATA = bytes(range(256)) * 8
UNKNOWN = "5e1f6c1e-0000-4000-8000-00000000dead"


async def stored(edge: Edge, **facts: Any) -> Artefact:
    """A finished task's one output, with its file in the storage."""

    _, task = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH})
    key = f"{task['task_id']}/1/2_0_picture.png"
    storage = await edge.state.storages.get("local")
    await storage.put(key, local_file(Path(edge.state.config.data.dir) / "sources", DATA))
    made = artefact(
        **{
            "key": key,
            "size_bytes": len(DATA),
            "sha256": hashlib.sha256(DATA).hexdigest(),
            "name": "picture.png",
            **facts,
        }
    )
    await edge.succeed(await edge.claim(task["task_id"]), made)
    return made


async def fetched(
    edge: Edge, made: Artefact, method: str = "GET", **headers: str
) -> tuple[aiohttp.ClientResponse, bytes]:
    url = f"{edge.base}/api/files/{made.key}"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with edge.http.request(method, url, headers=named) as response:
        return response, await response.read()


async def test_file_comes_back_as_its_row_describes_it(edge: Edge) -> None:
    made = await stored(edge)
    response, body = await fetched(edge, made)
    assert response.status == 200
    assert body == DATA
    assert response.headers["Content-Type"] == "image/png"
    assert response.headers["Content-Length"] == str(len(DATA))
    assert response.headers["ETag"] == f'"{made.sha256}"'
    assert response.headers["Accept-Ranges"] == "bytes"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Content-Disposition"].startswith('inline; filename="picture.png"')
    head, empty = await fetched(edge, made, "HEAD")
    assert (head.status, empty) == (200, b"")
    assert head.headers["Content-Length"] == str(len(DATA))


async def test_one_range_is_answered_with_its_bytes(edge: Edge) -> None:
    made = await stored(edge)
    size = len(DATA)
    ranges = {
        "bytes=0-0": (0, 1),
        "bytes=10-19": (10, 10),
        "bytes=2000-": (2000, size - 2000),
        "bytes=2000-999999": (2000, size - 2000),
        "bytes=-5": (size - 5, 5),
        "bytes=-999999": (0, size),
    }
    for asked, (start, length) in ranges.items():
        response, body = await fetched(edge, made, Range=asked)
        assert response.status == 206, asked
        assert body == DATA[start : start + length], asked
        assert response.headers["Content-Range"] == f"bytes {start}-{start + length - 1}/{size}"
        assert response.headers["Content-Length"] == str(length)
    response, body = await fetched(edge, made, "HEAD", Range="bytes=0-9")
    assert (response.status, response.headers["Content-Length"], body) == (206, "10", b"")


async def test_range_outside_the_file_is_416(edge: Edge) -> None:
    made = await stored(edge)
    for asked in (f"bytes={len(DATA)}-", "bytes=99999-100000", "bytes=-0"):
        response, body = await fetched(edge, made, Range=asked)
        assert (response.status, orjson.loads(body)["error"]["code"]) == (416, "invalid_request"), asked
        assert response.headers["Content-Type"] == "application/json"
        assert response.headers["Content-Range"] == f"bytes */{len(DATA)}"
        assert "Content-Disposition" not in response.headers


async def test_what_is_not_one_range_of_these_bytes_is_answered_with_the_whole_file(edge: Edge) -> None:
    made = await stored(edge)
    for asked in ("bytes=5-2", "bytes=-", "bytes=0-1,3-4", "lines=0-1", "bytes=a-b"):
        response, body = await fetched(edge, made, Range=asked)
        assert (response.status, body) == (200, DATA), asked
    response, _ = await fetched(edge, made, Range="bytes=0-1", If_Range='"other"')
    assert response.status == 200
    response, _ = await fetched(edge, made, Range="bytes=0-1", If_Range=f'"{made.sha256}"')
    assert response.status == 206


async def test_client_that_has_the_file_is_told_so(edge: Edge) -> None:
    made = await stored(edge)
    for tags in (f'"{made.sha256}"', f'"x", W/"{made.sha256}"', "*"):
        response, body = await fetched(edge, made, If_None_Match=tags)
        assert (response.status, body) == (304, b""), tags
        assert response.headers["ETag"] == f'"{made.sha256}"'
    response, _ = await fetched(edge, made, If_None_Match='"x"')
    assert response.status == 200


@pytest.mark.parametrize(
    ("content_type", "shown", "sent"),
    [
        ("image/webp", "inline", "image/webp"),
        ("video/mp4", "inline", "video/mp4"),
        ("text/plain; charset=utf-8", "inline", "text/plain; charset=utf-8"),
        ("image/svg+xml", "attachment", "image/svg+xml"),
        ("text/html", "attachment", "text/html"),
        ("application/xml", "attachment", "application/xml"),
        ("text/javascript", "attachment", "text/javascript"),
        ("text/plainish", "attachment", "text/plainish"),
        ("application/octet-stream", "attachment", "application/octet-stream"),
        ("image/png\r\nX-Evil: 1", "attachment", "application/octet-stream"),
    ],
)
async def test_what_a_browser_could_run_is_an_attachment(
    edge: Edge, content_type: str, shown: str, sent: str
) -> None:
    made = await stored(edge, content_type=content_type, type=OutputType.FILE)
    response, _ = await fetched(edge, made)
    assert response.headers["Content-Type"] == sent
    assert response.headers["Content-Disposition"].startswith(f"{shown};")
    assert "sandbox" in response.headers["Content-Security-Policy"]
    assert "X-Evil" not in response.headers


async def test_file_name_cannot_break_out_of_its_header(edge: Edge) -> None:
    made = await stored(edge, name='a"\r\nX-Evil: 1; ä/b.png')
    response, _ = await fetched(edge, made)
    assert "X-Evil" not in response.headers
    said = response.headers["Content-Disposition"]
    assert 'filename="a_X-Evil_ 1_ _b.png"' in said
    assert "filename*=UTF-8''a%22%0D%0AX-Evil%3A%201%3B%20%C3%A4%2Fb.png" in said


async def test_anything_but_a_stored_output_is_404(edge: Edge) -> None:
    made = await stored(edge)
    task_id = made.key.partition("/")[0]
    others = [
        "nothing",
        f"{UNKNOWN}/1/2_0_picture.png",
        f"{task_id}/1/other.png",
        f"{task_id}",
        f"{task_id}/../{made.key}",
        f"{task_id}/1/..%2f1%2f2_0_picture.png",
        "..%2f..%2fcomfyd.db",
        "%2fetc%2fpasswd",
        ".unfinished/x",
    ]
    for key in others:
        async with edge.http.get(URL(f"{edge.base}/api/files/{key}", encoded=True)) as response:
            assert response.status == 404, key
            assert (await response.json())["error"]["code"] in {"file_not_found", "not_found"}


async def test_output_of_another_storage_or_without_its_file_is_404(edge: Edge) -> None:
    elsewhere = await stored(edge, storage="s3")
    response, body = await fetched(edge, elsewhere)
    assert (response.status, orjson.loads(body)["error"]["code"]) == (503, "storage_error")
    made = await stored(edge)
    await (await edge.state.storages.get("local")).delete(made.key)
    for method in ("GET", "HEAD"):
        response, _ = await fetched(edge, made, method)
        assert response.status == 404


async def test_file_that_a_running_task_has_stored_is_served_and_not_when_it_was_withdrawn(
    edge: Edge,
) -> None:
    _, task = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH})
    claim = await edge.claim(task["task_id"])
    key = f"mine/{task['task_id']}/1/2_0_picture.png"
    storage = await edge.state.storages.get("local")
    await storage.put(key, local_file(Path(edge.state.config.data.dir) / "sources", DATA))
    made = artefact(key=key, size_bytes=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
    edge.state.board.stored(task["task_id"], made)
    _, shown = await edge.call("GET", f"/api/tasks/{task['task_id']}")
    (output,) = shown["outputs"]
    async with edge.http.get(output["url"]) as response:
        assert (response.status, await response.read()) == (200, DATA)
    edge.state.board.withdrawn(task["task_id"])
    await storage.delete(key)
    async with edge.http.get(output["url"]) as response:
        assert response.status == 404
    await edge.succeed(claim)


class Slow:
    """A store whose row of a task comes late: when it is there, the task has ended."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.meanwhile: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state.store, name)

    async def get(self, task_id: str) -> Any:
        """See `Store`."""
        row = await self._state.store.get(task_id)
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            await meanwhile()
        return row


async def test_file_is_there_at_the_very_moment_at_which_its_task_ends(config: Config) -> None:
    slow: list[Slow] = []

    def with_slow_store(state: State) -> State:
        slow.append(Slow(state))
        return dataclasses.replace(state, store=cast("Store", slow[0]))

    async with serving(config, state=with_slow_store) as edge:
        _, task = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH})
        claim = await edge.claim(task["task_id"])
        key = f"{task['task_id']}/1/2_0_picture.png"
        storage = await edge.state.storages.get("local")
        await storage.put(key, local_file(Path(edge.state.config.data.dir) / "sources", DATA))
        made = artefact(key=key, size_bytes=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
        edge.state.board.stored(task["task_id"], made)
        slow[0].meanwhile = lambda: edge.succeed(claim, made)
        response, body = await fetched(edge, made)
        assert (response.status, body) == (200, DATA)


# signed urls

HOUR = 3600


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


def signing(config: Config, expires: float = HOUR) -> Config:
    """The same, but urls of files are good for an hour only."""
    storage = StorageConfig(local=LocalStorageConfig(url_expires=expires))
    return msgspec.structs.replace(config, storage=storage)


@pytest.fixture
async def signed_edge(config: Config, clock: HandClock) -> AsyncIterator[Edge]:
    """An API whose urls expire, by a clock that tests turn."""

    def by_hand(state: State) -> State:
        signer = Signer(key_of(config.url_key), HOUR * 1000, clock)
        return dataclasses.replace(state, links=Links(state.storages, signer))

    async with serving(signing(config), state=by_hand) as served:
        yield served


async def url_of(edge: Edge, made: Artefact) -> URL:
    """What the task says of where its output is."""
    task_id = made.key.split("/")[-3]
    _, task = await edge.call("GET", f"/api/tasks/{task_id}")
    (output,) = task["outputs"]
    return URL(output["url"], encoded=True)


async def refused(edge: Edge, url: URL, method: str = "GET") -> bool:
    """Whether this is answered with 403 and no byte of the file."""
    async with edge.http.request(method, url) as response:
        body = await response.read()
        if response.status != 403:
            return False
    assert DATA[:100] not in body
    return method == "HEAD" or orjson.loads(body)["error"]["code"] == "invalid_signature"


async def test_signed_url_gives_the_file_until_it_expires_and_the_task_a_new_one(
    signed_edge: Edge, clock: HandClock
) -> None:
    made = await stored(signed_edge)
    url = await url_of(signed_edge, made)
    assert set(url.query) == {"expires", "signature"}
    for method, body in (("GET", DATA), ("HEAD", b"")):
        async with signed_edge.http.request(method, url) as response:
            assert (response.status, await response.read()) == (200, body)
            assert response.headers["Content-Length"] == str(len(DATA))
    async with signed_edge.http.get(url, headers={"Range": "bytes=10-19"}) as response:
        assert (response.status, await response.read()) == (206, DATA[10:20])
    async with signed_edge.http.get(url, headers={"If-None-Match": f'"{made.sha256}"'}) as response:
        assert response.status == 304
    clock.advance(HOUR * 1000)
    assert await refused(signed_edge, url)
    assert await refused(signed_edge, url, "HEAD")
    fresh = await url_of(signed_edge, made)
    assert fresh != url
    async with signed_edge.http.get(fresh) as response:
        assert response.status == 200


async def test_url_that_was_changed_or_not_signed_is_403_before_anything_else_is_said(
    signed_edge: Edge,
) -> None:
    made, other = await stored(signed_edge), await stored(signed_edge)
    url = await url_of(signed_edge, made)
    query = dict(url.query)
    later = str(int(query["expires"]) + 1)
    wrong = [
        url.with_query(None),
        url.with_query(expires=query["expires"]),
        url.with_query(signature=query["signature"]),
        url.with_query(expires=later, signature=query["signature"]),
        url.with_query(expires=query["expires"], signature=query["signature"][::-1]),
        url.with_query(expires=query["expires"], signature=""),
        (await url_of(signed_edge, other)).with_query(query),
        url.with_path(url.path.replace("/1/", "/2/")).with_query(query),
        url.with_path(f"/api/files/{UNKNOWN}/1/a.png").with_query(query),
        url.with_path("/api/files/nothing"),
        URL(f"{url.with_query(None)}?expires=%ff&signature=%ff", encoded=True),
    ]
    for each in wrong:
        assert await refused(signed_edge, each), each
        assert await refused(signed_edge, each, "HEAD"), each
    async with signed_edge.http.get(url.with_query(None), headers={"If-None-Match": "*"}) as response:
        assert response.status == 403
    async with signed_edge.http.get(url) as response:
        assert response.status == 200


async def test_signature_is_for_the_file_and_not_for_what_a_browser_makes_of_its_path(
    signed_edge: Edge,
) -> None:
    made = await stored(signed_edge)
    url = str(await url_of(signed_edge, made))
    task_id = made.key.split("/")[-3]
    spelled = url.replace(task_id, f"%{ord(task_id[0]):02x}{task_id[1:]}")
    async with signed_edge.http.get(URL(spelled, encoded=True)) as response:
        assert (response.status, await response.read()) == (200, DATA)
    around = url.replace(f"{task_id}/1", f"{task_id}/x/%2e%2e/1")
    assert await refused(signed_edge, URL(around, encoded=True))


async def test_url_signed_by_one_process_is_good_for_the_next_one(config: Config) -> None:
    settings = signing(config)
    async with serving(settings) as edge:
        made = await stored(edge)
        url = await url_of(edge, made)
    assert stat.S_IMODE(config.url_key.stat().st_mode) == 0o600
    async with serving(settings) as edge:
        moved = url.with_host("127.0.0.1").with_port(URL(edge.base).port)
        async with edge.http.get(moved) as response:
            assert (response.status, await response.read()) == (200, DATA)
    await asyncio.to_thread(config.url_key.unlink)
    async with serving(settings) as edge:
        moved = url.with_host("127.0.0.1").with_port(URL(edge.base).port)
        assert await refused(edge, moved)  # whoever deletes the key makes all urls void


async def test_where_urls_do_not_expire_they_are_plain_and_old_signed_ones_still_work(
    config: Config,
) -> None:
    async with serving(signing(config)) as edge:
        made = await stored(edge)
        signed = await url_of(edge, made)
    async with serving(config) as edge:
        plain = await url_of(edge, made)
        assert plain.query_string == ""
        port = URL(edge.base).port
        for url in (plain, signed.with_port(port)):
            async with edge.http.get(url) as response:
                assert response.status == 200
        wrong = signed.with_port(port).with_query(expires="1", signature="0")
        assert await refused(edge, wrong)
