"""At submit: what a request names or brings is looked at, and of one that is refused nothing is left."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from comfyd.config import Config, InputsConfig, LimitsConfig, OutboundConfig
from comfyd.errors import (
    IdempotencyKeyReuse,
    InputError,
    InputNotFound,
    InvalidInputs,
    InvalidWorkflow,
    QueueFull,
)
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.submission import SubmitRequest
from comfyd.tasks import Graph, IdempotencyKey, Status, Task, TaskFilter
from tests.support.service import Bench, bench, configuration
from tests.support.sources import data_uri, png, wav

RED = png(0xFF0000)
GONE = "upload:" + "0" * 64 + ".png"
HTML = b"<!DOCTYPE html><html><body>Not here</body></html>"


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions()) as made:
        yield made


def settings(simulator: Simulator, data: Path, **changes: Any) -> Config:
    return msgspec.structs.replace(configuration(data, simulator.url), **changes)


@pytest.fixture
async def made(simulator: Simulator, tmp_path: Path) -> AsyncIterator[Bench]:
    changes = {
        "limits": LimitsConfig(queued_tasks=5, string_length=100_000),
        "inputs": InputsConfig(max_bytes=10_000_000, pixels=100_000),
    }
    async with bench(settings(simulator, tmp_path / "data", **changes), works=False) as idle:
        await idle.ground.backends[0].probe()
        yield idle


def loading(value: object, node: str = "LoadImage", name: str = "image") -> Graph:
    """A graph whose node 1 loads a file."""
    return {
        "1": {"class_type": node, "inputs": {name: value}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "o"}},
    }


def left(made: Bench) -> list[str]:
    """The names of all files that are on their way or kept as inputs."""
    config = made.ground.config
    folders = (config.temporary, config.uploads)
    return sorted(path.name for folder in folders for path in folder.rglob("*") if path.is_file())


def file_of(data: bytes, extension: str = "png") -> str:
    return f"{hashlib.sha256(data).hexdigest()}.{extension}"


async def graph_of(made: Bench, row: Task) -> Graph:
    graph = await made.store.graph(row.id)
    assert graph is not None
    return graph


async def refused(made: Bench, workflow: Any, code: str, **facts: Any) -> InputError:
    """The refusal, which left nothing behind."""
    with pytest.raises(InputError) as caught:
        await made.submit(workflow, **facts)
    assert caught.value.code == code
    assert (await made.store.counts())[Status.QUEUED] == 0
    assert left(made) == []
    return caught.value


# what is taken


async def test_a_data_uri_becomes_an_upload_that_the_task_names(made: Bench) -> None:
    row = await made.submit(loading(f"\n{data_uri(RED)} "))
    assert (await graph_of(made, row))["1"]["inputs"]["image"] == f"upload:{file_of(RED)}"
    assert await made.store.uploads(row.id) == (file_of(RED),)
    assert left(made) == [file_of(RED)]


async def test_the_task_echoes_the_reference_and_never_the_data_uri(made: Bench) -> None:
    uri = data_uri(RED)
    raw = await made.submit(loading("x.png"), inputs={"1.image": f" {uri}", "SaveImage.filename_prefix": "p"})
    assert raw.inputs == {"1.image": f"upload:{file_of(RED)}", "SaveImage.filename_prefix": "p"}
    template = await made.submit("image-to-image", inputs={"image": uri, "prompt": "a cat"})
    assert template.inputs is not None
    assert template.inputs["image"] == f"upload:{file_of(RED)}"
    for row in (raw, template):
        assert b"base64" not in msgspec.json.encode([await graph_of(made, row), await made.task(row.id)])


async def test_a_wrapped_data_uri_is_echoed_as_its_reference_too(made: Bench) -> None:
    row = await made.submit(loading("x.png"), inputs={"1.image": {"__value__": data_uri(RED)}})
    assert row.inputs == {"1.image": f"upload:{file_of(RED)}"}


async def test_a_url_is_kept_as_it_was_given(made: Bench) -> None:
    url = "https://pictures.example/a.png?signature=%2Fx"
    row = await made.submit(loading("x.png"), inputs={"1.image": url})
    assert (await graph_of(made, row))["1"]["inputs"]["image"] == url
    assert row.inputs == {"1.image": url}
    assert await made.store.uploads(row.id) == ()
    assert left(made) == []


async def test_an_upload_is_named_by_every_task_that_uses_it_once(made: Bench) -> None:
    upload = await made.state.uploads.add_data_uri(data_uri(RED))
    graph = loading(upload.reference)
    graph["3"] = {"class_type": "LoadImageMask", "inputs": {"image": data_uri(RED), "channel": "red"}}
    graph["4"] = {"class_type": "MaskPreview", "inputs": {"mask": ["3", 0]}}
    first, second = await made.submit(graph), await made.submit(loading(upload.reference))
    for row in (first, second):
        assert await made.store.uploads(row.id) == (upload.file,)
    assert left(made) == [upload.file]


def showing(value: object) -> Graph:
    """A graph that shows a text."""
    return {
        "1": {"class_type": "PrimitiveString", "inputs": {"value": value}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }


async def test_a_reference_is_a_file_of_the_task_wherever_it_stands(made: Bench) -> None:
    picture = await made.state.uploads.add_data_uri(data_uri(RED))
    sound = await made.state.uploads.add_data_uri(data_uri(wav()))
    graph = {**showing(picture.reference), **loading(f" {picture.reference}")}
    graph["3"] = {
        "class_type": "SaveImage",
        "inputs": {"images": ["1", 0], "filename_prefix": sound.reference},
    }
    graph["4"] = showing({"__value__": [[sound.reference]]})["1"]
    graph["5"] = {"class_type": "PreviewAny", "inputs": {"source": ["4", 0]}}
    row = await made.submit(graph)
    assert sorted(await made.store.uploads(row.id)) == sorted([picture.file, sound.file])
    found = await graph_of(made, row)
    assert found["1"]["inputs"]["image"] == picture.reference
    assert found["4"]["inputs"]["value"] == {"__value__": [[sound.reference]]}
    await made.state.control.cancel(row.id)
    await made.state.control.delete(row.id)
    assert left(made) == []


async def test_a_node_is_given_the_name_of_the_file_that_it_has_there(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with bench(settings(simulator, tmp_path / "data")) as made:
        upload = await made.state.uploads.add_data_uri(data_uri(wav()))
        row = await made.ended((await made.submit(showing(upload.reference))).id)
        text = row.artefacts[0].text
        assert text is not None
        assert text.endswith(upload.file)
        assert "upload:" not in text
        assert (simulator.folders.roots["input"] / text).read_bytes() == wav()


@pytest.mark.parametrize("value", [GONE, {"__value__": [{"a": [GONE]}]}])
async def test_a_reference_of_nothing_is_refused_wherever_it_stands(made: Bench, value: object) -> None:
    error = await refused(made, showing(value), "input_not_found")
    assert error.details["input"] == "1.value"


async def test_a_text_with_a_reference_in_it_is_a_text(made: Bench) -> None:
    row = await made.submit(showing(f"use {GONE}"))
    assert (await graph_of(made, row))["1"]["inputs"]["value"] == f"use {GONE}"
    assert await made.store.uploads(row.id) == ()


async def test_a_reference_where_a_number_belongs_is_refused(made: Bench) -> None:
    upload = await made.state.uploads.add_data_uri(data_uri(RED))
    graph = loading(upload.reference)
    graph["1"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": upload.reference, "height": 8, "batch_size": 1, "color": 0},
    }
    with pytest.raises(InvalidWorkflow):
        await made.submit(graph)


async def test_a_file_name_of_comfyuis_own_stays_one(made: Bench, simulator: Simulator) -> None:
    (simulator.folders.roots["input"] / "mine.png").write_bytes(RED)
    row = await made.submit(loading("mine.png"))
    assert (await graph_of(made, row))["1"]["inputs"]["image"] == "mine.png"


async def test_a_text_that_happens_to_be_a_url_is_left_alone(made: Bench) -> None:
    """Nodes that fetch by themselves take a STRING: what they fetch is between them and ComfyUI."""
    graph = loading("http://127.0.0.1/internal", "PrimitiveString", "value")
    graph["2"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    graph["3"] = {"class_type": "PrimitiveString", "inputs": {"value": "data:text/plain,hello"}}
    row = await made.submit(graph)
    assert (await graph_of(made, row))["1"]["inputs"]["value"] == "http://127.0.0.1/internal"


# what is refused, each with its input


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.1/a.png", "blocked_address"),
        ("http://127.1/a.png", "blocked_address"),
        ("http://2130706433/a.png", "blocked_address"),
        ("http://0x7f.0.0.1/a.png", "blocked_address"),
        ("http://[::1]/a.png", "blocked_address"),
        ("http://[::ffff:127.0.0.1]/a.png", "blocked_address"),
        ("http://[64:ff9b::7f00:1]/a.png", "blocked_address"),
        ("http://169.254.169.254/latest/meta-data", "blocked_address"),
        ("http://168.63.129.16/", "blocked_address"),
        ("http://10.0.0.1/", "blocked_address"),
        ("http://localhost/a.png", "blocked_address"),
        ("HTTP://LOCALHOST./a.png", "blocked_address"),
        ("  http://127.0.0.1/a.png\n", "blocked_address"),
        ("http://user@pictures.example/a.png", "invalid_url"),
        ("http://user:secret@pictures.example/a.png", "invalid_url"),
        ("http://pictures.example:99999/a.png", "invalid_url"),
        ("http:///a.png", "invalid_url"),
        ("http:a.png", "invalid_url"),
        ("https://pictures.example/a b.png", "invalid_url"),
        ("ftp://pictures.example/a.png", "invalid_url"),
        ("file:///etc/passwd", "invalid_url"),
        (" gopher://127.0.0.1/x", "invalid_url"),
        ("https://pictures.example/" + "a" * 9_000, "invalid_url"),
    ],
)
async def test_a_url_that_may_not_be_fetched_is_refused_at_submit(made: Bench, url: str, code: str) -> None:
    error = await refused(made, loading(url), code)
    assert error.details["input"] == "1.image"
    assert "secret" not in error.message


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("data:image/png;base64,###", "invalid_data_uri"),
        ("data:image/png;base64,QUJ", "unsupported_content"),
        ("data:image/png,plain", "invalid_data_uri"),
        ("data:image/png;base64,", "unsupported_content"),
        ("data:image/png;base64,QUJD=QUJD", "invalid_data_uri"),
        (GONE, "input_not_found"),
        ("upload:cat.png", "input_not_found"),
        ("upload:../../etc/passwd", "input_not_found"),
        (data_uri(b"just words\n", "image/png"), "unsupported_content"),
        (data_uri(HTML, "image/png"), "unsupported_content"),
        (data_uri(wav(), "image/png"), "unsupported_content"),
        (data_uri(png(size=(1_000, 1_000))), "input_too_large"),
    ],
)
async def test_a_file_that_is_none_for_the_input_is_refused_at_submit(
    made: Bench, value: str, code: str
) -> None:
    error = await refused(made, loading(value), code)
    assert error.details["input"] == "1.image"
    assert len(error.message) < 300
    assert "\n" not in error.message


async def test_an_upload_of_the_wrong_kind_is_refused(made: Bench) -> None:
    upload = await made.state.uploads.add_data_uri(data_uri(wav()))
    with pytest.raises(InputError) as caught:
        await made.submit(loading(upload.reference))
    assert (caught.value.code, caught.value.details["input"]) == ("unsupported_content", "1.image")
    assert left(made) == [upload.file]


async def test_a_data_uri_of_too_many_bytes_is_refused(simulator: Simulator, tmp_path: Path) -> None:
    few = settings(simulator, tmp_path / "data", inputs=InputsConfig(max_bytes=40))
    async with bench(few, works=False) as made:
        error = await refused(made, loading(data_uri(RED)), "input_too_large")
    assert error.details["input"] == "1.image"


async def test_one_bad_file_among_good_ones_is_the_one_that_is_named(made: Bench) -> None:
    graph = loading(data_uri(RED))
    graph["7"] = {"class_type": "LoadImageMask", "inputs": {"image": data_uri(wav()), "channel": "red"}}
    graph["8"] = {"class_type": "MaskPreview", "inputs": {"mask": ["7", 0]}}
    assert (await refused(made, graph, "unsupported_content")).details["input"] == "7.image"


async def test_the_input_of_a_template_is_checked_likewise(made: Bench) -> None:
    values = {"prompt": "a cat"}
    error = await refused(
        made, "image-to-image", "blocked_address", inputs={**values, "image": "http://127.1/a.png"}
    )
    assert error.details["input"] == "10.image"
    with pytest.raises(InvalidInputs) as caught:
        await made.submit("image-to-image", inputs={**values, "image": "ftp://127.1/a.png"})
    assert "image" in caught.value.details["inputs"]


# nothing is left


async def test_a_request_that_is_wrong_elsewhere_leaves_no_file(made: Bench) -> None:
    wrong = loading(data_uri(RED))
    wrong["3"] = {"class_type": "NoSuchClass", "inputs": {}}
    with pytest.raises(InvalidWorkflow):
        await made.submit(wrong)
    with pytest.raises(InvalidWorkflow):
        await made.submit(loading(data_uri(RED)), inputs={"2.images": ["9", 0]})
    assert left(made) == []


async def test_a_full_queue_takes_no_file(made: Bench) -> None:
    for color in range(5):
        await made.submit(loading(data_uri(png(color))))
    before = left(made)
    with pytest.raises(QueueFull):
        await made.submit(loading(data_uri(RED)))
    assert left(made) == before
    assert len(before) == 5


async def test_a_repeated_request_leaves_only_what_the_first_one_did(made: Bench) -> None:
    key = IdempotencyKey(key="k", body_sha256="d")
    request = SubmitRequest(workflow=loading(data_uri(RED)))
    first = await made.state.submission.submit(request, key)
    again = await made.state.submission.submit(request, key)
    assert (again.replayed, again.task.id) == (True, first.task.id)
    assert left(made) == [file_of(RED)]
    await made.state.control.cancel(first.task.id)
    await made.state.control.delete(first.task.id)
    assert left(made) == []


async def test_another_body_under_a_known_key_leaves_no_file(made: Bench) -> None:
    await made.state.submission.submit(
        SubmitRequest(workflow=loading("https://pictures.example/a.png")),
        IdempotencyKey(key="k", body_sha256="d"),
    )
    other = SubmitRequest(workflow=loading(data_uri(RED)))
    with pytest.raises(IdempotencyKeyReuse):
        await made.state.submission.submit(other, IdempotencyKey(key="k", body_sha256="e"))
    assert left(made) == []


async def test_a_refused_request_does_not_take_an_upload_along(made: Bench) -> None:
    upload = await made.state.uploads.add_data_uri(data_uri(RED))
    wrong = loading(data_uri(RED))
    wrong["3"] = {"class_type": "NoSuchClass", "inputs": {}}
    with pytest.raises(InvalidWorkflow):
        await made.submit(wrong)
    assert left(made) == [upload.file]


async def test_the_same_file_in_many_requests_at_once_is_kept_for_those_that_are_taken(made: Bench) -> None:
    wrong = loading(data_uri(RED))
    wrong["3"] = {"class_type": "NoSuchClass", "inputs": {}}
    jobs = [made.submit(wrong if number % 2 else loading(data_uri(RED))) for number in range(10)]
    answers = await asyncio.gather(*jobs, return_exceptions=True)
    rows = [answer for answer in answers if isinstance(answer, Task)]
    assert len(rows) == 5
    for row in rows:
        assert await made.store.uploads(row.id) == (file_of(RED),)
    assert left(made) == [file_of(RED)]


async def test_a_request_that_is_dropped_leaves_nothing(made: Bench) -> None:
    for turns in range(0, 60, 7):
        submitting = asyncio.ensure_future(made.submit(loading(data_uri(png(turns)))))
        for _ in range(turns):
            await asyncio.sleep(0)
        submitting.cancel()
        await asyncio.gather(submitting, return_exceptions=True)
    # one that was dropped too late may have been queued: then, and only then, its file is kept
    named = {
        file
        for task in (await made.store.list_tasks(TaskFilter(), None, 50)).tasks
        for file in await made.store.uploads(task.id)
    }
    assert set(left(made)) == named


# uploads and the tasks that name them


async def test_an_upload_goes_with_the_last_task_that_names_it(made: Bench) -> None:
    upload = await made.state.uploads.add_data_uri(data_uri(RED))
    first, second = await made.submit(loading(upload.reference)), await made.submit(loading(data_uri(RED)))
    await made.state.control.cancel(first.id)
    await made.state.control.delete(first.id)
    assert left(made) == [upload.file]
    await made.state.control.cancel(second.id)
    await made.state.control.delete(second.id)
    assert left(made) == []
    with pytest.raises(InputNotFound):
        await made.submit(loading(upload.reference))


async def test_an_upload_that_a_new_task_is_about_to_name_is_not_deleted_with_an_old_one(made: Bench) -> None:
    old = await made.submit(loading(data_uri(RED)))
    await made.state.control.cancel(old.id)
    intake = made.state.submission._intake  # noqa: SLF001 - the moment between looking and adding is meant
    async with AsyncExitStack() as stack:
        await intake.take(loading(f"upload:{file_of(RED)}"), stack)
        await made.state.control.delete(old.id)
        assert left(made) == [file_of(RED)]


async def test_what_no_task_names_is_swept_when_it_is_old(simulator: Simulator, tmp_path: Path) -> None:
    short = settings(simulator, tmp_path / "data", inputs=InputsConfig(keep=0.001))
    async with bench(short, works=False) as made:
        await made.ground.backends[0].probe()
        await made.submit(loading(data_uri(RED)))
        await made.state.uploads.add_data_uri(data_uri(png(1)))
        async with asyncio.timeout(10):
            while await made.state.uploads.sweep(made.store.unused_uploads, 10) == 0:
                await asyncio.sleep(0.002)  # it is not old yet
        assert left(made) == [file_of(RED)]


# long strings


async def test_a_long_data_uri_is_fine_where_a_file_is_meant_and_nowhere_else(made: Bench) -> None:
    picture = png() + bytes(4_000_000)  # what follows a picture's end belongs to nobody
    uri = data_uri(picture)
    assert len(uri) > 5_000_000
    row = await made.submit(loading(uri))
    assert await made.store.uploads(row.id) == (file_of(picture),)
    text = {
        "1": {"class_type": "PrimitiveString", "inputs": {"value": uri}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    for graph in (text, {**text, **{f"1{key}": node for key, node in loading(data_uri(RED)).items()}}):
        wrong = {key: dict(node) for key, node in graph.items()}
        if "12" in wrong:
            wrong["12"] = {"class_type": "SaveImage", "inputs": {"images": ["11", 0], "filename_prefix": "o"}}
        with pytest.raises(InvalidWorkflow) as caught:
            await made.submit(wrong)
        assert caught.value.details["errors"][0]["type"] == "string_too_long"
    assert left(made) == [file_of(picture)]


# a ComfyUI that nobody can ask


async def test_without_a_comfyui_that_answers_well_known_loaders_are_still_looked_at(
    simulator: Simulator, tmp_path: Path
) -> None:
    await simulator.crash()
    async with bench(settings(simulator, tmp_path / "data"), works=False) as made:
        for node, name in (("LoadImage", "image"), ("LoadVideo", "file")):
            await refused(made, loading(data_uri(wav()), node, name), "unsupported_content")
        await refused(made, loading("http://127.0.0.1/x", "LoadAudio", "audio"), "blocked_address")
        await refused(made, loading("ftp://pictures.example/x", "LoadAudio", "audio"), "invalid_url")
        row = await made.submit(loading(data_uri(wav()), "LoadAudio", "audio"))
        assert (await graph_of(made, row))["1"]["inputs"]["audio"] == f"upload:{file_of(wav(), 'wav')}"


async def test_without_a_comfyui_that_answers_unknown_loaders_wait_to_be_known(
    simulator: Simulator, tmp_path: Path
) -> None:
    await simulator.crash()
    limits = LimitsConfig(string_length=1_000)
    async with bench(settings(simulator, tmp_path / "data", limits=limits), works=False) as made:
        uri = data_uri(png() + bytes(10_000))
        row = await made.submit(loading(uri, "SomebodysLoader", "picture"))
        assert (await graph_of(made, row))["1"]["inputs"]["picture"] == uri
        assert left(made) == []


async def test_without_a_comfyui_that_answers_a_padded_reference_is_kept_as_it_may_be_a_file(
    simulator: Simulator, tmp_path: Path
) -> None:
    await simulator.crash()
    async with bench(settings(simulator, tmp_path / "data"), works=False) as made:
        upload = await made.state.uploads.add_data_uri(data_uri(RED))
        graph = loading(f" {upload.reference}\n", "SomebodysLoader", "picture")
        graph["3"] = {"class_type": "SomebodysLoader", "inputs": {"picture": f"{GONE} "}}
        row = await made.submit(graph)
        assert sorted(await made.store.uploads(row.id)) == sorted([upload.file, GONE.removeprefix("upload:")])
        with pytest.raises(InputNotFound):
            await made.submit(loading(GONE, "SomebodysLoader", "picture"))


async def test_what_operators_allow_is_taken(simulator: Simulator, tmp_path: Path) -> None:
    allowed = settings(simulator, tmp_path / "data", outbound=OutboundConfig(allow=("10.0.0.0/8",)))
    async with bench(allowed, works=False) as made:
        await made.ground.backends[0].probe()
        assert (await made.submit(loading("http://10.1.2.3/a.png"))).status is Status.QUEUED
        await made.state.control.cancel((await made.submit(loading("http://10.1.2.3/b.png"))).id)
        with pytest.raises(InputError):
            await made.submit(loading("http://192.168.1.1/a.png"))
