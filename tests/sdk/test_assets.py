"""Files that go in, through the official SDK: uploads, their second time, and graphs that name them."""

import asyncio
import io
import os
import struct
import uuid
from pathlib import Path

import httpx
import pytest
from blake3 import blake3
from comfy_low.errors import ApiError
from comfy_low.transport import ComfyLow
from comfy_sdk import (
    Asset,
    AsyncComfy,
    Comfy,
    ComfyError,
    HashMismatch,
    MissingAsset,
    NotFound,
    Output,
    Workflow,
)
from PIL import Image, ImageOps

from tests.conformance import graphs
from tests.sdk.stage import REAL_ONLY, Stage, async_finished, finished, new_client

SIZE = (24, 16)


def picture() -> bytes:
    """A picture that nobody has sent, of full colours alone: ComfyUI rounds what is in between."""
    stream = io.BytesIO()
    full = bytes(255 * (value & 1) for value in os.urandom(SIZE[0] * SIZE[1] * 3))
    Image.frombytes("RGB", SIZE, full).save(stream, "PNG")
    return stream.getvalue()


def inverting(image: object) -> Workflow:
    """A workflow that inverts a picture."""
    workflow = Workflow(
        {
            "1": graphs.node("LoadImage"),
            "2": graphs.node("ImageInvert", image=["1", 0]),
            "9": graphs.node("SaveImage", images=["2", 0], filename_prefix=graphs.prefix()),
        }
    )
    workflow.set_input("1", "image", image)
    return workflow


def pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB").tobytes()


def inverted(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return ImageOps.invert(image.convert("RGB")).tobytes()


def digest(data: bytes) -> str:
    return f"blake3:{blake3(data).hexdigest()}"


def content(asset: Asset) -> bytes:
    """Its bytes, from the url that the SDK gives."""
    answer = httpx.get(asset.get_download_url().url)
    assert answer.status_code == 200
    return answer.content


def test_bytes_are_uploaded_once(client: Comfy) -> None:
    data = picture()
    first = client.assets.from_bytes(data, filename="first.png")
    assert first.commit() == first.commit() == first.id
    assert (first.created_new, first.hash, first.job_id) == (True, digest(data), None)
    second = client.assets.from_bytes(data, filename="second.png")
    second.commit()
    assert (second.created_new, second.hash) == (False, first.hash)
    assert content(first) == content(second) == data


def test_the_server_knows_bytes_by_their_hash(stage: Stage, client: Comfy) -> None:
    data = picture()
    with ComfyLow(stage.comfyd.url) as low:
        assert not low.head_asset_by_hash(digest(data))
        with pytest.raises(ApiError) as caught:
            low.asset_from_hash(digest(data), file_path="x.png")
        assert (caught.value.http_status, caught.value.code) == (404, "blob_not_found")
        asset = client.assets.from_bytes(data, filename="x.png")
        asset.commit()
        assert low.head_asset_by_hash(digest(data))
        minted = low.asset_from_hash(digest(data), file_path="y.png")
        assert (minted.hash, minted.size_bytes) == (digest(data), len(data))
        sent_again = low.post_assets(io.BytesIO(data), "image/png", "z.png")
        assert (sent_again.created_new, sent_again.hash) == (False, digest(data))


def test_files_streams_and_urls_are_uploaded(client: Comfy, tmp_path: Path) -> None:
    data = picture()
    path = tmp_path / "from a file.png"
    path.write_bytes(data)
    from_file = client.assets.from_file(path)
    from_file.commit()
    assert (from_file.file_path, from_file.created_new) == ("from a file.png", True)
    other = picture()
    from_stream = client.assets.from_stream(io.BytesIO(other), filename="s.png", content_type="image/png")
    from_stream.commit()
    assert content(from_stream) == other
    from_url = client.assets.from_url(from_file.get_download_url().url)
    from_url.commit()
    assert (from_url.created_new, content(from_url)) == (False, data)


def test_an_asset_is_known_by_its_id(client: Comfy) -> None:
    data = picture()
    asset = client.assets.from_bytes(data, filename="known.png")
    asset_id = asset.commit()
    found = client.assets.get(asset_id)
    assert (found.id, found.hash, found.file_path) == (asset_id, digest(data), "known.png")
    assert found.commit() == asset_id
    assert content(found) == data


@pytest.mark.parametrize("size", [1, 65_536, 5_000_000])
def test_a_file_of_any_size_comes_back_whole(client: Comfy, size: int) -> None:
    data = os.urandom(size)
    asset = client.assets.from_bytes(data, filename="any.bin")
    asset.commit()
    assert asset.hash == digest(data)
    assert content(asset) == data


def test_a_file_that_changed_since_it_was_hashed_is_refused(client: Comfy, tmp_path: Path) -> None:
    path = tmp_path / "changing.png"
    path.write_bytes(picture())
    asset = client.assets.from_file(path)
    hashed = asset.hash
    path.write_bytes(picture())
    with pytest.raises(HashMismatch) as caught:
        asset.commit()
    assert (caught.value.http_status, asset.id) == (409, None)
    again = client.assets.from_file(path)
    again.commit()
    assert (again.created_new, again.hash == hashed) == (True, False)


def test_a_file_that_is_too_long_is_refused(narrow: Stage) -> None:
    with new_client(narrow.comfyd.url) as client:
        with pytest.raises(ComfyError) as caught:
            client.assets.from_bytes(os.urandom(150_000)).commit()
        assert (caught.value.http_status, caught.value.code) == (413, "payload_too_large")
        assert client.assets.from_bytes(os.urandom(50_000)).commit()


def test_an_empty_file_is_refused(client: Comfy) -> None:
    with pytest.raises(ComfyError, match="empty") as caught:
        client.assets.from_bytes(b"", filename="empty.png").commit()
    assert (caught.value.http_status, caught.value.code) == (422, "invalid_request")


@pytest.mark.parametrize("name", ["../up.png", "/etc/x.png", "a/../../b.png"])
def test_a_path_that_leads_elsewhere_is_refused(client: Comfy, name: str) -> None:
    with pytest.raises(ComfyError) as caught:
        client.assets.from_bytes(picture(), filename=name).commit()
    assert (caught.value.http_status, caught.value.code) == (422, "invalid_request")


@pytest.mark.parametrize("name", ["plain.png", "input/below.png", "with blank.png", "grüße-画.png", None])
def test_a_graph_reads_what_was_uploaded(client: Comfy, name: str | None) -> None:
    data = picture()
    asset = client.assets.from_bytes(data, filename=name, content_type="image/png")
    (output,) = finished(client.submit(inverting(asset))).outputs
    assert asset.id is not None  # it was uploaded on the way
    assert pixels(output.to_bytes()) == inverted(data)


def test_two_files_of_one_name_are_two_files(client: Comfy) -> None:
    many = [picture() for _ in range(3)]
    jobs = [client.submit(inverting(client.assets.from_bytes(data, filename="same.png"))) for data in many]
    for job, data in zip(jobs, many, strict=True):
        assert pixels(finished(job).outputs[0].to_bytes()) == inverted(data)


def test_a_graph_may_have_several_assets_and_one_of_them_twice(client: Comfy) -> None:
    first, second = picture(), picture()
    workflow = inverting(client.assets.from_bytes(first, filename="a.png"))
    other = client.assets.from_bytes(second, filename="a.png")
    for number in ("21", "22"):
        workflow.json[number] = graphs.node("LoadImage")
        workflow.set_input(number, "image", other)
        saver = graphs.node("SaveImage", images=[number, 0], filename_prefix=graphs.prefix())
        workflow.json[f"{number}9"] = saver
    job = finished(client.submit(workflow))
    assert pixels(job.get_outputs("9")[0].to_bytes()) == inverted(first)
    for node in ("219", "229"):
        assert pixels(job.get_outputs(node)[0].to_bytes()) == pixels(second)


def test_the_executed_graph_names_files_in_place_of_assets(client: Comfy) -> None:
    job = client.submit(inverting(client.assets.from_bytes(picture(), filename="named.png")))
    graph = job.get_workflow().graph
    assert isinstance(graph["1"]["inputs"]["image"], str)
    assert "core/ASSET" not in str(graph)
    assert finished(job).status == "succeeded"


def reference_to(client: Comfy, output: Output) -> object:
    return {"__type": "core/ASSET", "info": {"id": client.assets.get(output.id).id}}


def test_an_output_is_the_input_of_another_job(client: Comfy) -> None:
    data = picture()
    first = finished(client.submit(inverting(client.assets.from_bytes(data, filename="one.png"))))
    (output,) = first.outputs
    for image in (client.assets.get(output.id), reference_to(client, output)):
        second = finished(client.submit(inverting(image)))
        assert pixels(second.outputs[0].to_bytes()) == pixels(data)


@REAL_ONLY
def test_a_film_is_the_input_of_another_job(client: Comfy) -> None:
    film = finished(client.submit(Workflow(graphs.named("animated-and-video")))).get_outputs("13")[0]
    graph = {
        "1": graphs.node("LoadVideo", file=client.assets.get(film.id)),
        "2": graphs.node("GetVideoComponents", video=["1", 0]),
        "9": graphs.node("SaveImage", images=["2", 0], filename_prefix=graphs.prefix()),
    }
    frames = finished(client.submit(Workflow(graph))).outputs
    assert len(frames) == 12
    assert struct.unpack(">II", frames[0].to_bytes(range=(16, 23))) == (192, 128)


def test_a_deleted_asset_is_gone(client: Comfy) -> None:
    asset = client.assets.from_bytes(picture(), filename="gone.png")
    asset_id = asset.commit()
    asset.delete()
    assert asset.id is None
    for gone in (client.assets.get, client.assets.delete):
        with pytest.raises(NotFound) as caught:
            gone(asset_id)
        assert caught.value.http_status == 404
    with pytest.raises(MissingAsset):
        client.submit(inverting({"__type": "core/ASSET", "info": {"id": asset_id}}))
    with pytest.raises(NotFound):
        client.assets.delete(str(uuid.uuid4()))


def test_what_was_deleted_can_be_uploaded_again(client: Comfy) -> None:
    data = picture()
    first = client.assets.from_bytes(data, filename="again.png")
    first.commit()
    first.delete()
    second = client.assets.from_bytes(data, filename="again.png")
    (output,) = finished(client.submit(inverting(second))).outputs
    assert pixels(output.to_bytes()) == inverted(data)


def test_deleting_one_of_two_assets_leaves_the_other(client: Comfy) -> None:
    data = picture()
    first = client.assets.from_bytes(data, filename="one.png")
    second = client.assets.from_bytes(data, filename="two.png")
    assert first.commit() != second.commit()
    first.delete()
    assert content(second) == data
    (output,) = finished(client.submit(inverting(second))).outputs
    assert pixels(output.to_bytes()) == inverted(data)


def test_a_job_that_was_accepted_keeps_its_input(stage: Stage, client: Comfy) -> None:
    data = picture()
    asset = client.assets.from_bytes(data, filename="kept.png")
    before = client.submit(Workflow(stage.sketching()))
    job = client.submit(inverting(asset))
    asset.delete()
    assert pixels(finished(job).outputs[0].to_bytes()) == inverted(data)
    assert finished(before).status == "succeeded"


async def test_the_same_bytes_may_come_many_times_at_once(async_client: AsyncComfy) -> None:
    data = picture()
    assets = [async_client.assets.from_bytes(data, filename=f"{number}.png") for number in range(10)]
    ids = await asyncio.gather(*(asset.commit() for asset in assets))
    assert all(ids)
    assert {asset.hash for asset in assets} == {digest(data)}
    job = await async_client.submit(inverting(assets[-1]))
    (output,) = (await async_finished(job)).outputs
    assert pixels(await output.to_bytes()) == inverted(data)


async def test_assets_live_asynchronously_too(async_client: AsyncComfy, tmp_path: Path) -> None:
    data = picture()
    (tmp_path / "a.png").write_bytes(data)
    asset = async_client.assets.from_file(tmp_path / "a.png")
    asset_id = await asset.commit()
    found = await async_client.assets.get(asset_id)
    url = (await found.get_download_url()).url
    assert (await async_client.assets.from_url(url)).hash == digest(data)
    job = await async_finished(await async_client.submit(inverting(found)))
    assert pixels(await job.outputs[0].to_bytes()) == inverted(data)
    await found.delete()
    with pytest.raises(NotFound):
        await async_client.assets.delete(asset_id)
