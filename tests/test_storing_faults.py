"""Storages that are down, slow, broken off, forbidding: the GPU ran once, and its results arrive.

Against a simulated ComfyUI, a real S3 server behind a proxy that goes wrong, and an image service.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from comfyd.clock import SystemClock
from comfyd.config import CfImagesStorageConfig, Config, StorageConfig
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.storage.s3 import open_s3
from comfyd.tasks import Artefact, OutputOptions, Status, Step, Task
from tests.api.conftest import Edge, serving
from tests.storage.stand_s3 import s3_config
from tests.support import cf_images_server, proxy, seaweed
from tests.support.cf_images_account import Account
from tests.support.files import read
from tests.support.service import Bench, bench, colored, configuration, until
from tests.test_artefacts import LARGE, sha256_of_zeros, stored_large
from tests.test_core_regressions import bench_with
from tests.test_execution import shipped
from tests.test_worker import starts

SPEED = 100
"""How much faster than the real clock that of a test is."""
DENIED = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code><Message>No.</Message></Error>'
)
FORBIDDEN = proxy.Answer(
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(DENIED), DENIED),
    times=4,
)


class HurriedClock(SystemClock):
    """Time that passes faster, so that a test sees many retries."""

    def __init__(self) -> None:
        super().__init__()
        self._epoch, self._start = super().now(), super().monotonic()

    def now(self) -> int:
        """See `Clock`."""
        return self._epoch + (super().now() - self._epoch) * SPEED

    def monotonic(self) -> int:
        """See `Clock`."""
        return self._start + (super().monotonic() - self._start) * SPEED

    async def sleep(self, milliseconds: int) -> None:
        """See `Clock`."""
        await asyncio.sleep(milliseconds / 1000 / SPEED)


@pytest.fixture(scope="module")
def s3() -> Iterator[seaweed.SeaweedServer]:
    """A real S3 server."""
    with seaweed.running() as server:
        server.client.create_bucket(Bucket="outputs")
        yield server


@pytest.fixture(scope="module")
def images() -> Iterator[cf_images_server.ImagesServer]:
    """A server that keeps to the documentation of Cloudflare Images."""
    with cf_images_server.running() as server:
        yield server


@pytest.fixture
async def simulator(request: pytest.FixtureRequest) -> AsyncIterator[Simulator]:
    size: int | None = getattr(request, "param", None)
    async with Simulator(SimulatorOptions(step_seconds=0.01, output_bytes=size)) as made:
        yield made


@pytest.fixture
async def way(s3: seaweed.SeaweedServer) -> AsyncIterator[proxy.Proxy]:
    """The way to the S3 server."""
    async with proxy.Proxy(int(s3.endpoint.rpartition(":")[2])) as made:
        yield made


class Place:
    """A configuration whose results go to S3, and what is there by the server's own account."""

    def __init__(
        self, s3: seaweed.SeaweedServer, way: proxy.Proxy, simulator: Simulator, folder: Path, **facts: Any
    ) -> None:
        self._s3 = s3
        self._s3_facts = {"bucket": "outputs", "endpoint": way.url, **facts}
        self.table = s3_config(s3, **self._s3_facts)
        self.folder = folder
        self._simulator = simulator

    def config(self, **storage: Any) -> Config:
        """With these keys of `[storage]`."""
        made = configuration(self.folder, self._simulator.url)
        return msgspec.structs.replace(
            made, storage=StorageConfig(**{"provider": "s3", "s3": self.table, **storage})
        )

    async def held(self) -> list[str]:
        """Keys, and uploads that were begun."""
        assert self.table.bucket is not None
        found = await asyncio.to_thread(self._s3.held, self.table.bucket, self.table.prefix)
        return [key.removeprefix(f"{self.table.prefix}/") for key in found]

    async def digest(self, key: str) -> str:
        """Of what the server has under this key."""

        def fetched() -> bytes:
            name = f"{self.table.prefix}/{key}"
            answer = self._s3.client.get_object(Bucket=self.table.bucket, Key=name)
            return bytes(answer["Body"].read())

        return hashlib.sha256(await asyncio.to_thread(fetched)).hexdigest()

    async def has_exactly(self, *artefacts: Artefact) -> bool:
        """Whether it holds just these, with the right bytes."""
        right = [await self.digest(each.key) == each.sha256 for each in artefacts]
        return all(right) and sorted(await self.held()) == sorted(each.key for each in artefacts)

    def local(self) -> list[str]:
        """What lies on this machine: results of the local storage, and what is on its way."""
        folders = (self.folder / "files", self.folder / "tmp")
        return [path.name for folder in folders for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def place(s3: seaweed.SeaweedServer, way: proxy.Proxy, simulator: Simulator, tmp_path: Path) -> Place:
    return Place(s3, way, simulator, tmp_path / "data")


def failures(made: Bench, storage: str = "s3") -> int:
    """How many tries failed, by the metric."""
    value = made.state.metrics.registry.get_sample_value(
        "comfyd_storage_failures_total", {"storage": storage}
    )
    return int(value or 0)


def sick(made: Bench) -> str:
    """What is said of S3; "" while it is well."""
    return made.state.health.problems().get("storage:s3", "")


def is_collected(row: Task) -> bool:
    return row.attempts != () and row.attempts[-1].step == Step.COLLECTED


# down, slow, broken off, forbidden: it takes longer


@pytest.mark.fault(34)
async def test_a_storage_that_is_down_for_long_costs_neither_the_task_nor_a_second_run(
    place: Place, way: proxy.Proxy, simulator: Simulator
) -> None:
    await way.set(proxy.Refuse())
    async with bench_with(place.config(), clock=HurriedClock()) as made:
        task = await made.submit(colored(1))
        await until(lambda: failures(made) >= 10)
        assert "cannot be reached" in sick(made)
        waiting = await made.task(task.id)
        assert (waiting.status, is_collected(waiting)) == (Status.RUNNING, True)
        assert made.ground.slots.used == {"comfyui-0": 0}  # the GPU is free for others
        await way.set(proxy.Pass())
        ended = await made.ended(task.id)
        assert made.state.health.problems() == {}
        assert failures(made) >= 10
    assert (ended.status, ended.attempt_count, ended.failures) == (Status.SUCCEEDED, 1, 0)
    assert [each.storage for each in ended.artefacts] == ["s3"]
    assert await place.has_exactly(*ended.artefacts)
    assert len(starts(simulator)) == 1
    assert place.local() == []


async def test_ready_names_a_storage_that_fails_and_forgets_it_when_it_is_well(
    place: Place, way: proxy.Proxy
) -> None:
    await way.set(proxy.Refuse())
    async with serving(place.config(), works=True) as edge:
        _, task = await edge.call("POST", "/api/tasks", json={"workflow": colored(1)})
        await until(lambda: sick(edge.bench) != "")
        status, ready = await edge.call("GET", "/api/ready")
        assert (status, ready["ready"]) == (200, True)  # tasks are still accepted and run
        assert [storage["name"] for storage in ready["checks"]["storages"]] == ["s3"]
        assert ready["checks"]["loops"] == []
        _, waiting = await edge.call("GET", f"/api/tasks/{task['task_id']}")
        assert waiting["progress"]["message"].startswith("waits for storage s3: ")
        assert str(place.table.secret_key) not in str(ready)
        await way.set(proxy.Pass())
        _, ended = await edge.call("GET", f"/api/tasks/{task['task_id']}?wait=20")
        _, ready = await edge.call("GET", "/api/ready")
        metrics = await (await edge.http.get(f"{edge.base}/metrics")).text()
        async with edge.http.get(ended["outputs"][0]["url"]) as answer:
            data = await answer.read()
    assert ended["status"] == "COMPLETED"
    assert ready["checks"]["storages"] == []
    assert f'comfyd_storage_failures_total{{storage="s3"}} {float(failures(edge.bench))}' in metrics
    assert hashlib.sha256(data).hexdigest() == ended["outputs"][0]["sha256"]
    assert way.url in ended["outputs"][0]["url"]  # the storage's own url, not comfyd's


@pytest.mark.parametrize("simulator", [200_000], indirect=True)
@pytest.mark.fault(33)
async def test_a_slow_storage_only_takes_longer(place: Place, way: proxy.Proxy, simulator: Simulator) -> None:
    await way.set(proxy.Slow(400_000))
    async with bench_with(place.config()) as made:
        ended = await made.ended((await made.submit(colored(1))).id)
        assert failures(made) == 0
    assert ended.status is Status.SUCCEEDED
    assert await place.has_exactly(*ended.artefacts)
    assert len(starts(simulator)) == 1


@pytest.mark.parametrize(
    ("simulator", "after"),
    [(300_000, 100_000), (20 << 20, 3 << 20)],
    indirect=["simulator"],
    ids=["whole", "in parts"],
)
@pytest.mark.fault(32)
async def test_an_upload_that_breaks_off_again_and_again_arrives_whole_in_the_end(
    place: Place, way: proxy.Proxy, simulator: Simulator, after: int
) -> None:
    await way.set(proxy.Reset(after, times=12))
    async with bench_with(place.config(), clock=HurriedClock()) as made:
        ended = await made.ended((await made.submit(colored(1))).id)
        assert failures(made) >= 2
        assert sick(made) == ""
    assert way.faulted == 12
    assert (ended.status, ended.attempt_count) == (Status.SUCCEEDED, 1)
    assert ended.artefacts[0].size_bytes > after
    assert await place.has_exactly(*ended.artefacts)  # and no upload that was only begun
    assert len(starts(simulator)) == 1


@pytest.mark.fault(32)
async def test_a_storage_that_forbids_is_asked_until_somebody_mends_it(
    place: Place, way: proxy.Proxy, simulator: Simulator
) -> None:
    await way.set(FORBIDDEN)
    async with bench_with(place.config(), clock=HurriedClock()) as made:
        task = await made.submit(colored(1))
        await until(lambda: failures(made) >= 1)
        assert "storage.s3.access_key" in sick(made)
        ended = await made.ended(task.id)
        assert failures(made) == 4
    assert ended.status is Status.SUCCEEDED
    assert await place.has_exactly(*ended.artefacts)
    assert len(starts(simulator)) == 1


@pytest.mark.fault(32)
async def test_a_bucket_that_is_made_late_is_found(
    s3: seaweed.SeaweedServer, way: proxy.Proxy, simulator: Simulator, tmp_path: Path
) -> None:
    place = Place(s3, way, simulator, tmp_path / "data", bucket="late-bucket")
    async with bench_with(place.config(), clock=HurriedClock()) as made:
        task = await made.submit(colored(1))
        await until(lambda: failures(made) >= 2)
        assert "there is no bucket 'late-bucket'" in sick(made)
        await asyncio.to_thread(s3.client.create_bucket, Bucket="late-bucket")
        ended = await made.ended(task.id)
    assert ended.status is Status.SUCCEEDED
    assert await place.has_exactly(*ended.artefacts)
    assert len(starts(simulator)) == 1


@pytest.mark.fault(32)
async def test_what_waits_for_one_storage_holds_nobody_up_who_uses_another(
    place: Place, way: proxy.Proxy
) -> None:
    await way.set(proxy.Refuse())
    async with bench_with(place.config()) as made:
        waiting = await made.submit(colored(1))
        await until(lambda: failures(made) >= 1)
        other = await made.submit(colored(2), output=OutputOptions(storage="local"))
        ended = await made.ended(other.id)
        assert [each.storage for each in ended.artefacts] == ["local"]
        await way.set(proxy.Pass())
        assert (await made.ended(waiting.id)).status is Status.SUCCEEDED


# cancelled, or given up


async def test_a_cancel_does_not_wait_for_a_storage_that_is_down(
    place: Place, way: proxy.Proxy, simulator: Simulator
) -> None:
    await way.set(proxy.Refuse())
    async with bench_with(place.config()) as made:
        task = await made.submit(colored(1), output=OutputOptions(format="jpeg"))
        await until(lambda: failures(made) >= 1)
        await made.state.control.cancel(task.id)
        async with asyncio.timeout(3):
            ended = await made.ended(task.id)
        assert made.state.board.artefacts(task.id) == ()
    assert (ended.status, ended.artefacts) == (Status.CANCELED, ())
    assert place.local() == []
    await way.set(proxy.Pass())
    assert await place.held() == []
    assert len(starts(simulator)) == 1


@pytest.mark.fault(33)
async def test_a_cancel_does_not_wait_for_a_storage_that_says_nothing(place: Place, way: proxy.Proxy) -> None:
    graph = colored(1, batch_size=20)
    async with bench_with(place.config()) as made:
        await way.set(proxy.Stall())
        task = await made.submit(graph, output=OutputOptions(format="webp"))
        await made.until(is_collected, task.id)
        await until(lambda: way.accepted >= 1)
        await made.state.control.cancel(task.id)
        async with asyncio.timeout(12):
            assert (await made.ended(task.id)).status is Status.CANCELED
    assert place.local() == []


@pytest.mark.fault(32)
async def test_a_storage_that_stays_away_too_long_fails_the_task_and_nobody_runs_it_again_by_himself(
    place: Place, way: proxy.Proxy, simulator: Simulator
) -> None:
    await way.set(proxy.Refuse())
    async with bench_with(place.config(retry_for=60.0), clock=HurriedClock()) as made:
        task = await made.submit(colored(1), max_attempts=3)
        failed = await made.ended(task.id)
        assert failed.status is Status.FAILED
        assert failed.error is not None
        assert (failed.error.code, failed.error.retryable) == ("storage_error", False)
        assert failed.error.details["key"] == "storage.s3.endpoint"
        assert failed.attempt_count == 1
        assert failures(made) >= 5
        assert place.local() == []
        await way.set(proxy.Pass())
        await made.state.control.retry(task.id)
        ended = await made.until(lambda row: row.status is Status.SUCCEEDED, task.id)
        assert sick(made) == ""
    assert ended.attempt_count == 2
    assert await place.has_exactly(*ended.artefacts)
    assert len(starts(simulator)) == 2


# a process that dies


@pytest.mark.fault(34)
async def test_what_waited_for_a_storage_is_stored_by_the_next_process(
    place: Place, way: proxy.Proxy, simulator: Simulator
) -> None:
    await way.set(proxy.Refuse())
    async with bench(place.config(), grace_ms=0) as made:
        task = await made.submit(colored(1, batch_size=3))
        await made.until(is_collected, task.id)
        await until(lambda: failures(made) >= 1)
    assert place.local() == []
    await way.set(proxy.Pass())
    async with bench(place.config()) as made:
        ended = await made.ended(task.id)
    assert (ended.status, ended.attempt_count, len(ended.artefacts)) == (Status.SUCCEEDED, 1, 3)
    assert await place.has_exactly(*ended.artefacts)
    assert len(starts(simulator)) == 1


@pytest.mark.parametrize("simulator", [20 << 20], indirect=True)
async def test_a_process_that_stops_in_the_middle_of_an_upload_leaves_none_that_was_only_begun(
    place: Place, way: proxy.Proxy, simulator: Simulator
) -> None:
    await way.set(proxy.Slow(4_000_000))
    async with bench(place.config(), grace_ms=0) as made:
        task = await made.submit(colored(1))
        while not await place.held():
            await asyncio.sleep(0.02)
        assert "(unfinished)" in (await place.held())[0]
        await way.set(proxy.Pass())
    async with bench(place.config()) as made:
        ended = await made.ended(task.id)
    assert ended.status is Status.SUCCEEDED
    assert await place.has_exactly(*ended.artefacts)
    assert len(starts(simulator)) == 1


async def test_outputs_in_a_storage_that_is_no_longer_configured_are_named_and_503(place: Place) -> None:
    async with serving(place.config(), works=True) as edge:
        _, task = await edge.call("POST", "/api/tasks?wait=20", json={"workflow": colored(1)})
        assert task["status"] == "COMPLETED", task
        path = f"/api/files/{task['task_id']}/1/"
        name = (await place.held())[0].rpartition("/")[2]
        async with edge.http.get(f"{edge.base}{path}{name}") as answer:  # comfyd serves it all the same
            assert hashlib.sha256(await answer.read()).hexdigest() == task["outputs"][0]["sha256"]
    alone = msgspec.structs.replace(place.config(), storage=StorageConfig())
    async with serving(alone, works=True) as edge:
        _, later = await edge.call("GET", f"/api/tasks/{task['task_id']}")
        assert later["outputs"][0]["url"] == f"{edge.base}{path}{name}"
        status, said = await edge.call("GET", f"{path}{name}")
        assert (status, said["error"]["code"]) == (503, "storage_error")
        assert "s3" in said["error"]["message"]
        status, said = await edge.call(
            "POST", "/api/tasks", json={"workflow": colored(2), "output": {"storage": "s3"}}
        )
        assert said["error"]["code"] == "storage_not_configured"
        assert (await edge.call("DELETE", f"/api/tasks/{task['task_id']}"))[0] == 204


# a large one


async def test_a_large_output_goes_to_the_server_in_little_memory(place: Place) -> None:
    grown, artefact = await stored_large(place.config(), LARGE)
    assert grown <= 32 << 20
    assert (artefact.size_bytes, artefact.storage) == (LARGE, "s3")
    assert artefact.sha256 == sha256_of_zeros(LARGE)
    assert [key for key in await place.held() if key.startswith("t/1/")] == [artefact.key]
    found = hashlib.sha256()
    async with open_s3(place.table) as storage, storage.open(artefact.key) as file:
        async for chunk in file.chunks:
            found.update(chunk)
    assert found.hexdigest() == artefact.sha256


# what a storage does not take goes to the fallback


class Gallery:
    """A configuration whose pictures go to an account of Cloudflare Images, the rest to the disk."""

    def __init__(self, images: cf_images_server.ImagesServer, simulator: Simulator, folder: Path) -> None:
        self.account: Account = images.new_account()
        self.folder = folder
        table = CfImagesStorageConfig(
            account_id=self.account.id, api_token=self.account.token, endpoint=images.endpoint
        )
        self._storage = StorageConfig(provider="cf_images", cf_images=table)
        self._config = configuration(folder, simulator.url)

    def config(self, **storage: Any) -> Config:
        """With these keys of `[storage]`."""
        return msgspec.structs.replace(
            self._config, storage=msgspec.structs.replace(self._storage, **storage)
        )

    def local(self) -> list[str]:
        """Results on the disk, and what is on its way."""
        folders = (self.folder / "files", self.folder / "tmp")
        return [path.name for folder in folders for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def gallery(images: cf_images_server.ImagesServer, simulator: Simulator, tmp_path: Path) -> Gallery:
    return Gallery(images, simulator, tmp_path / "data")


@asynccontextmanager
async def ran(edge: Edge, workflow: dict[str, Any], **output: Any) -> AsyncIterator[dict[str, Any]]:
    """A task that has ended well; deleted at the end of the block."""
    body = {"workflow": workflow, "output": output}
    _, task = await edge.call("POST", "/api/tasks?wait=20", json=body)
    assert task["status"] == "COMPLETED", task
    yield task
    assert (await edge.call("DELETE", f"/api/tasks/{task['task_id']}"))[0] == 204


async def fetched(edge: Edge, output: dict[str, Any]) -> tuple[int, str]:
    """The status of an output's url, and the digest of what it gives."""
    async with edge.http.get(output["url"]) as answer:
        return answer.status, hashlib.sha256(await answer.read()).hexdigest()


def colored_at(make: str, save: str) -> dict[str, Any]:
    """A tiny picture, as other nodes of another graph."""
    graph = colored(5)
    return {
        make: graph["1"],
        save: {
            "class_type": "SaveImage",
            "inputs": {"images": [make, 0], "filename_prefix": "still"},
        },
    }


async def test_videos_go_to_the_fallback_and_pictures_to_the_provider_and_both_are_fetched_and_deleted(
    gallery: Gallery, simulator: Simulator
) -> None:
    async with serving(gallery.config(), works=True) as edge:
        async with ran(edge, {**shipped("animated-and-video"), **colored_at("90", "91")}) as task:
            places = {(output["name"].rpartition(".")[2], output["storage"]) for output in task["outputs"]}
            assert places == {
                ("png", "cf_images"),
                ("webp", "cf_images"),
                ("webm", "local"),
                ("mp4", "local"),
            }
            for output in task["outputs"]:
                assert await fetched(edge, output) == (200, output["sha256"])
            assert len(gallery.account.images) == 3
            assert len(gallery.local()) == 2
        assert gallery.account.images == {}
        assert gallery.local() == []
        for output in task["outputs"]:
            assert (await fetched(edge, output))[0] == 404
    assert len(starts(simulator)) == 1


@pytest.mark.parametrize("simulator", [10 * 1024 * 1024 + 1], indirect=True)
async def test_a_picture_over_10_mb_goes_to_the_fallback(gallery: Gallery) -> None:
    async with (
        serving(gallery.config(), works=True) as edge,
        ran(edge, colored(1)) as task,
    ):
        (output,) = task["outputs"]
        assert output["storage"] == "local"
        assert await fetched(edge, output) == (200, output["sha256"])
        assert gallery.account.calls == []  # nothing was sent to be refused


async def test_what_the_provider_refuses_when_it_is_back_goes_to_the_fallback_and_it_counts_as_well(
    gallery: Gallery,
) -> None:
    gallery.account.fail("500")
    gallery.account.largest = 10
    async with bench_with(gallery.config(), clock=HurriedClock()) as made:
        ended = await made.ended((await made.submit(colored(1))).id)
        assert [each.storage for each in ended.artefacts] == ["local"]
        assert failures(made, "cf_images") == 1
        assert made.state.health.problems() == {}


async def test_a_storage_that_a_request_names_has_the_same_fallback(
    gallery: Gallery, simulator: Simulator
) -> None:
    config = gallery.config(provider="local")
    async with bench_with(config) as made:
        options = OutputOptions(storage="cf_images", prefix="of/mine")
        task = await made.submit(shipped("animated-and-video"), output=options)
        ended = await made.ended(task.id)
        assert ended.status is Status.SUCCEEDED
        assert {each.storage for each in ended.artefacts} == {"cf_images", "local"}
        assert all(each.key.startswith(f"of/mine/{task.id}/1/") for each in ended.artefacts)
        for each in ended.artefacts:
            found = await read(await made.ground.storages.get(each.storage), each.key)
            assert hashlib.sha256(found).hexdigest() == each.sha256
    assert len(starts(simulator)) == 1


async def test_what_even_the_fallback_does_not_take_fails_the_task_which_is_not_run_again(
    gallery: Gallery, simulator: Simulator
) -> None:
    async with bench_with(gallery.config(fallback="cf_images")) as made:
        failed = await made.ended((await made.submit(shipped("animated-and-video"), max_attempts=3)).id)
    assert failed.status is Status.FAILED
    assert failed.error is not None
    assert (failed.error.code, failed.error.retryable) == ("storage_not_accepted", False)
    assert failed.attempt_count == 1
    assert gallery.account.images == {}
    assert gallery.local() == []
    assert len(starts(simulator)) == 1
