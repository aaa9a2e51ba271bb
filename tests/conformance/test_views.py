"""GET /view: which file is served, with which headers, and what is refused."""

from __future__ import annotations

import io
import uuid
from typing import TYPE_CHECKING

import pytest
from PIL import Image

if TYPE_CHECKING:
    from tests.conformance.raw_client import Answer, Server
    from tests.support.comfyui import ComfyUIProcess

COLOR = (10, 20, 30, 40)


def write(process: ComfyUIProcess, name: str, content: bytes, folder: str = "") -> None:
    """Put a file into the server's output folder."""
    target = process.output_dir / folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


@pytest.fixture
def picture(process: ComfyUIProcess) -> str:
    """The name of a PNG with transparency in the output folder."""
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), COLOR).save(buffer, "PNG")
    name = f"{uuid.uuid4().hex}.png"
    write(process, name, buffer.getvalue())
    return name


async def view(server: Server, **parameters: str) -> Answer:
    """GET /view."""
    return await server.get("/view", params=parameters)


@pytest.mark.parametrize("prefix", ["", "/api"])
async def test_a_file_is_served_as_it_is(
    server: Server, process: ComfyUIProcess, picture: str, prefix: str
) -> None:
    answer = await server.get(f"{prefix}/view", params={"filename": picture})
    assert answer.status == 200
    assert answer.body == (process.output_dir / picture).read_bytes()
    assert answer.headers["Content-Type"] == "image/png"
    assert answer.headers["Content-Disposition"] == f'filename="{picture}"'
    assert answer.headers["Content-Length"] == str(len(answer.body))
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert "ETag" in answer.headers
    assert "Last-Modified" in answer.headers
    assert "Cache-Control" not in answer.headers
    assert answer.headers.get("X-Content-Type-Options") == ("nosniff" if server.facts.modern else None)


async def test_only_the_asked_range_is_served(server: Server, picture: str) -> None:
    whole = (await view(server, filename=picture)).body
    for asked, expected in (("bytes=0-9", whole[:10]), ("bytes=-5", whole[-5:]), ("bytes=20-", whole[20:])):
        answer = await server.get("/view", params={"filename": picture}, headers={"Range": asked})
        assert (answer.status, answer.body) == (206, expected)
        first = whole.index(expected)
        assert answer.headers["Content-Range"] == f"bytes {first}-{first + len(expected) - 1}/{len(whole)}"
    for impossible in (f"bytes={len(whole)}-", "nonsense"):
        answer = await server.get("/view", params={"filename": picture}, headers={"Range": impossible})
        assert (answer.status, answer.headers["Content-Range"]) == (416, f"bytes */{len(whole)}")


async def test_an_unchanged_file_is_not_sent_again(server: Server, picture: str) -> None:
    first = await view(server, filename=picture)
    for header, mark in (("If-None-Match", "ETag"), ("If-Modified-Since", "Last-Modified")):
        headers = {header: first.headers[mark]}
        again = await server.get("/view", params={"filename": picture}, headers=headers)
        assert (again.status, again.body) == (304, b"")


async def test_head_tells_the_size(server: Server, picture: str) -> None:
    whole = await view(server, filename=picture)
    head = await server.request("HEAD", "/view", params={"filename": picture})
    assert (head.status, head.body) == (200, b"")
    assert head.headers["Content-Length"] == str(len(whole.body))


async def test_the_folder_in_the_name_wins(server: Server, process: ComfyUIProcess, picture: str) -> None:
    other = f"{uuid.uuid4().hex}.png"
    (process.input_dir / other).write_bytes(b"input")
    assert (await view(server, filename=other)).status == 404
    assert (await view(server, filename=other, type="input")).body == b"input"
    assert (await view(server, filename=f"{other} [input]")).body == b"input"
    assert (await view(server, filename=f"{other} [input]", type="output")).body == b"input"
    assert (await view(server, filename=f"{picture} [output]", type="input")).status == 200
    assert (await view(server, filename=f"{other} [temp]", type="input")).status == 404
    assert (await view(server, filename=f"{other}[input]")).status == 404, "a character too many is cut off"


async def test_folders_in_the_name_are_ignored(server: Server, process: ComfyUIProcess, picture: str) -> None:
    folder = uuid.uuid4().hex
    write(process, picture, b"below", f"a/{folder}")
    assert (await view(server, filename=picture, subfolder=f"a/{folder}")).body == b"below"
    assert (await view(server, filename=f"a/{folder}/{picture}")).body != b"below"
    assert (await view(server, filename=picture, subfolder="no-such-folder")).status == 404


@pytest.mark.parametrize(
    ("parameters", "status"),
    [
        ({}, 404),
        ({"filename": ""}, 400),
        ({"filename": "/etc/passwd"}, 400),
        ({"filename": "../a.png"}, 400),
        ({"filename": "a..b.png"}, 400),
        ({"filename": "a.png", "type": "nope"}, 400),
        ({"filename": "a.png", "subfolder": "../.."}, 403),
        ({"filename": "a.png", "subfolder": "/etc"}, 403),
        ({"filename": "no-such-file.png"}, 404),
        ({"filename": "no-such-file.png", "type": "temp"}, 404),
    ],
    ids=str,
)
async def test_refusals_are_empty(server: Server, parameters: dict[str, str], status: int) -> None:
    answer = await view(server, **parameters)
    assert (answer.status, answer.body) == (status, b"")


@pytest.mark.parametrize(
    ("extension", "content_type"),
    [
        ("txt", "text/plain"),
        ("json", "application/json"),
        ("webp", "image/webp"),
        ("webm", "video/webm"),
        ("mp4", "video/mp4"),
        ("pdf", "application/pdf"),
        ("latent", "application/octet-stream"),
        ("nobody-knows", "application/octet-stream"),
    ],
)
async def test_the_type_comes_from_the_extension(
    server: Server, process: ComfyUIProcess, extension: str, content_type: str
) -> None:
    name = f"{uuid.uuid4().hex}.{extension}"
    write(process, name, b"{}")
    assert (await view(server, filename=name)).headers["Content-Type"] == content_type


@pytest.mark.parametrize(
    ("extension", "older"),
    [
        ("html", "application/octet-stream"),
        ("css", "application/octet-stream"),
        ("js", "application/javascript; charset=utf-8"),
        ("svg", "image/svg+xml"),
        ("xml", "application/xml"),
    ],
)
async def test_active_content_is_a_download_on_newer_servers(
    server: Server, process: ComfyUIProcess, extension: str, older: str
) -> None:
    name = f"{uuid.uuid4().hex}.{extension}"
    write(process, name, b"<a/>")
    headers = (await view(server, filename=name)).headers
    if server.facts.modern:
        assert headers["Content-Type"] == "application/octet-stream"
        assert headers["Content-Disposition"] == f'attachment; filename="{name}"'
        assert headers["Cache-Control"] == "no-store"
        assert headers["Vary"] == "Sec-Fetch-Dest"
    else:
        assert headers["Content-Type"] == older
        assert headers["Content-Disposition"] == f'filename="{name}"'


async def test_an_svg_for_an_image_tag_is_shown(server: Server, process: ComfyUIProcess) -> None:
    name = f"{uuid.uuid4().hex}.svg"
    write(process, name, b"<svg/>")
    headers = {"Sec-Fetch-Dest": "image"}
    answer = await server.get("/view", params={"filename": name}, headers=headers)
    assert answer.headers["Content-Type"] == "image/svg+xml"


@pytest.mark.parametrize(
    ("parameters", "content_type", "mode"),
    [
        ({"preview": "webp;50"}, "image/webp", "RGBA"),
        ({"preview": "jpeg"}, "image/jpeg", "RGB"),
        ({"preview": "jpeg;10"}, "image/jpeg", "RGB"),
        ({"preview": "png"}, "image/webp", "RGBA"),
        ({"preview": ""}, "image/webp", "RGBA"),
        ({"preview": "jpeg", "channel": "a"}, "image/webp", "RGBA"),
        ({"preview": "webp", "channel": "rgb"}, "image/webp", "RGB"),
        ({"channel": "rgb"}, "image/png", "RGB"),
        ({"channel": "a"}, "image/png", "RGBA"),
        ({"channel": "rgba"}, "image/png", "RGBA"),
        ({"channel": "nope"}, "image/png", "RGBA"),
    ],
    ids=str,
)
async def test_pictures_are_converted(
    server: Server, picture: str, parameters: dict[str, str], content_type: str, mode: str
) -> None:
    answer = await view(server, filename=picture, **parameters)
    assert (answer.status, answer.headers["Content-Type"]) == (200, content_type)
    assert answer.headers["Content-Disposition"] == f'filename="{picture}"'
    with Image.open(io.BytesIO(answer.body)) as image:
        assert (Image.MIME[str(image.format)], image.mode, image.size) == (content_type, mode, (8, 8))
        if parameters.get("channel") == "a" and "preview" not in parameters:
            assert image.getpixel((0, 0)) == (0, 0, 0, COLOR[3])


async def test_what_is_no_picture_cannot_be_converted(server: Server, process: ComfyUIProcess) -> None:
    name = f"{uuid.uuid4().hex}.txt"
    write(process, name, b"words")
    assert (await view(server, filename=name, preview="webp")).status == 500
    assert (await view(server, filename=name, channel="rgb")).status == 500
    assert (await view(server, filename=name, channel="rgba")).body == b"words"
