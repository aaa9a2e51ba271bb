"""Kills, cuts, ghosts and other clients, against the real ComfyUI: nothing lost, no run too many.

How many prompts ComfyUI was given and how many it ran is read from its own log.
"""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support import proxy
from tests.support.comfyd import Client, ComfydProcess
from tests.support.comfyui import ComfyUIProcess, ServerFailed
from tests.support.service import colored

pytestmark = pytest.mark.comfyui

PATIENCE = 60.0
POSTED = b"got prompt"
RAN = b"Prompt executed in"

_colors = itertools.count(1)
"""A fresh one for each graph, so that nothing is cached."""


class FreezableComfyd(ComfydProcess):
    """A comfyd that can be stopped in the middle of whatever it does, and go on."""

    def freeze(self) -> None:
        """SIGSTOP."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGCONT)


class Ground:
    """A comfyd in front of the real ComfyUI, with a way between them that can be cut. One for each test."""

    def __init__(
        self, comfyui: ComfyUIProcess, comfyd: FreezableComfyd, way: proxy.Proxy, http: aiohttp.ClientSession
    ) -> None:
        self.comfyui = comfyui
        self.comfyd = comfyd
        self.way = way
        self.client = Client(http, comfyd.url)
        self.direct = Client(http, comfyui.url)
        """Somebody else, who talks to ComfyUI itself."""
        self._before: dict[bytes, int] = {}

    def count_from_here(self) -> None:
        """What ComfyUI did until now is not this test's."""
        self._before = {what: self._count(what) for what in (POSTED, RAN)}

    def _count(self, what: bytes) -> int:
        return self.comfyui.log_file.read_bytes().count(what)

    @property
    def posted(self) -> int:
        """Prompts that ComfyUI was given."""
        return self._count(POSTED) - self._before[POSTED]

    @property
    def ran(self) -> int:
        """Prompts that it worked on to some end."""
        return self._count(RAN) - self._before[RAN]

    async def submit(self, graph: dict[str, Any], **facts: Any) -> str:
        """Queue a task; its id."""
        return str((await self.client.submit(graph, **facts))["task_id"])

    async def until(
        self, condition: Callable[[dict[str, Any]], bool], task_id: str, patience: float = PATIENCE
    ) -> dict[str, Any]:
        """The task as soon as it fulfils the condition."""
        async with asyncio.timeout(patience):
            while not condition(task := await self.client.task(task_id)):
                await asyncio.sleep(0.02)
        return task

    async def completed(self, task_id: str) -> dict[str, Any]:
        """The task, completed, whose every output can be read."""
        task = await self.client.ended(task_id, PATIENCE)
        assert task["status"] == "COMPLETED", task
        assert task["outputs"]
        for output in task["outputs"]:
            assert len(await self.client.read(output["url"])) == output["size_bytes"] > 0
        return task

    async def in_comfyui(self, where: str) -> list[str]:
        """The prompt ids that are `running` or `pending` there."""
        _, queue = await self.direct.call("GET", "/queue")
        return [item[1] for item in queue[f"queue_{where}"]]

    async def until_in_comfyui(self, where: str, task_id: str) -> str:
        """Wait until the task's latest prompt is `running` or `pending` there; its id."""
        async with asyncio.timeout(PATIENCE):
            while True:
                task = await self.client.task(task_id)
                prompt_id = task["attempts"][-1]["id"] if task["attempts"] else ""
                if prompt_id in await self.in_comfyui(where):
                    return str(prompt_id)
                assert task["status"] in {"PENDING", "PROCESSING"}, task
                await asyncio.sleep(0.01)

    async def until_seen(self, prompt_id: str) -> None:
        """Wait until ComfyUI's history has it."""
        async with asyncio.timeout(PATIENCE):
            while not (await self.direct.call("GET", f"/history/{prompt_id}"))[1]:
                await asyncio.sleep(0.02)

    async def foreign(self, graph: dict[str, Any]) -> str:
        """A prompt of somebody else; its id."""
        body = {"prompt": graph, "client_id": "somebody"}
        status, answer = await self.direct.call("POST", "/prompt", json=body)
        assert status == 200, answer
        return str(answer["prompt_id"])

    async def verdict(self, prompt_id: str) -> str:
        """How a prompt ended, by ComfyUI's history."""
        await self.until_seen(prompt_id)
        _, history = await self.direct.call("GET", f"/history/{prompt_id}")
        messages = history[prompt_id]["status"]["messages"]
        return str(messages[-1][0])

    async def revive(self) -> None:
        """Start a ComfyUI that was killed."""
        await self.comfyui.start_async()

    async def watch_dog(self) -> None:
        """Start it each time it has died by itself."""
        while True:
            with contextlib.suppress(ServerFailed):  # it lives
                self.comfyui.wait_for_exit(0)
                self.comfyui.kill()
                await self.comfyui.start_async()
            await asyncio.sleep(0.05)


NODES = """
import os, signal, time
from comfy.utils import ProgressBar


class TestRest:
    INPUT_TYPES = classmethod(lambda cls: {"required": {
        "image": ("IMAGE",),
        "seconds": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 600.0}),
        "dies": ("BOOLEAN", {"default": False}),
    }})
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "rest"
    CATEGORY = "tests"

    def rest(self, image, seconds, dies):
        steps = max(int(seconds / 0.05), 1)
        bar = ProgressBar(steps)
        for step in range(steps):
            time.sleep(seconds / steps)
            bar.update_absolute(step + 1)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return (image,)


NODE_CLASS_MAPPINGS = {"TestRest": TestRest}
"""
"""A node that takes its time without work, and one that is the end of ComfyUI."""


def resting(*seconds: float, dies: bool = False) -> dict[str, Any]:
    """A picture that goes through nodes which take so long, each a step of 0.05 s after the other."""
    graph: dict[str, Any] = {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": next(_colors)},
        }
    }
    last = "1"
    for number, time_taken in enumerate(seconds):
        inputs = {"image": [last, 0], "seconds": time_taken, "dies": dies}
        last = str(10 + number)
        graph[last] = {"class_type": "TestRest", "inputs": inputs}
    graph["9"] = {"class_type": "SaveImage", "inputs": {"images": [last, 0], "filename_prefix": "rest"}}
    return graph


def quick() -> dict[str, Any]:
    """A tiny picture that no cache has seen."""
    return colored(1_000_000 + next(_colors))


def outcomes(task: dict[str, Any]) -> list[str | None]:
    return [attempt["outcome"] for attempt in task["attempts"]]


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUIProcess]:
    """One for this file: it is killed and started again."""
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "test_nodes.py").write_text(NODES)
    paths = folder / "paths.yaml"
    paths.write_text(f"tests:\n  base_path: {folder}\n  custom_nodes: custom_nodes\n")
    with ComfyUIProcess("real", options=["--extra-model-paths-config", str(paths)]) as process:
        yield process


@asynccontextmanager
async def ground_before(comfyui: ComfyUIProcess, folder: Path) -> AsyncIterator[Ground]:
    """A fresh comfyd; at the end ComfyUI has nothing left of it."""
    async with proxy.Proxy(comfyui.port) as way, aiohttp.ClientSession() as http:
        comfyd = FreezableComfyd(folder, way.url, COMFYD__COMFYUI__REQUEST_TIMEOUT="1.5")
        try:
            await asyncio.to_thread(comfyd.start)
            made = Ground(comfyui, comfyd, way, http)
            async with asyncio.timeout(PATIENCE):
                while (await made.client.call("GET", "/api/ready"))[0] != 200:
                    await asyncio.sleep(0.02)
            await made.completed(await made.submit(quick()))  # it knows this ComfyUI now
            made.count_from_here()
            yield made
            async with asyncio.timeout(PATIENCE):
                while await made.in_comfyui("running") or await made.in_comfyui("pending"):
                    await asyncio.sleep(0.02)
        finally:
            await asyncio.to_thread(comfyd.kill)
            print(comfyd.log_text())  # shown of a test that failed


@pytest.fixture
async def ground(comfyui: ComfyUIProcess, tmp_path: Path) -> AsyncIterator[Ground]:
    with contextlib.suppress(ServerFailed):  # it lives, unless an earlier test has failed
        comfyui.wait_for_exit(0)
        comfyui.kill()
        await comfyui.start_async()
    async with ground_before(comfyui, tmp_path) as made:
        yield made


# comfyd is killed


@pytest.mark.fault(2)
async def test_a_comfyd_killed_while_its_prompt_waits_adopts_it(ground: Ground) -> None:
    ahead = await ground.foreign(resting(4.0))
    task_id = await ground.submit(resting(0.3))
    await ground.until_in_comfyui("pending", task_id)
    await asyncio.to_thread(ground.comfyd.kill)
    assert len(await ground.in_comfyui("pending")) == 1
    await asyncio.to_thread(ground.comfyd.start)
    task = await ground.completed(task_id)
    assert outcomes(task) == ["succeeded"]
    assert await ground.verdict(ahead) == "execution_success"
    assert (ground.posted, ground.ran) == (2, 2)


@pytest.mark.fault(2)
async def test_a_comfyd_killed_while_its_prompt_runs_adopts_it_and_has_it_soon(ground: Ground) -> None:
    task_id = await ground.submit(resting(4.0))
    prompt_id = await ground.until_in_comfyui("running", task_id)
    await asyncio.to_thread(ground.comfyd.kill)
    await asyncio.to_thread(ground.comfyd.start)
    assert await ground.in_comfyui("running") == [prompt_id]
    await ground.until_seen(prompt_id)
    ended = time.monotonic()
    task = await ground.completed(task_id)
    assert time.monotonic() - ended < 5
    assert outcomes(task) == ["succeeded"]
    assert (ground.posted, ground.ran) == (1, 1)


@pytest.mark.fault(2)
async def test_a_comfyd_killed_before_its_prompt_ended_fetches_what_was_made_meanwhile(
    ground: Ground,
) -> None:
    task_id = await ground.submit(resting(1.0))
    prompt_id = await ground.until_in_comfyui("running", task_id)
    await asyncio.to_thread(ground.comfyd.kill)
    await ground.until_seen(prompt_id)
    await asyncio.to_thread(ground.comfyd.start)
    started = time.monotonic()
    task = await ground.completed(task_id)
    assert time.monotonic() - started < 5
    assert outcomes(task) == ["succeeded"]
    assert (ground.posted, ground.ran) == (1, 1)


# ComfyUI is killed


@pytest.mark.fault(3, 4)
async def test_a_killed_comfyui_costs_only_the_prompt_that_ran(ground: Ground) -> None:
    tasks = [await ground.submit(resting(3.0)), *[await ground.submit(resting(0.3)) for _ in range(3)]]
    await ground.until_in_comfyui("running", tasks[0])
    await ground.until(lambda task: task["progress"]["value"] > 0, tasks[0])
    await ground.until_in_comfyui("pending", tasks[1])
    await asyncio.to_thread(ground.comfyui.kill)
    late = await ground.submit(quick())
    await ground.revive()
    running, waiting, *others = [await ground.completed(task_id) for task_id in (*tasks, late)]
    assert outcomes(running) == ["suspect", "succeeded"]
    assert outcomes(waiting) == ["lost", "succeeded"]
    for task in others:
        assert [outcome for outcome in outcomes(task) if outcome != "lost"] == ["succeeded"]
    assert (ground.posted, ground.ran) == (2 + 5, 5)


@pytest.mark.fault(5)
async def test_a_comfyui_killed_after_it_saved_everything_is_not_asked_to_run_it_again(
    ground: Ground,
) -> None:
    task_id = await ground.submit(resting(1.5))
    prompt_id = await ground.until_in_comfyui("running", task_id)
    await ground.until(lambda task: task["progress"]["value"] > 0, task_id)
    ground.comfyd.freeze()  # it will hear all that ComfyUI said before it died, and find no history
    await ground.until_seen(prompt_id)
    await asyncio.to_thread(ground.comfyui.kill)
    await ground.revive()
    ground.comfyd.thaw()
    task = await ground.completed(task_id)
    assert outcomes(task) == ["succeeded"]
    assert (ground.posted, ground.ran) == (1, 1)


@pytest.mark.fault(18)
async def test_a_task_that_kills_comfyui_each_time_fails_and_the_others_do_not_pay(ground: Ground) -> None:
    poison = await ground.submit(resting(1.5, dies=True))
    good = [await ground.submit(resting(0.2)) for _ in range(4)]
    watching = asyncio.ensure_future(ground.watch_dog())
    try:
        ended = await ground.client.ended(poison, PATIENCE)
        tasks = [await ground.completed(task_id) for task_id in good]
        assert not watching.done()
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    assert (ended["status"], ended["error"]["code"]) == ("FAILED", "backend_crashed")
    assert [outcome for outcome in outcomes(ended) if outcome != "lost"] == ["suspect"] * 3
    for task in tasks:
        assert [outcome for outcome in outcomes(task) if outcome != "lost"] == ["succeeded"]
    assert ground.ran == len(good)


@pytest.mark.fault(18)
async def test_a_graph_that_would_kill_the_worker_is_refused_and_never_sent(ground: Ground) -> None:
    alone = {"class_type": "EmptyImage"}
    for stray in (alone, {**alone, "inputs": None}, {**alone, "inputs": []}):
        graph = {**quick(), "77": stray}
        status, body = await ground.client.call("POST", "/api/tasks", json={"workflow": graph})
        assert (status, body["error"]["code"]) == (422, "invalid_workflow")
    assert ground.posted == 0
    await ground.completed(await ground.submit(quick()))
    assert (ground.posted, ground.ran) == (1, 1)


# the way between them


@pytest.mark.fault(10)
async def test_a_socket_that_is_dropped_in_mid_run_costs_nothing(ground: Ground) -> None:
    task_id = await ground.submit(resting(2.0))
    prompt_id = await ground.until_in_comfyui("running", task_id)
    for _ in range(2):
        await ground.way.set(proxy.Refuse())
        await asyncio.sleep(0.2)
        await ground.way.set(proxy.Pass())
        await asyncio.sleep(0.3)
    await ground.until_seen(prompt_id)
    ended = time.monotonic()
    task = await ground.completed(task_id)
    assert time.monotonic() - ended < 3
    assert outcomes(task) == ["succeeded"]
    assert (ground.posted, ground.ran) == (1, 1)


@pytest.mark.fault(9)
async def test_a_way_that_goes_silent_in_mid_run_costs_nothing(ground: Ground) -> None:
    task_id = await ground.submit(resting(0.6))
    prompt_id = await ground.until_in_comfyui("running", task_id)
    await ground.way.set(proxy.Stall())
    await ground.until_seen(prompt_id)
    await asyncio.sleep(2.0)
    await ground.way.set(proxy.Pass())
    task = await ground.completed(task_id)
    assert outcomes(task) == ["succeeded"]
    assert (ground.posted, ground.ran) == (1, 1)


@pytest.mark.fault(7)
async def test_a_post_that_times_out_here_and_runs_there_is_not_sent_again(ground: Ground) -> None:
    assert ground.comfyui.pid is not None
    os.killpg(ground.comfyui.pid, signal.SIGSTOP)  # the request lies in its socket until it goes on (Q6)
    try:
        task_id = await ground.submit(resting(0.3))
        async with asyncio.timeout(PATIENCE):
            while "prompt.unclear" not in ground.comfyd.log_text():
                await asyncio.sleep(0.05)
        assert ground.posted == 0
    finally:
        os.killpg(ground.comfyui.pid, signal.SIGCONT)
    task = await ground.completed(task_id)
    assert outcomes(task) == ["succeeded"]
    assert (ground.posted, ground.ran) == (1, 1)


# somebody else at the same ComfyUI


@pytest.mark.fault(14)
async def test_somebody_elses_global_interrupt_is_forgiven(ground: Ground) -> None:
    task_id = await ground.submit(resting(1.5))
    prompt_id = await ground.until_in_comfyui("running", task_id)
    async with asyncio.timeout(PATIENCE):  # it may come too early to be seen (Q7)
        while prompt_id in await ground.in_comfyui("running"):
            await ground.direct.call("POST", "/interrupt")
            await asyncio.sleep(0.1)
    task = await ground.completed(task_id)
    assert outcomes(task) == ["stray", "succeeded"]
    assert await ground.verdict(prompt_id) == "execution_interrupted"
    assert (ground.posted, ground.ran) == (2, 2)


@pytest.mark.fault(13)
async def test_a_queue_that_somebody_clears_is_filled_again_and_what_runs_goes_on(ground: Ground) -> None:
    tasks = [await ground.submit(resting(2.0)), *[await ground.submit(quick()) for _ in range(2)]]
    await ground.until_in_comfyui("running", tasks[0])
    await ground.until_in_comfyui("pending", tasks[1])
    status, _ = await ground.direct.call("POST", "/queue", json={"clear": True})
    assert status == 200
    running, waiting, other = [await ground.completed(task_id) for task_id in tasks]
    assert outcomes(running) == ["succeeded"]
    assert outcomes(waiting) == ["lost", "succeeded"]
    assert outcomes(other) == ["succeeded"]
    assert (ground.posted, ground.ran) == (4, 3)


async def test_twenty_cancels_of_running_prompts_hit_these_and_nobody_else(ground: Ground) -> None:
    chance = random.Random(4)
    innocent: list[str] = []
    foreign: list[str] = []
    waits: list[float] = []
    for number in range(20):
        victim = await ground.submit(resting(1.0, 1.0, 1.0))
        if number % 5 == 0:
            foreign.append(await ground.foreign(quick()))
            innocent.append(await ground.submit(quick()))
        prompt_id = await ground.until_in_comfyui("running", victim)
        await asyncio.sleep(chance.uniform(0.0, 0.4))
        assert prompt_id in await ground.in_comfyui("running")
        asked = time.monotonic()
        await ground.client.call("POST", f"/api/tasks/{victim}/cancel")
        task = await ground.client.ended(victim)
        waits.append(time.monotonic() - asked)
        assert task["status"] == "CANCELED"
        assert prompt_id not in await ground.in_comfyui("running")
        assert await ground.verdict(prompt_id) == "execution_interrupted"
    for task_id in innocent:
        assert outcomes(await ground.completed(task_id)) == ["succeeded"]
    for prompt_id in foreign:
        assert await ground.verdict(prompt_id) == "execution_success"
    assert ground.posted == 20 + len(innocent) + len(foreign)
    waits.sort()
    print(f"20 cancels: median {waits[10]:.3f} s, p95 {waits[18]:.3f} s, most {waits[-1]:.3f} s")
    assert waits[18] <= 5
