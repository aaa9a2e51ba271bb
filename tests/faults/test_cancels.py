"""Cancels at random instants hit exactly their targets, each once, and soon; never another prompt.

`CHAOS_CANCELS=1000` asks for more of the same. `run_cancels` is the same for whoever wants the numbers.
"""

import asyncio
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, cast

import aiohttp
import msgspec
import pytest

from comfyd.control import Control
from comfyd.metrics import Metrics
from comfyd.queue import TaskQueue
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.simulator.options import FlavorName
from comfyd.tasks import CancelResult, Settlement, Status, Step, Task
from tests.support.service import Bench, bench, configuration, sampled
from tests.support.values import artefact
from tests.test_worker import left_behind

COUNT: Final = int(os.environ.get("CHAOS_CANCELS", "150"))
SEED: Final = int(os.environ.get("CHAOS_SEED", "1"))
NOBODY: Final = "http://127.0.0.1:9"
"""Where no ComfyUI listens."""
STEP_SECONDS: Final = 0.01
ALIVE: Final = 8
"""Tasks that are there at a time: one runs, one waits in ComfyUI, the others in comfyd."""
BYSTANDERS: Final = 0.4
"""Tasks that nobody cancels, for each that somebody does."""
LIFE_SECONDS: Final = 0.4
"""About how long a task is there, so that a cancel within this may meet it anywhere."""


class CancelSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What became of so many cancels. `problems` is empty when every promise was kept."""

    seed: int
    cancels: int
    met: dict[str, int]
    """Where the cancels met their tasks -> how many."""
    bystanders: int
    foreign: int
    running_p50: float
    running_p95: float
    running_most: float
    """Seconds from asking to the end of a task whose prompt the GPU was working on."""
    p95: float
    """The same for all tasks that a worker had."""
    seconds: float
    problems: tuple[str, ...]

    def text(self) -> str:
        """One line."""
        met = ", ".join(f"{count} {where}" for where, count in sorted(self.met.items()))
        return (
            f"{self.cancels} cancels in {self.seconds:.1f} s, seed {self.seed}: {met}; running ones ended in"
            f" {self.running_p50:.3f} s (median), {self.running_p95:.3f} s (p95), {self.running_most:.3f} s"
            f" (most), all in work {self.p95:.3f} s (p95); {self.bystanders} bystanders and {self.foreign}"
            f" foreign prompts; {len(self.problems)} problems"
        )


class Storm:
    """Tasks, cancels and somebody else's prompts at one comfyd. Lives as long as its block."""

    def __init__(self, made: Bench, simulator: Simulator, http: aiohttp.ClientSession, seed: int) -> None:
        self._made = made
        self._simulator = simulator
        self._http = http
        self._chance = random.Random(seed)
        self._room = asyncio.Semaphore(ALIVE)
        self.ended: list[Task] = []
        self.met: Counter[str] = Counter()
        self.waits: dict[str, list[float]] = {}
        self.bystanders = 0
        self.foreign: list[str] = []
        self.problems: list[str] = []

    async def blow(self, cancels: int) -> None:
        """So many cancels; returns when everything has ended and was looked at."""
        work: list[asyncio.Task[None]] = []
        victims = 0
        foreign = asyncio.ensure_future(self._somebody_else())
        while victims < cancels:
            await self._room.acquire()
            victim = self._chance.random() < 1 / (1 + BYSTANDERS)
            victims += victim
            work.append(asyncio.ensure_future(self._victim() if victim else self._bystander()))
            work[-1].add_done_callback(lambda _: self._room.release())
        await asyncio.gather(*work)
        foreign.cancel()
        await asyncio.gather(foreign, return_exceptions=True)
        await self._until(lambda: all(self._fate(prompt_id) for prompt_id in self.foreign))
        await self._judge()

    def _graph(self) -> dict[str, Any]:
        """Mostly 20 to 50 ms on the GPU, now and then 300."""
        steps = 30 if self._chance.random() < 0.08 else self._chance.randint(2, 5)
        return sampled(self._chance.getrandbits(48), steps)

    async def _bystander(self) -> None:
        self.bystanders += 1
        task = await self._made.ended((await self._made.submit(self._graph())).id)
        runs = [outcome for attempt in task.attempts for outcome in self._fate(attempt.id)]
        if (task.status, task.attempt_count, runs) != (Status.SUCCEEDED, 1, ["success"]):
            self.problems.append(f"bystander {task.id} is {task.status}, its runs ended {runs}")
        self.ended.append(task)

    async def _victim(self) -> None:
        task = await self._made.submit(self._graph())
        if self._chance.random() < 0.4:
            await self._until_it_runs(task.id)
            await asyncio.sleep(self._chance.uniform(0, 0.05))
        else:
            await asyncio.sleep(self._chance.uniform(0, LIFE_SECONDS))
        on_gpu = self._on_gpu(await self._made.task(task.id))
        asked = time.monotonic()
        answer = await self._made.state.control.cancel(task.id)
        where = _where(answer, on_gpu=on_gpu)
        self.met[where] += 1
        ended = await self._made.ended(task.id)
        self.waits.setdefault(where, []).append(time.monotonic() - asked)
        expected = Status.SUCCEEDED if where == "ended" else Status.CANCELED
        if ended.status is not expected:
            self.problems.append(f"{task.id}, canceled while {where}, is {ended.status}")
        async with self._http.get("/queue") as said:
            queue = await said.json()
        left = {item[1] for name in ("queue_running", "queue_pending") for item in queue[name]}
        if left & {attempt.id for attempt in ended.attempts}:
            self.problems.append(f"{task.id}, canceled while {where}, is still in ComfyUI's queue")
        self.ended.append(ended)

    async def _somebody_else(self) -> None:
        """Another client's prompts, in the same ComfyUI, one after the other."""
        while True:
            body = {"prompt": self._graph(), "client_id": "somebody"}
            async with self._http.post("/prompt", json=body) as answer:
                self.foreign.append((await answer.json())["prompt_id"])
            await self._until(lambda: bool(self._fate(self.foreign[-1])))
            await asyncio.sleep(self._chance.uniform(0, LIFE_SECONDS))

    async def _until_it_runs(self, task_id: str) -> None:
        async with asyncio.timeout(30):
            while not self._on_gpu(row := await self._made.task(task_id)) and not row.status.terminal:
                await asyncio.sleep(0.004)

    async def _until(self, condition: Any) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.005)

    def _begun(self, prompt_id: str) -> list[int]:
        """When the GPU began with this prompt."""
        entries = self._simulator.executions
        return [entry.at for entry in entries if entry.event == "start" and entry.prompt_id == prompt_id]

    def _fate(self, prompt_id: str) -> list[str | None]:
        """How the GPU's runs of this prompt ended."""
        entries = self._simulator.executions
        return [entry.outcome for entry in entries if entry.event == "end" and entry.prompt_id == prompt_id]

    def _on_gpu(self, row: Task) -> bool:
        """Whether the GPU works on it now."""
        ids = [attempt.id for attempt in row.attempts[-1:]]
        return any(self._begun(prompt_id) and not self._fate(prompt_id) for prompt_id in ids)

    async def _judge(self) -> None:
        """What can only be said at the end."""
        for prompt_id in self.foreign:
            if self._fate(prompt_id) != ["success"]:
                self.problems.append(f"foreign prompt {prompt_id} ended {self._fate(prompt_id)}")
        ends = _ends(self._made.state.metrics)
        if ends != len(self.ended):
            self.problems.append(f"{len(self.ended)} tasks ended {ends} times")
        for seen in self.ended:
            await self._judge_ended(seen)

    async def _judge_ended(self, seen: Task) -> None:
        now = await self._made.task(seen.id)
        if (now.status, now.completed_at) != (seen.status, seen.completed_at):
            self.problems.append(f"{seen.id} was {seen.status} and is {now.status}")
        begun = [at for attempt in now.attempts for at in self._begun(attempt.id)]
        if len(begun) > 1:
            self.problems.append(f"{now.id} ran {len(begun)} times")
        if begun and now.completed_at is not None and max(begun) > now.completed_at:
            self.problems.append(f"{now.id} ran after it had ended")
        if now.suspects + now.strays + now.failures:
            self.problems.append(f"{now.id} was blamed for what was none of its doing")
        if now.status is Status.CANCELED and now.artefacts:
            self.problems.append(f"{now.id} is canceled and has outputs")


def _where(answer: Task, *, on_gpu: bool) -> str:
    """Where a cancel met its task, by the answer that it got."""
    if answer.status is Status.CANCELED:
        return "queued"
    if answer.status.terminal:
        return "ended"
    if on_gpu:
        return "running"
    step = answer.attempts[-1].step if answer.attempts else Step.CLAIMED
    return {Step.CLAIMED: "prepared", Step.SUBMITTING: "sent", Step.SUBMITTED: "pending or just ended"}.get(
        step, "being stored"
    )


# two moments that the storm meets now and then


SUCCESS: Final = Settlement(status=Status.SUCCEEDED, outcome="succeeded", artefacts=(artefact(),))


async def test_a_cancel_that_was_answered_is_kept_although_the_success_was_decided_before_it(
    tmp_path: Path,
) -> None:
    async with bench(configuration(tmp_path / "data", NOBODY), works=False) as made:
        claim = await left_behind(made, sampled(1, 2))
        answer = await made.state.control.cancel(claim.task.id)
        assert (answer.status, answer.cancel_requested_at is None) == (Status.RUNNING, False)
        ended = await made.store.settle(claim.attempt.id, SUCCESS, made.state.clock.now())
    assert (ended.status, ended.artefacts) == (Status.CANCELED, ())


class Meanwhile:
    """A store in which a task ends between being looked at and being canceled."""

    def __init__(self, made: Bench, attempt_id: str) -> None:
        self._made = made
        self._attempt_id = attempt_id

    async def cancel(self, task_id: str, now: int) -> CancelResult | None:
        """See `Store`."""
        await self._made.store.settle(self._attempt_id, SUCCESS, self._made.state.clock.now())
        return await self._made.store.cancel(task_id, now)


async def test_a_task_that_ends_while_its_cancel_comes_is_counted_and_told_by_its_end_alone(
    tmp_path: Path,
) -> None:
    async with bench(configuration(tmp_path / "data", NOBODY), works=False) as made:
        claim = await left_behind(made, sampled(1, 2))
        state, rows = made.state, cast("Any", Meanwhile(made, claim.attempt.id))
        queue = TaskQueue(made.store, state.clock)
        control = Control(rows, cast("Any", None), queue, state.board, state.metrics, state.clock)
        with state.board.watch(claim.task.id) as watcher:
            answer = await control.cancel(claim.task.id)
            told = await watcher.next(timeout=0.05)
        assert (answer.status, told) == (Status.SUCCEEDED, None)
        assert _ends(state.metrics) == 0


# the storm


def _ends(metrics: Metrics) -> int:
    """How many ends of tasks were counted."""
    counted = [
        metrics.registry.get_sample_value("comfyd_tasks_finished_total", {"status": str(status)})
        for status in Status
    ]
    return int(sum(value or 0 for value in counted))


@asynccontextmanager
async def _storm(data: Path, seed: int, flavor: FlavorName) -> AsyncIterator[Storm]:
    options = SimulatorOptions(step_seconds=STEP_SECONDS, flavor=flavor, previews=False)
    async with Simulator(options) as simulator:
        config = configuration(data, simulator.url)
        async with bench(config) as made, aiohttp.ClientSession(simulator.url) as http:
            yield Storm(made, simulator, http, seed)


async def _run(count: int, seed: int, flavor: FlavorName, data: Path) -> CancelSummary:
    began = time.monotonic()
    async with _storm(data, seed, flavor) as storm:
        await storm.blow(count)
        left = [path for path in (data / "files").rglob("*") if path.is_file()]
        kept = {each.key for row in storm.ended for each in row.artefacts}
        problems = [*storm.problems, *(f"{path.name} is nobody's" for path in left if not _is_in(path, kept))]
    working = [
        wait for where, waits in storm.waits.items() if where not in {"queued", "ended"} for wait in waits
    ]
    return CancelSummary(
        seed=seed,
        cancels=sum(storm.met.values()),
        met=dict(storm.met),
        bystanders=storm.bystanders,
        foreign=len(storm.foreign),
        running_p50=_quantile(storm.waits.get("running", []), 0.5),
        running_p95=_quantile(storm.waits.get("running", []), 0.95),
        running_most=_quantile(storm.waits.get("running", []), 1.0),
        p95=_quantile(working, 0.95),
        seconds=time.monotonic() - began,
        problems=tuple(problems),
    )


def _is_in(path: Path, keys: set[str]) -> bool:
    return any(path.as_posix().endswith(key) for key in keys)


def _quantile(values: list[float], part: float) -> float:
    """0 of none."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)] if ordered else 0.0


def run_cancels(count: int, seed: int, flavor: FlavorName = "0.3.75") -> CancelSummary:
    """So many cancels at random instants against a whole comfyd; what became of them. Runs its own loop."""
    with tempfile.TemporaryDirectory(prefix="cancels-") as folder:
        return asyncio.run(_run(count, seed, flavor, Path(folder) / "data"))


@pytest.mark.timeout(60 + COUNT)
@pytest.mark.parametrize(("flavor", "part"), [("0.3.75", 2 / 3), ("0.33", 1 / 3)], ids=["0.3.75", "0.33"])
def test_cancels_at_random_instants_hit_their_targets_once_and_nobody_else(
    flavor: FlavorName, part: float
) -> None:
    summary = run_cancels(round(COUNT * part), SEED, flavor)
    print(summary.text())
    assert summary.problems == (), summary.text()
    assert summary.met["running"] >= summary.cancels // 10
    assert summary.running_p95 <= 5.0
