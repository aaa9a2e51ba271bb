"""Outputs become artefacts: as the client wants them, while the task still runs, and none is left behind."""

import asyncio
import base64
import ctypes
import gc
import hashlib
import io
import resource
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import orjson
import pytest
from blake3 import blake3
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from comfyd.artefacts import (
    FIRST_PAUSE_MS,
    MOST_PAUSE_MS,
    STORAGE_PAUSE_MS,
    TRIES,
    ArtefactWriter,
    StoringTerms,
    from_memory,
    text_source,
)
from comfyd.clock import Clock, SystemClock
from comfyd.comfy.files import OutputStream
from comfyd.config import Config, LimitsConfig
from comfyd.disk import BLOCK
from comfyd.errors import (
    BackendUnclear,
    BackendUnreachable,
    MediaError,
    NotAccepted,
    OutputUnavailable,
    StorageError,
)
from comfyd.loops import Health
from comfyd.metrics import Metrics
from comfyd.progress import Board
from comfyd.scratch import open_scratch
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.storage.base import LocalFile
from comfyd.storage.opening import open_storages
from comfyd.storing import Storing
from comfyd.tasks import Artefact, OutputFile, OutputOptions, OutputType, PictureFormat, Status, Task
from tests.api.conftest import Edge, serving
from tests.support.clock import HandClock
from tests.support.files import only, read, small_disk
from tests.support.service import Bench, bench, colored, configuration, sampled, until
from tests.support.values import attempt
from tests.test_execution import shipped
from tests.test_worker import starts

CANARY = "canary-in-the-prompt"


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions(step_seconds=0.01)) as made:
        yield made


@pytest.fixture
async def made(simulator: Simulator, tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(configuration(tmp_path / "data", simulator.url)) as running:
        await until(lambda: running.ground.backends[0].state.socket)
        yield running


def lying(folder: Path) -> list[str]:
    """The keys in the local storage, and what lies in the folder of temporary files."""
    files = [
        str(path.relative_to(folder / "files")) for path in (folder / "files").rglob("*") if path.is_file()
    ]
    return sorted([*files, *(path.name for path in (folder / "tmp").iterdir())])


async def content(made: Bench, artefact: Artefact) -> bytes:
    """What is stored, which is what the row says of it."""
    data = await read(await made.ground.storages.get(artefact.storage), artefact.key)
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (artefact.sha256, artefact.size_bytes)
    assert artefact.blake3 == blake3(data).hexdigest()
    return data


def noise(batch: int = 1, **facts: Any) -> dict[str, Any]:
    """Pictures that do not compress well, and a prompt that says something."""
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 48, "batch_size": batch, "color": 2237106, **facts},
        },
        "2": {"class_type": "ImageAddNoise", "inputs": {"image": ["1", 0], "seed": 3, "strength": 0.8}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "n"}},
        "8": {
            "class_type": "StringConcatenate",
            "inputs": {"string_a": CANARY, "string_b": "", "delimiter": ""},
        },
        "9": {"class_type": "PreviewAny", "inputs": {"source": ["8", 0]}},
    }


def pictures(task: Task) -> list[Artefact]:
    return [each for each in task.artefacts if each.type is OutputType.IMAGE]


def opened(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


# what a client wants of them


@pytest.mark.parametrize(
    ("wanted", "kind", "extension"),
    [
        ("jpeg", "JPEG", "jpg"),
        ("webp", "WEBP", "webp"),
        ("avif", "AVIF", "avif"),
    ],
)
async def test_pictures_come_in_the_format_and_quality_that_was_asked_for(
    made: Bench, simulator: Simulator, wanted: PictureFormat, kind: str, extension: str
) -> None:
    sizes = {}
    for quality in (15, 90):
        options = OutputOptions(format=wanted, quality=quality)
        ended = await made.ended((await made.submit(noise(), output=options)).id)
        (artefact,) = pictures(ended)
        data = await content(made, artefact)
        picture = opened(data)
        assert (picture.format, picture.size) == (kind, (64, 48))
        assert artefact.content_type == f"image/{wanted}"
        assert artefact.name == f"n_00001_.{extension}"
        assert artefact.key.endswith(artefact.name)
        assert (artefact.width, artefact.height) == (64, 48)
        assert CANARY.encode() not in data
        sizes[quality] = len(data)
    assert sizes[15] < sizes[90] * 0.7
    assert len(starts(simulator)) == 2


async def test_a_picture_that_has_the_format_already_stays_as_it_is(made: Bench) -> None:
    options = OutputOptions(format="png")
    plain = await made.ended((await made.submit(noise())).id)
    same = await made.ended((await made.submit(noise(), output=options)).id)
    for ended in (plain, same):
        (artefact,) = pictures(ended)
        data = await content(made, artefact)
        assert opened(data).format == "PNG"
        assert (artefact.name, artefact.content_type) == ("n_00001_.png", "image/png")
        assert CANARY.encode() in data


@pytest.mark.parametrize("wanted", [None, "png"])
async def test_metadata_is_taken_out_and_not_a_pixel_changed(
    made: Bench, wanted: PictureFormat | None
) -> None:
    plain = await made.ended((await made.submit(noise())).id)
    options = OutputOptions(strip=True, format=wanted)
    stripped = await made.ended((await made.submit(noise(), output=options)).id)
    before, after = [await content(made, pictures(ended)[0]) for ended in (plain, stripped)]
    assert CANARY.encode() in before
    assert CANARY.encode() not in after
    assert opened(after).info.keys() <= {"gamma", "dpi"}
    assert opened(before).tobytes() == opened(after).tobytes()
    assert pictures(stripped)[0].name == pictures(plain)[0].name


async def test_metadata_is_taken_out_of_everything_a_task_makes(made: Bench) -> None:
    graph = {**shipped("animated-and-video"), **{key: noise()[key] for key in ("8", "9")}}
    leaking = 0
    for strip in (False, True):
        ended = await made.ended((await made.submit(graph, output=OutputOptions(strip=strip))).id)
        assert ended.status is Status.SUCCEEDED, ended.error
        files = [each for each in ended.artefacts if each.text is None]
        assert {each.name.rpartition(".")[2] for each in files} == {"webp", "png", "webm", "mp4"}
        leaks = [each.name for each in files if CANARY.encode() in await content(made, each)]
        if strip:
            assert leaks == []
            assert all(each.width == 192 and each.height == 128 for each in files)
        leaking += len(leaks)
    assert leaking >= 2


async def test_texts_are_left_as_they_are_whatever_is_asked_of_pictures(made: Bench) -> None:
    options = OutputOptions(format="jpeg", quality=50, strip=True)
    ended = await made.ended((await made.submit(shipped("multi-output"), output=options)).id)
    assert ended.status is Status.SUCCEEDED
    (text,) = [each for each in ended.artefacts if each.type is OutputType.TEXT]
    assert (text.text, text.name) == ("hello comfyd", "text.txt")
    assert await content(made, text) == b"hello comfyd"
    (latent,) = [each for each in ended.artefacts if each.type is OutputType.LATENT]
    assert latent.name.endswith(".latent")
    assert {each.content_type for each in pictures(ended)} == {"image/jpeg"}


async def test_temporary_pictures_are_converted_like_the_others(made: Bench) -> None:
    options = OutputOptions(include_temp=True, format="webp")
    ended = await made.ended((await made.submit(shipped("multi-output"), output=options)).id)
    assert {each.node_id for each in pictures(ended)} == {"10", "11", "12", "13"}
    for each in pictures(ended):
        assert opened(await content(made, each)).format == "WEBP"
        assert (each.content_type, each.name.rpartition(".")[2]) == ("image/webp", "webp")


async def test_an_animation_that_becomes_a_jpeg_stays_what_it_is(made: Bench) -> None:
    options = OutputOptions(format="jpeg", strip=True)
    graph = {key: node for key, node in shipped("animated-and-video").items() if key in {"1", "2", "10"}}
    ended = await made.ended((await made.submit(graph, output=options)).id)
    (artefact,) = ended.artefacts
    assert (artefact.content_type, artefact.name.rpartition(".")[2]) == ("image/webp", "webp")
    assert getattr(opened(await content(made, artefact)), "n_frames", 1) == 12


async def test_images_of_the_socket_are_converted_as_well(made: Bench) -> None:
    options = OutputOptions(format="jpeg")
    ended = await made.ended((await made.submit(shipped("websocket-image"), output=options)).id)
    assert [each.name for each in ended.artefacts] == ["websocket_00001.jpg", "websocket_00002.jpg"]


async def test_what_cannot_be_made_of_a_file_fails_the_task_after_one_run_and_leaves_nothing(
    made: Bench, simulator: Simulator, tmp_path: Path
) -> None:
    simulator.faults.view = "garbled"
    wanted = OutputOptions(format="webp")
    failed = await made.ended((await made.submit(noise(batch=3), output=wanted, max_attempts=3)).id)
    assert failed.status is Status.FAILED
    assert failed.error is not None
    assert (failed.error.code, failed.error.retryable) == ("media_error", False)
    assert "\n" not in failed.error.message
    assert (failed.attempt_count, failed.artefacts) == (1, ())
    assert len(starts(simulator)) == 1
    assert made.state.board.artefacts(failed.id) == ()
    assert lying(tmp_path / "data") == []


# shown in the task itself


def limited(config: Config, inline_bytes: int) -> Config:
    return msgspec.structs.replace(config, limits=LimitsConfig(inline_bytes=inline_bytes))


async def test_small_outputs_are_in_the_task_and_large_ones_and_lists_have_none(
    simulator: Simulator, tmp_path: Path
) -> None:
    config = limited(configuration(tmp_path / "data", simulator.url), 5_000)
    large = {key: node for key, node in noise(width=128, height=128).items() if key in {"1", "2", "3"}}
    small = colored(7)
    graph = {
        **large,
        "21": small["1"],
        "22": {"class_type": "SaveImage", "inputs": {"images": ["21", 0], "filename_prefix": "small"}},
    }
    async with serving(config, works=True) as edge:
        await until(lambda: edge.bench.ground.backends[0].state.socket)
        body = {"workflow": graph, "output": {"inline": True}}
        _, shown = await edge.call("POST", "/api/tasks?wait=20", json=body)
        assert shown["status"] == "COMPLETED"
        by_name = {output["name"]: output for output in shown["outputs"]}
        data = base64.b64decode(by_name["small_00001_.png"]["data"], validate=True)
        assert hashlib.sha256(data).hexdigest() == by_name["small_00001_.png"]["sha256"]
        assert by_name["n_00001_.png"]["size_bytes"] > 5_000
        assert by_name["n_00001_.png"]["data"] is None
        _, again = await edge.call("GET", f"/api/tasks/{shown['task_id']}")
        assert again["outputs"] == shown["outputs"]
        _, page = await edge.call("GET", "/api/tasks")
        assert [[output["data"] for output in row["outputs"]] for row in page["tasks"]] == [[None, None]]
        _, plain = await edge.call("POST", "/api/tasks?wait=20", json={"workflow": graph})
        assert [output["data"] for output in plain["outputs"]] == [None, None]
    async with serving(config, works=True) as edge:  # and it is durable
        _, again = await edge.call("GET", f"/api/tasks/{shown['task_id']}")
        assert {output["name"]: output["data"] for output in again["outputs"]} == {
            name: output["data"] for name, output in by_name.items()
        }


async def test_outputs_of_one_task_together_show_no_more_than_the_limit(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with bench(limited(configuration(tmp_path / "data", simulator.url), 3_000)) as made:
        for _ in range(2):  # the limit is the task's, not the process's
            row = await made.submit(colored(3, batch_size=30), output=OutputOptions(inline=True))
            ended = await made.ended(row.id)
            shown = [each.size_bytes for each in ended.artefacts if each.data is not None]
            assert len(ended.artefacts) == 30
            assert 0 < len(shown) < 30
            assert sum(shown) <= 3_000
            assert sum(shown) + min(each.size_bytes for each in ended.artefacts) > 3_000
            for each in ended.artefacts:
                if each.data is not None:
                    assert hashlib.sha256(each.data).hexdigest() == each.sha256


# where they are


async def test_keys_begin_with_the_clients_folders_and_urls_do_not_need_them(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with serving(configuration(tmp_path / "data", simulator.url), works=True) as edge:
        body = {"workflow": colored(5), "output": {"prefix": "clients/mine"}}
        seen = []
        for _ in range(2):  # the same request twice
            _, ended = await edge.call("POST", "/api/tasks?wait=20", json=body)
            (output,) = ended["outputs"]
            async with edge.http.get(output["url"]) as answer:
                assert hashlib.sha256(await answer.read()).hexdigest() == output["sha256"]
            assert "clients" not in output["url"]
            seen.append((ended["task_id"], output["url"]))
        assert len({url for _, url in seen}) == 2
        keys = lying(tmp_path / "data")
        assert sorted(keys) == sorted(f"clients/mine/{task_id}/1/2_0_t_00001_.png" for task_id, _ in seen)
        for task_id, url in seen:
            assert (await edge.call("DELETE", f"/api/tasks/{task_id}"))[0] == 204
            async with edge.http.get(url) as answer:
                assert answer.status == 404
    assert lying(tmp_path / "data") == []
    assert not (tmp_path / "data" / "files" / "clients").exists()


# while the task still runs


def early(steps: int) -> dict[str, Any]:
    """A picture that is saved at once, and one that takes `steps` hundredths of a second more."""
    return {**colored(5), **sampled(1, steps)}


def early_and_broken() -> dict[str, Any]:
    """A picture that is saved at once, and a node that fails later: ComfyUI takes the shorter way first."""
    broken = {key: node for key, node in shipped("fail-at-runtime").items() if key in {"3", "4"}}
    broken["3"]["inputs"]["string"] = ["6", 0]
    joined = {"string_a": "a", "string_b": "b", "delimiter": " "}
    broken["5"] = {"class_type": "StringConcatenate", "inputs": joined}
    broken["6"] = {"class_type": "StringConcatenate", "inputs": {**joined, "string_a": ["5", 0]}}
    return {**colored(5), **broken}


class Heard:
    """Events of one stream, as they come. Lives as long as the stream."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer
        self.names: list[str] = []

    async def next(self) -> tuple[str, Any]:
        """The next event: its name and its data."""
        name = ""
        async with asyncio.timeout(20):
            while True:
                line = (await self._answer.content.readline()).decode()
                assert line, "the stream has ended"
                if line.startswith("event: "):
                    name = line.removeprefix("event: ").strip()
                elif line.startswith("data: "):
                    self.names.append(name)
                    return name, orjson.loads(line.removeprefix("data: "))

    async def until(self, name: str) -> Any:
        """The data of the next event of this name."""
        while True:
            event, data = await self.next()
            if event == name:
                return data


@asynccontextmanager
async def heard(edge: Edge, task_id: str) -> AsyncIterator[Heard]:
    async with edge.http.get(f"{edge.base}/api/tasks/{task_id}/events") as answer:
        yield Heard(answer)


async def test_an_output_is_shown_and_can_be_fetched_while_later_nodes_run_and_is_told_once(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with serving(configuration(tmp_path / "data", simulator.url), works=True) as edge:
        await until(lambda: edge.bench.ground.backends[0].state.socket)
        body = {"workflow": early(60), "output": {"inline": True}}
        _, row = await edge.call("POST", "/api/tasks", json=body)
        path = f"/api/tasks/{row['task_id']}"
        async with heard(edge, row["task_id"]) as stream:
            first = await stream.until("output")
            _, running = await edge.call("GET", path)
            assert running["status"] == "PROCESSING"
            assert running["outputs"] == [first]
            assert first["node_id"] == "2"
            async with edge.http.get(first["url"]) as answer:
                data = await answer.read()
            assert hashlib.sha256(data).hexdigest() == first["sha256"]
            assert base64.b64decode(first["data"]) == data
            assert simulator.executions[-1].event == "start"  # ComfyUI is not done yet
            second = await stream.until("output")
            assert second["node_id"] == "9"
            ended = await stream.until("status")
        assert stream.names.count("output") == 2
        assert ended["status"] == "COMPLETED"
        assert ended["outputs"] == [first, second]
        assert edge.state.board.artefacts(row["task_id"]) == ()
    assert len(starts(simulator)) == 1


async def test_lists_show_the_outputs_of_running_tasks_without_their_data(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with serving(configuration(tmp_path / "data", simulator.url), works=True) as edge:
        await until(lambda: edge.bench.ground.backends[0].state.socket)
        row = await edge.bench.submit(early(60), output=OutputOptions(inline=True))
        await has_early_output(edge.bench, row.id)
        _, page = await edge.call("GET", "/api/tasks")
        (listed,) = page["tasks"]
        assert listed["status"] == "PROCESSING"
        assert [output["data"] for output in listed["outputs"]] == [None]
        await edge.state.control.cancel(row.id)
        await edge.bench.ended(row.id)


async def has_early_output(made: Bench, task_id: str) -> Artefact:
    """The output that the running task has already."""
    await until(lambda: made.state.board.artefacts(task_id) != ())
    assert (await made.task(task_id)).status is Status.RUNNING
    (artefact,) = made.state.board.artefacts(task_id)
    assert hashlib.sha256(await content(made, artefact)).hexdigest() == artefact.sha256
    return artefact


@pytest.mark.parametrize("end", ["fails", "is canceled"])
async def test_an_early_output_of_an_attempt_that_comes_to_nothing_is_gone_everywhere(
    simulator: Simulator, tmp_path: Path, end: str
) -> None:
    simulator.faults.class_seconds = {"RegexReplace": 1.5}
    async with serving(configuration(tmp_path / "data", simulator.url), works=True) as edge:
        made = edge.bench
        await until(lambda: made.ground.backends[0].state.socket)
        graph = early_and_broken() if end == "fails" else early(2_000)
        row = await made.submit(graph)
        artefact = await has_early_output(made, row.id)
        _, running = await edge.call("GET", f"/api/tasks/{row.id}")
        url = running["outputs"][0]["url"]
        async with edge.http.get(url) as answer:
            assert answer.status == 200
        if end == "is canceled":
            await made.state.control.cancel(row.id)
        ended = await made.ended(row.id)
        assert ended.status is (Status.FAILED if end == "fails" else Status.CANCELED)
        assert ended.artefacts == made.state.board.artefacts(row.id) == ()
        _, gone = await edge.call("GET", f"/api/tasks/{row.id}")
        assert gone["outputs"] == []
        async with edge.http.get(url) as answer:
            assert answer.status == 404
    assert artefact.key not in lying(tmp_path / "data")
    assert lying(tmp_path / "data") == []
    assert len(starts(simulator)) == 1


async def test_an_early_output_of_a_comfyui_that_died_makes_room_for_that_of_the_next_attempt(
    made: Bench, simulator: Simulator, tmp_path: Path
) -> None:
    row = await made.submit(early(60))
    first = await has_early_output(made, row.id)
    await simulator.crash()
    await until(lambda: not made.ground.backends[0].state.ready)
    await simulator.restart()
    ended = await made.ended(row.id)
    assert [attempt.outcome for attempt in ended.attempts] == ["suspect", "succeeded"]
    assert len(ended.artefacts) == 2
    assert lying(tmp_path / "data") == sorted(each.key for each in ended.artefacts)
    assert first.key not in lying(tmp_path / "data")


async def test_what_was_stored_early_is_taken_over_by_the_next_process(
    simulator: Simulator, tmp_path: Path
) -> None:
    config = configuration(tmp_path / "data", simulator.url)
    async with bench(config, grace_ms=0) as made:
        await until(lambda: made.ground.backends[0].state.socket)
        row = await made.submit(early(60))
        first = await has_early_output(made, row.id)
    assert lying(tmp_path / "data") == [first.key]  # not forgotten: it will be wanted
    async with bench(config) as made:
        ended = await made.ended(row.id)
    assert (ended.status, ended.attempt_count) == (Status.SUCCEEDED, 1)
    assert first in ended.artefacts
    assert lying(tmp_path / "data") == sorted(each.key for each in ended.artefacts)
    assert len(starts(simulator)) == 1


@pytest.mark.parametrize("end", ["fails", "is canceled", "is lost"])
async def test_what_an_earlier_process_stored_early_is_gone_when_its_attempt_comes_to_nothing(
    simulator: Simulator, tmp_path: Path, end: str
) -> None:
    simulator.faults.class_seconds = {"RegexReplace": 1.0}
    config = configuration(tmp_path / "data", simulator.url)
    async with bench(config, grace_ms=0) as made:
        await until(lambda: made.ground.backends[0].state.socket)
        row = await made.submit(early_and_broken() if end == "fails" else early(200))
        first = await has_early_output(made, row.id)
    if end == "is lost":
        await simulator.crash()
        await simulator.restart()
    async with bench(config) as made:
        if end == "is canceled":
            await made.state.control.cancel(row.id)
        ended = await made.ended(row.id)
    assert first.key not in lying(tmp_path / "data")
    assert lying(tmp_path / "data") == sorted(each.key for each in ended.artefacts)


# one file: `ArtefactWriter`


class Failing:
    """A storage that raises these, one after the other, and then keeps what it is given."""

    name = "local"

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.kept: dict[str, bytes] = {}
        self.puts = 0

    async def put(self, key: str, file: LocalFile) -> str | None:
        """See `Storage`."""
        self.puts += 1
        if self.errors:
            raise self.errors.pop(0)
        self.kept[key] = await asyncio.to_thread(file.path.read_bytes)
        return None

    async def delete(self, key: str) -> None:
        """See `Storage`."""
        self.kept.pop(key, None)


class Parts:
    """A writer in front of a storage, and what it tells. Made by `writing`."""

    def __init__(self, writer: ArtefactWriter, storage: Any, health: Health, metrics: Metrics) -> None:
        self.writer = writer
        self.storage = storage
        self.health = health
        self.metrics = metrics
        self.board = Board()

    def storing(self, row: Task, *collected: OutputFile) -> Storing:
        """The outputs of its first attempt, of which these were told of before."""
        known = attempt(task_id=row.id, collected=collected)
        return Storing(row, known, self.writer, self.board, HandClock())


@asynccontextmanager
async def writing(
    folder: Path, storage: Any, clock: Clock | None = None, **terms: int
) -> AsyncIterator[Parts]:
    """A writer whose only storage is this one; the scratch folder is empty afterwards."""
    health, metrics = Health(), Metrics()
    async with open_scratch(folder / "tmp") as scratch:
        known = StoringTerms(**{"retry_ms": 0, "inline_bytes": 0, **terms})
        writer = ArtefactWriter(only(storage), scratch, health, metrics, clock or HandClock(), known)
        yield Parts(writer, storage, health, metrics)
        assert list((folder / "tmp").iterdir()) == []


def output_file(filename: str = "a.png", **facts: Any) -> OutputFile:
    defaults: dict[str, Any] = {"node_id": "2", "index": 0, "kind": "images", "type": OutputType.IMAGE}
    return OutputFile(filename=filename, **{**defaults, **facts})


def png(side: int = 4, color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, "PNG")
    return buffer.getvalue()


class Backend:
    """A ComfyUI as far as its files go: raises these first, then serves these bytes."""

    def __init__(self, data: bytes, *errors: Exception, content_type: str = "image/png") -> None:
        self._data = data
        self._errors = list(errors)
        self._content_type = content_type
        self.asked = 0

    @asynccontextmanager
    async def __call__(self, _: OutputFile) -> AsyncIterator[OutputStream]:
        self.asked += 1
        if self._errors:
            raise self._errors.pop(0)
        async with from_memory(self._data, self._content_type) as stream:
            yield stream


async def test_pauses_before_a_failing_storage_grow_to_half_a_minute_and_no_further(tmp_path: Path) -> None:
    clock, storage = HandClock(), Failing(*[StorageError("away")] * 14)
    async with writing(tmp_path, storage, clock) as parts:
        await parts.writer.write("t/1", output_file(), OutputOptions(), Backend(png()))
        assert parts.health.problems() == {}
    assert storage.kept == {"t/1/2_0_a.png": png()}
    full = [min(FIRST_PAUSE_MS << turn, STORAGE_PAUSE_MS) for turn in range(14)]
    assert clock.slept == [round(pause * 0.75) for pause in full]


async def test_patience_with_a_storage_ends_when_it_is_configured_to(tmp_path: Path) -> None:
    error = StorageError("away")
    storage = Failing(*[error] * 1_000)
    async with writing(tmp_path, storage, clock := HandClock(), retry_ms=3_600_000) as parts:
        before = clock.monotonic()
        with pytest.raises(StorageError) as caught:
            await parts.writer.write("t/1", output_file(), OutputOptions(), Backend(png()))
        assert parts.health.problems() == {"storage:local": "away"}
    assert caught.value is error
    assert not error.retryable
    assert 0 <= clock.monotonic() - before - 3_600_000 <= STORAGE_PAUSE_MS
    assert storage.puts > 100


async def test_a_comfyui_that_is_down_is_waited_for_and_one_that_says_nothing_is_asked_again(
    tmp_path: Path,
) -> None:
    down = [BackendUnreachable("refused")] * 12
    odd = [OutputUnavailable("short"), BackendUnclear("late")]
    source = Backend(png(), *down, *odd)
    storage = Failing()
    async with writing(tmp_path, storage, clock := HandClock()) as parts:
        await parts.writer.write("t/1", output_file(), OutputOptions(), source)
    assert source.asked == 15
    assert storage.puts == 1
    assert max(clock.slept) == MOST_PAUSE_MS


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (OutputUnavailable("gone", details={"status": 404}), 1),
        (OutputUnavailable("short"), TRIES),
        (BackendUnclear("late"), TRIES),
    ],
)
async def test_a_file_that_comfyui_does_not_give_is_given_up(
    tmp_path: Path, error: Exception, asked: int
) -> None:
    source = Backend(png(), *[error] * 100)
    async with writing(tmp_path, Failing()) as parts:
        with pytest.raises(type(error)):
            await parts.writer.write("t/1", output_file(), OutputOptions(), source)
    assert source.asked == asked


async def test_an_empty_file_is_no_output_and_an_empty_text_is_one(tmp_path: Path) -> None:
    storage, source = Failing(), Backend(b"")
    async with writing(tmp_path, storage) as parts:
        with pytest.raises(OutputUnavailable, match="empty"):
            await parts.writer.write("t/1", output_file(), OutputOptions(), source)
        text = output_file("text.txt", type=OutputType.TEXT, text="")
        artefact = await parts.writer.write("t/1", text, OutputOptions(), text_source)
    assert source.asked == TRIES
    assert (artefact.text, artefact.size_bytes) == ("", 0)
    assert storage.kept == {artefact.key: b""}


async def test_nodes_of_whatever_names_have_keys_of_their_own(tmp_path: Path) -> None:
    plain = output_file("a.png")
    tail = hashlib.sha256(b"a_b").hexdigest()[:8]
    async with writing(tmp_path, Failing()) as parts:
        keys = [
            (await parts.writer.write("t/1", each, OutputOptions(), Backend(png()))).key
            for each in (
                msgspec.structs.replace(plain, node_id=node) for node in ("a_b", "a-b", f"a-b-{tail}", "a.b")
            )
        ]
    assert len(set(keys)) == len(keys)


async def test_a_text_that_is_too_long_for_the_task_is_a_file(tmp_path: Path) -> None:
    storage = Failing()
    async with writing(tmp_path, storage) as parts:
        text = output_file("text.txt", type=OutputType.TEXT, text="x" * 70_000)
        artefact = await parts.writer.write("t/1", text, OutputOptions(), text_source)
    assert artefact.text is None
    assert len(storage.kept[artefact.key]) == 70_000


async def test_a_full_disk_of_this_machine_is_waited_for_and_given_up_in_words(tmp_path: Path) -> None:
    source = Backend(bytes(100_000), content_type="application/octet-stream")
    async with writing(tmp_path, Failing(), clock := HandClock(), retry_ms=60_000) as parts:
        with small_disk(5_000), pytest.raises(StorageError, match="File too large") as caught:
            await parts.writer.write("t/1", output_file("a.bin"), OutputOptions(), source)
        assert not caught.value.retryable
        assert source.asked > 10
        assert max(clock.slept) == MOST_PAUSE_MS
        artefact = await parts.writer.write("t/1", output_file("a.bin"), OutputOptions(), source)
    assert artefact.size_bytes == 100_000


async def test_an_output_that_is_fetched_to_a_full_disk_can_be_broken_off(tmp_path: Path) -> None:
    """As SIGTERM and a cancel do it: what they wait for must end."""
    dry = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        yield bytes(BLOCK + 100)  # the last 100 are in Python's buffer then
        dry.set()
        await asyncio.Event().wait()

    @asynccontextmanager
    async def source(_: OutputFile) -> AsyncIterator[OutputStream]:
        yield OutputStream(size_bytes=2 * BLOCK, content_type="image/png", chunks=chunks())

    async with writing(tmp_path, Failing(), SystemClock()) as parts:
        with small_disk(BLOCK):
            fetching = asyncio.ensure_future(
                parts.writer.write("t/1", output_file(), OutputOptions(), source)
            )
            await dry.wait()
            fetching.cancel()
            await asyncio.wait({fetching}, timeout=10)
            assert fetching.cancelled()


@pytest.mark.parametrize(
    ("filename", "kind", "content_type"),
    [
        ("a.png", OutputType.IMAGE, "image/png"),
        ("render", OutputType.FILE, "image/png"),
        ("render.custom", OutputType.FILE, "image/png"),
        ("A.B.PNG", OutputType.IMAGE, "image/png"),
    ],
)
async def test_a_converted_file_is_forgotten_under_the_name_that_it_got(
    tmp_path: Path, filename: str, kind: OutputType, content_type: str
) -> None:
    storage = Failing()
    file, options = output_file(filename, type=kind), OutputOptions(format="jpeg")
    async with writing(tmp_path, storage) as parts:
        artefact = await parts.writer.write("t/1", file, options, Backend(png(), content_type=content_type))
        assert artefact.content_type == "image/jpeg"
        assert artefact.name.endswith(".jpg")
        assert list(storage.kept) == [artefact.key]
        await parts.writer.forget("t/1", [file], options)
    assert storage.kept == {}


async def test_what_a_fallback_refuses_and_what_cannot_be_converted_come_out_as_they_are(
    tmp_path: Path,
) -> None:
    async with writing(tmp_path, Failing(NotAccepted("never"))) as parts:
        with pytest.raises(NotAccepted):
            await parts.writer.write("t/1", output_file(), OutputOptions(), Backend(png()))
        options = OutputOptions(format="webp")
        with pytest.raises(MediaError):
            await parts.writer.write("t/1", output_file(), options, Backend(b"no picture"))


@pytest.mark.parametrize("options", [OutputOptions(format="webp"), OutputOptions(strip=True)])
async def test_a_file_that_is_dropped_while_it_is_converted_leaves_none_behind(
    tmp_path: Path, options: OutputOptions
) -> None:
    threads = 4
    picture = Image.new("RGB", (400, 400), "red")
    buffer, texts = io.BytesIO(), PngInfo()
    texts.add_text("prompt", CANARY)
    picture.save(buffer, "PNG", pnginfo=texts)

    async def every_thread_is_free() -> None:
        together = threading.Barrier(threads)
        await asyncio.gather(*[asyncio.to_thread(together.wait, 20) for _ in range(threads)])
        for shaping in threading.enumerate():
            if shaping.name == "comfyd-shaping":
                await asyncio.to_thread(shaping.join, 20)

    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(threads) as executor:
        loop.set_default_executor(executor)
        async with writing(tmp_path, storage := Failing()) as parts:
            for moment in range(40):
                write = asyncio.ensure_future(
                    parts.writer.write("t/1", output_file(), options, Backend(buffer.getvalue()))
                )
                await asyncio.sleep(moment / 4_000)
                write.cancel()
                await asyncio.gather(write, return_exceptions=True)
                await every_thread_is_free()
                assert list((tmp_path / "tmp").iterdir()) == []
                storage.kept.clear()


HTML = b"<!DOCTYPE html><html><body><script>alert(1)</script></body></html>"


@pytest.mark.parametrize(
    ("filename", "data", "announced", "kind", "media_type"),
    [
        ("a.png", png(), "image/png", OutputType.IMAGE, "image/png"),
        ("a", png(), "application/octet-stream", OutputType.IMAGE, "image/png"),
        ("a.html", png(), "text/html", OutputType.IMAGE, "image/png"),
        ("a.png", HTML, "image/png", OutputType.FILE, "text/html"),
        (
            "a.bin",
            b"\x00\x01\x02\x03",
            "application/octet-stream",
            OutputType.FILE,
            "application/octet-stream",
        ),
        ("a.txt", b"just text", "text/plain; charset=utf-8", OutputType.TEXT, "text/plain; charset=utf-8"),
    ],
)
async def test_what_an_output_is_its_content_says(
    tmp_path: Path, filename: str, data: bytes, announced: str, kind: OutputType, media_type: str
) -> None:
    named = {"png": OutputType.IMAGE, "txt": OutputType.TEXT}.get(
        filename.rpartition(".")[2], OutputType.FILE
    )
    file = output_file(filename, type=named)
    async with writing(tmp_path, Failing()) as parts:
        source = Backend(data, content_type=announced)
        artefact = await parts.writer.write("t/1", file, OutputOptions(), source)
    assert (artefact.type, artefact.content_type) == (kind, media_type)


class Healing(HandClock):
    """A clock under which the disk has room again as soon as somebody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def sleep(self, milliseconds: int) -> None:
        """See `HandClock`."""
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        await super().sleep(milliseconds)


@pytest.mark.parametrize("wanted", [OutputOptions(format="png"), OutputOptions(strip=True)])
async def test_a_disk_without_room_for_what_is_made_of_a_file_is_waited_for(
    tmp_path: Path, wanted: OutputOptions
) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((256, 256), 80).save(buffer, "JPEG", comment=b"a prompt " * 100)
    data = buffer.getvalue()
    clock = Healing()
    room = len(data) if wanted.format else 1_000

    @asynccontextmanager
    async def source(file: OutputFile) -> AsyncIterator[OutputStream]:
        async with Backend(data, content_type="image/jpeg")(file) as stream:
            yield stream
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, clock.limits[1]))

    try:
        async with writing(tmp_path, storage := Failing(), clock) as parts:
            artefact = await parts.writer.write("t/1", output_file("a.jpg"), wanted, source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, clock.limits)
    assert clock.slept != []
    assert storage.kept[artefact.key].startswith(b"\x89PNG" if wanted.format else b"\xff\xd8")


# large ones


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Bytes by which this process is larger at its largest within the block than before it; by sampling."""
    found: list[int] = []
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would hide what this one takes
    before, highest, done = resident(), 0, threading.Event()

    def sample() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, resident())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found.append(max(highest - before, 0))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Endless:
    """A source of that many zeros, which are nowhere before they are asked for."""

    def __init__(self, size: int) -> None:
        self._size = size

    @asynccontextmanager
    async def __call__(self, _: OutputFile) -> AsyncIterator[OutputStream]:
        chunk = bytes(1 << 18)

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(self._size // len(chunk)):
                yield chunk

        yield OutputStream(size_bytes=self._size, content_type="application/octet-stream", chunks=chunks())


async def stored_large(config: Config, size: int) -> tuple[int, Artefact]:
    """Store a file of that size under this configuration; the growth of this process, and the artefact."""
    clock = SystemClock()
    async with open_storages(config, clock) as storages, open_scratch(config.temporary) as scratch:
        terms = StoringTerms(retry_ms=1, inline_bytes=1 << 20)
        writer = ArtefactWriter(storages, scratch, Health(), Metrics(), clock, terms)
        small = await writer.write("warm/1", output_file("a.bin"), OutputOptions(), Backend(b"x" * 1_000))
        assert small.size_bytes == 1_000
        options = OutputOptions(inline=True, format="webp")
        file = output_file("large.bin", type=OutputType.FILE)
        with peak_memory() as grown:
            artefact = await writer.write("t/1", file, options, Endless(size))
        assert list(config.temporary.iterdir()) == []
    return grown[0], artefact


LARGE = 256 << 20


async def test_a_large_output_is_stored_in_little_memory(tmp_path: Path) -> None:
    config = configuration(tmp_path / "data")
    grown, artefact = await stored_large(config, LARGE)
    assert grown <= 32 << 20
    assert (artefact.size_bytes, artefact.data) == (LARGE, None)
    assert (config.files / artefact.key).stat().st_size == LARGE
    assert artefact.sha256 == sha256_of_zeros(LARGE)


def sha256_of_zeros(size: int) -> str:
    digest = hashlib.sha256()
    for _ in range(size >> 20):
        digest.update(bytes(1 << 20))
    return digest.hexdigest()
