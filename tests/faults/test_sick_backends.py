"""A ComfyUI that answers and does not work: a dead worker, a node that cannot be interrupted."""

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from comfyd.config import Config
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.tasks import Status, Step, Task
from tests.support.comfyd import Client, ComfydProcess
from tests.support.comfyui import ComfyUIProcess
from tests.support.service import Bench, bench, colored, configuration, sampled, until


def runs(simulator: Simulator) -> Counter[str]:
    """How often each prompt was begun on the simulated GPU."""
    return Counter(entry.prompt_id for entry in simulator.executions if entry.event == "start")


def quick_to_judge(data: Path, *servers: Simulator | ComfyUIProcess, **keys: Any) -> Config:
    """A configuration whose servers are found sick within moments."""
    limits = {"stuck_after": 0.3, "stop_timeout": 0.3, **keys}
    config = configuration(data, *(server.url for server in servers))
    judged = tuple(msgspec.structs.replace(each, **limits) for each in config.comfyui)
    return msgspec.structs.replace(config, comfyui=judged)


def submitted(row: Task) -> bool:
    """It is in a ComfyUI's queue."""
    return bool(row.attempts) and row.attempts[-1].step is Step.SUBMITTED


def executing(row: Task) -> bool:
    """It was seen to run."""
    return bool(row.attempts) and row.attempts[-1].seen_running_at is not None


async def call_sick(made: Bench, number: int = 0) -> str:
    """The reason, as soon as that server is found sick."""
    backend = made.ground.backends[number]
    await until(lambda: backend.state.sick)
    assert not backend.state.ready
    return str(backend.state.reason)


async def restart_on_request(simulator: Simulator, asked: Path) -> None:
    """What a supervisor does: the file that the command wrote to is its order."""
    await until(asked.exists)
    simulator.faults.worker_dead = False
    await simulator.crash()
    await simulator.restart()


@pytest.mark.fault(17)
async def test_a_dead_worker_is_told_and_restarted_once_and_costs_its_tasks_nothing(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    settings = {
        "COMFYD__COMFYUI__STUCK_AFTER": "0.5",
        "COMFYD__COMFYUI__RESTART": f"sh,-c,echo again >> {asked}; echo done",
    }
    async with (
        Simulator(SimulatorOptions(step_seconds=0.01)) as simulator,
        aiohttp.ClientSession() as session,
    ):
        process = ComfydProcess(tmp_path, simulator.url, **settings)
        await asyncio.to_thread(process.start)
        try:
            client = Client(session, process.url)
            first = await client.submit(sampled(1, 60))
            await until(lambda: len(simulator.executions) == 1)
            simulator.faults.worker_dead = True  # after the prompt that runs
            waiting = [await client.submit(colored(number)) for number in range(6)]
            assert (await client.ended(first["task_id"]))["status"] == "COMPLETED"
            died = time.monotonic()
            while (answer := await client.call("GET", "/api/ready"))[0] == 200:
                assert time.monotonic() - died < 5
                await asyncio.sleep(0.02)
            reason = answer[1]["checks"]["comfyui"][0]["reason"]
            assert (
                reason == "sick: it answers but does not work, prompts have waited for 0.5 s and nothing runs"
            )
            (backend,) = (await client.call("GET", "/api/status"))[1]["backends"]
            assert (backend["ready"], backend["reason"]) == (False, reason)
            for task in [await client.task(each["task_id"]) for each in waiting]:
                assert task["status"] in {"PENDING", "PROCESSING"}
                assert [attempt["outcome"] for attempt in task["attempts"]] in ([], [None])
            refused = await client.submit(colored(7))  # is accepted all the same
            assert 'comfyd_backend_sick{backend="comfyui"} 1.0' in await figures(client, process)
            await restart_on_request(simulator, asked)
            for task in [await client.ended(each["task_id"]) for each in (*waiting, refused)]:
                assert task["status"] == "COMPLETED"
                outcomes = [attempt["outcome"] for attempt in task["attempts"]]
                assert outcomes in (["succeeded"], ["lost", "succeeded"])
            assert (await client.call("GET", "/api/ready"))[0] == 200
            told = await figures(client, process)
        finally:
            await asyncio.to_thread(process.kill)
        assert len(runs(simulator)) == 8
        assert set(runs(simulator).values()) == {1}
    assert asked.read_text() == "again\n"
    assert 'comfyd_backend_restarts_total{backend="comfyui",result="ok"} 1.0' in told
    assert 'comfyd_backend_sick{backend="comfyui"} 0.0' in told


async def figures(client: Client, process: ComfydProcess) -> str:
    """The text of `/metrics`."""
    return (await client.read(f"{process.url}/metrics")).decode()


@pytest.mark.fault(17)
async def test_tasks_go_to_the_server_that_works_and_not_to_the_sick_one(tmp_path: Path) -> None:
    async with Simulator() as dead, Simulator() as sound:
        dead.faults.worker_dead = True
        async with bench(quick_to_judge(tmp_path / "data", dead, sound)) as made:
            await until(lambda: all(backend.state.ready for backend in made.ground.backends))
            tasks = [await made.submit(colored(number)) for number in range(8)]
            assert "nothing runs" in await call_sick(made)
            tasks += [await made.submit(colored(100 + number)) for number in range(8)]
            await made.all_ended(14)
            rows = [await made.task(task.id) for task in tasks]
            assert made.ground.slots.used == {"comfyui-0": 2, "comfyui-1": 0}
            stuck = [row for row in rows if row.status is Status.RUNNING]
            assert [len(row.attempts) for row in stuck] == [1, 1]
            assert len(runs(sound)) == 14
            dead.faults.worker_dead = False
            await dead.crash()
            await dead.restart()
            for row in stuck:
                assert (await made.ended(row.id)).status is Status.SUCCEEDED
                assert (await made.task(row.id)).failures == 0
            await until(lambda: made.ground.backends[0].state.ready)
        assert set((runs(dead) + runs(sound)).values()) == {1}
        assert len(runs(dead) + runs(sound)) == 16


@pytest.mark.fault(17)
async def test_a_sick_server_whose_queue_was_emptied_gets_one_prompt_and_not_one_after_the_other(
    tmp_path: Path,
) -> None:
    async with Simulator() as simulator, bench(quick_to_judge(tmp_path / "data", simulator)) as made:
        (backend,) = made.ground.backends
        simulator.faults.worker_dead = True
        tasks = [await made.submit(colored(number)) for number in range(5)]
        await call_sick(made)
        for task in tasks[:2]:
            await made.state.control.cancel(task.id)
        await made.until(submitted, tasks[2].id)
        assert (backend.in_flight, made.ground.slots.used) == (1, {"comfyui-0": 1})
        await call_sick(made)
        await made.state.control.cancel(tasks[2].id)
        assert (await made.ended(tasks[2].id)).status is Status.CANCELED
        await asyncio.sleep(0.3)  # several looks at its empty queue: the next one is due in a minute
        assert backend.state.sick
        backend.reset_socket()
        await until(lambda: backend.connections == 2)
        await asyncio.sleep(0.3)
        assert backend.state.sick
        assert [(await made.task(task.id)).attempts[-1].step for task in tasks[3:]] == [Step.CLAIMED] * 2
        simulator.faults.worker_dead = False
        await simulator.crash()
        await until(lambda: not backend.state.sick)  # it is down: a socket that only broke is no restart
        await simulator.restart()
        assert [(await made.ended(task.id)).status for task in tasks[3:]] == [Status.SUCCEEDED] * 2
        assert backend.in_flight == 2


@pytest.mark.fault(16)
@pytest.mark.fault(15)
@pytest.mark.parametrize(
    ("graph", "deaf"),
    [
        (colored(1), {"uninterruptible": {"EmptyImage", "SaveImage"}, "class_seconds": {"EmptyImage": 1.2}}),
        (sampled(1, 2_000), {"interrupts_ignored": -1}),
    ],
    ids=["a node that never looks", "interrupts that get lost"],
)
async def test_a_prompt_that_will_not_stop_makes_its_server_sick_until_it_has_ended(
    tmp_path: Path, graph: dict[str, Any], deaf: dict[str, Any]
) -> None:
    options = SimulatorOptions(step_seconds=0.01)
    async with Simulator(options) as simulator, bench(quick_to_judge(tmp_path / "data", simulator)) as made:
        for switch, value in deaf.items():
            setattr(simulator.faults, switch, value)
        stubborn = await made.submit(graph)
        await made.until(executing, stubborn.id)
        simulator.faults.class_seconds = {}  # for those that come then
        behind = [await made.submit(colored(10 + number)) for number in range(3)]
        await made.until(submitted, behind[0].id)
        await made.state.control.cancel(stubborn.id)
        reason = await call_sick(made)
        row = await made.task(stubborn.id)
        assert reason.endswith(f"prompt {row.attempts[-1].id} runs on, asked to stop for 0.3 s")
        assert row.status is Status.RUNNING
        assert row.cancel_requested_at is not None
        assert len((await made.ground.backends[0].queue()).pending) == 1  # nothing new since
        simulator.faults.interrupts_ignored = 0
        ended = await made.ended(stubborn.id)
        assert (ended.status, len(ended.attempts)) == (Status.CANCELED, 1)
        for task in behind:
            assert (await made.ended(task.id)).status is Status.SUCCEEDED
        assert made.ground.backends[0].state.ready
        assert set(runs(simulator).values()) == {1}


@pytest.mark.fault(17)
async def test_a_prompt_that_ended_and_does_not_leave_the_queue_makes_its_server_sick(tmp_path: Path) -> None:
    async with Simulator() as simulator, bench(quick_to_judge(tmp_path / "data", simulator)) as made:
        simulator.faults.history_delay_seconds = 0.8  # as when the worker dies on what it does after a prompt
        task = await made.submit(colored(1))
        reason = await call_sick(made)
        assert "ended and has been in its queue for 0.3 s since" in reason
        simulator.faults.history_delay_seconds = 0.0
        assert (await made.ended(task.id)).status is Status.SUCCEEDED
        await until(lambda: made.ground.backends[0].state.ready)
        assert set(runs(simulator).values()) == {1}


async def test_somebody_elses_long_queue_is_no_sickness(tmp_path: Path) -> None:
    options = SimulatorOptions(step_seconds=0.01)
    async with Simulator(options) as simulator, aiohttp.ClientSession() as session:
        for number in range(10):
            body = {"prompt": sampled(number, 10_000)}
            async with session.post(f"{simulator.url}/prompt", json=body) as answer:
                assert answer.status == 200
        async with bench(quick_to_judge(tmp_path / "data", simulator)) as made:
            task = await made.submit(colored(1))
            await made.until(submitted, task.id)
            await asyncio.sleep(0.8)  # more than twice the limit
            assert made.ground.backends[0].state.ready


@pytest.mark.fault(17)
async def test_a_sick_server_that_is_down_is_down_and_may_be_well_when_it_is_back(tmp_path: Path) -> None:
    async with Simulator() as simulator, bench(quick_to_judge(tmp_path / "data", simulator)) as made:
        (backend,) = made.ground.backends
        simulator.faults.worker_dead = True
        task = await made.submit(colored(1))
        await call_sick(made)
        await simulator.crash()
        await until(lambda: not backend.state.sick)
        assert str(backend.state.reason).startswith("connection refused")
        simulator.faults.worker_dead = False
        await simulator.restart()
        assert (await made.ended(task.id)).status is Status.SUCCEEDED


@pytest.mark.comfyui
@pytest.mark.timeout(180)
@pytest.mark.fault(17)
async def test_the_real_comfyui_is_found_sick_when_its_worker_has_died_and_well_when_it_is_restarted(
    tmp_path: Path,
) -> None:
    async with ComfyUIProcess("real") as server, aiohttp.ClientSession() as session:
        config = quick_to_judge(tmp_path / "data", server, stuck_after=3.0)
        async with bench(config) as made:
            await until(lambda: made.ground.backends[0].state.ready)
            # While one runs, two that cannot be told apart: the worker dies when it compares them.
            slow = colored(1, width=512, height=512, batch_size=3)
            slow["2"]["inputs"]["images"] = ["3", 0]
            blur = {"image": ["1", 0], "blur_radius": 31, "sigma": 10.0}
            slow["3"] = {"class_type": "ImageBlur", "inputs": blur}
            twin = {"prompt": colored(2), "prompt_id": "8a1e2f64-0d1c-4b0e-9d43-0d8e5c1b2a3f", "number": 1}
            for body in ({"prompt": slow, "number": 0}, twin, twin, twin):
                async with session.post(f"{server.url}/prompt", json=body) as answer:
                    assert answer.status in {200, 500}
                await asyncio.sleep(0.1)  # until the first one has begun
            async with asyncio.timeout(30):
                while (await made.ground.backends[0].queue()).running:
                    await asyncio.sleep(0.1)
            task = await made.submit(colored(3))
            assert "nothing runs" in await call_sick(made)
            assert submitted(await made.task(task.id))
            await asyncio.to_thread(server.restart)
            ended = await made.ended(task.id)
            assert (ended.status, ended.failures) == (Status.SUCCEEDED, 0)
            assert made.ground.backends[0].state.ready
