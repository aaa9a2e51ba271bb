"""Assets over HTTP: uploads as the SDK shapes them and in odd shapes; what is refused leaves nothing."""

import asyncio
import hashlib
import io
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import msgspec
from blake3 import blake3
from comfy_low import _multipart
from comfy_low.models import Asset
from yarl import URL

from comfyd.api.v2.asset_form import PARTS, TEXT
from comfyd.config import Config, InputsConfig, LimitsConfig
from tests.api.conftest import Edge, serving, until
from tests.test_uploads import picture

PNG = picture()
OTHER = picture(5, 4)
ASSETS = "/api/v2/assets"
FORM = {"Content-Type": "multipart/form-data; boundary=cut"}
NAMED = [("content_type", "image/png"), ("file_path", "photo.png")]


def hash_of(data: bytes) -> str:
    return f"blake3:{blake3(data).hexdigest()}"


def sdk_body(data: bytes, fields: list[tuple[str, str]], name: str = "photo.png") -> bytes:
    """A whole form as the Python SDK makes it."""
    pieces, length = _multipart.build_multipart(
        "cut",
        fields=fields,
        file_name=name,
        file_obj=io.BytesIO(data),
        file_content_type="image/png",
        file_size=len(data),
    )
    body = b"".join(pieces)
    assert len(body) == length
    return body


def part(name: str, value: bytes | str, file_name: str | None = None) -> bytes:
    """A part of a form, from its boundary on."""
    disposition = f'Content-Disposition: form-data; name="{name}"'
    if file_name is not None:
        disposition += f'; filename="{file_name}"'
    data = value.encode() if isinstance(value, str) else value
    return b"--cut\r\n" + disposition.encode() + b"\r\n\r\n" + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--cut--\r\n"


TEXTS = (part("content_type", "image/png"), part("file_path", "photo.png"))
FILE = part("file", PNG, "photo.png")


async def in_parts(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


def on_disk(config: Config) -> list[str]:
    """Every file below the folder of uploads."""
    return sorted(path.name for path in config.uploads.rglob("*") if path.is_file())


async def post(edge: Edge, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    return await edge.call("POST", ASSETS, data=body, headers=headers or FORM)


async def uploaded(edge: Edge, data: bytes = PNG, **fields: str) -> Asset:
    """An asset that was uploaded as the SDK does."""
    given = {"content_type": "image/png", "file_path": "photo.png", **fields}
    status, answer = await post(edge, sdk_body(data, list(given.items())))
    assert status in {200, 201}, answer
    return Asset.model_validate(answer)


async def exists(edge: Edge, word: str) -> int:
    """The status of asking for a hash, which has no body."""
    async with edge.http.head(URL(f"{edge.base}{ASSETS}/by-hash/{word}", encoded=True)) as response:
        assert await response.read() == b""
        return response.status


async def refused(edge: Edge, body: Any, headers: dict[str, str] | None = None) -> Any:
    """The error of a form that is wrong, of which nothing may be left."""
    status, answer = await post(edge, body, headers)
    assert (status, answer["error"]["code"]) == (422, "invalid_request"), answer
    assert on_disk(edge.state.config) == []
    assert await exists(edge, hash_of(PNG)) == 404
    message = answer["error"]["message"]
    assert message.isprintable()
    assert len(message) < 256
    return answer["error"]


async def test_an_upload_of_the_sdk_is_an_asset(edge: Edge) -> None:
    fields = [*NAMED, ("expected_hash", hash_of(PNG)), ("tags", "input"), ("tags", "mine")]
    headers = {**FORM, "Idempotency-Key": "11111111-2222-4333-8444-555555555555"}
    status, answer = await post(edge, sdk_body(PNG, fields), headers)
    assert status == 201
    asset = Asset.model_validate(answer)
    assert asset.created_new is True
    assert (asset.hash, asset.size_bytes, asset.content_type) == (hash_of(PNG), len(PNG), "image/png")
    assert (asset.file_path, asset.job_id) == ("photo.png", None)
    assert str(asset.url) == f"{edge.base}{ASSETS}/{asset.id}/content"
    assert asset.expires_at is not None
    kept = (asset.expires_at - asset.created_at).total_seconds()
    assert kept == edge.state.config.inputs.keep
    assert asset.url_expires_at == asset.expires_at
    assert on_disk(edge.state.config) == [f"{hashlib.sha256(PNG).hexdigest()}.png"]
    async with edge.http.get(str(asset.url)) as response:
        assert (response.status, await response.read()) == (200, PNG)


async def test_known_bytes_get_a_new_id_over_the_same_file(edge: Edge) -> None:
    first = await uploaded(edge)
    headers = {**FORM, "Idempotency-Key": "not unique"}
    status, answer = await post(edge, sdk_body(PNG, [NAMED[0], ("file_path", "other.png")]), headers)
    again = Asset.model_validate(answer)
    assert (status, again.created_new, again.file_path) == (200, False, "other.png")
    assert again.id != first.id
    assert again.hash == first.hash
    assert len(on_disk(edge.state.config)) == 1
    status, answer = await edge.call("GET", f"{ASSETS}/{first.id}")
    assert (status, answer["file_path"], "created_new" in answer) == (200, "photo.png", False)


async def test_forms_are_taken_in_any_order_and_however_they_are_cut(edge: Edge) -> None:
    forms = {
        "the file first": form(FILE, *TEXTS),
        "the file between": form(TEXTS[1], FILE, TEXTS[0]),
        "unknown fields": form(part("other", "x"), *TEXTS, part("", "y"), FILE, part("later", "z" * TEXT)),
        "tags on both sides": form(part("tags", "a"), *TEXTS, FILE, part("tags", "b")),
        "a file without a name": form(*TEXTS, part("file", PNG, "")),
        "a file that is none by its head": form(*TEXTS, part("file", PNG)),
        "text that is called a file": form(part("content_type", "image/png", "blob"), TEXTS[1], FILE),
        "an empty unknown field": form(part("other", ""), *TEXTS, FILE),
        "as many parts as may be": form(*TEXTS, *[part("tags", "x")] * (PARTS - 3), FILE),
        "the hash after the file": form(*TEXTS, FILE, part("expected_hash", hash_of(PNG))),
        "capitals in the hash": form(*TEXTS, part("expected_hash", hash_of(PNG).upper()), FILE),
    }
    for name, body in forms.items():
        for size in (100_000, 7):
            status, answer = await post(edge, in_parts(body, size))
            assert status in {200, 201}, (name, answer)
            asset = Asset.model_validate(answer)
            assert (asset.hash, asset.file_path) == (hash_of(PNG), "photo.png"), name
    assert len(on_disk(edge.state.config)) == 1


async def test_odd_names_come_back_as_they_were_given(edge: Edge) -> None:
    for name in ('a "quoted" one.png', "a;b=c.png", "日本語 ä.png", "input/sub/x.png"):
        # what the SDK calls the part is unescaped and may be anything; the path counts
        status, answer = await post(edge, sdk_body(PNG, [NAMED[0], ("file_path", name)], name))
        assert (status, answer.get("file_path")) in {(200, name), (201, name)}, answer
        async with edge.http.get(answer["url"]) as response:
            said = response.headers["Content-Disposition"]
            assert said.endswith(f"filename*=UTF-8''{quote(name.rpartition('/')[2], safe='')}")
    status, answer = await post(edge, sdk_body(PNG, NAMED, "a\nb.png"))
    assert (status, answer["file_path"]) == (200, "photo.png")


async def test_an_asset_is_kept_as_long_as_was_asked(edge: Edge) -> None:
    asset = await uploaded(edge, expires_in="3600")
    assert asset.expires_at is not None
    assert (asset.expires_at - asset.created_at).total_seconds() == 3600


async def test_the_content_says_what_it_is_and_the_client_only_where_it_does_not(edge: Edge) -> None:
    assert (await uploaded(edge, content_type="text/html")).content_type == "image/png"
    plain = await uploaded(edge, b"\0\1\2\3", content_type="application/x-mine", file_path="mine.bin")
    assert plain.content_type == "application/x-mine"


BAD_FORMS: dict[str, tuple[bytes, str | None]] = {
    "no content_type": (form(TEXTS[1], FILE), "content_type"),
    "no file_path": (form(TEXTS[0], FILE), "file_path"),
    "no file": (form(*TEXTS), "file"),
    "two files": (form(*TEXTS, FILE, FILE), "file"),
    "two files, one of another name": (form(*TEXTS, FILE, part("image", PNG, "b.png")), "image"),
    "two paths": (form(*TEXTS, TEXTS[1], FILE), "file_path"),
    "two hashes": (form(*TEXTS, *[part("expected_hash", hash_of(PNG))] * 2, FILE), "expected_hash"),
    "two types after the file": (form(FILE, *TEXTS, TEXTS[0]), "content_type"),
    "no media type": (form(part("content_type", ""), TEXTS[1], FILE), "content_type"),
    "a path upwards": (form(TEXTS[0], part("file_path", "../x.png"), FILE), "file_path"),
    "a path upwards after the file": (form(FILE, TEXTS[0], part("file_path", "../x.png")), "file_path"),
    "a model": (form(TEXTS[0], part("file_path", "models/loras/x.safetensors"), FILE), "file_path"),
    "a hash of another kind": (form(*TEXTS, part("expected_hash", "sha256:00"), FILE), "expected_hash"),
    "a time too short": (form(*TEXTS, part("expires_in", "59"), FILE), "expires_in"),
    "an empty file": (form(*TEXTS, part("file", b"", "photo.png")), None),
    "an empty file first": (form(part("file", b"", "photo.png"), *TEXTS), None),
    "a long field": (form(*TEXTS, part("tags", "x" * (TEXT + 1)), FILE), "tags"),
    "a long unknown field": (form(FILE, *TEXTS, part("other", "x" * (TEXT + 1))), "other"),
    "a field that is no text": (form(TEXTS[0], part("file_path", b"\xff\xfe.png"), FILE), "file_path"),
    "too many parts": (form(FILE, *TEXTS, *[part("tags", "x")] * (PARTS - 2)), None),
    "no parts": (b"--cut--\r\n", "content_type"),
    "no body": (b"", None),
    "no form": (PNG, None),
    "another boundary": (form(*TEXTS, FILE).replace(b"--cut", b"--put"), None),
    "cut off in the file": (form(*TEXTS, FILE)[:-40], None),
    "cut off after the file": (form(*TEXTS, FILE)[:-9], None),
    "cut off in the last boundary": (form(*TEXTS, FILE)[:-4], None),
    "a line break in the name": (sdk_body(PNG, NAMED, "a\r\nb.png"), None),
}


async def test_a_form_that_is_wrong_leaves_nothing(edge: Edge) -> None:
    for name, (body, field) in BAD_FORMS.items():
        for size in (100_000, 7):
            error = await refused(edge, in_parts(body, size))
            assert error["details"].get("field") == field, name


async def test_what_is_no_form_is_refused(edge: Edge) -> None:
    for kind in ("multipart/form-data", "multipart/mixed; boundary=cut", "application/json", "nonsense"):
        await refused(edge, form(*TEXTS, FILE), {"Content-Type": kind})
    await refused(edge, form(*TEXTS, FILE), {"Content-Type": ""})


async def test_other_bytes_than_announced_leave_nothing(edge: Edge) -> None:
    expected = part("expected_hash", hash_of(OTHER))
    for body in (sdk_body(PNG, [*NAMED, ("expected_hash", hash_of(OTHER))]), form(FILE, *TEXTS, expected)):
        status, answer = await post(edge, body)
        assert (status, answer["error"]["code"]) == (409, "hash_mismatch")
        assert on_disk(edge.state.config) == []
        assert await exists(edge, hash_of(PNG)) == 404
        assert await exists(edge, hash_of(OTHER)) == 404


async def test_a_mismatch_leaves_what_was_there_before(edge: Edge) -> None:
    asset = await uploaded(edge)
    status, _ = await post(edge, sdk_body(PNG, [*NAMED, ("expected_hash", hash_of(OTHER))]))
    assert status == 409
    async with edge.http.get(str(asset.url)) as response:
        assert (response.status, await response.read()) == (200, PNG)


async def test_uploads_over_their_limits_are_refused_announced_or_not(config: Config) -> None:
    small = msgspec.structs.replace(
        config, inputs=InputsConfig(max_bytes=2000, pixels=30), limits=LimitsConfig(upload_bytes=5000)
    )
    tag = part("tags", "x" * 1500)
    async with serving(small) as edge:
        for body in (form(*TEXTS, part("file", bytes(2001), "a")), form(*TEXTS, *[tag] * 4, FILE)):
            for sent in (body, in_parts(body, 500)):
                status, answer = await post(edge, sent)
                assert (status, answer["error"]["code"]) == (413, "payload_too_large")
                assert on_disk(small) == []
        status, answer = await post(edge, sdk_body(picture(6, 6), NAMED))
        assert (status, answer["error"]["code"]) == (413, "payload_too_large")
        assert (await post(edge, form(*TEXTS, part("file", bytes(2000), "a"))))[0] == 201


async def test_no_upload_is_taken_on_a_disk_without_room(config: Config) -> None:
    async with serving(config, measure=lambda _: 0) as edge:
        status, answer = await post(edge, sdk_body(PNG, NAMED))
        assert (status, answer["error"]["code"]) == (507, "insufficient_storage")
        assert on_disk(config) == []


async def test_an_upload_that_breaks_off_leaves_nothing(edge: Edge) -> None:
    config = edge.state.config
    host, _, port = edge.base.removeprefix("http://").partition(":")
    for head in ("Content-Length: 10000000", "Transfer-Encoding: chunked"):
        _, writer = await asyncio.open_connection(host, int(port))
        request = f"POST {ASSETS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {FORM['Content-Type']}\r\n{head}"
        body = form(*TEXTS, part("file", PNG + bytes(300_000), "a.png"))[:-100]
        if "chunked" in head:
            body = f"{len(body):x}\r\n".encode() + body + b"\r\n"
        writer.write(f"{request}\r\n\r\n".encode() + body)
        await until(lambda: len(on_disk(config)) == 1)
        writer.transport.abort()
        await until(lambda: on_disk(config) == [])
    assert await exists(edge, hash_of(PNG)) == 404


async def test_a_large_upload_is_never_in_memory(edge: Edge) -> None:
    block, count = bytes(range(256)) * 256, 512

    async def body() -> AsyncIterator[bytes]:
        yield form(*TEXTS)[: -len(b"--cut--\r\n")]
        yield b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n\r\n'
        for _ in range(count):
            yield block
        yield b"\r\n--cut--\r\n"

    tracemalloc.start()
    try:
        status, answer = await post(edge, body())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert status == 201
    assert answer["size_bytes"] == len(block) * count
    digest = blake3()
    for _ in range(count):
        digest.update(block)
    assert answer["hash"] == f"blake3:{digest.hexdigest()}"
    assert peak < 8_000_000 < answer["size_bytes"] / 4


async def test_many_uploads_of_the_same_bytes_are_one_file_and_one_of_them_was_first(edge: Edge) -> None:
    data = PNG + bytes(200_000)
    body = sdk_body(data, [*NAMED, ("expected_hash", hash_of(data))])
    answers = await asyncio.gather(*(post(edge, in_parts(body, 9000)) for _ in range(8)))
    assert sorted(status for status, _ in answers) == [200] * 7 + [201]
    assert {answer["created_new"] for status, answer in answers if status == 200} == {False}
    assert len({answer["id"] for _, answer in answers}) == 8
    assert len(on_disk(edge.state.config)) == 1
    for _, answer in answers:
        async with edge.http.get(answer["url"]) as response:
            assert await response.read() == data


# known bytes


async def mint(edge: Edge, **body: Any) -> tuple[int, Any]:
    return await edge.call("POST", f"{ASSETS}/from-hash", json=body)


async def test_an_asset_is_made_of_bytes_that_are_known_and_found_again_as_it_is(edge: Edge) -> None:
    first = await uploaded(edge)
    status, answer = await mint(edge, hash=first.hash, file_path="other.png", tags=["input"], later="x")
    other = Asset.model_validate(answer)
    assert (status, other.file_path, other.created_new) == (201, "other.png", False)
    assert other.id != first.id
    assert (other.hash, other.size_bytes, other.content_type) == (hash_of(PNG), len(PNG), "image/png")
    status, answer = await mint(edge, hash=hash_of(PNG).upper(), file_path="other.png")
    again = Asset.model_validate(answer)
    assert (status, again.id) == (200, other.id)
    status, answer = await mint(edge, hash=first.hash)
    assert (status, answer["id"]) == (200, other.id)
    async with edge.http.get(str(other.url)) as response:
        assert await response.read() == PNG


async def test_an_asset_that_is_used_again_is_kept_longer_and_never_shorter(edge: Edge) -> None:
    first = await uploaded(edge, expires_in="3600")
    for seconds, kept in ((7200, 7200), (60, 7200)):
        status, answer = await mint(edge, hash=first.hash, file_path="photo.png", expires_in=seconds)
        again = Asset.model_validate(answer)
        assert (status, again.id) == (200, first.id)
        assert again.expires_at is not None
        assert abs((again.expires_at - again.created_at).total_seconds() - kept) < 60


async def test_head_and_from_hash_always_say_the_same(edge: Edge) -> None:
    asset = await uploaded(edge)
    word = hash_of(PNG)
    for spelled in (word, word.replace(":", "%3A"), word.replace(":", "%3a"), word.upper()):
        assert await exists(edge, spelled) == 200
    assert (await mint(edge, hash=word))[0] == 200
    unknown = hash_of(b"unknown")
    assert await exists(edge, unknown) == 404
    status, answer = await mint(edge, hash=unknown, file_path="photo.png")
    assert (status, answer["error"]["code"]) == (404, "blob_not_found")
    await edge.call("DELETE", f"{ASSETS}/{asset.id}")
    assert await exists(edge, word) == 404
    assert (await mint(edge, hash=word))[0] == 404


async def test_bytes_whose_file_is_gone_are_not_known(edge: Edge) -> None:
    await uploaded(edge)
    (file,) = edge.state.config.uploads.glob("*.png")
    await asyncio.to_thread(file.unlink)
    assert await exists(edge, hash_of(PNG)) == 404
    assert (await mint(edge, hash=hash_of(PNG)))[0] == 404
    assert (await uploaded(edge)).hash == hash_of(PNG)
    assert await exists(edge, hash_of(PNG)) == 200


async def test_a_hash_that_is_none_is_not_there(edge: Edge) -> None:
    for word in ("nothing", "blake3:", "blake3:00", f"sha256:{'0' * 64}", "%00", "%ff", "a%20b", "0" * 5000):
        assert await exists(edge, word) == 404


WRONG: list[tuple[Any, str | None]] = [
    ({"hash": "blake3:00"}, "hash"),
    ({"hash": "0" * 64, "file_path": "photo.png"}, "hash"),
    ({"hash": hash_of(PNG), "file_path": "../photo.png"}, "file_path"),
    ({"hash": hash_of(PNG), "file_path": "models/x.safetensors"}, "file_path"),
    ({"hash": hash_of(PNG), "expires_in": 59}, "expires_in"),
    ({"hash": hash_of(PNG), "expires_in": "3600"}, None),
    ({"hash": hash_of(PNG), "tags": "input"}, None),
    ({"hash": 1}, None),
    ({"file_path": "photo.png"}, None),
    ({}, None),
    ([], None),
    ("", None),
]


async def test_a_request_for_known_bytes_that_is_wrong_is_refused(edge: Edge) -> None:
    await uploaded(edge)
    for body, field in WRONG:
        status, answer = await edge.call("POST", f"{ASSETS}/from-hash", json=body)
        assert (status, answer["error"]["code"]) == (422, "invalid_request"), body
        assert answer["error"]["details"].get("field") == field


async def test_a_request_for_known_bytes_that_is_no_json_is_malformed(edge: Edge) -> None:
    for body in (b"", b"{", b"\xff"):
        status, answer = await edge.call("POST", f"{ASSETS}/from-hash", data=body)
        assert (status, answer["error"]["code"]) == (400, "invalid_request")
