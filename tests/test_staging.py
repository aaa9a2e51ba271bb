"""The files of one graph are brought here once, and to each ComfyUI once, whoever gives way meanwhile."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from comfyd.clock import SystemClock
from comfyd.comfy.backend import Backend
from comfyd.config import InputsConfig
from comfyd.errors import (
    BackendUnclear,
    BackendUnreachable,
    FetchFailed,
    InputError,
    InputNotFound,
    StorageError,
    UnsupportedContent,
)
from comfyd.fetch import Fetcher
from comfyd.guard import Guard, open_client
from comfyd.metrics import Metrics
from comfyd.scratch import open_scratch
from comfyd.simulator import containers
from comfyd.staging import Stager
from comfyd.tasks import Graph
from comfyd.uploads import Uploads, open_uploads
from tests.media import samples
from tests.support.sources import Sources, data_uri, open_sources, png, wav
from tests.support.trap import Script, head, open_trap

MIB = 1 << 20
INFO = {
    "LoadImage": {"input": {"required": {"image": [["example.png"], {"image_upload": True}]}}},
    "Custom": {
        "input": {"required": {"thing": ["COMBO", {"options": ["a.wav", "b.wav"]}], "text": ["STRING", {}]}}
    },
}


class FakeComfyUI:
    """A backend, as far as staging knows one: keeps what it is given."""

    def __init__(self, name: str = "a") -> None:
        self.name = name
        self.client_id: str | None = "first"
        self.files: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.errors: list[Exception] = []
        self.info: dict[str, Any] | Exception = INFO

    async def upload_input(self, filename: str, chunks: AsyncIterator[bytes]) -> str:
        """See `Backend`."""
        self.uploads.append(filename)
        data = b"".join([chunk async for chunk in chunks])
        if self.errors:
            raise self.errors.pop(0)
        self.files[filename] = data
        return f"{self.name}/{filename}"

    async def object_info(self) -> Mapping[str, Any]:
        """See `Backend`."""
        if isinstance(self.info, Exception):
            raise self.info
        return self.info

    @property
    def real(self) -> Backend:
        """In the place of a real one."""
        return cast("Backend", self)


class Desk:
    """A stager over empty folders, and a server of files."""

    def __init__(self, stager: Stager, uploads: Uploads, sources: Sources, folder: Path) -> None:
        self.staging = stager.staging
        self.uploads = uploads
        self.sources = sources
        self.scratch = folder / "tmp"
        self.comfyui = FakeComfyUI()

    def empty(self) -> bool:
        """Whether nothing temporary is left."""
        return not list(self.scratch.iterdir())


@asynccontextmanager
async def open_desk(folder: Path, config: InputsConfig) -> AsyncIterator[Desk]:
    clock = SystemClock()
    async with (
        open_sources() as sources,
        open_client(Guard.of(["127.0.0.0/8"])) as client,
        open_scratch(folder / "tmp") as scratch,
        open_uploads(folder / "inputs", config, clock) as uploads,
    ):
        fetcher = Fetcher(config, client, clock)
        yield Desk(Stager(fetcher, uploads, scratch, Metrics(), config), uploads, sources, folder)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with open_desk(tmp_path, InputsConfig(attempts=1)) as made:
        yield made


def node(class_type: str, **inputs: object) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs, "_meta": {}}


def loading(*values: object) -> Graph:
    return {str(number): node("LoadImage", image=value) for number, value in enumerate(values, 1)}


def named(data: bytes, extension: str = "png") -> str:
    return f"{hashlib.sha256(data).hexdigest()}.{extension}"


async def brought(desk: Desk, graph: Graph, info: Mapping[str, Any] | None = INFO) -> Graph:
    async with desk.staging(graph, info) as staging:
        return await (await staging.fetch()).deliver(desk.comfyui.real)


async def test_a_graph_of_comfyuis_own_files_needs_nothing(desk: Desk) -> None:
    graph = {**loading("mine.png", ["9", 0]), "9": node("Custom", thing="a", text="b")}
    async with desk.staging(graph, INFO) as staging:
        assert not staging
        assert await (await staging.fetch()).deliver(desk.comfyui.real) == graph
    assert desk.comfyui.uploads == []


async def test_every_source_becomes_a_name_of_its_content(desk: Desk) -> None:
    upload = await desk.uploads.add_data_uri(data_uri(png(1)))
    url = desk.sources.file("/anything.jpg", png(2))
    graph = await brought(desk, loading(url, f" {upload.reference}", "mine.png"))
    names = [graph[number]["inputs"]["image"] for number in "123"]
    assert names == [f"a/{named(png(2))}", f"a/{named(png(1))}", "mine.png"]
    assert desk.comfyui.files == {named(png(1)): png(1), named(png(2)): png(2)}
    assert desk.empty()


async def test_a_reference_is_a_file_wherever_it_stands(desk: Desk) -> None:
    upload = await desk.uploads.add_data_uri(data_uri(png(1)))
    sound = await desk.uploads.add_data_uri(data_uri(wav()))
    graph = {
        "1": node("Anything", x={"__value__": [[upload.reference], {"deep": sound.reference}, "x"]}),
        "2": node("Custom", text=upload.reference, thing=f"see {upload.reference}"),
        "3": node("LoadImage", image=f" {upload.reference}"),
    }
    for info in (INFO, None):
        desk.comfyui = FakeComfyUI()
        made = await brought(desk, graph, info)
        assert made["1"]["inputs"]["x"] == {
            "__value__": [[f"a/{upload.file}"], {"deep": f"a/{sound.file}"}, "x"]
        }
        assert made["2"]["inputs"] == {"text": f"a/{upload.file}", "thing": f"see {upload.reference}"}
        assert made["3"]["inputs"]["image"] == f"a/{upload.file}"
        assert desk.comfyui.files == {upload.file: png(1), sound.file: wav()}
        assert sorted(desk.comfyui.uploads) == sorted([upload.file, sound.file])


async def test_a_graph_whose_only_file_lies_deep_is_not_forgotten(desk: Desk) -> None:
    upload = await desk.uploads.add_data_uri(data_uri(wav()))
    graph = {"1": node("Anything", x={"a": [upload.reference]})}
    async with desk.staging(graph, None) as staging:
        assert staging
        await staging.fetch()
        assert await desk.uploads.forget([upload.file], all_unused) == 0  # held while it is needed
        assert (await staging.deliver(desk.comfyui.real))["1"]["inputs"] == {"x": {"a": [f"a/{upload.file}"]}}
        assert (await staging.deliver(FakeComfyUI("b").real))["1"]["inputs"]["x"]["a"] == [f"b/{upload.file}"]
    assert await desk.uploads.forget([upload.file], all_unused) == 1
    with pytest.raises(InputNotFound) as caught:
        await brought(desk, graph)
    assert caught.value.details["input"] == "1.x"


async def test_a_reference_is_checked_for_its_kind_where_a_loader_takes_it_and_nowhere_else(
    desk: Desk,
) -> None:
    sound = await desk.uploads.add_data_uri(data_uri(wav()))
    graph = {"1": node("Custom", text=sound.reference), "2": node("LoadImage", image=sound.reference)}
    with pytest.raises(UnsupportedContent) as caught:
        await brought(desk, graph)
    assert caught.value.details["input"] == "2.image"


async def all_unused(files: Sequence[str]) -> Sequence[str]:
    """As if nothing named any."""
    return files


async def test_a_url_is_fetched_once_and_a_content_is_given_once(desk: Desk) -> None:
    one, other = desk.sources.file("/one", png(1)), desk.sources.file("/other", png(1))
    graph = await brought(desk, loading(one, other, f"{one} "))
    assert {graph[number]["inputs"]["image"] for number in "123"} == {f"a/{named(png(1))}"}
    assert sorted(desk.sources.asked) == ["/one", "/other"]
    assert desk.comfyui.uploads == [named(png(1))]


async def test_what_is_fetched_stays_until_the_block_ends(desk: Desk) -> None:
    second = FakeComfyUI("b")
    async with desk.staging(loading(desk.sources.file("/a", png())), INFO) as staging:
        await staging.fetch()
        await staging.fetch()
        for backend in (desk.comfyui, second, desk.comfyui, second):
            graph = await staging.deliver(backend.real)
            assert graph["1"]["inputs"]["image"] == f"{backend.name}/{named(png())}"
        assert not desk.empty()
    assert (desk.comfyui.uploads, second.uploads) == ([named(png())], [named(png())])
    assert desk.sources.asked == ["/a"]
    assert desk.empty()


async def test_another_life_of_a_comfyui_is_given_the_files_again(desk: Desk) -> None:
    async with desk.staging(loading(desk.sources.file("/a", png())), INFO) as staging:
        await (await staging.fetch()).deliver(desk.comfyui.real)
        desk.comfyui.client_id = "second"
        await staging.deliver(desk.comfyui.real)
    assert desk.comfyui.uploads == [named(png())] * 2


async def test_an_upload_that_broke_off_is_repeated_once(desk: Desk) -> None:
    """So a ComfyUI that went away is seen to be away, which costs the task nothing."""
    desk.comfyui.errors = [BackendUnclear("broke off")]
    graph = loading(desk.sources.file("/a", png()))
    await brought(desk, graph)
    assert desk.comfyui.files == {named(png()): png()}
    for last in (BackendUnclear("again"), BackendUnreachable("gone")):
        desk.comfyui.errors = [BackendUnclear("broke off"), last]
        with pytest.raises(type(last)):
            await brought(desk, graph)
    assert desk.empty()


# what kinds fit


@pytest.mark.parametrize(
    ("class_type", "name", "fits", "unfit"),
    [
        ("LoadImage", "image", ("png", "gif", "webp"), ("wav", "mp4", "webm", "html")),
        ("LoadVideo", "file", ("mp4", "webm", "gif", "webp"), ("wav", "png", "html")),
        ("LoadAudio", "audio", ("wav", "mp4", "webm"), ("png", "gif", "html")),
        ("LoadLatent", "latent", ("latent", "html"), ()),
    ],
)
async def test_a_loader_takes_only_what_it_can_load(
    desk: Desk, tmp_path: Path, class_type: str, name: str, fits: tuple[str, ...], unfit: tuple[str, ...]
) -> None:
    frame = samples.picture(size=(16, 16))
    data = {
        "png": png(),
        "gif": samples.gif(tmp_path / "a.gif").read_bytes(),
        "webp": samples.webp(tmp_path / "a.webp").read_bytes(),
        "wav": wav(),
        "mp4": containers.mp4((frame,), 8),
        "webm": containers.webm((frame,), 8),
        "html": b"<!DOCTYPE html><html></html>",
        "latent": samples.latent(tmp_path / "a.latent").read_bytes(),
    }
    for kind in fits:
        url = desk.sources.file(f"/file.{kind}", data[kind])
        graph = await brought(desk, {"7": node(class_type, **{name: url})}, None)
        assert graph["7"]["inputs"][name] == f"a/{named(data[kind], kind)}"
    for kind in unfit:
        url = desk.sources.file(f"/file.{kind}", data[kind])
        with pytest.raises(UnsupportedContent) as caught:
            await brought(desk, {"7": node(class_type, **{name: url})}, None)
        assert caught.value.details["input"] == f"7.{name}"
    assert desk.empty()


async def test_an_empty_file_is_none_for_any_input(desk: Desk) -> None:
    url = desk.sources.file("/file.latent", b"")
    with pytest.raises(UnsupportedContent) as caught:
        await brought(desk, {"7": node("LoadLatent", latent=url)})
    assert caught.value.details["input"] == "7.latent"


async def test_one_file_for_two_inputs_has_to_fit_both(desk: Desk) -> None:
    url = desk.sources.file("/a", wav())
    graph = {"1": node("LoadAudio", audio=url), "2": node("LoadImage", image=url)}
    with pytest.raises(UnsupportedContent) as caught:
        await brought(desk, graph)
    assert caught.value.details["input"] == "2.image"


async def test_an_upload_that_is_gone_is_named_with_its_input(desk: Desk) -> None:
    with pytest.raises(InputNotFound) as caught:
        await brought(desk, loading("upload:" + "0" * 64 + ".png"))
    assert caught.value.details["input"] == "1.image"


async def test_a_failure_names_the_first_input_that_has_the_url(desk: Desk) -> None:
    gone = desk.sources.url + "/gone"
    with pytest.raises(FetchFailed) as caught:
        await brought(desk, loading(gone, gone))
    assert caught.value.details["input"] == "1.image"


async def test_a_disk_that_fails_is_nobodys_input(desk: Desk) -> None:
    desk.scratch.rmdir()
    with pytest.raises(StorageError) as caught:
        await brought(desk, loading(desk.sources.file("/a", png())))
    assert "input" not in caught.value.details


# what only ComfyUI knows


async def test_inputs_that_nobody_could_tell_are_asked_for_at_delivery(desk: Desk) -> None:
    own, well_known = desk.sources.file("/own", wav()), desk.sources.file("/image", png())
    graph = {**loading(well_known), "2": node("Custom", thing=own, text=own)}
    async with desk.staging(graph, None) as staging:
        assert staging
        await staging.fetch()
        assert desk.sources.asked == ["/image"]
        made = await staging.deliver(desk.comfyui.real)
    assert made["1"]["inputs"]["image"] == f"a/{named(png())}"
    assert made["2"]["inputs"] == {"thing": f"a/{named(wav(), 'wav')}", "text": own}
    assert desk.sources.asked == ["/image", "/own"]
    assert desk.empty()


async def test_a_graph_whose_only_file_nobody_could_tell_is_not_forgotten(desk: Desk) -> None:
    graph = {"2": node("Custom", thing=data_uri(wav()), text="x")}
    made = await brought(desk, graph, None)
    assert made["2"]["inputs"]["thing"] == f"a/{named(wav(), 'wav')}"
    with pytest.raises(InputError) as caught:
        await brought(desk, {"2": node("Custom", thing="data:,plain", text="x")}, None)
    assert caught.value.details["input"] == "2.thing"


async def test_a_comfyui_that_cannot_tell_is_given_what_is_well_known(desk: Desk) -> None:
    own, well_known = desk.sources.file("/own", wav()), desk.sources.file("/image", png())
    graph = {**loading(well_known), "2": node("Custom", thing=own)}
    desk.comfyui.info = BackendUnclear("no answer")
    async with desk.staging(graph, None) as staging:
        await staging.fetch()
        made = await staging.deliver(desk.comfyui.real)
        assert (made["1"]["inputs"]["image"], made["2"]["inputs"]["thing"]) == (f"a/{named(png())}", own)
        desk.comfyui.info = INFO  # asked again, before it is the prompt's turn
        made = await staging.deliver(desk.comfyui.real)
        assert made["2"]["inputs"]["thing"] == f"a/{named(wav(), 'wav')}"
    desk.comfyui.info = BackendUnreachable("gone")
    with pytest.raises(BackendUnreachable):
        await brought(desk, graph, None)


# giving way


async def test_dropped_in_the_middle_it_closes_what_it_opened_and_leaves_nothing(desk: Desk) -> None:
    urls = [desk.sources.endless(f"/{number}", png()) for number in range(5)]
    bringing = asyncio.ensure_future(brought(desk, loading(*urls)))
    async with asyncio.timeout(10):
        while len(list(desk.scratch.iterdir())) < 5:
            await asyncio.sleep(0.005)
        bringing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await bringing
        while desk.sources.open:
            await asyncio.sleep(0.005)
    assert desk.empty()
    assert sum(desk.sources.left.values()) == 5


def memory(word: str) -> int:
    """Bytes of this process's memory: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(word))


def forget_peak() -> int:
    """Let `VmHWM` count from now on; the bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def long_file(size: int) -> Script:
    """A file of this many bytes, of which the server holds few."""
    begin = png()

    async def script(writer: asyncio.StreamWriter) -> None:
        block = bytes(64 * 1024)
        writer.write(head(200, {"Content-Length": str(size)}) + begin)
        for start in range(len(begin), size, len(block)):
            writer.write(block[: size - start])
            await writer.drain()

    return script


async def test_ten_files_at_once_take_little_memory(tmp_path: Path) -> None:
    size = 20 * MIB
    async with open_desk(tmp_path, InputsConfig()) as desk, open_trap(long_file(size)) as server:
        await brought(desk, loading(desk.sources.file("/a", png())))  # what is made once is made
        before = forget_peak()
        async with desk.staging(loading(*[f"{server.url}/{n}" for n in range(10)]), INFO) as staging:
            await staging.fetch()
            peak = memory("VmHWM")
            assert [path.stat().st_size for path in desk.scratch.iterdir()] == [size] * 10
        assert peak - before <= 32 * MIB
    assert server.accepted == 10
