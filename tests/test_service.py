"""comfyd as a process: killed, started again, told to stop; against a simulated ComfyUI of its own."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from comfyd.simulator import Simulator, SimulatorOptions
from tests.support.comfyd import Client, ComfydProcess
from tests.support.service import colored, sampled, until


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions(step_seconds=0.01)) as made:
        yield made


@pytest.fixture
async def comfyd(simulator: Simulator, tmp_path: Path) -> AsyncIterator[ComfydProcess]:
    process = ComfydProcess(tmp_path, simulator.url)
    await asyncio.to_thread(process.start)
    yield process
    await asyncio.to_thread(process.kill)


@pytest.fixture
async def client(comfyd: ComfydProcess) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(session, comfyd.url)


def runs(simulator: Simulator) -> Counter[str]:
    """How often each prompt was started on the simulated GPU."""
    return Counter(entry.prompt_id for entry in simulator.executions if entry.event == "start")


async def test_a_killed_comfyd_takes_up_the_running_prompt_and_all_that_waited(
    comfyd: ComfydProcess, client: Client, simulator: Simulator
) -> None:
    tasks = [await client.submit(sampled(1, 500))]
    await until(lambda: len(simulator.executions) == 1)
    tasks += [await client.submit(colored(100 + number)) for number in range(50)]
    assert len(simulator.executions) == 1
    await asyncio.to_thread(comfyd.kill)
    await asyncio.to_thread(comfyd.start)
    ended = [await client.ended(task["task_id"]) for task in tasks]
    assert {task["status"] for task in ended} == {"COMPLETED"}
    assert all(len(task["attempts"]) == 1 for task in ended)
    assert len(runs(simulator)) == len(tasks)
    assert set(runs(simulator).values()) == {1}


@pytest.mark.parametrize("moment", ["ends while it is away", "runs on"])
async def test_what_comfyui_did_while_comfyd_was_away_is_not_done_again(
    comfyd: ComfydProcess, client: Client, simulator: Simulator, moment: str
) -> None:
    task = await client.submit(sampled(1, 60 if moment == "ends while it is away" else 200))
    await until(lambda: len(simulator.executions) == 1)
    await asyncio.to_thread(comfyd.kill)
    if moment == "ends while it is away":
        await until(lambda: len(simulator.executions) == 2)
    started = time.monotonic()
    await asyncio.to_thread(comfyd.start)
    ended = await client.ended(task["task_id"])
    assert ended["status"] == "COMPLETED"
    assert len(runs(simulator)) == 1
    if moment == "ends while it is away":
        assert time.monotonic() - started < 5


async def test_a_task_canceled_just_before_a_kill_is_canceled_after_it(
    comfyd: ComfydProcess, client: Client, simulator: Simulator
) -> None:
    simulator.faults.interrupts_ignored = -1
    task = await client.submit(sampled(1, 3_000))
    await until(lambda: len(simulator.executions) == 1)
    await client.call("POST", f"/api/tasks/{task['task_id']}/cancel")
    await asyncio.to_thread(comfyd.kill)
    simulator.faults.interrupts_ignored = 0
    await asyncio.to_thread(comfyd.start)
    assert (await client.ended(task["task_id"]))["status"] == "CANCELED"
    assert simulator.executions[-1].outcome == "interrupted"


async def test_sigterm_leaves_the_running_prompt_to_the_next_process(
    comfyd: ComfydProcess, client: Client, simulator: Simulator
) -> None:
    running, waiting = await client.submit(sampled(1, 300)), await client.submit(colored(7))
    await until(lambda: len(simulator.executions) == 1)
    assert await asyncio.to_thread(comfyd.terminate) == 0
    assert "Traceback" not in comfyd.log_text()
    await asyncio.to_thread(comfyd.start)
    for task in (running, waiting):
        assert (await client.ended(task["task_id"]))["status"] == "COMPLETED"
    assert set(runs(simulator).values()) == {1}


async def test_sigterm_waits_for_what_is_nearly_done(
    comfyd: ComfydProcess, client: Client, simulator: Simulator
) -> None:
    task = await client.submit(sampled(1, 40))
    await until(lambda: len(simulator.executions) == 1)
    assert await asyncio.to_thread(comfyd.terminate) == 0
    await asyncio.to_thread(comfyd.start)
    row = await client.task(task["task_id"])
    assert row["status"] == "COMPLETED"
    assert len(row["attempts"]) == 1


async def test_event_streams_end_when_comfyd_stops(
    comfyd: ComfydProcess, client: Client, simulator: Simulator
) -> None:
    task = await client.submit(sampled(1, 500))
    await until(lambda: len(simulator.executions) == 1)
    url = f"{comfyd.url}/api/tasks/{task['task_id']}/events"
    async with aiohttp.ClientSession() as session, session.get(url) as stream:
        assert (await stream.content.readline()).startswith(b"event: status")
        stopping = asyncio.to_thread(comfyd.terminate)
        code, _ = await asyncio.gather(stopping, drained(stream))
    assert code == 0


async def drained(stream: aiohttp.ClientResponse) -> None:
    async with asyncio.timeout(20):
        async for _ in stream.content:
            pass


async def test_tasks_are_accepted_while_comfyui_is_down_and_run_when_it_is_up(
    comfyd: ComfydProcess, client: Client, simulator: Simulator
) -> None:
    await simulator.crash()
    async with asyncio.timeout(20):
        while "refused" not in str(said := await client.call("GET", "/api/ready")):
            await asyncio.sleep(0.05)
    assert said[0] == 503
    task = await client.submit(colored(5))
    assert (await client.task(task["task_id"]))["status"] == "PENDING"
    await simulator.restart()
    assert (await client.ended(task["task_id"]))["status"] == "COMPLETED"
    assert (await client.call("GET", "/api/ready"))[0] == 200
    assert comfyd.exit_code() is None


@pytest.mark.fault(26)
async def test_a_second_comfyd_on_the_same_data_is_refused_and_the_first_goes_on(
    comfyd: ComfydProcess, client: Client, simulator: Simulator
) -> None:
    task = await client.submit(sampled(1, 100))
    await until(lambda: len(simulator.executions) == 1)
    second = ComfydProcess(comfyd.folder, simulator.url)
    second.log = comfyd.folder / "second.log"
    await asyncio.to_thread(second.spawn)
    assert await asyncio.to_thread(second.wait) == 69
    assert "Traceback" not in second.log_text()
    assert str(comfyd.folder / "data") in second.log_text()
    for wanted in (task, await client.submit(colored(1))):
        assert (await client.ended(wanted["task_id"]))["status"] == "COMPLETED"
    assert set(runs(simulator).values()) == {1}


async def test_a_port_that_is_taken_is_one_line(comfyd: ComfydProcess, simulator: Simulator) -> None:
    second = ComfydProcess(comfyd.folder / "second", simulator.url, COMFYD__SERVER__PORT=str(comfyd.port))
    await asyncio.to_thread(second.spawn)
    assert await asyncio.to_thread(second.wait) == 78
    assert "server.port" in second.log_text()
    assert "Traceback" not in second.log_text()


async def test_one_socket_serves_a_hundred_tasks(client: Client, simulator: Simulator) -> None:
    tasks = await asyncio.gather(*[client.submit(colored(3_000 + number)) for number in range(100)])
    ended = await asyncio.gather(*[client.ended(task["task_id"]) for task in tasks])
    assert {task["status"] for task in ended} == {"COMPLETED"}
    assert simulator.sockets.peak == 1
    assert simulator.sockets.total == 1


def positions(tasks: list[dict[str, Any]]) -> Iterator[int | None]:
    return (task["queue_position"] for task in tasks)


async def test_waiting_tasks_say_where_they_stand_and_when_they_may_end(
    client: Client, simulator: Simulator
) -> None:
    first = await client.submit(sampled(1, 20))
    assert first["eta_seconds"] is None
    await client.ended(first["task_id"])
    tasks = [await client.submit(sampled(2 + number, 2_000)) for number in range(8)]
    await until(lambda: len(simulator.executions) == 3)
    await asyncio.sleep(0.3)
    rows = [await client.task(task["task_id"]) for task in tasks]
    waiting = [row for row in rows if row["status"] == "PENDING"]
    assert list(positions(waiting)) == list(range(1, len(waiting) + 1))
    etas = [row["eta_seconds"] for row in waiting]
    assert etas == sorted(etas)
    assert etas[0] > 0
    for row in rows:
        await client.call("POST", f"/api/tasks/{row['task_id']}/cancel")
