"""Stored outputs over HTTP: whole and in ranges, under safe headers, and nothing else of the disk."""

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from yarl import URL

from comfyd.tasks import Artefact, OutputType
from tests.api.conftest import Edge
from tests.support.values import GRAPH, artefact

DATA = bytes(range(256)) * 8
UNKNOWN = "5e1f6c1e-0000-4000-8000-00000000dead"


async def stored(edge: Edge, **facts: Any) -> Artefact:
    """A finished task's one output, with its file in the storage."""

    async def chunks() -> AsyncIterator[bytes]:
        yield DATA

    _, task = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH})
    key = f"{task['task_id']}/1/2_0_picture.png"
    await edge.state.storage.put(key, chunks(), "image/png")
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
        assert (response.status, body) == (416, b""), asked
        assert response.headers["Content-Range"] == f"bytes */{len(DATA)}"


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
    assert (await fetched(edge, elsewhere))[0].status == 404
    made = await stored(edge)
    await edge.state.storage.delete(made.key)
    response, _ = await fetched(edge, made)
    assert response.status == 404
