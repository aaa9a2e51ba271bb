"""comfyd as a process, against clients and storages that mean it no good; each test is one such thing."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from comfyd.simulator import Simulator, SimulatorOptions
from tests.support.comfyd import Client, ComfydProcess
from tests.support.comfyui import free_port
from tests.support.service import colored
from tests.support.sources import Sources, open_sources, png

WORKERS = 32
"""By default."""
WAITING = 120
"""Results for a storage that is down."""


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions()) as made:
        yield made


@pytest.fixture
async def sources() -> AsyncIterator[Sources]:
    async with open_sources() as made:
        yield made


@asynccontextmanager
async def running(
    folder: Path, simulator: Simulator, **settings: str
) -> AsyncIterator[tuple[ComfydProcess, Client]]:
    """A comfyd and its client, until the block ends."""
    process = ComfydProcess(folder, simulator.url, **settings)
    await asyncio.to_thread(process.start)
    try:
        async with aiohttp.ClientSession() as session:
            yield process, Client(session, process.url)
    finally:
        await asyncio.to_thread(process.kill)


def loading(urls: list[str], prefix: str = "o") -> dict[str, Any]:
    """A graph that loads each of these pictures and saves it."""
    graph: dict[str, Any] = {}
    for number, url in enumerate(urls):
        graph[f"in{number}"] = {"class_type": "LoadImage", "inputs": {"image": url, "upload": "image"}}
        images = [f"in{number}", 0]
        inputs = {"images": images, "filename_prefix": f"{prefix}{number}"}
        graph[f"out{number}"] = {"class_type": "SaveImage", "inputs": inputs}
    return graph


def noise(side: int) -> dict[str, Any]:
    """A square picture that is hard to encode."""
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": side, "height": side, "batch_size": 1, "color": 5},
        },
        "2": {"class_type": "ImageAddNoise", "inputs": {"image": ["1", 0], "seed": 3, "strength": 1.0}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "n"}},
    }


async def ends_within(client: Client, task_id: str, seconds: float) -> dict[str, Any]:
    """The task when it has ended, or as it is when the time is over."""
    return await client.task(task_id, wait=seconds)


async def file_of(client: Client) -> str:
    """A finished task's file, as urls name it: `task/attempt/file`."""
    task = await client.ended((await client.submit(colored(1)))["task_id"])
    url = task["outputs"][0]["url"]
    assert isinstance(url, str)
    return url.partition("/api/files/")[2]


async def test_a_prefix_that_is_a_file_of_another_task_does_not_wait_for_a_day(
    tmp_path: Path, simulator: Simulator
) -> None:
    async with running(tmp_path, simulator) as (_, client):
        taken = {"prefix": await file_of(client)}
        body = {"workflow": colored(2), "output": taken}
        status, answer = await client.call("POST", "/api/tasks", json=body)
        if status == 202:  # it may be refused at once, or be stored elsewhere, or fail
            task = await ends_within(client, answer["task_id"], 8)
            assert task["status"] in {"COMPLETED", "FAILED"}, task["progress"]


async def test_no_prefix_that_clients_choose_keeps_other_tasks_from_running(
    tmp_path: Path, simulator: Simulator
) -> None:
    async with running(tmp_path, simulator) as (_, client):
        taken = {"prefix": await file_of(client)}
        for number in range(WORKERS):
            body = {"workflow": colored(100 + number), "output": taken}
            await client.call("POST", "/api/tasks", json=body)
        other = await client.submit(colored(2))
        assert (await ends_within(client, other["task_id"], 15))["status"] == "COMPLETED"


async def test_a_storage_that_is_down_does_not_keep_tasks_for_another_one_from_running(
    tmp_path: Path, simulator: Simulator
) -> None:
    nobody = {
        "COMFYD__STORAGE__S3__BUCKET": "results",
        "COMFYD__STORAGE__S3__ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "COMFYD__STORAGE__S3__ACCESS_KEY": "key",
        "COMFYD__STORAGE__S3__SECRET_KEY": "secret",
    }
    async with running(tmp_path, simulator, **nobody) as (_, client):
        for number in range(WORKERS):
            await client.submit(colored(100 + number), output={"storage": "s3"})
        other = await client.submit(colored(2), output={"storage": "local"}, priority="high")
        assert (await ends_within(client, other["task_id"], 15))["status"] == "COMPLETED"


async def test_a_dozen_urls_that_hang_do_not_keep_other_tasks_from_running(
    tmp_path: Path, simulator: Simulator, sources: Sources
) -> None:
    url = sources.hang("/never.png")
    async with running(tmp_path, simulator, COMFYD__OUTBOUND__ALLOW="127.0.0.1") as (_, client):
        for number in range(12):
            await client.submit(loading([url], prefix=f"hangs{number}"))
        other = await client.submit(colored(2))
        assert (await ends_within(client, other["task_id"], 15))["status"] == "COMPLETED"


async def test_a_stop_does_not_wait_until_pictures_are_converted(
    tmp_path: Path, simulator: Simulator
) -> None:
    async with running(tmp_path, simulator, COMFYD__SERVER__GRACE="1") as (process, client):
        made = await client.ended((await client.submit(noise(3000)))["task_id"])
        assert made["status"] == "COMPLETED"
        for quality in (60, 70):  # ComfyUI has it in its cache: what takes time is the conversion
            await client.submit(noise(3000), output={"format": "avif", "quality": quality})
        async with asyncio.timeout(20):
            while len(list((tmp_path / "data" / "tmp").iterdir())) < 4:  # as it came, and as it becomes
                await asyncio.sleep(0.05)
        began = time.monotonic()
        assert await asyncio.to_thread(process.terminate) == 0
        assert time.monotonic() - began < 4


async def test_ten_large_inputs_at_once_take_at_most_32_megabytes(
    tmp_path: Path, simulator: Simulator, sources: Sources
) -> None:
    files = [png(number) + os.urandom(20_000_000) for number in range(10)]
    async with running(tmp_path, simulator, COMFYD__OUTBOUND__ALLOW="127.0.0.1") as (process, client):
        await client.ended((await client.submit(loading([sources.file("/first.png", png(1))])))["task_id"])
        idle = resident(process, "VmRSS")
        for turn in range(3):
            urls = sources.together(f"/{turn}/", files)
            task = await client.ended((await client.submit(loading(urls, f"t{turn}")))["task_id"])
            assert task["status"] == "COMPLETED", task["error"]
        assert resident(process, "VmHWM") - idle <= 32 << 20


async def test_a_restart_does_not_bring_every_waiting_result_here_at_once(tmp_path: Path) -> None:
    nobody = {
        "COMFYD__STORAGE__PROVIDER": "s3",
        "COMFYD__STORAGE__S3__BUCKET": "results",
        "COMFYD__STORAGE__S3__ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "COMFYD__STORAGE__S3__ACCESS_KEY": "key",
        "COMFYD__STORAGE__S3__SECRET_KEY": "secret",
    }
    async with (
        Simulator(SimulatorOptions(output_bytes=4_000_000)) as large,
        running(tmp_path, large, **nobody) as (process, client),
    ):
        idle = resident(process, "VmRSS")
        for number in range(WAITING):
            await client.submit(colored(100 + number))
        await all_waiting(tmp_path / "data" / "tmp")
        assert resident(process, "VmHWM") - idle <= 32 << 20
        assert await asyncio.to_thread(process.terminate) == 0
        await asyncio.to_thread(process.start)
        await all_waiting(tmp_path / "data" / "tmp")
        assert resident(process, "VmHWM") - idle <= 64 << 20


async def all_waiting(folder: Path) -> None:
    """Until every result lies here whole."""
    async with asyncio.timeout(40):
        while sum(size >= 4_000_000 for size in sizes(folder)) < WAITING:
            await asyncio.sleep(0.1)


def sizes(folder: Path) -> list[int]:
    """Of the files in a folder, some of which may go meanwhile."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(path.stat().st_size)
    return found


def resident(process: ComfydProcess, field: str) -> int:
    """Bytes in memory: now (`VmRSS`) or at most (`VmHWM`)."""
    mine = [found for found in Path("/proc").glob("[0-9]*/environ") if _serves(found, process.port)]
    lines = (mine[0].parent / "status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _serves(environment: Path, port: int) -> bool:
    try:
        return f"COMFYD__SERVER__PORT={port}\0".encode() in environment.read_bytes()
    except OSError:  # somebody else's, or gone meanwhile
        return False
