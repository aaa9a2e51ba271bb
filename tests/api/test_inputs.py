"""Uploads over HTTP: files in forms and bodies, however they are cut; what is malformed leaves nothing."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from comfyd.api.errors import status_of
from comfyd.api.inputs import FILES
from comfyd.config import Config, InputsConfig, LimitsConfig
from comfyd.errors import (
    BodyTooLarge,
    ComfydError,
    InputTooLarge,
    MalformedRequest,
    UnsupportedContent,
    UnsupportedMediaType,
)
from tests.api.conftest import Edge, serving, until
from tests.test_uploads import picture

PNG = picture()
OTHER = picture(5, 4)
FORM = {"Content-Type": "multipart/form-data; boundary=cut"}


def part(data: bytes, name: str = "photo.png", *, head: bytes | None = None) -> bytes:
    """A file in a form, from its boundary on."""
    disposition = f'Content-Disposition: form-data; name="file"; filename="{name}"'.encode()
    return b"--cut\r\n" + (disposition if head is None else head) + b"\r\n\r\n" + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--cut--\r\n"


def in_parts(body: bytes, size: int) -> AsyncIterator[bytes]:
    async def cut() -> AsyncIterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    return cut()


def files(config: Config) -> list[str]:
    """The uploads on the disk."""
    return sorted(path.name for path in config.uploads.iterdir() if path.is_file())


def unfinished(config: Config) -> list[Path]:
    return list((config.uploads / ".unfinished").iterdir())


async def post(edge: Edge, body: Any, headers: dict[str, str], query: str = "") -> tuple[int, Any]:
    return await edge.call("POST", f"/api/inputs{query}", data=body, headers=headers)


async def refused(edge: Edge, body: Any, headers: dict[str, str], kind: type[ComfydError]) -> Any:
    """The error, which must be of this class and leave nothing on the disk; its words and details."""
    status, answer = await post(edge, body, headers)
    assert (status, answer["error"]["code"]) == (status_of(kind), kind.code), answer
    assert (files(edge.state.config), unfinished(edge.state.config)) == ([], [])
    return answer["error"]


async def test_several_files_of_a_form_become_uploads_in_its_order(edge: Edge) -> None:
    made = aiohttp.FormData()
    made.add_field("image", PNG, filename="photo.png", content_type="text/plain")
    made.add_field("another", b"\0\1\2", filename="notes.xyz")
    made.add_field("image", OTHER, filename="photo.png", content_type="image/png")
    async with edge.http.post(f"{edge.base}/api/inputs", data=made) as response:
        assert response.status == 201
        answer = await response.json()
    first, second, third = answer["inputs"]
    assert first == {
        "reference": f"upload:{hashlib.sha256(PNG).hexdigest()}.png",
        "name": "photo.png",
        "content_type": "image/png",
        "kind": "image",
        "size_bytes": len(PNG),
        "sha256": hashlib.sha256(PNG).hexdigest(),
        "width": 3,
        "height": 2,
    }
    assert (second["name"], second["kind"], second["size_bytes"]) == ("notes.xyz", "file", 3)
    assert (third["width"], third["height"]) == (5, 4)
    found = await edge.state.uploads.find(first["reference"])
    assert edge.state.uploads.path(found.file).read_bytes() == PNG


async def test_the_same_content_twice_is_one_upload(edge: Edge) -> None:
    _, answer = await post(edge, form(part(PNG, "a.png"), part(PNG, "b.png")), FORM)
    _, again = await post(edge, PNG, {"Content-Type": "image/png"})
    views = [*answer["inputs"], *again["inputs"]]
    assert len({view["reference"] for view in views}) == 1
    assert [view["name"] for view in views] == ["a.png", "b.png", None]
    assert len(files(edge.state.config)) == 1


async def test_a_body_of_another_type_is_one_file(edge: Edge) -> None:
    for kind in ("image/png", "application/octet-stream", "application/json", "nonsense", ""):
        body = in_parts(PNG, 10) if kind else PNG
        status, answer = await post(edge, body, {"Content-Type": kind}, "?name=dir/photo.jpg")
        assert status == 201
        (view,) = answer["inputs"]
        assert (view["name"], view["content_type"], view["width"]) == ("photo.jpg", "image/png", 3)


NAMES = [
    ('filename="photo.png"', "photo.png"),
    ("filename=photo.png", "photo.png"),
    ('filename="a \\"quoted\\" one.png"', 'a "quoted" one.png'),
    ('filename="a;b=c.png"', "a;b=c.png"),
    ('filename="日本語 ä.png"', "日本語 ä.png"),
    ('filename="../../x.png"', "x.png"),
    ('filename="/etc/passwd"', "passwd"),
    ('filename="C:\\\\fakepath\\\\x.png"', "x.png"),
    ('filename="..\\\\..\\\\x.png"', "x.png"),
    ('filename=".."', None),
    ('filename="dir/"', None),
    ('filename=""', None),
    ('filename="a\u202eb\u0000\tc.png"', "abc.png"),
    (f'filename="{"x" * 300}.png"', f"{'x' * 96}.png"),
    ("filename*=UTF-8''%E2%82%AC.png", "€.png"),
    ("filename*=utf-8''a%2F..%2Fb.png", "b.png"),
    ("filename=plain.png; filename*=UTF-8''extended.png", "plain.png"),
    ('FileName="photo.png"', "photo.png"),
]


async def test_names_are_shown_and_never_followed(edge: Edge) -> None:
    for spelled, shown in NAMES:
        head = f'Content-Disposition: form-data; name="file"; {spelled}'.encode()
        status, answer = await post(edge, form(part(PNG, head=head)), FORM)
        assert status == 201, spelled
        assert answer["inputs"][0]["name"] == shown
    assert files(edge.state.config) == [f"{hashlib.sha256(PNG).hexdigest()}.png"]


HEAD = b'Content-Disposition: form-data; name="file"; filename="a.png"'
GOOD_FORMS = {
    "plain": (FORM["Content-Type"], form(part(PNG))),
    "without the last line break": (FORM["Content-Type"], form(part(PNG))[:-2]),
    "quoted boundary": ('multipart/form-data; boundary="cut"', form(part(PNG))),
    "boundary after a charset": ("multipart/form-data; charset=utf-8; boundary=cut", form(part(PNG))),
    "capitals": ("Multipart/Form-Data; BOUNDARY=cut", form(part(PNG))),
    "a line break before": (FORM["Content-Type"], b"\r\n" + form(part(PNG))),
    "an epilogue": (FORM["Content-Type"], form(part(PNG)) + b"that was all\r\n--cut\r\nreally"),
    "a file without a name": (FORM["Content-Type"], form(part(PNG, ""))),
    "other headers": (
        FORM["Content-Type"],
        form(
            part(
                PNG,
                head=b"Content-Type: text/html\r\nX-Other: y\r\nContent-Transfer-Encoding: binary\r\n" + HEAD,
            )
        ),
    ),
    "header names in capitals": (
        FORM["Content-Type"],
        form(part(PNG, head=HEAD.replace(b"Content-D", b"CONTENT-D"))),
    ),
    "a file not chosen beside one that was": (
        FORM["Content-Type"],
        form(part(b"", ""), part(PNG), part(b"", "")),
    ),
}


async def test_good_forms_are_read_however_they_are_cut(edge: Edge) -> None:
    for name, (kind, body) in GOOD_FORMS.items():
        for size in (100_000, 7):
            status, answer = await post(edge, in_parts(body, size), {"Content-Type": kind})
            assert status == 201, (name, answer)
            assert [view["sha256"] for view in answer["inputs"]] == [hashlib.sha256(PNG).hexdigest()], name


BAD_FORMS: dict[str, tuple[str, bytes]] = {
    "no boundary": ("multipart/form-data", form(part(PNG))),
    "an empty boundary": ("multipart/form-data; boundary=", form(part(PNG))),
    "an endless boundary": (f"multipart/form-data; boundary={'x' * 300}", form(part(PNG))),
    "another boundary": ("multipart/form-data; boundary=other", form(part(PNG))),
    "no body": (FORM["Content-Type"], b""),
    "no part": (FORM["Content-Type"], b"--cut--\r\n"),
    "no file chosen": (FORM["Content-Type"], form(part(b"", ""))),
    "not a form": (FORM["Content-Type"], PNG),
    "a preamble": (FORM["Content-Type"], b"This is a message.\r\n" + form(part(PNG))),
    "cut off in the data": (FORM["Content-Type"], part(PNG)[:-20]),
    "cut off before the last boundary": (FORM["Content-Type"], part(PNG)),
    "cut off in the last boundary": (FORM["Content-Type"], part(PNG) + b"--cut-"),
    "cut off in a header": (FORM["Content-Type"], b"--cut\r\n" + HEAD[:30]),
    "cut off after a whole file": (FORM["Content-Type"], part(OTHER) + part(PNG)[:-20]),
    "no headers": (FORM["Content-Type"], form(b"--cut\r\n\r\n" + PNG + b"\r\n")),
    "no disposition": (FORM["Content-Type"], form(part(PNG, head=b"Content-Type: image/png"))),
    "another disposition": (
        FORM["Content-Type"],
        form(part(PNG, head=HEAD.replace(b"form-data", b"attachment"))),
    ),
    "two dispositions": (FORM["Content-Type"], form(part(PNG, head=HEAD + b"\r\n" + HEAD))),
    "a field that is no file": (
        FORM["Content-Type"],
        form(part(b"x", head=HEAD.partition(b"; filename")[0])),
    ),
    "a file, then a field": (
        FORM["Content-Type"],
        form(part(PNG), part(b"x", head=b'Content-Disposition: form-data; name="overwrite"')),
    ),
    "an encoded part": (
        FORM["Content-Type"],
        form(part(PNG, head=HEAD + b"\r\nContent-Transfer-Encoding: base64")),
    ),
    "a long header": (FORM["Content-Type"], form(part(PNG, "x" * 5000))),
    "many headers": (FORM["Content-Type"], form(part(PNG, head=HEAD + b"\r\nX: y" * 50))),
    "many headers of one name each": (
        FORM["Content-Type"],
        form(part(PNG, head=HEAD + b"".join(b"\r\nX-%d: y" % number for number in range(50)))),
    ),
    "a header without a name": (FORM["Content-Type"], form(part(PNG, head=HEAD + b"\r\n: y"))),
    "a header with a bad name": (FORM["Content-Type"], form(part(PNG, head=HEAD + b'\r\nX"Y: y'))),
    "a bare line feed": (FORM["Content-Type"], form(part(PNG)).replace(b"\r\n", b"\n")),
    "too many files": (FORM["Content-Type"], form(*[part(b"x")] * (FILES + 1))),
}


async def test_malformed_forms_are_400_and_leave_nothing(edge: Edge) -> None:
    for kind, body in BAD_FORMS.values():
        for size in (100_000, 7):
            error = await refused(edge, in_parts(body, size), {"Content-Type": kind}, MalformedRequest)
            assert "\n" not in error["message"]
            assert len(error["message"]) < 250


async def test_as_many_files_as_are_allowed_are_taken(edge: Edge) -> None:
    parts = [part(b"%d" % number, f"{number}.bin") for number in range(FILES)]
    status, answer = await post(edge, form(*parts), FORM)
    assert status == 201
    assert [view["name"] for view in answer["inputs"]] == [f"{number}.bin" for number in range(FILES)]


async def test_a_plain_field_is_told_how_to_be_a_file(edge: Edge) -> None:
    made = aiohttp.FormData(default_to_multipart=True)
    made.add_field("image", "photo.png")
    error = await refused(edge, made, {}, MalformedRequest)
    assert error["details"] == {"field": "image"}
    assert "curl -F 'file=@photo.png'" in error["message"]


@pytest.mark.parametrize("kind", ["multipart/mixed; boundary=cut", "application/x-www-form-urlencoded"])
async def test_other_forms_are_415(edge: Edge, kind: str) -> None:
    error = await refused(edge, form(part(PNG)), {"Content-Type": kind}, UnsupportedMediaType)
    assert error["details"] == {"content_type": kind.partition(";")[0]}


async def test_empty_files_are_refused_with_their_name(edge: Edge) -> None:
    error = await refused(edge, b"", {"Content-Type": "image/png"}, UnsupportedContent)
    assert error["message"] == "the file is empty"
    error = await refused(edge, form(part(PNG), part(b"", "gone.png")), FORM, UnsupportedContent)
    assert error["message"] == "gone.png: the file is empty"
    assert error["details"] == {"name": "gone.png"}


async def test_files_and_bodies_over_their_limits_are_refused_announced_or_not(config: Config) -> None:
    small = msgspec.structs.replace(
        config,
        inputs=InputsConfig(max_bytes=2000, pixels=30),
        limits=LimitsConfig(upload_bytes=5000, body_bytes=100),
    )
    raw = {"Content-Type": "image/png"}
    async with serving(small) as edge:
        for size in (10_000, 500):
            for body in (PNG + bytes(3000), form(part(OTHER), part(PNG + bytes(2500)))):
                headers = FORM if body.startswith(b"--cut") else raw
                error = await refused(edge, in_parts(body, size), headers, InputTooLarge)
                assert error["details"]["limit"] == 2000
            body = form(*[part(bytes(1500))] * 4)
            error = await refused(edge, in_parts(body, size), FORM, BodyTooLarge)
            assert error["details"] == {"limit": 5000}
            assert "limits.upload_bytes" in error["message"]
        error = await refused(edge, form(*[part(bytes(1500))] * 4), FORM, BodyTooLarge)
        assert error["details"] == {"limit": 5000}
        error = await refused(edge, picture(6, 6), raw, InputTooLarge)
        assert (error["details"]["width"], error["details"]["height"]) == (6, 6)
        assert (await post(edge, form(part(PNG), part(OTHER)), FORM))[0] == 201


async def request_of(edge: Edge, head: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which the head of a request was sent."""
    host, _, port = edge.base.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST /api/inputs HTTP/1.1\r\nHost: {host}\r\n{head}\r\n\r\n".encode())
    return reader, writer


async def test_a_body_announced_too_large_is_refused_before_it_is_sent(edge: Edge) -> None:
    reader, writer = await request_of(edge, "Content-Type: image/png\r\nContent-Length: 1000000000000")
    async with asyncio.timeout(10):
        assert b" 413 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    "head", ["Content-Type: image/png", "Content-Type: multipart/form-data; boundary=cut"]
)
async def test_a_client_that_leaves_in_mid_body_leaves_nothing(edge: Edge, head: str) -> None:
    config = edge.state.config
    _, writer = await request_of(edge, f"{head}\r\nContent-Length: 10000000")
    writer.write(part(PNG) + part(bytes(300_000)))
    await until(lambda: len(unfinished(config)) == 1 + head.endswith("cut"))
    writer.transport.abort()
    await until(lambda: not unfinished(config))
    assert files(config) == []


async def test_expect_100_continue_is_answered(edge: Edge) -> None:
    head = f"Content-Type: image/png\r\nContent-Length: {len(PNG)}\r\nExpect: 100-continue"
    reader, writer = await request_of(edge, head)
    async with asyncio.timeout(10):
        assert b" 100 " in await reader.readline()
        await reader.readline()
        writer.write(PNG)
        assert b" 201 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


async def test_many_uploads_at_once_do_not_mix(edge: Edge) -> None:
    async def one(number: int) -> None:
        data = [bytes([number, index]) * 40_000 for index in range(3)]
        body = form(*(part(each, f"{number}.bin" if number else "") for each in data))
        status, answer = await post(edge, in_parts(body, 9000), FORM)
        assert status == 201
        assert [view["sha256"] for view in answer["inputs"]] == [
            hashlib.sha256(each).hexdigest() for each in data
        ]

    await asyncio.gather(*(one(number) for number in range(8)))
    assert len(files(edge.state.config)) == 24
