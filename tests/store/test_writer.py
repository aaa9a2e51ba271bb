"""Group commit, held against a database that is only a list."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from comfyd.errors import StoreUnavailable
from comfyd.store.writer import BATCH, GroupCommit, Operation, Result

Journal = list[int]


class FakeDisk:
    """Applies batches to a list, one at a time and only while its gate is open."""

    def __init__(self) -> None:
        self.journal: Journal = []
        self.batches: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = asyncio.Event()

    async def apply(self, operations: Sequence[Operation[Journal]]) -> list[Result]:
        """Each operation's value, or its error."""
        self.batches.append(len(operations))
        self.entered.set()
        await self.gate.wait()
        return [self._one(operation) for operation in operations]

    def _one(self, operation: Operation[Journal]) -> Result:
        try:
            return Result(value=operation(self.journal))
        except ValueError as exc:
            return Result(error=exc)


def write(number: int) -> Callable[[Journal], int]:
    def operation(journal: Journal) -> int:
        if number < 0:
            raise ValueError(number)
        journal.append(number)
        return number

    return operation


async def test_lone_operation_waits_for_nobody() -> None:
    disk = FakeDisk()
    async with GroupCommit(disk.apply) as commits:
        assert await commits.submit(write(1)) == 1
        assert await commits.submit(write(2)) == 2
    assert disk.batches == [1, 1]


async def test_what_comes_meanwhile_goes_together_and_in_order() -> None:
    disk = FakeDisk()
    disk.gate.clear()
    async with GroupCommit(disk.apply) as commits:
        submits: list[asyncio.Task[Any]] = [asyncio.create_task(commits.submit(write(0)))]
        await disk.entered.wait()
        submits += [asyncio.create_task(commits.submit(write(number))) for number in range(1, 2 * BATCH)]
        await asyncio.sleep(0)
        disk.gate.set()
        assert await asyncio.gather(*submits) == list(range(2 * BATCH))
    assert disk.batches == [1, BATCH, BATCH - 1]
    assert disk.journal == list(range(2 * BATCH))


async def test_refused_operation_is_its_callers_alone() -> None:
    disk = FakeDisk()
    async with GroupCommit(disk.apply) as commits:
        results = await asyncio.gather(
            *(commits.submit(write(number)) for number in (1, -1, 2)), return_exceptions=True
        )
    assert disk.batches == [3]
    assert results[::2] == [1, 2]
    assert isinstance(results[1], ValueError)


async def test_operation_of_a_caller_that_left_in_time_is_not_applied() -> None:
    disk = FakeDisk()
    disk.gate.clear()
    async with GroupCommit(disk.apply) as commits:
        first = asyncio.create_task(commits.submit(write(1)))
        await disk.entered.wait()
        second = asyncio.create_task(commits.submit(write(2)))
        await asyncio.sleep(0)
        for each in (first, second):
            each.cancel()
        await asyncio.sleep(0)
        disk.gate.set()
    assert disk.journal == [1]
    assert disk.batches == [1]


async def test_nothing_is_taken_after_the_end() -> None:
    commits = GroupCommit(FakeDisk().apply)
    async with commits:
        pass
    with pytest.raises(StoreUnavailable):
        await commits.submit(write(1))


async def test_canceled_end_leaves_no_caller_waiting() -> None:
    disk = FakeDisk()
    disk.gate.clear()
    inside = asyncio.Event()
    callers: list[asyncio.Task[int]] = []

    async def lifetime() -> None:
        async with GroupCommit(disk.apply) as commits:
            callers.extend(asyncio.create_task(commits.submit(write(number))) for number in range(3))
            await disk.entered.wait()
            callers.append(asyncio.create_task(commits.submit(write(3))))
            await asyncio.sleep(0)
            inside.set()

    task = asyncio.create_task(lifetime())
    await inside.wait()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    results = await asyncio.wait_for(asyncio.gather(*callers, return_exceptions=True), 5)
    assert [type(result) for result in results] == [StoreUnavailable] * 4
