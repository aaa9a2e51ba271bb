"""Files come whole or are said not to have come; inputs go out under safe names."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from comfyd.comfy import Backend, OutputStream, content_type
from comfyd.errors import (
    BackendRejected,
    BackendUnclear,
    BackendUnreachable,
    OutputUnavailable,
    StorageError,
)
from comfyd.simulator import Simulator
from comfyd.tasks import OutputFile, OutputType
from tests.comfy.stage import answering, backend_at, chunked, serving

DATA = bytes(range(256)) * 4096


def output(filename: str, subfolder: str = "", folder: str = "output") -> OutputFile:
    return OutputFile(
        node_id="9",
        index=0,
        kind="images",
        type=OutputType.FILE,
        filename=filename,
        subfolder=subfolder,
        folder=folder,
    )


def put(simulator: Simulator, name: str, data: bytes = DATA) -> None:
    path = simulator.folders.roots["output"] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


async def whole(stream: OutputStream) -> bytes:
    return b"".join([chunk async for chunk in stream.chunks])


@pytest.mark.parametrize("name", ["a.png", "sub/dir/b.webp", "über & 100%20 #1?+.png", "x", "active.html"])
async def test_a_file_comes_whole_whatever_its_name(
    simulator: Simulator, backend: Backend, name: str
) -> None:
    put(simulator, name)
    path = Path(name)
    subfolder = "" if path.parent == Path() else str(path.parent)
    async with backend.open_output(output(path.name, subfolder)) as stream:
        assert stream.size_bytes == len(DATA)
        assert await whole(stream) == DATA
        known = content_type(name)
        assert known in {stream.content_type, "application/octet-stream"}


async def test_an_empty_file_is_an_empty_file(simulator: Simulator, backend: Backend) -> None:
    put(simulator, "a.png", b"")
    async with backend.open_output(output("a.png")) as stream:
        assert (stream.size_bytes, await whole(stream)) == (0, b"")


@pytest.mark.parametrize(
    "file", [output("gone.png"), output("../a.png"), output("a.png", "../.."), output("a.png", "", "temp")]
)
async def test_a_file_that_is_not_served_is_unavailable(
    simulator: Simulator, backend: Backend, file: OutputFile
) -> None:
    put(simulator, "a.png")
    with pytest.raises(OutputUnavailable):
        async with backend.open_output(file):
            pass


async def test_a_server_error_is_unavailable(simulator: Simulator, backend: Backend) -> None:
    put(simulator, "a.png")
    simulator.faults.view = "error"
    with pytest.raises(OutputUnavailable, match="500"):
        async with backend.open_output(output("a.png")):
            pass


async def test_a_file_that_breaks_off_is_unavailable(simulator: Simulator, backend: Backend) -> None:
    put(simulator, "a.png")
    simulator.faults.view = "cut"
    async with backend.open_output(output("a.png")) as stream:
        assert stream.size_bytes == len(DATA)
        with pytest.raises(OutputUnavailable, match="broke off") as caught:
            await whole(stream)
    assert caught.value.details["announced"] == len(DATA)


async def test_a_file_that_stalls_is_unavailable(simulator: Simulator) -> None:
    put(simulator, "a.png")
    simulator.faults.view = "stall"
    async with (
        backend_at(simulator.url, timeout=0.3) as backend,
        backend.open_output(output("a.png")) as stream,
    ):
        with pytest.raises(OutputUnavailable):
            await asyncio.wait_for(whole(stream), 10)
    simulator.faults.view = "none"


async def test_a_file_half_read_does_not_spoil_the_next(simulator: Simulator, backend: Backend) -> None:
    put(simulator, "a.png")
    for _ in range(3):
        async with backend.open_output(output("a.png")) as stream:
            await anext(stream.chunks)
    async with backend.open_output(output("a.png")) as stream:
        assert await whole(stream) == DATA


async def test_an_error_of_the_consumer_comes_out_as_it_is(simulator: Simulator, backend: Backend) -> None:
    put(simulator, "a.png")

    async def copy() -> None:
        async with backend.open_output(output("a.png")) as stream:
            async for _chunk in stream.chunks:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        await copy()


async def test_a_file_of_unknown_length_is_taken_as_it_comes() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.headers["Accept-Encoding"] == "identity"
        response = web.StreamResponse(headers={"Content-Type": "model/x-odd"})
        await response.prepare(request)
        await response.write(b"abc")
        return response

    async with (
        serving({"GET /view": handler}) as url,
        backend_at(url) as backend,
        backend.open_output(output("a.odd")) as stream,
    ):
        assert (stream.size_bytes, stream.content_type) == (None, "model/x-odd")
        assert await whole(stream) == b"abc"


async def test_a_body_of_another_length_than_announced_is_unavailable() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        )
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        async with backend_at(f"http://{host}:{port}") as backend:
            with pytest.raises(BackendUnclear):
                async with backend.open_output(output("a.png")) as stream:
                    await whole(stream)


async def test_a_body_that_is_encoded_unasked_is_refused() -> None:
    async def handler(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"abc", headers={"Content-Encoding": "br"})

    async with serving({"GET /view": handler}) as url, backend_at(url) as backend:
        with pytest.raises(OutputUnavailable, match="encoded"):
            async with backend.open_output(output("a.png")):
                pass


# inputs


async def test_an_upload_is_stored_and_named(simulator: Simulator, backend: Backend) -> None:
    name = await backend.upload_input("abc.png", chunked(b"one", b"two"))
    assert name == "abc.png"
    assert (simulator.folders.roots["input"] / name).read_bytes() == b"onetwo"


async def test_an_upload_may_be_repeated_and_another_content_gets_another_name(backend: Backend) -> None:
    names = [await backend.upload_input("a.png", chunked(data)) for data in (b"x", b"x", b"y")]
    assert names == ["a.png", "a.png", "a (1).png"]


@pytest.mark.parametrize(
    "name", ["", "../a.png", "a/b.png", ".hidden", "ü.png", 'a".png', "a\r\nb", "x" * 300]
)
async def test_unsafe_names_are_refused(backend: Backend, name: str) -> None:
    with pytest.raises(ValueError, match="not a safe name"):
        await backend.upload_input(name, chunked(b"x"))


async def test_an_upload_that_is_too_large_is_rejected_for_good() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await request.read()
        return web.Response(status=413, text="too large")

    async with serving({"POST /upload/image": handler}) as url, backend_at(url) as backend:
        with pytest.raises(BackendRejected, match="max-upload-size"):
            await backend.upload_input("a.png", chunked(b"x"))


@pytest.mark.parametrize(
    ("body", "status"), [("", 500), (b"", 400), ([], 200), ({"name": 3}, 200), ({}, 200)]
)
async def test_an_upload_that_is_not_named_is_unclear(body: object, status: int) -> None:
    async with serving({"POST /upload/image": answering(body, status)}) as url, backend_at(url) as backend:
        with pytest.raises(BackendUnclear):
            await backend.upload_input("a.png", chunked(b"x"))


async def test_a_subfolder_is_part_of_the_name() -> None:
    body = {"name": "a.png", "subfolder": "s", "type": "input"}
    async with serving({"POST /upload/image": answering(body)}) as url, backend_at(url) as backend:
        assert await backend.upload_input("a.png", chunked(b"x")) == "s/a.png"


@pytest.mark.parametrize("error", [StorageError("gone"), OSError("gone")])
async def test_an_error_of_the_source_comes_out_as_it_is(error: Exception) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=await request.read())

    async def source() -> AsyncIterator[bytes]:
        yield b"one"
        raise error

    async with serving({"POST /upload/image": handler}) as url, backend_at(url) as backend:
        with pytest.raises(type(error), match="gone"):
            await backend.upload_input("a.png", source())


async def test_an_upload_to_nothing_is_unreachable(simulator: Simulator, backend: Backend) -> None:
    await simulator.crash()
    with pytest.raises(BackendUnreachable):
        await backend.upload_input("a.png", chunked(b"x"))


async def test_an_upload_that_is_cut_off_is_unclear() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with serving({"POST /upload/image": handler}) as url, backend_at(url) as backend:
        with pytest.raises(BackendUnclear):
            await backend.upload_input("a.png", chunked(b"x"))
