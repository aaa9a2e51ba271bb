"""Prompts that nobody waits for are taken back: also of a sick ComfyUI, and no others count."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from comfyd.comfy.sightings import QueueView
from comfyd.errors import BackendUnclear
from comfyd.metrics import Metrics
from comfyd.orphans import LOOK_EVERY_MS, Orphans
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.tasks import Settlement, Status, TaskError
from tests.support.logs import captured_logs
from tests.support.service import bench, configuration, sampled, until


class Queue:
    """A ComfyUI, as far as `Orphans` knows one: shows these views in turn, the last one for ever."""

    name = "c"

    def __init__(self, *views: QueueView) -> None:
        self.state = SimpleNamespace(ready=True, sick=False)
        self.views = list(views)
        self.looks = 0
        self.cancelled: list[str] = []
        self.silent = False

    async def queue(self) -> QueueView:
        """See `Backend`."""
        self.looks += 1
        if self.silent:
            raise BackendUnclear("no answer in time")
        return self.views.pop(0) if len(self.views) > 1 else self.views[0]

    async def cancel(self, prompt_id: str) -> None:
        """See `Backend`."""
        self.cancelled.append(prompt_id)


class Rows:
    """A store that knows which attempts have ended."""

    def __init__(self, *ended: str) -> None:
        self.ended = ended

    async def ended_attempts(self, attempt_ids: Sequence[str]) -> tuple[str, ...]:
        """See `Store`."""
        return tuple(attempt_id for attempt_id in attempt_ids if attempt_id in self.ended)


class Looking:
    """Orphans of this queue, and what they counted."""

    def __init__(self, queue: Queue, *ended: str) -> None:
        self.metrics = Metrics()
        self.orphans = Orphans(cast("Any", queue), cast("Any", Rows(*ended)), self.metrics)

    async def look(self) -> int:
        """Look once; how many were counted in all."""
        assert await self.orphans.step() == LOOK_EVERY_MS
        lines = self.metrics.render()[0].decode().splitlines()
        found = [line for line in lines if line.startswith('comfyd_orphaned_prompts_total{backend="c"}')]
        return round(float(found[0].split()[1])) if found else 0


async def test_an_orphan_is_counted_once_and_asked_to_go_until_it_does() -> None:
    queue = Queue(QueueView(running=("foreign", "orphan"), pending=("another", "live")))
    looking = Looking(queue, "orphan", "another")
    assert await looking.look() == 2
    assert await looking.look() == 2
    assert queue.cancelled == ["orphan", "another"] * 2


async def test_one_that_left_the_queue_and_was_settled_during_the_look_is_none() -> None:
    queue = Queue(QueueView(running=("done",), pending=("orphan",)), QueueView(running=("orphan",)))
    with captured_logs() as lines:
        assert await Looking(queue, "done", "orphan").look() == 1
    assert queue.cancelled == ["orphan"]
    assert [(line["event"], line["attempt_id"]) for line in lines] == [("prompt.orphaned", "orphan")]


async def test_where_nothing_has_ended_one_look_is_enough() -> None:
    queue = Queue(QueueView(running=("live",)))
    assert await Looking(queue, "gone").look() == 0
    assert queue.looks == 1


@pytest.mark.parametrize(("ready", "sick", "looks"), [(True, False, 2), (False, True, 2), (False, False, 0)])
async def test_a_sick_comfyui_is_looked_at_and_one_that_is_down_is_not(
    *, ready: bool, sick: bool, looks: int
) -> None:
    queue = Queue(QueueView(running=("orphan",)))
    queue.state = SimpleNamespace(ready=ready, sick=sick)
    await Looking(queue, "orphan").look()
    assert (queue.looks, len(queue.cancelled)) == (looks, looks // 2)


async def test_no_answer_proves_nothing() -> None:
    queue = Queue(QueueView(running=("orphan",)))
    queue.silent = True
    looking = Looking(queue, "orphan")
    assert await looking.look() == 0
    queue.silent = False
    assert await looking.look() == 1


async def test_an_orphan_that_makes_its_comfyui_sick_is_still_asked_to_go(tmp_path: Path) -> None:
    """Its first interrupt is lost (Q7); if nobody asked a sick server again, sick it would stay."""
    async with Simulator(SimulatorOptions(step_seconds=0.01)) as simulator:
        config = configuration(tmp_path / "data", simulator.url)
        server = msgspec.structs.replace(config.comfyui[0], stop_timeout=0.3)
        async with bench(msgspec.structs.replace(config, comfyui=(server,))) as made:
            task = await made.submit(sampled(1, 10_000))
            row = await made.until(
                lambda row: bool(row.attempts) and row.attempts[-1].seen_running_at is not None, task.id
            )
            simulator.faults.interrupts_ignored = 1
            error = TaskError(code="stalled", message="it was given up")
            settlement = Settlement(
                status=Status.FAILED, outcome="lost", failures=0, suspects=0, strays=0, error=error
            )
            await made.store.settle(row.attempts[-1].id, settlement, made.state.clock.now())
            (backend,) = made.ground.backends
            await until(lambda: backend.state.sick, 15)
            await until(lambda: any(entry.event == "end" for entry in simulator.executions), 15)
            await until(lambda: backend.state.ready, 15)
