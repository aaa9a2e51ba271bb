"""`comfyd submit` against a comfyd that runs, with real storages: files go in, come out, and are the same."""

import asyncio
import hashlib
import io
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

from comfyd.cli import main
from comfyd.clock import SystemClock
from comfyd.commands.rest import connect
from comfyd.simulator import Simulator
from tests.commands.fake_comfyd import TASK_ID, output
from tests.support import cf_images_server, seaweed
from tests.support.comfyd import ComfydProcess

GRAPH = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "photo.png"}},
    "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "a b+ü"}},
}
UPLOAD_BYTES = 2_000_000


@pytest.fixture(scope="module")
def s3() -> Iterator[seaweed.SeaweedServer]:
    with seaweed.running() as server:
        yield server


@pytest.fixture(scope="module")
def comfyui() -> Iterator[str]:
    """The url of a simulated ComfyUI, on a thread of its own as it outlives each test's loop."""
    urls: list[str] = []
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def simulate() -> None:
        async with Simulator() as simulator:
            urls.append(simulator.url)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(simulate(),))
    thread.start()
    try:
        assert started.wait(20)
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        loop.close()


@pytest.fixture(scope="module")
def comfyd_url(
    s3: seaweed.SeaweedServer, comfyui: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A comfyd that has the local disk, S3 and Cloudflare Images."""
    with cf_images_server.running() as images:
        account = images.new_account()
        settings = {
            "STORAGE__LOCAL__URL_EXPIRES": "3600",
            "STORAGE__S3__BUCKET": s3.bucket,
            "STORAGE__S3__ENDPOINT": s3.endpoint,
            "STORAGE__S3__ACCESS_KEY": seaweed.ACCESS_KEY,
            "STORAGE__S3__SECRET_KEY": seaweed.SECRET_KEY,
            "STORAGE__CF_IMAGES__ACCOUNT_ID": account.id,
            "STORAGE__CF_IMAGES__API_TOKEN": account.token,
            "STORAGE__CF_IMAGES__ENDPOINT": images.endpoint,
            "LIMITS__UPLOAD_BYTES": str(UPLOAD_BYTES),
        }
        named = {f"COMFYD__{name}": value for name, value in settings.items()}
        with ComfydProcess(tmp_path_factory.mktemp("comfyd"), comfyui, **named) as process:
            yield process.url


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture that no other test sends, so that ComfyUI has to work."""
    path = tmp_path / "my photo + ü.png"
    Image.frombytes("RGB", (24, 16), os.urandom(24 * 16 * 3)).save(path)
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    return path


def submit(url: str, photo: Path, *arguments: str) -> int:
    given = ["submit", "./graph.json", "-i", f"1.image=@{photo.name}", "--url", url, *arguments]
    return main(given, {})


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.parametrize("storage", ["local", "s3", "cf_images"])
def test_a_file_goes_in_and_its_result_comes_out(
    comfyd_url: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], storage: str
) -> None:
    assert (
        submit(comfyd_url, photo, "-o", "out", "--json", "--storage", storage, "--prefix", "customers/42")
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    (result,), (saved,) = printed["outputs"], printed["saved"]
    data = (tmp_path / saved).read_bytes()
    assert (result["storage"], result["sha256"], result["size_bytes"]) == (storage, sha256(data), len(data))
    with Image.open(photo) as sent, Image.open(io.BytesIO(data)) as received:
        inverted = bytes(255 - value for value in sent.tobytes())
        assert received.convert("RGB").tobytes() == inverted
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [Path(saved).name]


def test_outputs_come_as_they_were_wanted(
    comfyd_url: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(comfyd_url, photo, "--wait", "--format", "webp", "--quality", "70", "--strip") == 0
    saved = capsys.readouterr().out.splitlines()[-1]
    with Image.open(tmp_path / saved) as image:
        assert (image.format, image.size) == ("WEBP", (24, 16))
    assert saved.endswith(".webp")


async def test_an_expired_url_of_s3_is_renewed(
    comfyd_url: str,
    s3: seaweed.SeaweedServer,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = await asyncio.to_thread(submit, comfyd_url, photo, "-o", "first", "--json", "--storage", "s3")
    assert code == 0
    printed = json.loads(capsys.readouterr().out)
    stale = {**printed["outputs"][0], "url": presigned(s3, key_of(printed["outputs"][0]["url"]), 1)}
    async with asyncio.timeout(30):
        while await asyncio.to_thread(status, stale["url"]) != 403:
            await asyncio.sleep(0.1)
    async with connect(comfyd_url, SystemClock()) as client:
        path = await client.download(printed["task_id"], stale, tmp_path)
    assert sha256(path.read_bytes()) == stale["sha256"]


@pytest.mark.parametrize(
    "name", ["a b.png", "a+b%2B.png", "ü画.png", "a&b=c#d?e.png", "100%.png", "(1)'!*~.png"]
)
async def test_s3_takes_a_signed_url_whatever_the_name(
    comfyd_url: str, s3: seaweed.SeaweedServer, tmp_path: Path, name: str
) -> None:
    data = os.urandom(1000)
    await asyncio.to_thread(s3.client.put_object, Bucket=s3.bucket, Key=f"names/{name}", Body=data)
    signed = output(name, data, storage="s3", url=presigned(s3, f"names/{name}", 60))
    async with connect(comfyd_url, SystemClock()) as client:
        path = await client.download(TASK_ID, signed, tmp_path)
    assert path.read_bytes() == data


def presigned(s3: seaweed.SeaweedServer, key: str, seconds: int) -> str:
    place: dict[str, Any] = {"Bucket": s3.bucket, "Key": key}
    return str(s3.client.generate_presigned_url("get_object", Params=place, ExpiresIn=seconds))


def key_of(url: str) -> str:
    return unquote(urlsplit(url).path).split("/", 2)[2]


def test_a_file_that_comfyd_does_not_take_is_told_in_one_line(
    comfyd_url: str, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo.write_bytes(os.urandom(UPLOAD_BYTES + 30_000_000))
    assert submit(comfyd_url, photo) == 65
    said = f"{photo.name}: the body is longer than the {UPLOAD_BYTES} bytes that limits.upload_bytes allows\n"
    assert capsys.readouterr() == ("", said)


def test_a_file_that_is_no_picture_is_told_in_one_line(
    comfyd_url: str, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo.write_text("not a picture")
    assert submit(comfyd_url, photo) == 65
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "1.image" in captured.err
