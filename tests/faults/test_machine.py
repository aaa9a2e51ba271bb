"""The state machine over the whole service: no series of steps breaks a promise, and a broken comfyd does.

`CHAOS_EXAMPLES` and `CHAOS_SEED` make it longer and another one.
"""

import os
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest

from comfyd.app import Ground, Service, wire
from comfyd.store.base import Store
from comfyd.tasks import Attempt, Settlement, Status, Step, Task
from tests.faults.machine import run_machine
from tests.faults.machine_ledger import Broken

EXAMPLES = int(os.environ.get("CHAOS_EXAMPLES", "25"))
SEED = int(os.environ.get("CHAOS_SEED", "4"))
ENOUGH = 60
"""Examples within which a comfyd that is broken on purpose has to be found out. All were within 20."""


@pytest.mark.timeout(300 + 10 * EXAMPLES)
@pytest.mark.fault(2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 19, 20, 21, 22, 23, 27, 37, 38)
def test_no_series_of_steps_breaks_a_promise() -> None:
    figures = run_machine(EXAMPLES, SEED)
    print(figures)
    assert figures.examples >= EXAMPLES
    assert figures.runs > 0


def test_the_same_seed_does_the_same() -> None:
    one, two = (run_machine(3, SEED, shrink=False) for _ in range(2))
    assert (one.steps, one.runs, one.excused) == (two.steps, two.runs, two.excused)
    assert one.virtual_seconds == two.virtual_seconds


class Spoiled:
    """A store that does one thing wrong, and everything else as the real one."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class LosesSettles(Spoiled):
    """Says of every third settlement that it is kept, and keeps nothing: the task runs for ever."""

    async def settle(self, attempt_id: str, settlement: Settlement, now: int) -> Task:
        self.count += 1
        if self.count % 3:
            return await self.inner.settle(attempt_id, settlement, now)
        (task,) = (claim.task for claim in await self.inner.live() if claim.attempt.id == attempt_id)
        return msgspec.structs.replace(task, status=settlement.status)


class QueuesSuccessesAgain(Spoiled):
    """Puts a task that has succeeded back into the queue: the GPU runs it twice."""

    async def settle(self, attempt_id: str, settlement: Settlement, now: int) -> Task:
        if settlement.status is Status.SUCCEEDED and not self.count:
            self.count += 1
            settlement = msgspec.structs.replace(
                settlement, status=Status.QUEUED, available_at=now, outcome="lost", artefacts=()
            )
        return await self.inner.settle(attempt_id, settlement, now)


class ForgetsIntents(Spoiled):
    """Does not keep that a prompt is about to be sent: what a crash leaves is sent once more."""

    async def record(self, attempt: Attempt) -> None:
        if attempt.step in {Step.SUBMITTING, Step.SUBMITTED}:
            return
        await self.inner.record(attempt)


class CancelsAnother(Spoiled):
    """Cancels the newest task, whichever was named."""

    async def cancel(self, task_id: str, now: int) -> Any:
        newest = await self.inner.live()
        return await self.inner.cancel(newest[-1].task.id if newest else task_id, now)


class ForgetsKeys(Spoiled):
    """Keeps the task, and not the key under which it was asked for."""

    async def add(self, new: Any, _key: Any, now: int) -> Any:
        return await self.inner.add(new, None, now)


class MixesResults(Spoiled):
    """Settles with the artefacts of the task before."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.before: tuple[Any, ...] = ()

    async def settle(self, attempt_id: str, settlement: Settlement, now: int) -> Task:
        mine, self.before = settlement.artefacts, settlement.artefacts or self.before
        if mine:
            settlement = msgspec.structs.replace(settlement, artefacts=self.before_of(mine))
        return await self.inner.settle(attempt_id, settlement, now)

    def before_of(self, mine: tuple[Any, ...]) -> tuple[Any, ...]:
        """Those of the first task that ended, for all."""
        self.first = getattr(self, "first", mine)
        return self.first


def spoiled(kind: Callable[[Store], Spoiled]) -> Callable[[Ground], Service]:
    """A comfyd with such a store."""

    def wired(ground: Ground) -> Service:
        return wire(msgspec.structs.replace(ground, store=cast("Store", kind(ground.store))))

    return wired


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("kind", "counter"),
    [
        (LosesSettles, "lost"),
        (QueuesSuccessesAgain, "dup"),
        (ForgetsIntents, "dup|lost|phantom"),
        (CancelsAnother, "phantom"),
        (ForgetsKeys, "idem_split"),
        (MixesResults, "phantom"),
    ],
)
def test_a_comfyd_that_breaks_a_promise_is_found_out(kind: Callable[[Store], Spoiled], counter: str) -> None:
    with pytest.raises(Broken, match=counter):
        run_machine(ENOUGH, 1, shrink=False, wiring=spoiled(kind))
