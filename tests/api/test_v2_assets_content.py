"""Assets over HTTP once they are there: what is said of them, their bytes and ranges, and their end."""

import asyncio
import dataclasses
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import orjson
import pytest
from blake3 import blake3
from comfy_low.models import Asset
from yarl import URL

from comfyd.api.links import Links
from comfyd.api.state import State
from comfyd.config import Config, LocalStorageConfig, StorageConfig
from comfyd.signing import Signer, key_of
from comfyd.tasks import Artefact, OutputType
from tests.api.conftest import Edge, serving
from tests.api.test_v2_assets import (
    ASSETS,
    NAMED,
    OTHER,
    exists,
    hash_of,
    in_parts,
    on_disk,
    post,
    sdk_body,
    uploaded,
)
from tests.support.clock import HandClock
from tests.support.files import local_file, only
from tests.support.values import GRAPH, artefact
from tests.test_uploads import picture

DATA = bytes(range(256)) * 8
UNKNOWN = "5e1f6c1e-0000-4000-8000-00000000dead"
HOUR = 3600


async def kept(edge: Edge, **facts: Any) -> tuple[str, Artefact]:
    """A task that runs, and a file of its that is stored but not yet told of."""
    _, task = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH})
    key = f"{task['task_id']}/1/2_0_picture.png"
    storage = await edge.state.storages.get("local")
    await storage.put(key, local_file(Path(edge.state.config.data.dir) / "sources", DATA))
    known = {
        "key": key,
        "size_bytes": len(DATA),
        "sha256": hashlib.sha256(DATA).hexdigest(),
        "blake3": blake3(DATA).hexdigest(),
        "name": "picture.png",
    }
    return task["task_id"], artefact(**{**known, **facts})


async def output(edge: Edge, **facts: Any) -> Artefact:
    """The one output of a task that has ended."""
    task_id, made = await kept(edge, **facts)
    await edge.succeed(await edge.claim(task_id), made)
    return made


async def fetched(
    edge: Edge, asset_id: str | None, method: str = "GET", **headers: str
) -> tuple[aiohttp.ClientResponse, bytes]:
    """The content of an asset as it is answered, redirects not followed."""
    url = f"{edge.base}{ASSETS}/{asset_id}/content"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with edge.http.request(method, url, headers=named, allow_redirects=False) as response:
        return response, await response.read()


def code_of(body: bytes) -> str:
    code = orjson.loads(body)["error"]["code"]
    assert isinstance(code, str)
    return code


# what is said


async def test_an_asset_is_read_under_its_id_however_that_is_written(edge: Edge) -> None:
    made = await uploaded(edge)
    for asset_id in (made.id, made.id.upper()):
        status, answer = await edge.call("GET", f"{ASSETS}/{asset_id}")
        assert status == 200
        read = Asset.model_validate(answer)
        assert read.model_copy(update={"created_new": True}) == made


async def test_what_is_no_asset_is_not_found(edge: Edge) -> None:
    for asset_id in (UNKNOWN, "nothing", "%00", "%E2%82%AC", "0" * 3000):
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("HEAD", "/content")):
            url = URL(f"{edge.base}{ASSETS}/{asset_id}{path}", encoded=True)
            async with edge.http.request(method, url) as response:
                body = await response.read()
            assert response.status == 404, asset_id
            assert method == "HEAD" or code_of(body) == "not_found"


async def test_an_output_is_an_asset_as_long_as_its_job(edge: Edge) -> None:
    made = await output(edge)
    task_id = made.key.partition("/")[0]
    status, answer = await edge.call("GET", f"{ASSETS}/{made.id}")
    assert status == 200
    asset = Asset.model_validate(answer)
    assert (asset.id, asset.job_id, asset.file_path) == (made.id, task_id, "picture.png")
    assert (asset.hash, asset.size_bytes, asset.content_type) == (hash_of(DATA), len(DATA), "image/png")
    assert (asset.expires_at, asset.created_new) == (None, None)
    _, job = await edge.call("GET", f"/api/v2/jobs/{task_id}")
    (shown,) = job["outputs"]
    assert (shown["id"], shown["url"], shown["hash"]) == (made.id, str(asset.url), asset.hash)
    assert shown["url_expires_at"] == answer["url_expires_at"]
    assert answer["created_at"] == job["completed_at"]
    async with edge.http.get(str(asset.url)) as response:
        assert await response.read() == DATA
    await edge.call("DELETE", f"/api/tasks/{task_id}")
    assert (await edge.call("GET", f"{ASSETS}/{made.id}"))[0] == 404
    assert (await fetched(edge, made.id))[0].status == 404


async def test_an_output_is_an_asset_while_its_job_still_runs(edge: Edge) -> None:
    task_id, made = await kept(edge)
    await edge.claim(task_id)
    assert (await edge.call("GET", f"{ASSETS}/{made.id}"))[0] == 404
    edge.state.board.stored(task_id, made)
    status, answer = await edge.call("GET", f"{ASSETS}/{made.id}")
    assert (status, Asset.model_validate(answer).job_id) == (200, task_id)
    response, body = await fetched(edge, made.id)
    assert (response.status, body) == (200, DATA)


async def test_an_output_of_before_hashes_were_taken_has_none(edge: Edge) -> None:
    made = await output(edge, blake3=None)
    _, answer = await edge.call("GET", f"{ASSETS}/{made.id}")
    assert Asset.model_validate(answer).hash is None


# bytes

RANGES: dict[str, tuple[int, int] | None] = {
    "bytes=0-0": (0, 1),
    "bytes=0-3": (0, 4),
    "bytes=10-19": (10, 10),
    "bytes=2000-": (2000, 48),
    "bytes=2000-999999": (2000, 48),
    "bytes=-5": (2043, 5),
    "bytes=-999999": (0, 2048),
    f"bytes=0-{len(DATA) - 1}": (0, 2048),
    f"bytes={len(DATA)}-": None,
    "bytes=99999-100000": None,
    "bytes=-0": None,
}


@pytest.mark.parametrize("kind", ["upload", "output"])
async def test_ranges_are_answered_with_their_bytes_and_others_with_416(edge: Edge, kind: str) -> None:
    asset_id = (await uploaded(edge, DATA)).id if kind == "upload" else (await output(edge)).id
    for asked, span in RANGES.items():
        for method in ("GET", "HEAD"):
            response, body = await fetched(edge, asset_id, method, Range=asked)
            if span is None:
                assert response.status == 416, asked
                assert (code_of(body) if method == "GET" else body) in {"invalid_request", b""}
                assert response.headers["Content-Range"] == f"bytes */{len(DATA)}"
                continue
            start, length = span
            assert response.status == 206, asked
            assert body == (DATA[start : start + length] if method == "GET" else b""), asked
            assert response.headers["Content-Range"] == f"bytes {start}-{start + length - 1}/{len(DATA)}"
            assert response.headers["Content-Length"] == str(length)
    for asked in ("bytes=5-2", "bytes=-", "bytes=0-1,3-4", "lines=0-1", "bytes=a-b", ""):
        response, body = await fetched(edge, asset_id, Range=asked)
        assert (response.status, body) == (200, DATA), asked


async def test_the_whole_content_comes_with_headers_that_keep_browsers_safe(edge: Edge) -> None:
    asset = await uploaded(edge, DATA, file_path="input/a.bin", content_type="text/html")
    response, body = await fetched(edge, asset.id)
    assert (response.status, body) == (200, DATA)
    assert response.headers["Content-Length"] == str(len(DATA))
    assert response.headers["Accept-Ranges"] == "bytes"
    assert response.headers["ETag"] == f'"{blake3(DATA).hexdigest()}"'
    assert response.headers["Content-Type"] == "text/html"
    assert response.headers["Content-Disposition"].startswith('attachment; filename="a.bin"')
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in response.headers["Content-Security-Policy"]
    head, empty = await fetched(edge, asset.id, "HEAD")
    assert (head.status, empty) == (200, b"")
    assert head.headers["Content-Length"] == str(len(DATA))


async def test_a_client_that_has_the_bytes_is_told_so(edge: Edge) -> None:
    asset = await uploaded(edge, DATA)
    tag = f'"{blake3(DATA).hexdigest()}"'
    response, body = await fetched(edge, asset.id, If_None_Match=tag)
    assert (response.status, body) == (304, b"")
    assert (await fetched(edge, asset.id, Range="bytes=0-1", If_Range=tag))[0].status == 206
    assert (await fetched(edge, asset.id, Range="bytes=0-1", If_Range='"other"'))[0].status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_bytes_that_are_gone_are_not_found(edge: Edge, method: str) -> None:
    asset, made = await uploaded(edge), await output(edge)
    (file,) = edge.state.config.uploads.glob("*.png")
    await asyncio.to_thread(file.unlink)
    await (await edge.state.storages.get("local")).delete(made.key)
    for asset_id, code in ((asset.id, "not_found"), (made.id, "output_unavailable")):
        response, body = await fetched(edge, asset_id, method, Range="bytes=0-1")
        assert response.status == 404
        assert method == "HEAD" or code_of(body) == code


async def test_an_output_of_a_storage_that_is_not_there_is_no_broken_answer(edge: Edge) -> None:
    made = await output(edge, storage="s3")
    response, body = await fetched(edge, made.id)
    assert response.status == 503
    assert "error" in orjson.loads(body)


class Bucket:
    """A storage with urls of its own, of which nothing is ever read through comfyd."""

    name = "local"

    async def url(self, key: str, location: str | None) -> str:
        """See `Storage`."""
        assert location == "there"
        return f"https://bucket.example/{key}?X-Amz-Date=20300102T030405Z&X-Amz-Expires=600&X-Amz-Signature=x"


async def test_an_output_in_a_bucket_is_fetched_there(config: Config) -> None:
    def with_bucket(state: State) -> State:
        storages = only(Bucket())
        signer = Signer(key_of(config.url_key), 0, state.clock)
        return dataclasses.replace(state, storages=storages, links=Links(storages, signer))

    async with serving(config, state=with_bucket) as edge:
        _, task = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH})
        made = artefact(
            key=f"{task['task_id']}/1/2_0_a.png", location="there", blake3="0" * 64, type=OutputType.IMAGE
        )
        await edge.succeed(await edge.claim(task["task_id"]), made)
        _, answer = await edge.call("GET", f"{ASSETS}/{made.id}")
        assert answer["url"].startswith(f"https://bucket.example/{made.key}?")
        assert answer["url_expires_at"] == "2030-01-02T03:14:05.000Z"
        for method in ("GET", "HEAD"):
            response, body = await fetched(edge, made.id, method, Range="bytes=0-1")
            assert (response.status, body) == (302, b"")
            assert response.headers["Location"] == answer["url"]


# urls that expire


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def signed_edge(config: Config, clock: HandClock) -> AsyncIterator[Edge]:
    """An API whose urls expire, by a clock that tests turn."""
    local = StorageConfig(local=LocalStorageConfig(url_expires=HOUR))

    def by_hand(state: State) -> State:
        signer = Signer(key_of(config.url_key), HOUR * 1000, clock)
        return dataclasses.replace(state, links=Links(state.storages, signer))

    async with serving(msgspec.structs.replace(config, storage=local), state=by_hand) as served:
        yield served


async def test_the_url_of_an_upload_is_signed_where_urls_are(signed_edge: Edge, clock: HandClock) -> None:
    edge, asset = signed_edge, await uploaded(signed_edge, DATA)
    url = URL(str(asset.url), encoded=True)
    assert set(url.query) == {"expires", "signature"}
    assert asset.url_expires_at.timestamp() == int(url.query["expires"])
    async with edge.http.get(url) as response:
        assert (response.status, await response.read()) == (200, DATA)
    assert (await fetched(edge, asset.id))[0].status == 200  # how the SDKs ask
    other = URL(str((await uploaded(edge, OTHER)).url), encoded=True)
    query = dict(url.query)
    wrong = [
        url.with_query(expires=query["expires"]),
        url.with_query(signature=query["signature"]),
        url.with_query(expires=str(int(query["expires"]) + 1), signature=query["signature"]),
        other.with_query(query),
        URL(f"{edge.base}{ASSETS}/{UNKNOWN}/content").with_query(query),
    ]
    clock.advance(HOUR * 1000)
    for each in [*wrong, url]:
        async with edge.http.get(each) as response:
            assert (response.status, code_of(await response.read())) == (403, "forbidden"), each
    _, answer = await edge.call("GET", f"{ASSETS}/{asset.id}")
    async with edge.http.get(URL(answer["url"], encoded=True)) as response:
        assert response.status == 200


async def test_where_urls_do_not_expire_a_wrong_signature_is_refused_all_the_same(edge: Edge) -> None:
    asset = await uploaded(edge)
    async with edge.http.get(f"{asset.url}?expires=1&signature=0") as response:
        assert response.status == 403


# the end


async def test_an_asset_is_deleted_once(edge: Edge) -> None:
    asset = await uploaded(edge)
    async with edge.http.delete(f"{edge.base}{ASSETS}/{asset.id}") as response:
        assert (response.status, await response.read()) == (204, b"")
    status, answer = await edge.call("DELETE", f"{ASSETS}/{asset.id}")
    assert (status, answer["error"]["code"]) == (404, "not_found")
    assert (await edge.call("GET", f"{ASSETS}/{asset.id}"))[0] == 404
    assert (await fetched(edge, asset.id))[0].status == 404
    assert on_disk(edge.state.config) == []


async def test_bytes_stay_as_long_as_another_asset_has_them(edge: Edge) -> None:
    first, second = await uploaded(edge), await uploaded(edge)
    await edge.call("DELETE", f"{ASSETS}/{first.id}")
    response, body = await fetched(edge, second.id)
    assert (response.status, body) == (200, picture())
    assert await exists(edge, hash_of(picture())) == 200
    await edge.call("DELETE", f"{ASSETS}/{second.id}")
    assert on_disk(edge.state.config) == []


async def test_an_output_is_not_deleted_without_its_job(edge: Edge) -> None:
    made = await output(edge)
    status, answer = await edge.call("DELETE", f"{ASSETS}/{made.id}")
    assert (status, answer["error"]["code"]) == (409, "asset_in_use")
    assert (await fetched(edge, made.id))[0].status == 200


async def test_bytes_that_a_queued_job_needs_survive_their_asset(edge: Edge) -> None:
    asset = await uploaded(edge)
    reference = {"__type": "core/ASSET", "info": {"id": asset.id, "hash": asset.hash, "file_path": "x"}}
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": reference}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "t"}},
    }
    status, job = await edge.call("POST", "/api/v2/jobs", json={"workflow": graph})
    assert status == 201, job
    await edge.call("DELETE", f"{ASSETS}/{asset.id}")
    assert (await fetched(edge, asset.id))[0].status == 404
    assert len(on_disk(edge.state.config)) == 1
    await edge.call("POST", f"/api/v2/jobs/{job['id']}/cancel")
    assert (await edge.call("DELETE", f"/api/tasks/{job['id']}"))[0] == 204
    assert on_disk(edge.state.config) == []


async def test_a_download_that_began_ends_whole_though_the_asset_is_deleted(edge: Edge) -> None:
    data = DATA * 4000
    _, answer = await post(edge, in_parts(sdk_body(data, NAMED), 100_000))
    asset = Asset.model_validate(answer)
    async with edge.http.get(str(asset.url)) as response:
        first = await response.content.readexactly(1000)
        await edge.call("DELETE", f"{ASSETS}/{asset.id}")
        assert first + await response.read() == data
    assert on_disk(edge.state.config) == []
