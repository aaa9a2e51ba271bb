"""Every way in and every way out, through the REST API, the real ComfyUI and a real S3 server.

Never believes comfyd's own reader of a file: pictures are opened with Pillow, sound and video with PyAV.
"""

import asyncio
import base64
import hashlib
import io
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
from PIL import Image

from tests.support import seaweed
from tests.support.comfyd import Client, ComfydProcess
from tests.support.comfyui import ComfyUIProcess
from tests.support.opened_files import (
    FPS,
    FRAMES,
    STILL,
    Color,
    decoded,
    encoded,
    film,
    halves,
    inverted,
    pictures,
    shows,
    tensors,
    wav,
)
from tests.support.seaweed import SeaweedServer
from tests.support.sources import Sources, data_uri, open_sources

pytestmark = pytest.mark.comfyui

GRAPHS: Final = Path(__file__).parent / "graphs"
PATIENCE: Final = 100.0
CANARY: Final = "canary-5f0c1d"
Graph = dict[str, Any]


class SoundingComfyUI(ComfyUIProcess):
    """ComfyUI with its audio nodes. They import torchaudio, and use it only where the rate has to change.

    It is not in the recipe, so an empty module of that name stands in its place.
    """

    def _environment(self) -> dict[str, str]:
        modules = self.folder / "modules"
        modules.mkdir(exist_ok=True)
        (modules / "torchaudio.py").touch()
        return {**super()._environment(), "PYTHONPATH": str(modules)}


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUIProcess]:
    with SoundingComfyUI("real") as process:
        yield process


@pytest.fixture(scope="module")
def s3() -> Iterator[SeaweedServer]:
    with seaweed.running() as server:
        yield server


@pytest.fixture(scope="module")
def comfyd(
    comfyui: ComfyUIProcess, s3: SeaweedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfydProcess]:
    settings = {
        "COMFYD__STORAGE__PROVIDER": "s3",
        "COMFYD__STORAGE__S3__ENDPOINT": s3.endpoint,
        "COMFYD__STORAGE__S3__BUCKET": s3.bucket,
        "COMFYD__STORAGE__S3__REGION": seaweed.REGION,
        "COMFYD__STORAGE__S3__ACCESS_KEY": seaweed.ACCESS_KEY,
        "COMFYD__STORAGE__S3__SECRET_KEY": seaweed.SECRET_KEY,
        "COMFYD__OUTBOUND__ALLOW": "127.0.0.1",
        "COMFYD__WORKFLOWS__DIR": str(GRAPHS),
    }
    with ComfydProcess(tmp_path_factory.mktemp("comfyd"), comfyui.url, **settings) as process:
        yield process


@pytest.fixture
async def site() -> AsyncIterator[Sources]:
    """Somebody's web server."""
    async with open_sources() as sources:
        yield sources


@pytest.fixture
async def client(comfyd: ComfydProcess) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(session, comfyd.url)


@pytest.fixture
async def direct(comfyui: ComfyUIProcess) -> AsyncIterator[Client]:
    """ComfyUI itself, for looking at what comfyd did there."""
    async with aiohttp.ClientSession() as session:
        yield Client(session, comfyui.url)


Traces = Callable[[], Awaitable[object]]


@pytest.fixture
def traces(direct: Client, comfyui: ComfyUIProcess, comfyd: ComfydProcess) -> Traces:
    """What there is of anybody's prompts and files: ComfyUI's queue, history and inputs, comfyd's rests."""

    async def look() -> object:
        return await known_prompts(direct), inputs_of(comfyui), rests(comfyd)

    return look


@pytest.fixture(params=["s3", "local"])
def storage(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- what goes in -------------------------------------------------------------------------------------------


def graph(name: str, **inputs: Any) -> Graph:
    """One of the shared graphs, with inputs changed: `n1__image=value`."""
    loaded = json.loads((GRAPHS / f"{name}.json").read_text())
    for address, value in inputs.items():
        node, _, field = address.partition("__")
        loaded[node.removeprefix("n")]["inputs"][field] = value
    assert isinstance(loaded, dict)
    return loaded


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


async def upload(client: Client, data: bytes, name: str) -> dict[str, Any]:
    """The view of a file that was taken."""
    form = aiohttp.FormData(quote_fields=False)
    form.add_field("file", data, filename=name)
    status, body = await client.call("POST", "/api/inputs", data=form)
    assert status == 201, body
    (view,) = body["inputs"]
    assert isinstance(view, dict)
    assert (view["sha256"], view["size_bytes"]) == (sha256(data), len(data))
    return view


# --- what comes out -----------------------------------------------------------------------------------------


class Got:
    """A completed task and the bytes of its outputs, fetched from their urls without any credentials."""

    def __init__(self, task: dict[str, Any], bodies: list[bytes]) -> None:
        self.task = task
        self.outputs: list[dict[str, Any]] = task["outputs"]
        self.bodies = bodies

    def of(self, node_id: str) -> tuple[dict[str, Any], bytes]:
        """The only output of this node."""
        (found,) = [
            (output, body)
            for output, body in zip(self.outputs, self.bodies, strict=True)
            if output["node_id"] == node_id
        ]
        return found


async def done(client: Client, direct: Client, workflow: Graph, **facts: Any) -> Got:
    """Run it: completed in one attempt, of which ComfyUI knows; every url gives what the task says of it."""
    task = await client.submit(workflow, **facts)
    ended = await client.ended(task["task_id"], PATIENCE)
    assert ended["status"] == "COMPLETED", ended["error"]
    (attempt,) = ended["attempts"]
    _, history = await direct.call("GET", f"/history/{attempt['id']}")
    assert list(history) == [attempt["id"]]
    wanted = facts.get("output", {}).get("storage", "s3")
    return Got(ended, [await fetched(output, wanted) for output in ended["outputs"]])


async def fetched(output: dict[str, Any], storage: str) -> bytes:
    """The bytes behind the url, as anybody gets them."""
    assert output["storage"] == storage
    assert ("X-Amz-Signature" in output["url"]) == (storage == "s3")
    async with aiohttp.ClientSession() as session, session.get(output["url"]) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.headers["Content-Type"] == output["content_type"]
        data = await answer.read()
    assert (len(data), sha256(data)) == (output["size_bytes"], output["sha256"])
    return data


async def known_prompts(direct: Client) -> set[str]:
    """All that ComfyUI ran or will run."""
    _, queue = await direct.call("GET", "/queue")
    _, history = await direct.call("GET", "/history", params={"max_items": "1000"})
    return {item[1] for part in queue.values() for item in part} | set(history)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- pictures in --------------------------------------------------------------------------------------------


async def test_a_picture_by_url_is_the_one_that_comfyui_works_on(
    client: Client, direct: Client, site: Sources, storage: str
) -> None:
    left, right = ((200, 30, 40), (10, 90, 250)) if storage == "s3" else ((1, 130, 20), (90, 9, 80))
    url = site.file("/photo", halves(left, right))
    got = await done(client, direct, graph("image-to-image", n1__image=url), output={"storage": storage})
    output, data = got.of("9")
    shows(data, inverted(left), inverted(right))
    assert (output["width"], output["height"], output["content_type"]) == (384, 256, "image/png")
    assert site.asked == ["/photo"]


async def test_a_picture_behind_redirects(client: Client, direct: Client, site: Sources) -> None:
    left, right = (20, 200, 60), (240, 240, 10)
    site.file("/shelf/photo.png", halves(left, right))
    url = site.redirect("/link", site.redirect("/short", "shelf/photo.png"))
    got = await done(client, direct, graph("image-to-image", n1__image=url))
    shows(got.of("9")[1], inverted(left), inverted(right))
    assert site.asked == ["/link", "/short", "/shelf/photo.png"]


async def test_a_picture_as_data_uri(client: Client, direct: Client) -> None:
    left, right = (5, 6, 77), (130, 20, 130)
    given = {"1.image": data_uri(halves(left, right))}
    got = await done(client, direct, graph("image-to-image"), inputs=given)
    shows(got.of("9")[1], inverted(left), inverted(right))
    assert got.task["inputs"]["1.image"].startswith("upload:")  # and not kilobytes in every answer


async def test_an_uploaded_picture(client: Client, direct: Client) -> None:
    left, right = (255, 128, 0), (0, 64, 32)
    view = await upload(client, halves(left, right), "../träume/foto.exe")
    assert (view["name"], view["content_type"], view["kind"]) == ("foto.exe", "image/png", "image")
    assert (view["width"], view["height"]) == (96, 64)
    got = await done(client, direct, graph("image-to-image", n1__image=view["reference"]))
    shows(got.of("9")[1], inverted(left), inverted(right))


async def test_every_kind_of_picture_is_known_by_its_content(
    client: Client, direct: Client, site: Sources
) -> None:
    """All at once, served as something else; the first one twice in the graph, and fetched once."""
    workflow: Graph = {}
    expected: dict[str, tuple[Color, Color]] = {}
    kinds = ["png", *STILL]
    for number, kind in enumerate(kinds):
        left, right = (250 - 20 * number, 10, 20 * number), (10 * number, 200, 30)
        if number == 0:
            left, right = (230, 10, 20), (10, 200, 30)
        url = site.file(f"/{kind}.html", halves(left, right, STILL[kind]), "text/html")
        workflow[f"1{number}"] = node("LoadImage", image=url)
        workflow[f"5{number}"] = node("SaveImage", images=[f"1{number}", 0], filename_prefix=kind)
        expected[f"5{number}"] = (left, right)
    got = await done(client, direct, workflow)
    for node_id, (left, right) in expected.items():
        shows(got.of(node_id)[1], left, right, slack=16)  # they lose something, a GIF most
    assert sorted(site.asked) == sorted(f"/{kind}.html" for kind in STILL)


@pytest.mark.parametrize("way", ["url", "upload"])
async def test_a_mask_is_the_picture_s_transparency(
    client: Client, direct: Client, site: Sources, way: str
) -> None:
    picture = Image.new("RGBA", (96, 64), (200, 100, 50, 255))
    holes = (0, 0, 48, 64) if way == "url" else (48, 0, 96, 64)
    picture.paste((200, 100, 50, 0), holes)
    data = encoded(picture)
    source = (
        site.file("/mask", data) if way == "url" else (await upload(client, data, "mask.png"))["reference"]
    )
    workflow = {
        "1": node("LoadImageMask", image=source, channel="alpha"),
        "2": node("LoadImage", image=source),
        "3": node("LoadImageMask", image=source, channel="red"),
        **{
            f"{number}0": node("MaskToImage", mask=[str(number), 1 if number == 2 else 0])
            for number in (1, 2, 3)
        },
        **{
            f"{number}1": node("SaveImage", images=[f"{number}0", 0], filename_prefix="m")
            for number in (1, 2, 3)
        },
    }
    got = await done(client, direct, workflow)
    white, black = (255, 255, 255), (0, 0, 0)
    shown = (white, black) if way == "url" else (black, white)
    shows(got.of("11")[1], *shown)
    shows(got.of("21")[1], *shown)
    shows(got.of("31")[1], (200, 200, 200), (200, 200, 200))


async def test_a_template_takes_a_url(client: Client, site: Sources) -> None:
    left, right = (60, 61, 62), (201, 3, 160)
    inputs = {"image": site.file("/photo", halves(left, right, "WEBP"))}
    status, task = await client.call("POST", "/api/workflows/image-to-image/run", json=inputs)
    assert status == 202, task
    ended = await client.ended(task["task_id"], PATIENCE)
    (output,) = ended["outputs"]
    shows(await fetched(output, "s3"), inverted(left), inverted(right), slack=8)
    assert ended["inputs"]["image"] == inputs["image"]


# --- sound, video and others in -----------------------------------------------------------------------------


async def test_an_uploaded_sound_comes_back_in_every_format(
    client: Client, direct: Client, storage: str
) -> None:
    seconds = 1.25 if storage == "s3" else 0.75
    view = await upload(client, wav(seconds), "voice")
    assert (view["kind"], view["content_type"]) == ("audio", "audio/wav")
    got = await done(client, direct, sounds(view["reference"]), output={"storage": storage})
    types = {"11": ("audio/flac", "f_00001_.flac"), "12": ("audio/mpeg", "m_00001_.mp3")}
    types["13"] = ("audio/ogg", "o_00001_.opus")
    for node_id, told in types.items():
        output, data = got.of(node_id)
        assert (output["type"], output["content_type"], output["name"]) == ("audio", *told)
        assert output["duration"] == pytest.approx(seconds, abs=0.06)
        assert decoded(data).seconds == pytest.approx(seconds, abs=0.06)
    assert decoded(got.of("11")[1]).sound == decoded(wav(seconds)).sound
    output, data = got.of("14")
    assert (output["content_type"], output["width"], output["height"]) == ("video/mp4", 32, 32)
    assert output["duration"] == pytest.approx(1.0, abs=0.25)


def sounds(source: str) -> Graph:
    return {
        "1": node("LoadAudio", audio=source),
        "11": node("SaveAudio", audio=["1", 0], filename_prefix="f"),
        "12": node("SaveAudioMP3", audio=["1", 0], filename_prefix="m", quality="128k"),
        "13": node("SaveAudioOpus", audio=["1", 0], filename_prefix="o", quality="64k"),
        "20": node("EmptyImage", width=32, height=32, batch_size=4, color=99),
        "21": node("CreateVideo", images=["20", 0], audio=["1", 0], fps=4.0),
        "14": node("SaveVideo", video=["21", 0], filename_prefix="v", format="mp4", codec="h264"),
        "90": node("PrimitiveString", value=CANARY),
    }


async def test_a_video_by_url_is_taken_apart(
    client: Client, direct: Client, site: Sources, tmp_path: Path
) -> None:
    color = (30, 160, 220)
    source = site.file("/film", film(tmp_path / "film.mp4", color, 0.9))
    workflow = {
        "1": node("LoadVideo", file=source),
        "2": node("GetVideoComponents", video=["1", 0]),
        "3": node("LoadAudio", audio=source),
        "11": node("SaveVideo", video=["1", 0], filename_prefix="v", format="auto", codec="auto"),
        "12": node("SaveImage", images=["2", 0], filename_prefix="i"),
        "13": node("SaveAudio", audio=["3", 0], filename_prefix="a"),
        "14": node("PreviewAny", source=["2", 2]),
    }
    got = await done(client, direct, workflow)
    output, data = got.of("11")
    assert (output["content_type"], output["width"], output["height"]) == ("video/mp4", 64, 48)
    assert output["duration"] == pytest.approx(FRAMES / FPS, abs=1 / FPS)
    assert len(decoded(data).pictures) == FRAMES
    frames = [body for output, body in zip(got.outputs, got.bodies, strict=True) if output["node_id"] == "12"]
    assert len(frames) == FRAMES
    for frame in frames:
        shows(frame, color, color, slack=6)
    assert got.of("13")[0]["duration"] == pytest.approx(0.9, abs=0.05)
    assert float(got.of("14")[0]["text"]) == FPS
    assert site.asked == ["/film"]


async def test_an_animation_is_taken_for_a_video(client: Client, direct: Client) -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (64, 48), (40 * number, 0, 100)) for number in range(5)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    workflow = {
        "1": node("LoadVideo", file=data_uri(file.getvalue(), "image/gif")),
        "11": node("SaveVideo", video=["1", 0], filename_prefix="v", format="mp4", codec="h264"),
    }
    output, data = (await done(client, direct, workflow)).of("11")
    assert (output["content_type"], len(decoded(data).pictures)) == ("video/mp4", 5)


async def test_a_latent_that_came_out_goes_in_again(client: Client, direct: Client) -> None:
    first = await done(client, direct, latents(node("EmptyLatentImage", width=24, height=16, batch_size=3)))
    output, data = first.of("11")
    assert (output["type"], output["content_type"]) == ("latent", "application/octet-stream")
    view = await upload(client, data, "first.latent")
    again = await done(client, direct, latents(node("LoadLatent", latent=view["reference"])))
    assert tensors(again.of("11")[1]) == tensors(data)
    assert max(map(len, tensors(data).pictures)) == 4 * 3 * 4 * 2 * 3


async def test_sound_and_video_that_came_out_go_in_again(client: Client, direct: Client) -> None:
    sound = (await upload(client, wav(0.6), "a.wav"))["reference"]
    made = [await done(client, direct, workflow) for workflow in (sounds(sound), moving(4, 4.0))]
    given = [
        (await upload(client, data, "again"))["reference"]
        for got in made
        for output, data in zip(got.outputs, got.bodies, strict=True)
        if output["type"] != "image"
    ]
    workflow: Graph = {}
    for number, source in enumerate(given):
        first, last = f"{number}1", f"{number}2"
        if number < 4:  # flac, mp3, opus, and the sound of an mp4
            workflow[first] = node("LoadAudio", audio=source)
            workflow[last] = node("SaveAudio", audio=[first, 0], filename_prefix="a")
        else:  # webm and mp4
            workflow[first] = node("LoadVideo", file=source)
            workflow[last] = node(
                "SaveVideo", video=[first, 0], filename_prefix="v", format="mp4", codec="h264"
            )
    again = await done(client, direct, workflow)
    assert [output["type"] for output in again.outputs] == ["audio"] * 4 + ["video"] * 2
    for output in again.outputs:
        expected = 0.6 if output["type"] == "audio" else 1.0
        assert output["duration"] == pytest.approx(expected, abs=0.06), output


def latents(source: dict[str, Any]) -> Graph:
    return {
        "1": source,
        "11": node("SaveLatent", samples=["1", 0], filename_prefix="l"),
        "90": node("PrimitiveString", value=CANARY),
    }


# --- what comes out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "fps"), [(12, 12.0), (9, 6.0)])
async def test_what_moves_is_stored_with_its_size_and_duration(
    client: Client, direct: Client, storage: str, frames: int, fps: float
) -> None:
    got = await done(client, direct, moving(frames, fps), output={"storage": storage})
    types = {"10": "image/webp", "11": "image/png", "12": "video/webm", "13": "video/mp4"}
    for node_id, content_type in types.items():
        output, data = got.of(node_id)
        assert (output["content_type"], output["width"], output["height"]) == (content_type, 192, 128)
        assert output["type"] == content_type.partition("/")[0]
        assert output["duration"] == pytest.approx(frames / fps, abs=1 / fps)
        seen = pictures(data) if output["type"] == "image" else decoded(data)
        assert len(seen.pictures) == frames
        assert output["duration"] == pytest.approx(seen.seconds, abs=0.01)
        assert output["duration"] == round(output["duration"], 6)


def moving(frames: int, fps: float) -> Graph:
    workflow = graph("animated-and-video", n1__batch_size=frames, n3__fps=fps)
    for node_id in ("10", "11", "12"):
        workflow[node_id]["inputs"]["fps"] = fps
    return {**workflow, "90": node("PrimitiveString", value=CANARY)}


async def test_a_url_of_s3_that_was_changed_opens_nothing(client: Client, direct: Client) -> None:
    got = await done(client, direct, graph("image-generate", n1__color=77))
    url = got.outputs[0]["url"]
    async with aiohttp.ClientSession() as session:
        for wrong in (url.partition("?")[0], re.sub("X-Amz-Expires=[0-9]+", "X-Amz-Expires=86401", url)):
            async with session.get(wrong) as answer:
                assert answer.status == 403


async def test_stripped_files_tell_nothing_and_show_the_same(client: Client, direct: Client) -> None:
    """Every saver once as ComfyUI does it, which tells the prompt, and once stripped."""
    sound = (await upload(client, wav(0.8), "tone.wav"))["reference"]
    still = graph("image-generate", n1__color=5)
    still["90"] = node("PrimitiveString", value=CANARY)
    readers = {".latent": tensors, ".png": pictures, ".webp": pictures}
    of_its_own = dict.fromkeys(("url", "sha256", "size_bytes", "duration"))
    seen = set()
    for workflow in (
        moving(3, 7.0),
        sounds(sound),
        still,
        latents(node("EmptyLatentImage", width=64, height=64, batch_size=1)),
    ):
        kept = await done(client, direct, workflow)
        stripped = await done(client, direct, workflow, output={"metadata": "strip"})
        assert len(kept.outputs) == len(stripped.outputs) > 0
        for output, before in zip(kept.outputs, kept.bodies, strict=True):
            told, after = stripped.of(output["node_id"])
            suffix = Path(output["name"]).suffix
            assert CANARY.encode() in before, suffix
            assert CANARY.encode() not in after, suffix
            assert b"class_type" not in after, suffix
            read = readers.get(suffix, decoded)
            assert read(after) == read(before), suffix
            # WebM counts milliseconds, and a copy rounds the last frame's anew.
            assert (told["duration"] or 0) == pytest.approx(output["duration"] or 0, abs=0.002)
            assert {**told, **of_its_own} == {**output, **of_its_own}
            seen.add(suffix)
    assert seen == {*readers, ".webm", ".mp4", ".flac", ".mp3", ".opus"}


@pytest.mark.parametrize("wanted", ["webp", "avif", "jpeg", "png"])
async def test_pictures_are_converted(client: Client, direct: Client, wanted: str, storage: str) -> None:
    left, right = (200, 60, 40), (20, 110, 190)
    workflow = {
        "1": node("LoadImage", image=data_uri(halves(left, right))),
        "11": node("SaveImage", images=["1", 0], filename_prefix="shown"),
        "90": node("PrimitiveString", value=CANARY),
    }
    quality = {} if wanted == "png" else {"quality": 90}
    output, data = (
        await done(client, direct, workflow, output={"format": wanted, "storage": storage, **quality})
    ).of("11")
    assert output["content_type"] == f"image/{wanted}"
    assert output["name"] == f"shown_00001_.{'jpg' if wanted == 'jpeg' else wanted}"
    assert (output["width"], output["height"]) == (96, 64)
    with Image.open(io.BytesIO(data)) as picture:
        assert (picture.format, picture.size) == (wanted.upper(), (96, 64))
    shows(data, left, right, slack=12)
    assert (CANARY.encode() in data) == (wanted == "png")  # already what was wanted: left as it is


async def test_what_moves_stays_as_it_is_where_a_format_cannot_hold_it(
    client: Client, direct: Client
) -> None:
    got = await done(client, direct, moving(5, 5.0), output={"format": "jpeg"})
    assert [output["content_type"] for output in got.outputs] == [
        "image/webp",
        "image/png",
        "video/webm",
        "video/mp4",
    ]
    moved = await done(client, direct, moving(5, 5.0), output={"format": "webp"})
    for node_id in ("10", "11"):
        output, data = moved.of(node_id)
        assert (output["content_type"], len(pictures(data).pictures)) == ("image/webp", 5)
        assert output["duration"] == pytest.approx(1.0, abs=0.02)


async def test_small_outputs_come_inline_and_below_their_prefix(
    client: Client, direct: Client, s3: SeaweedServer
) -> None:
    asked = {"inline": True, "prefix": "customers/42"}
    got = await done(client, direct, graph("image-generate", n1__width=64, n1__height=64), output=asked)
    (output,), (data,) = got.outputs, got.bodies
    assert base64.b64decode(output["data"], validate=True) == data
    held = await asyncio.to_thread(s3.held, s3.bucket, "customers/42/")
    assert [key.rpartition("/")[0] for key in held] == [f"customers/42/{got.task['task_id']}/1"]
    large = graph("image-generate", n1__width=1024, n1__height=1024)
    (output,) = (await done(client, direct, large, output={"inline": True})).outputs
    assert (output["data"], output["size_bytes"] > 1_048_576) == (None, True)


async def test_texts_come_along_and_previews_only_when_asked_for(
    client: Client, direct: Client, storage: str
) -> None:
    got = await done(client, direct, graph("multi-output"), output={"storage": storage})
    assert Counter(output["node_id"] for output in got.outputs) == {"10": 2, "11": 2, "14": 1, "15": 1}
    output, data = got.of("14")
    assert (output["type"], output["text"], data) == ("text", "hello comfyd", b"hello comfyd")
    everything = await done(
        client, direct, graph("multi-output"), output={"storage": storage, "include_temp": True}
    )
    counts = Counter(output["node_id"] for output in everything.outputs)
    assert counts == {"10": 2, "11": 2, "12": 2, "13": 1, "14": 1, "15": 1}
    preview = {
        "1": node("EmptyImage", width=64, height=64, batch_size=1, color=5),
        "2": node("PreviewImage", images=["1", 0]),
    }
    only = await done(client, direct, preview, output={"storage": storage})
    assert [output["type"] for output in only.outputs] == ["image"]  # there is nothing else to give


async def test_outputs_are_there_while_the_task_runs(client: Client, site: Sources) -> None:
    """Two branches of seconds each; which is first is ComfyUI's choice. Meanwhile the next file comes."""
    workflow: Graph = {}
    for branch in ("1", "2"):
        workflow[f"{branch}0"] = node("EmptyImage", width=1536, height=1536, batch_size=1, color=int(branch))
        workflow[f"{branch}1"] = node("ImageBlur", image=[f"{branch}0", 0], blur_radius=31, sigma=10.0)
        workflow[f"{branch}9"] = node("SaveImage", images=[f"{branch}1", 0], filename_prefix="branch")
    task = await client.submit(workflow)
    url = site.file("/next", halves((9, 9, 9), (99, 99, 99)))
    following = await client.submit(graph("image-to-image", n1__image=url))
    deadline = time.monotonic() + PATIENCE
    while not (seen := await client.task(task["task_id"]))["outputs"]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    assert (seen["status"], len(seen["outputs"])) == ("PROCESSING", 1)
    await fetched(seen["outputs"][0], "s3")
    assert site.asked == ["/next"]
    assert (await client.task(task["task_id"]))["status"] == "PROCESSING"
    ended = await client.ended(task["task_id"], PATIENCE)
    assert ended["status"] == "COMPLETED"
    sums = [output["sha256"] for output in ended["outputs"]]
    assert len(sums) == 2
    assert seen["outputs"][0]["sha256"] in sums
    assert (await client.ended(following["task_id"], PATIENCE))["status"] == "COMPLETED"


async def test_a_deleted_task_leaves_nothing_on_s3(client: Client, direct: Client, s3: SeaweedServer) -> None:
    got = await done(client, direct, graph("batch-images"), output={"prefix": "gone"})
    assert len(await asyncio.to_thread(s3.held, s3.bucket, "gone/")) == len(got.outputs) > 0
    status, _ = await client.call("DELETE", f"/api/tasks/{got.task['task_id']}")
    assert status == 204
    assert await asyncio.to_thread(s3.held, s3.bucket, "gone/") == []


# --- what ComfyUI never sees --------------------------------------------------------------------------------

PAGE: Final = b"<!doctype html><html><body>not found</body></html>"
BOMB: Final = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0" + bytes(64)
)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (PAGE, "unsupported_content"),
        (wav(0.1), "unsupported_content"),
        (BOMB, "input_too_large"),
        (b"", "unsupported_content"),
        (None, "fetch_failed"),
        ("http://169.254.169.254/latest/meta-data/", "blocked_address"),
    ],
    ids=["a page", "a sound", "a bomb", "nothing", "404", "a redirect inwards"],
)
async def test_a_bad_file_behind_a_url_never_reaches_comfyui(
    client: Client, traces: Traces, site: Sources, data: bytes | str | None, code: str
) -> None:
    before = await traces()
    if isinstance(data, str):
        site.redirect("/photo.png", data)
    elif data is not None:
        site.file("/photo.png", data, "image/png")
    task = await client.submit(graph("image-to-image", n1__image=f"{site.url}/photo.png"))
    ended = await client.ended(task["task_id"], PATIENCE)
    assert (ended["status"], ended["error"]["code"]) == ("FAILED", code)
    assert ended["error"]["details"]["input"] == "1.image"
    assert ended["outputs"] == []
    assert await traces() == before


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (data_uri(PAGE), "unsupported_content"),
        (data_uri(BOMB), "input_too_large"),
        ("data:image/png;base64,%%%", "invalid_data_uri"),
        ("upload:" + "0" * 64, "input_not_found"),
        ("http://169.254.169.254/latest/meta-data/", "blocked_address"),
    ],
    ids=["a page", "a bomb", "no base64", "no upload", "an inner address"],
)
async def test_what_is_known_to_be_bad_is_refused_at_once(
    client: Client, traces: Traces, source: str, code: str
) -> None:
    before = await traces()
    body = {"workflow": graph("image-to-image", n1__image=source)}
    status, answer = await client.call("POST", "/api/tasks", json=body)
    assert (status // 100, answer["error"]["code"]) == (4, code)
    assert answer["error"]["details"]["input"] == "1.image"
    assert await traces() == before


async def test_an_upload_of_the_wrong_kind_is_refused_where_it_is_used(
    client: Client, direct: Client
) -> None:
    before = await known_prompts(direct)
    for data in (PAGE, wav(0.1)):
        view = await upload(client, data, "photo.png")
        body = {"workflow": graph("image-to-image", n1__image=view["reference"])}
        status, answer = await client.call("POST", "/api/tasks", json=body)
        assert (status, answer["error"]["code"]) == (422, "unsupported_content")
        assert answer["error"]["details"]["content_type"] == view["content_type"]
    assert await known_prompts(direct) == before


# --- what ComfyUI has ---------------------------------------------------------------------------------------


def inputs_of(comfyui: ComfyUIProcess) -> set[str]:
    """What lies in ComfyUI's input folder."""
    files = (path for path in comfyui.input_dir.rglob("*") if path.is_file())
    return {str(path.relative_to(comfyui.input_dir)) for path in files}


def rests(comfyd: ComfydProcess) -> set[str]:
    """What lies in comfyd's own folders of files that are on their way in or out."""
    folders = (comfyd.folder / "data" / name for name in ("tmp", "inputs"))
    return {str(path) for folder in folders for path in folder.rglob("*") if path.is_file()}


async def test_the_same_content_is_in_comfyui_once_whatever_it_came_as(
    client: Client, direct: Client, comfyui: ComfyUIProcess, site: Sources
) -> None:
    left, right = (77, 7, 7), (7, 177, 7)
    data = halves(left, right)
    before = inputs_of(comfyui)
    sources = [
        site.file("/a", data),
        site.file("/b.jpg", data, "image/jpeg"),
        data_uri(data),
        (await upload(client, data, "c.gif"))["reference"],
    ]
    for source in sources:
        got = await done(client, direct, graph("image-to-image", n1__image=source))
        shows(got.of("9")[1], inverted(left), inverted(right))
    assert inputs_of(comfyui) - before == {f"{sha256(data)}.png"}


async def test_comfyui_ran_one_prompt_for_each_attempt_and_names_tell_contents(
    client: Client, direct: Client, comfyui: ComfyUIProcess, comfyd: ComfydProcess
) -> None:
    """The last one: looks at what all others left behind."""
    attempts: list[str] = []
    query: dict[str, str] = {"limit": "100"}
    while True:
        _, listed = await client.call("GET", "/api/tasks", params=query)
        for task in listed["tasks"]:
            assert len(task["attempts"]) == 1, task
            attempts += [attempt["id"] for attempt in task["attempts"] if task["status"] == "COMPLETED"]
        if listed.get("next_cursor") is None:
            break
        query["cursor"] = listed["next_cursor"]
    known = await known_prompts(direct)
    assert len(attempts) == len(set(attempts)) > 0
    assert set(attempts) <= known
    assert len(known - set(attempts)) <= 1  # the task that was deleted
    for name in inputs_of(comfyui):
        assert re.fullmatch(r"[0-9a-f]{64}\.[a-z0-9]{1,10}", name)
        assert Path(name).stem == sha256((comfyui.input_dir / name).read_bytes())
    assert {Path(path).parent.name for path in rests(comfyd)} == {"inputs"}  # and nothing half-way
