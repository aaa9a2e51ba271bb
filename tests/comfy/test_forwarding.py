"""Requests of others reach ComfyUI as they are, without what is ours or what makes it refuse them."""

import pytest
from aiohttp import web

from comfyd.comfy import Backend, ForwardedRequest, ForwardedResponse
from comfyd.errors import BackendUnclear, BackendUnreachable, MalformedRequest
from comfyd.simulator import Simulator
from tests.comfy.stage import backend_at, chunked, serving


async def whole(response: ForwardedResponse) -> bytes:
    return b"".join([chunk async for chunk in response.chunks])


class Echo:
    """Remembers the request and answers with its body."""

    def __init__(self) -> None:
        self.path = ""
        self.headers: dict[str, str] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.path = request.raw_path
        self.headers = {name.lower(): value for name, value in request.headers.items()}
        answer = {
            "X-Kept": "yes",
            "Set-Cookie": "a=b",
            "Access-Control-Allow-Origin": "*",
            "Connection": "keep-alive, X-Hop",
            "X-Hop": "no",
            "Location": "/elsewhere",
        }
        return web.Response(body=await request.read(), status=302, headers=answer)


async def test_a_request_goes_on_without_what_is_not_for_comfyui() -> None:
    echo = Echo()
    request = ForwardedRequest(
        method="POST",
        path="/userdata/a%2Fb.json",
        query="overwrite=true&x=%20+",
        headers=(
            ("Host", "comfyd.example"),
            ("Origin", "https://comfyd.example"),
            ("Sec-Fetch-Site", "cross-site"),
            ("Cookie", "a=b"),
            ("Authorization", "Bearer x"),
            ("X-API-Key", "x"),
            ("Connection", "close, X-Mine"),
            ("X-Mine", "x"),
            ("Transfer-Encoding", "chunked"),
            ("Content-Type", "text/x-odd"),
            ("Content-Length", "6"),
            ("Accept-Encoding", "gzip"),
            ("Range", "bytes=0-9"),
        ),
        body=chunked(b"abc", b"def"),
    )
    async with serving({"POST /userdata/{name}": echo.answer}) as url, backend_at(url) as backend:
        async with backend.forward(request) as response:
            headers = dict(response.headers)
            assert response.status == 302
            assert await whole(response) == b"abcdef"
        assert echo.headers.pop("host") == url.removeprefix("http://")
    assert echo.path == "/userdata/a%2Fb.json?overwrite=true&x=%20+"
    echo.headers.pop("user-agent")
    assert echo.headers == {
        "content-type": "text/x-odd",
        "content-length": "6",
        "accept-encoding": "gzip",
        "range": "bytes=0-9",
        "accept": "*/*",
    }
    assert headers["X-Kept"] == "yes"
    assert headers["Location"] == "/elsewhere"
    assert not {"Set-Cookie", "Access-Control-Allow-Origin", "Connection", "X-Hop", "Server", "Date"} & set(
        headers
    )


async def test_a_browsers_request_is_not_refused_by_either(backend: Backend, newer_backend: Backend) -> None:
    headers = (("Origin", "http://evil.example"), ("Sec-Fetch-Site", "cross-site"))
    for each in (backend, newer_backend):
        async with each.forward(
            ForwardedRequest(method="GET", path="api/queue", headers=headers)
        ) as response:
            assert response.status == 200
            assert b"queue_running" in await whole(response)


async def test_a_body_is_read_only_when_it_is_announced() -> None:
    echo = Echo()
    announcements: list[tuple[tuple[tuple[str, str], ...], bytes]] = [
        ((), b""),
        ((("Content-Length", "0"),), b""),
        ((("Transfer-Encoding", "chunked"),), b"abc"),
        ((("content-length", "3"),), b"abc"),
    ]
    async with serving({"POST /free": echo.answer}) as url, backend_at(url) as backend:
        for headers, body in announcements:
            request = ForwardedRequest(method="POST", path="free", headers=headers, body=chunked(b"abc"))
            async with backend.forward(request) as response:
                assert await whole(response) == body


async def test_a_head_is_answered_without_a_body() -> None:
    async def handler(_request: web.Request) -> web.StreamResponse:
        return web.Response(headers={"Content-Length": "10"})

    request = ForwardedRequest(method="HEAD", path="view", headers=(("Content-Length", "0"),))
    async with (
        serving({"HEAD /view": handler}) as url,
        backend_at(url) as backend,
        backend.forward(request) as response,
    ):
        assert (response.status, await whole(response)) == (200, b"")
        assert ("Content-Length", "10") in response.headers


async def test_a_range_is_answered_as_asked(simulator: Simulator, backend: Backend) -> None:
    (simulator.folders.roots["output"] / "a.txt").write_bytes(b"0123456789")
    request = ForwardedRequest(
        method="GET", path="view", query="filename=a.txt", headers=(("Range", "bytes=2-4"),)
    )
    async with backend.forward(request) as response:
        assert (response.status, await whole(response)) == (206, b"234")


@pytest.mark.parametrize(
    "request_",
    [
        ForwardedRequest(method="get", path="queue"),
        ForwardedRequest(method="GET\r\nX: y", path="queue"),
        ForwardedRequest(method="GET", path="../secret"),
        ForwardedRequest(method="GET", path="a/%2E%2e/b"),
        ForwardedRequest(method="GET", path="a/./b"),
        ForwardedRequest(method="GET", path="a b"),
        ForwardedRequest(method="GET", path="a\r\nX: y"),
        ForwardedRequest(method="GET", path="a?b"),
        ForwardedRequest(method="GET", path="a", query="b#c"),
        ForwardedRequest(method="GET", path="a", query="ü"),
    ],
)
async def test_what_could_mean_another_request_is_refused(
    backend: Backend, request_: ForwardedRequest
) -> None:
    with pytest.raises(MalformedRequest):
        async with backend.forward(request_):
            pass


async def test_a_path_cannot_name_another_server(backend: Backend) -> None:
    request = ForwardedRequest(method="GET", path="//evil.example/@x:80/queue")
    async with backend.forward(request) as response:
        assert response.status == 404


async def test_an_answer_that_breaks_off_is_unclear(simulator: Simulator, backend: Backend) -> None:
    (simulator.folders.roots["output"] / "a.txt").write_bytes(b"0123456789" * 100)
    simulator.faults.view = "cut"
    async with backend.forward(
        ForwardedRequest(method="GET", path="view", query="filename=a.txt")
    ) as response:
        with pytest.raises(BackendUnclear):
            await whole(response)


async def test_a_request_to_nothing_is_unreachable(simulator: Simulator, backend: Backend) -> None:
    await simulator.crash()
    with pytest.raises(BackendUnreachable):
        async with backend.forward(ForwardedRequest(method="GET", path="queue")):
            pass
