"""Files from wherever the client has them, through comfyd, into a simulated ComfyUI, and out again."""

import asyncio
import contextlib
import errno
import hashlib
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
import pytest

from comfyd.app import open_ground, wire, working
from comfyd.clock import SystemClock
from comfyd.config import Config, InputsConfig, OutboundConfig
from comfyd.errors import InputError
from comfyd.guard import Guard, open_client
from comfyd.scratch import Scratch
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.simulator.options import FlavorName
from comfyd.tasks import Graph, Status, Task
from tests.support.service import Bench, bench, configuration, sampled, simulator_of, until
from tests.support.sources import Sources, color_of, data_uri, open_sources, png, wav
from tests.support.trap import open_trap
from tests.test_worker import starts

RED, GREEN, BLUE = 0xFF0000, 0x00FF00, 0x0000FF
HTML = b"<!DOCTYPE html><html><body>Not here</body></html>"


@pytest.fixture
async def simulator(request: pytest.FixtureRequest) -> AsyncIterator[Simulator]:
    flavor: FlavorName = getattr(request, "param", "0.3.75")
    async with Simulator(SimulatorOptions(step_seconds=0.01, flavor=flavor)) as made:
        yield made


both_flavors = pytest.mark.parametrize("simulator", ["0.3.75", "0.33"], indirect=True)


@pytest.fixture
async def sources() -> AsyncIterator[Sources]:
    async with open_sources() as made:
        yield made


def settings(
    data: Path, *simulators: Simulator, in_flight: int = 2, inputs: InputsConfig | None = None, **queue: Any
) -> Config:
    """A configuration whose urls may lead to 127.0.0.1, and to nothing else that is not public."""
    made = configuration(data, *(each.url for each in simulators), **queue)
    return msgspec.structs.replace(
        made,
        comfyui=tuple(msgspec.structs.replace(each, in_flight=in_flight) for each in made.comfyui),
        outbound=OutboundConfig(allow=("127.0.0.1",)),
        inputs=inputs or InputsConfig(),
    )


@pytest.fixture
async def made(simulator: Simulator, tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(settings(tmp_path / "data", simulator)) as running:
        yield running


def loading(value: object, prefix: str = "o") -> Graph:
    """A graph that gives a picture back as it is."""
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": value}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def stored(made: Bench, row: Task, index: int = 0) -> bytes:
    """An output as it lies in the local storage."""
    return (made.ground.config.files / row.artefacts[index].key).read_bytes()


def given(simulator: Simulator) -> list[str]:
    """The files that ComfyUI was given."""
    return sorted(path.name for path in simulator.folders.roots["input"].iterdir())


def named(data: bytes, extension: str = "png") -> str:
    return f"{hashlib.sha256(data).hexdigest()}.{extension}"


def left(made: Bench) -> list[str]:
    """The names of all files that are on their way or kept as inputs."""
    config = made.ground.config
    folders = (config.temporary, config.uploads)
    return sorted(path.name for folder in folders for path in folder.rglob("*") if path.is_file())


def error_of(row: Task) -> str:
    assert row.error is not None
    return row.error.code


async def graph_of(made: Bench, row: Task) -> Graph:
    graph = await made.store.graph(row.id)
    assert graph is not None
    return graph


async def succeeded(made: Bench, workflow: Any, **facts: Any) -> Task:
    row = await made.ended((await made.submit(workflow, **facts)).id)
    assert row.status is Status.SUCCEEDED, row.error
    return row


# every way in


@both_flavors
async def test_a_picture_from_a_url_comes_out_again(
    made: Bench, sources: Sources, simulator: Simulator
) -> None:
    url = sources.file("/a/red.jpg", png(RED))
    row = await succeeded(made, loading(url))
    assert color_of(stored(made, row)) == RED
    assert given(simulator) == [named(png(RED))]  # its content says that it is a png
    assert (await graph_of(made, row))["1"]["inputs"]["image"] == url
    assert left(made) == []


async def test_a_picture_from_a_url_that_redirects_comes_out_again(made: Bench, sources: Sources) -> None:
    sources.file("/new.png", png(GREEN))
    sources.redirect("/middle", "new.png")
    row = await succeeded(made, loading(sources.redirect("/old", sources.url + "/middle")))
    assert color_of(stored(made, row)) == GREEN
    assert sources.asked == ["/old", "/middle", "/new.png"]


async def test_a_picture_from_a_data_uri_comes_out_again(made: Bench, simulator: Simulator) -> None:
    row = await succeeded(made, loading(data_uri(png(RED))))
    assert color_of(stored(made, row)) == RED
    assert (await graph_of(made, row))["1"]["inputs"]["image"] == f"upload:{named(png(RED))}"
    assert given(simulator) == [named(png(RED))]


async def test_an_uploaded_picture_comes_out_again(made: Bench) -> None:
    upload = await made.state.uploads.add_data_uri(data_uri(png(GREEN)))
    row = await succeeded(made, loading(upload.reference))
    assert color_of(stored(made, row)) == GREEN
    assert left(made) == [upload.file]
    await made.state.control.delete(row.id)
    assert left(made) == []


@pytest.mark.parametrize("way", ["url", "redirect", "data", "upload"])
async def test_a_template_takes_its_picture_from_anywhere(made: Bench, sources: Sources, way: str) -> None:
    picture = png(RED, (64, 32))
    ways = {
        "url": sources.file("/red.png", picture),
        "redirect": sources.redirect("/old", "/red.png"),
        "data": data_uri(picture),
        "upload": (await made.state.uploads.add_data_uri(data_uri(picture))).reference,
    }
    row = await succeeded(
        made, "image-to-image", inputs={"image": ways[way], "prompt": "a cat", "denoise": 0.01, "steps": 2}
    )
    assert (row.artefacts[0].width, row.artefacts[0].height) == (64, 32)
    assert color_of(stored(made, row)) >> 16 > 0xC0  # nearly as red as what went in
    assert row.inputs is not None
    assert row.inputs["image"] == (ways["upload"] if way == "data" else ways[way])


async def test_inputs_of_a_raw_graph_bring_files_too(made: Bench, sources: Sources) -> None:
    row = await succeeded(made, loading("nothing.png"), inputs={"1.image": sources.file("/a", png(RED))})
    assert color_of(stored(made, row)) == RED


async def test_a_mask_comes_as_a_file_and_as_the_transparency_of_one(made: Bench, sources: Sources) -> None:
    graph = {
        "1": {
            "class_type": "LoadImageMask",
            "inputs": {"image": sources.file("/mask.png", png(0x400000)), "channel": "red"},
        },
        "2": {"class_type": "MaskToImage", "inputs": {"mask": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "file"}},
        "4": {"class_type": "LoadImage", "inputs": {"image": data_uri(png(RED, alpha=0xC0))}},
        "5": {"class_type": "MaskToImage", "inputs": {"mask": ["4", 1]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "alpha"}},
    }
    row = await succeeded(made, graph)
    shades = {artefact.node_id: color_of(stored(made, row, n)) for n, artefact in enumerate(row.artefacts)}
    assert shades == {"3": 0x404040, "6": 0x3F3F3F}


async def test_a_url_in_a_text_is_left_to_the_node(made: Bench, sources: Sources) -> None:
    url = sources.file("/a.png", png())
    graph = {
        "1": {"class_type": "PrimitiveString", "inputs": {"value": url}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    row = await succeeded(made, graph)
    assert [artefact.text for artefact in row.artefacts] == [url]
    assert sources.asked == []


# each once, several at once


async def test_one_url_in_several_inputs_is_fetched_once(
    made: Bench, sources: Sources, simulator: Simulator
) -> None:
    url = sources.file("/a.png", png(RED))
    graph = {**loading(url), "3": {"class_type": "LoadImage", "inputs": {"image": f" {url}"}}}
    graph["4"] = {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "p"}}
    row = await succeeded(made, graph)
    assert [color_of(stored(made, row, index)) for index in (0, 1)] == [RED, RED]
    assert sources.count("/a.png") == 1
    assert given(simulator) == [named(png(RED))]


def many(urls: Sequence[str]) -> Graph:
    """A graph that gives so many pictures back."""
    graph = {}
    for number, url in enumerate(urls):
        for key, node in loading(url, f"o{number}").items():
            inputs = {**node["inputs"], **({"images": [f"{number}-1", 0]} if key == "2" else {})}
            graph[f"{number}-{key}"] = {**node, "inputs": inputs}
    return graph


async def test_ten_urls_of_one_task_are_open_at_once(made: Bench, sources: Sources) -> None:
    urls = sources.together("/", [png(number) for number in range(10)])
    row = await succeeded(made, many(urls))
    colors = {artefact.node_id: color_of(stored(made, row, n)) for n, artefact in enumerate(row.artefacts)}
    assert colors == {f"{number}-2": number for number in range(10)}
    assert (sources.most_open, len(sources.asked)) == (10, 10)


async def test_no_more_than_configured_are_open_at_once(
    simulator: Simulator, sources: Sources, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    urls = [sources.hang(f"/{number}", gate, png(number)) for number in range(9)]
    async with bench(settings(tmp_path / "data", simulator, inputs=InputsConfig(at_once=3))) as made:
        row = await made.submit(many(urls))
        await until(lambda: sources.open == 3)
        gate.set()
        assert (await made.ended(row.id)).status is Status.SUCCEEDED
    assert (sources.most_open, len(sources.asked)) == (3, 9)


# what cannot be fetched


async def failed_before_comfyui(
    made: Bench, simulator: Simulator, workflow: Graph, code: str, attempts: int = 1
) -> Task:
    """The task, failed with that code; ComfyUI saw nothing, and nothing is left."""
    row = await made.ended((await made.submit(workflow)).id)
    assert (row.status, error_of(row), row.attempt_count) == (Status.FAILED, code, attempts)
    assert row.error is not None
    assert row.error.details["input"] == "1.image"
    assert "\n" not in row.error.message
    assert all(attempt.intent_at is None for attempt in row.attempts)
    assert (starts(simulator), given(simulator), left(made)) == ([], [], [])
    return row


async def test_a_url_that_is_not_there_fails_the_task(
    made: Bench, sources: Sources, simulator: Simulator
) -> None:
    row = await failed_before_comfyui(
        made, simulator, loading(sources.url + "/gone?token=secret"), "fetch_failed"
    )
    assert row.error is not None
    assert row.error.details["status"] == 404
    assert "secret" not in row.error.message


@pytest.mark.parametrize("body", [HTML, b"words", wav(), b""], ids=["html", "text", "wav", "empty"])
async def test_a_url_whose_content_is_none_for_the_input_fails_the_task(
    made: Bench, sources: Sources, simulator: Simulator, body: bytes
) -> None:
    url = sources.file("/a.png", body, "image/png")
    await failed_before_comfyui(made, simulator, loading(url), "unsupported_content")


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (InputsConfig(max_bytes=50), "input_too_large"),
        (InputsConfig(pixels=200), "input_too_large"),
        (InputsConfig(timeout=0.2), "input_too_slow"),
    ],
    ids=["bytes", "pixels", "slow"],
)
async def test_a_url_beyond_a_limit_fails_the_task(
    simulator: Simulator, sources: Sources, tmp_path: Path, limits: InputsConfig, code: str
) -> None:
    url = sources.file("/a.png", png()) if code == "input_too_large" else sources.endless("/a", png()[:50])
    async with bench(settings(tmp_path / "data", simulator, inputs=limits)) as made:
        await failed_before_comfyui(made, simulator, loading(url), code)


async def test_a_file_of_unknown_length_that_is_too_large_fails_the_task(
    simulator: Simulator, sources: Sources, tmp_path: Path
) -> None:
    url = sources.endless("/a", png() + bytes(1_000))
    limits = InputsConfig(max_bytes=1_000)
    async with bench(settings(tmp_path / "data", simulator, inputs=limits)) as made:
        await failed_before_comfyui(made, simulator, loading(url), "input_too_large")


async def test_a_redirect_inward_fails_the_task_and_reaches_nobody(
    made: Bench, sources: Sources, simulator: Simulator
) -> None:
    async with open_trap(host="127.0.0.2") as trap:
        inward = [
            f"http://127.0.0.2:{trap.port}/",
            f"http://[::ffff:127.0.0.2]:{trap.port}/",
            f"http://2130706434:{trap.port}/",
        ]
        for number, location in enumerate(inward):
            url = sources.redirect(f"/{number}", location)
            await failed_before_comfyui(made, simulator, loading(url), "blocked_address")
        file = sources.redirect("/file", "file:///etc/passwd")
        await failed_before_comfyui(made, simulator, loading(file), "invalid_url")
        assert trap.accepted == 0


async def test_a_url_that_is_refused_at_submit_reaches_nobody(made: Bench) -> None:
    async with open_trap(host="127.0.0.2") as trap:
        for host in ("127.0.0.2", "2130706434", "0x7f.2", "[::ffff:127.0.0.2]", "127.0.0.2.", "a@127.0.0.2"):
            with pytest.raises(InputError):
                await made.submit(loading(f"http://{host}:{trap.port}/a.png"))
        assert trap.accepted == 0
    assert (await made.store.counts())[Status.QUEUED] == 0


@asynccontextmanager
async def bench_with_names(config: Config, names: dict[str, list[str]]) -> AsyncIterator[Bench]:
    """A comfyd for which the name server says this, and nothing inward is allowed."""

    async def lookup(host: str) -> Sequence[str]:
        return names[host]

    async with (
        open_ground(config, SystemClock()) as opened,
        open_client(Guard.of([]), lookup=lookup) as outbound,
    ):
        service = wire(msgspec.structs.replace(opened, outbound=outbound))
        async with working(service, 200, asyncio.Event()):
            yield Bench(opened, service)


async def test_a_host_that_resolves_inward_fails_the_task_and_reaches_nobody(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with open_trap(host="127.0.0.2") as trap:
        names = {"pictures.example": ["127.0.0.2"], "mixed.example": ["127.0.0.2", "::1"]}
        async with bench_with_names(settings(tmp_path / "data", simulator), names) as made:
            for host in names:
                url = f"http://{host}:{trap.port}/a.png"
                await failed_before_comfyui(made, simulator, loading(url), "blocked_address")
        assert trap.accepted == 0


async def test_one_file_that_fails_ends_the_others_at_once(
    made: Bench, sources: Sources, simulator: Simulator
) -> None:
    slow = sources.hang("/slow")
    row = await made.ended((await made.submit(many([slow, sources.url + "/gone"]))).id)
    assert (error_of(row), row.error and row.error.details["input"]) == ("fetch_failed", "1-1.image")
    await until(lambda: sources.open == 0)
    assert left(made) == []
    assert given(simulator) == []


# what may pass


async def test_a_server_that_recovers_is_asked_again(made: Bench, sources: Sources) -> None:
    row = await succeeded(made, loading(sources.refuse("/a", 503, times=1, then=png(RED))))
    assert color_of(stored(made, row)) == RED
    assert (row.attempt_count, sources.count("/a")) == (1, 2)


async def test_a_server_that_is_not_there_costs_all_attempts(simulator: Simulator, tmp_path: Path) -> None:
    async with open_sources() as gone:
        url = gone.file("/a.png", png())
    config = settings(tmp_path / "data", simulator, inputs=InputsConfig(attempts=1), max_attempts=2)
    async with bench(config) as made:
        row = await failed_before_comfyui(made, simulator, loading(url), "fetch_failed", attempts=2)
    assert (row.failures, [attempt.outcome for attempt in row.attempts]) == (2, ["failed", "failed"])


async def test_a_comfyui_that_takes_no_files_costs_all_attempts(
    simulator: Simulator, sources: Sources, tmp_path: Path
) -> None:
    simulator.faults.http_statuses["/upload/image"] = 500
    async with bench(settings(tmp_path / "data", simulator, max_attempts=2)) as made:
        row = await made.ended((await made.submit(loading(sources.file("/a", png())))).id)
        assert (row.status, row.failures, error_of(row)) == (Status.FAILED, 2, "backend_unclear")
        assert left(made) == []
    assert starts(simulator) == []


async def test_a_server_that_stays_down_costs_all_attempts(
    simulator: Simulator, sources: Sources, tmp_path: Path
) -> None:
    url = sources.refuse("/a", 503)
    config = settings(tmp_path / "data", simulator, inputs=InputsConfig(attempts=1), max_attempts=3)
    async with bench(config) as made:
        row = await failed_before_comfyui(made, simulator, loading(url), "fetch_failed", attempts=3)
    assert (row.failures, sources.count("/a")) == (3, 3)
    pauses = [
        later.claimed_at - earlier.ended_at
        for earlier, later in zip(row.attempts, row.attempts[1:], strict=False)
        if earlier.ended_at is not None
    ]
    assert len(pauses) == 2
    assert all(pause >= 5 for pause in pauses)  # half of the configured 10 ms at least


# the GPU does not wait


async def running(made: Bench, seed: int = 1, steps: int = 1_000) -> Task:
    """A long prompt that is being executed."""
    row = await made.submit(sampled(seed, steps))
    return await made.until(
        lambda row: row.attempts != () and row.attempts[0].seen_running_at is not None, row.id
    )


async def test_while_one_prompt_runs_the_next_ones_files_are_there_already(
    simulator: Simulator, sources: Sources, tmp_path: Path
) -> None:
    async with bench(settings(tmp_path / "data", simulator, in_flight=1, prefetch=2)) as made:
        long = await running(made)
        waiting = [await made.submit(loading(sources.file(f"/{n}", png(n)), f"o{n}")) for n in range(2)]
        await until(lambda: given(simulator) == sorted(named(png(n)) for n in range(2)))
        assert (await made.task(long.id)).status is Status.RUNNING
        assert starts(simulator) == [long.attempts[0].id]
        await made.state.control.cancel(long.id)
        rows = [await made.ended(row.id) for row in waiting]
    assert [color_of(stored(made, row)) for row in rows] == [0, 1]
    assert len(sources.asked) == 2


async def test_slow_urls_do_not_keep_others_from_the_gpu(
    simulator: Simulator, sources: Sources, tmp_path: Path
) -> None:
    config = settings(tmp_path / "data", simulator, in_flight=1, prefetch=1, workers=16)
    async with bench(config) as made:
        slow = [await made.submit(loading(sources.hang(f"/slow{number}"))) for number in range(6)]
        await until(lambda: sources.open == 6)
        later = [await made.submit(loading(sources.file(f"/{n}", png(n)), f"o{n}")) for n in range(5)]
        for row in later:
            assert (await made.ended(row.id)).status is Status.SUCCEEDED
        for row in slow:
            assert (await made.task(row.id)).status is Status.RUNNING
            await made.state.control.cancel(row.id)
        for row in slow:
            assert (await made.ended(row.id)).status is Status.CANCELED
        await until(lambda: sources.open == 0)
        assert left(made) == []


async def test_an_urgent_task_overtakes_those_whose_files_are_there(
    simulator: Simulator, sources: Sources, tmp_path: Path
) -> None:
    async with bench(settings(tmp_path / "data", simulator, in_flight=1, prefetch=2)) as made:
        long = await running(made)
        prepared = await made.submit(loading(sources.file("/1", png(1)), "o1"))
        await until(lambda: given(simulator) == [named(png(1))])
        urgent = await made.submit(loading(sources.file("/2", png(2)), "o2"), priority=50)
        await until(lambda: len(given(simulator)) == 2)
        await made.state.control.cancel(long.id)
        rows = [await made.ended(row.id) for row in (urgent, prepared)]
    assert starts(simulator)[1:] == [row.attempts[0].id for row in rows]


async def test_a_canceled_task_lets_go_of_its_download_at_once(
    made: Bench, sources: Sources, simulator: Simulator
) -> None:
    row = await made.submit(loading(sources.endless("/a", png())))
    await until(lambda: sources.open == 1)
    await made.state.control.cancel(row.id)
    async with asyncio.timeout(3):
        ended = await made.ended(row.id)
    assert ended.status is Status.CANCELED
    await until(lambda: sources.left["/a"] == 1)
    assert (left(made), given(simulator), ended.attempts[0].intent_at) == ([], [], None)


async def test_a_canceled_task_lets_go_of_its_upload_at_once(
    made: Bench, sources: Sources, simulator: Simulator, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    row = await made.submit(loading(sources.hang("/a", gate, png() + bytes(20_000_000))))
    await until(lambda: sources.open == 1)
    simulator.faults.http_delay_seconds = 60  # it reads no more than what fits into its buffers
    gate.set()
    await until(lambda: sources.open == 0 and reading(tmp_path / "data" / "tmp") == 1)
    await made.state.control.cancel(row.id)
    async with asyncio.timeout(3):
        assert (await made.ended(row.id)).status is Status.CANCELED
    await until(lambda: reading(tmp_path / "data" / "tmp") == 0)
    simulator.faults.http_delay_seconds = 0
    assert left(made) == []
    assert given(simulator) == []


def reading(folder: Path) -> int:
    """How many files of a folder this process has open to read."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            flags = Path("/proc/self/fdinfo", descriptor.name).read_text().split("flags:")[1].split()[0]
            found += descriptor.readlink().parent == folder and int(flags, 8) & os.O_ACCMODE == os.O_RDONLY
    return found


# crashes


async def test_a_crash_while_fetching_loses_nothing(
    simulator: Simulator, sources: Sources, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    url = sources.hang("/a", gate, png(RED))
    config = settings(tmp_path / "data", simulator)
    async with bench(config, grace_ms=0) as made:
        row = await made.submit(loading(url))
        await until(lambda: sources.open == 1)
    (tmp_path / "data" / "tmp" / "half").write_bytes(b"what a killed process leaves")
    gate.set()
    async with bench(config) as made:
        ended = await made.ended(row.id)
        assert left(made) == []
    assert (ended.status, ended.attempt_count, ended.failures) == (Status.SUCCEEDED, 1, 0)
    assert color_of(stored(made, ended)) == RED
    assert sources.count("/a") == 2
    assert len(starts(simulator)) == 1


async def test_a_comfyui_that_is_down_costs_no_attempt(
    simulator: Simulator, sources: Sources, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    url = sources.hang("/a", gate, png(RED))
    async with bench(settings(tmp_path / "data", simulator, max_attempts=1)) as made:
        row = await made.submit(loading(url))
        await until(lambda: sources.open == 1)
        await simulator.crash()
        gate.set()
        await made.until(lambda row: row.status is Status.QUEUED, row.id)
        await simulator.restart()
        ended = await made.ended(row.id)
        assert left(made) == []
    assert (ended.status, ended.failures) == (Status.SUCCEEDED, 0)
    assert [attempt.outcome for attempt in ended.attempts] == ["lost", "succeeded"]
    assert color_of(stored(made, ended)) == RED


async def test_files_that_a_restarted_comfyui_has_lost_are_given_to_it_again(
    simulator: Simulator, sources: Sources, tmp_path: Path
) -> None:
    async with bench(settings(tmp_path / "data", simulator, in_flight=1)) as made:
        long = await running(made)
        row = await made.submit(loading(sources.file("/a", png(RED))))
        await until(lambda: given(simulator) == [named(png(RED))])
        await made.state.control.cancel(long.id)
        await simulator.crash()
        for path in simulator.folders.roots["input"].iterdir():
            path.unlink()
        await simulator.restart()
        ended = await made.ended(row.id)
    assert ended.status is Status.SUCCEEDED, ended.error
    assert color_of(stored(made, ended)) == RED


async def test_what_was_submitted_while_comfyui_was_down_is_brought_later(
    simulator: Simulator, sources: Sources, tmp_path: Path
) -> None:
    await simulator.crash()
    async with bench(settings(tmp_path / "data", simulator)) as made:
        url = await made.submit(loading(sources.file("/a", png(RED))))
        uri = await made.submit(loading(data_uri(png(BLUE))))
        await simulator.restart()
        assert color_of(stored(made, await made.ended(url.id))) == RED
        assert color_of(stored(made, await made.ended(uri.id))) == BLUE
    assert given(simulator) == sorted([named(png(RED)), named(png(BLUE))])


# several ComfyUIs


async def test_files_are_given_to_the_comfyui_that_runs_the_task(
    simulator: Simulator, sources: Sources, tmp_path: Path
) -> None:
    async with Simulator(SimulatorOptions(step_seconds=0.01)) as other:
        config = settings(tmp_path / "data", simulator, other, in_flight=1, prefetch=0)
        async with bench(config) as made:
            await until(lambda: all(backend.state.ready for backend in made.ground.backends))
            rows = [await made.submit(loading(sources.file(f"/{n}", png(n)), f"o{n}")) for n in range(6)]
            ended = [await made.ended(row.id) for row in rows]
        ran = {"comfyui-0": simulator, "comfyui-1": other}
        assert {row.attempts[0].backend for row in ended} == set(ran)
        for number, row in enumerate(ended):
            place = ran[row.attempts[0].backend or ""]
            assert row.attempts[0].id in simulator_of(place)
            assert color_of(stored(made, row)) == number
        for backend, place in ran.items():
            own = [n for n, row in enumerate(ended) if row.attempts[0].backend == backend]
            assert given(place) == sorted(named(png(n)) for n in own)


class FullPath(type(Path())):  # type: ignore[misc] # how 3.11 lets a path be subclassed
    """A place on a disk that has no room."""

    def open(self, *_: object, **__: object) -> IO[Any]:
        """As the kernel does it."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullAtFirst(Scratch):
    """A scratch folder whose disk is full for the first few files."""

    def __init__(self, folder: Path, left: int) -> None:
        super().__init__(folder)
        self.left = left

    @asynccontextmanager
    async def file(self) -> AsyncIterator[Path]:
        """See `Scratch`."""
        async with super().file() as path:
            self.left -= 1
            yield FullPath(path) if self.left >= 0 else path


@pytest.mark.fault(23)
async def test_inputs_wait_for_room_on_a_full_disk_and_cost_no_attempt(
    simulator: Simulator, sources: Sources, tmp_path: Path
) -> None:
    config = settings(tmp_path / "data", simulator)
    async with open_ground(config, SystemClock()) as ground:
        full = FullAtFirst(config.temporary, 1)
        service = wire(msgspec.structs.replace(ground, scratch=full))
        async with working(service, 200, asyncio.Event()):
            made = Bench(ground, service)
            task = await made.ended((await made.submit(loading(sources.file("/a", png(RED))))).id)
            assert color_of(stored(made, task)) == RED
    assert full.left < 0
    assert (task.failures, len(task.attempts)) == (0, 1)


class SmallDisk(Scratch):
    """A scratch folder whose disk holds so many files at a time."""

    def __init__(self, folder: Path, most: int) -> None:
        super().__init__(folder)
        self.most = most
        self.held = 0

    @asynccontextmanager
    async def file(self) -> AsyncIterator[Path]:
        """See `Scratch`."""
        async with super().file() as path:
            self.held += 1
            try:
                yield FullPath(path) if self.held > self.most else path
            finally:
                self.held -= 1


@pytest.mark.fault(23)
async def test_tasks_that_wait_for_room_do_not_hold_it_against_each_other(
    simulator: Simulator, sources: Sources, tmp_path: Path
) -> None:
    config = settings(tmp_path / "data", simulator, inputs=InputsConfig(at_once=1))
    async with open_ground(config, SystemClock()) as ground:
        service = wire(msgspec.structs.replace(ground, scratch=SmallDisk(config.temporary, 2)))
        async with working(service, 200, asyncio.Event()):
            made = Bench(ground, service)
            rows = []
            for name in "ab":
                first, second = (sources.file(f"/{name}{n}", png(n)) for n in (1, 2))
                graph = {**loading(first), "7": {"class_type": "LoadImage", "inputs": {"image": second}}}
                graph["8"] = {"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}}
                rows.append(await made.submit(graph))
            ended = [await made.ended(row.id) for row in rows]
    assert [(row.status, row.attempt_count) for row in ended] == [(Status.SUCCEEDED, 1)] * 2
