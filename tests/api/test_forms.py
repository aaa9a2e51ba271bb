"""Forms as they come: the same parts however the body is cut, and never half of one taken for a whole."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.api.forms import Form, Part, boundary_of
from comfyd.errors import MalformedRequest

LIMIT = 20
HEAD = b'Content-Disposition: form-data; name="file"; filename="a.png"'
TRICKY = b"--cut-\r\n--cu\r\n--cutter\r\r\n\r\n--\r\n-\r\n--cu"  # all but a boundary


def part(data: bytes, name: str, file_name: str | None = None) -> bytes:
    """A part from its boundary on; a file where it has a file name."""
    disposition = f'Content-Disposition: form-data; name="{name}"'
    if file_name is not None:
        disposition += f'; filename="{file_name}"'
    return b"--cut\r\n" + disposition.encode() + b"\r\n\r\n" + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--cut--\r\n"


async def pieces(body: bytes, *cuts: int) -> AsyncIterator[bytes]:
    for start, end in zip((0, *cuts), (*cuts, len(body)), strict=True):
        yield body[start:end]


async def in_parts(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


async def content(body: AsyncIterator[bytes]) -> list[tuple[str, str | None, bytes]]:
    """Every part: its field, its file name, its bytes."""
    read = Form(b"cut", body, LIMIT)
    return [
        (each.field, each.file_name, b"".join([piece async for piece in read.data()]))
        async for each in read.parts()
    ]


async def text_of(value: bytes, limit: int = 100) -> str:
    """The one field of a form, as text."""
    read = Form(b"cut", pieces(form(part(value, "words"))), LIMIT)
    async for each in read.parts():
        return await read.text(each, limit)
    raise AssertionError


async def test_a_form_is_the_same_wherever_it_is_cut_in_two() -> None:
    body = form(
        part(TRICKY, "a", "A"), part(b"", "b"), part(b"\r\n", "c", ""), part(TRICKY + b"\r\n", "d", "D")
    )
    whole = [("a", "A", TRICKY), ("b", None, b""), ("c", "", b"\r\n"), ("d", "D", TRICKY + b"\r\n")]
    for cut in range(len(body)):
        assert await content(pieces(body, cut)) == whole, cut
    assert await content(pieces(body, *range(1, len(body)))) == whole


async def test_a_form_cut_off_anywhere_is_malformed() -> None:
    body = form(part(TRICKY, "a", "A"), part(b"plain", "b"))
    for length in range(len(body) - 2):
        with pytest.raises(MalformedRequest):
            await content(pieces(body[:length]))


_SHREDS = st.sampled_from(
    [b"--cut", b"--", b"\r\n", b"\r\n\r\n", HEAD, b": ", b'"', b" ", b"\0\xff", b"file"]
)


@given(st.lists(_SHREDS, max_size=20).map(b"".join), st.integers(1, 30))
def test_any_bytes_are_a_form_or_a_malformed_one(body: bytes, size: int) -> None:
    with contextlib.suppress(MalformedRequest):
        asyncio.run(content(in_parts(b"--cut\r\n" + HEAD + body, size)))


async def test_there_are_only_so_many_parts() -> None:
    parts = [part(b"x", "f")] * LIMIT
    assert len(await content(pieces(form(*parts)))) == LIMIT
    with pytest.raises(MalformedRequest, match=f"more than {LIMIT} parts") as caught:
        await content(pieces(form(*parts, part(b"x", "f"))))
    assert caught.value.details == {"limit": LIMIT}


async def test_text_is_read_up_to_its_limit_and_in_one_encoding() -> None:
    assert await text_of("日本語".encode()) == "日本語"
    assert await text_of(b"") == ""
    assert await text_of(b"x" * 100) == "x" * 100
    with pytest.raises(MalformedRequest, match="the field 'words' of the form is longer than 100") as caught:
        await text_of(b"x" * 101)
    assert caught.value.details == {"field": "words", "limit": 100}
    with pytest.raises(MalformedRequest, match="is not UTF-8"):
        await text_of(b"\xff\xfe")


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [
        ('name="file"; filename="a"b.png"', Part(field="file", file_name='a"b.png')),
        ('name="file"; filename="a\\"b.png"', Part(field="file", file_name='a"b.png')),
        ('filename="a.png"; name="file"', Part(field="file", file_name="a.png")),
        ("name=file", Part(field="file", file_name=None)),
        ("name*=utf-8''file", Part(field="", file_name=None)),
        ("name=\"ä\"; filename*=UTF-8''%E2%82%AC.png", Part(field="ä", file_name="€.png")),
    ],
)
async def test_a_part_is_what_its_disposition_says(spelled: str, meant: Part) -> None:
    body = b"--cut\r\nContent-Disposition: form-data; " + spelled.encode() + b"\r\n\r\nx\r\n--cut--"
    read = Form(b"cut", pieces(body), LIMIT)
    found = [(each, [piece async for piece in read.data()]) async for each in read.parts()]
    assert found == [(meant, [b"x"])]


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=cut", b"cut"),
        ('Multipart/Form-Data; charset=utf-8; BOUNDARY="a b"', b"a b"),
        ("multipart/form-data", b""),
        ("multipart/mixed; boundary=cut", None),
        ("application/json", None),
        ("", None),
        (None, None),
    ],
)
def test_only_a_form_has_a_boundary(content_type: str | None, boundary: bytes | None) -> None:
    assert boundary_of(content_type) == boundary
