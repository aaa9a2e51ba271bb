"""What comes out of jobs, through the official SDK: every kind, whole and in part."""

import io
from pathlib import Path

import httpx
import pytest
from blake3 import blake3
from comfy_sdk import AsyncComfy, Comfy, ComfyError, NotFound, Output, Workflow
from PIL import Image

from tests.conformance import graphs
from tests.sdk.stage import async_finished, finished


@pytest.fixture
def output(client: Comfy) -> Output:
    """A picture of a job that succeeded."""
    (made,) = finished(client.submit(Workflow(graphs.picture(size=64)))).outputs
    return made


def kinds(outputs: list[Output]) -> list[tuple[str, str, str]]:
    return sorted((one.node_id, one.type, one.content_type.partition(";")[0]) for one in outputs)


def check(client: Comfy, outputs: list[Output]) -> None:
    """Size and hash that are told are those of the bytes, as the asset that the output is has them."""
    for one in outputs:
        data = one.to_bytes()
        asset = client.assets.get(one.id)
        assert len(data) == one.size_bytes > 0
        assert asset.hash == f"blake3:{blake3(data).hexdigest()}"
        assert (asset.id, asset.job_id) == (one.id, one.job_id)


def test_an_output_is_downloaded_whole_in_every_way(output: Output, tmp_path: Path) -> None:
    data = output.to_bytes()
    stream = io.BytesIO()
    assert output.to_stream(stream) == len(data) == output.size_bytes
    assert output.to_file(tmp_path / "out.png").read_bytes() == stream.getvalue() == data
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("PNG", (64, 64))


def test_an_output_is_downloaded_in_parts(output: Output, tmp_path: Path) -> None:
    data = output.to_bytes()
    last = len(data) - 1
    assert output.to_bytes(range=(0, 3)) == data[:4]
    assert output.to_bytes(range=(10, 10)) == data[10:11]
    assert output.to_bytes(range=(last, last)) == data[-1:]
    assert output.to_bytes(range=(5, last + 1_000)) == data[5:]
    assert output.to_bytes(range=(0, last)) == data
    assert output.to_file(tmp_path / "part", range=(4, 40)).read_bytes() == data[4:41]
    halves = io.BytesIO()
    assert output.to_stream(halves, range=(0, 99)) == 100
    output.to_stream(halves, range=(100, last))
    assert halves.getvalue() == data


def test_a_part_beyond_the_end_is_refused(output: Output) -> None:
    with pytest.raises(ComfyError) as caught:
        output.to_bytes(range=(output.size_bytes, output.size_bytes + 9))
    assert caught.value.http_status == 416


async def test_an_output_is_downloaded_asynchronously(async_client: AsyncComfy, tmp_path: Path) -> None:
    job = await async_finished(await async_client.submit(Workflow(graphs.picture())))
    (output,) = job.outputs
    data = await output.to_bytes()
    stream = io.BytesIO()
    assert await output.to_stream(stream) == len(data) == output.size_bytes
    assert (await output.to_file(tmp_path / "out.png")).read_bytes() == stream.getvalue() == data
    assert await output.to_bytes(range=(1, 3)) == b"PNG"
    url = (await output.get_download_url()).url
    async with httpx.AsyncClient() as http:
        assert (await http.get(url)).content == data


def test_the_url_of_an_output_gives_its_bytes(output: Output) -> None:
    found = output.get_download_url()
    answer = httpx.get(found.url)
    assert answer.status_code == 200
    assert answer.content == output.to_bytes()
    assert int(answer.headers["Content-Length"]) == output.size_bytes


def test_a_job_has_outputs_of_many_kinds(client: Comfy) -> None:
    job = finished(client.submit(Workflow(graphs.named("multi-output"))))
    assert kinds([one for one in job.outputs if one.node_id not in {"12", "13"}]) == [
        *[("10", "image", "image/png")] * 2,
        *[("11", "image", "image/png")] * 2,
        ("14", "text", "text/plain"),
        ("15", "latent", "application/octet-stream"),
    ]
    check(client, job.outputs)
    (text,) = job.get_outputs("14")
    assert text.to_bytes() == b"hello comfyd"
    assert job.get_outputs("99") == []


def test_films_and_animations_are_what_they_are(client: Comfy) -> None:
    job = finished(client.submit(Workflow(graphs.named("animated-and-video"))))
    assert kinds(job.outputs) == [
        ("10", "image", "image/webp"),
        ("11", "image", "image/png"),
        ("12", "video", "video/webm"),
        ("13", "video", "video/mp4"),
    ]
    check(client, job.outputs)
    assert job.get_outputs("13")[0].to_bytes(range=(4, 7)) == b"ftyp"


def test_sound_is_sound(client: Comfy) -> None:
    graph = {
        "1": graphs.node("EmptyAudio", duration=0.5, sample_rate=44_100, channels=2),
        "11": graphs.node("SaveAudio", audio=["1", 0], filename_prefix=graphs.prefix()),
        "12": graphs.node("SaveAudioMP3", audio=["1", 0], filename_prefix=graphs.prefix(), quality="128k"),
    }
    job = finished(client.submit(Workflow(graph)))
    assert kinds(job.outputs) == [("11", "audio", "audio/flac"), ("12", "audio", "audio/mpeg")]
    check(client, job.outputs)
    assert job.get_outputs("11")[0].to_bytes(range=(0, 3)) == b"fLaC"


def test_pictures_that_never_were_files_are_outputs_too(client: Comfy) -> None:
    job = finished(client.submit(Workflow(graphs.named("websocket-image"))))
    assert kinds(job.outputs) == [("9", "image", "image/png")] * 2
    check(client, job.outputs)


def test_outputs_of_a_node_are_in_order(client: Comfy) -> None:
    job = finished(client.submit(Workflow(graphs.named("batch-images"))))
    names = [one.name for one in job.get_outputs("9")]
    assert names == sorted(names)
    assert len({one.to_bytes() for one in job.outputs}) == len(names) == 4


def test_an_unknown_output_is_not_found(client: Comfy) -> None:
    with pytest.raises(NotFound):
        client.assets.get("5e1f6c1e-0000-4000-8000-00000000dead")
