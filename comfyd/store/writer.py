"""Group commit: operations of many callers, gathered into batches; knows no database and decides nothing.

While one batch is being committed the next one gathers, so nobody waits for company: an operation that comes
alone is applied at once, and under load one sync to disk serves up to `BATCH` callers.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, Generic, Self, TypeVar

import msgspec

from comfyd.errors import StoreUnavailable

BATCH: Final = 64
"""How many operations go into one transaction at most."""

D = TypeVar("D")
T = TypeVar("T")

Operation = Callable[[D], Any]
"""One write: takes the database inside a transaction, answers what the caller is to get."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one operation: its value once it is durable, or the error that undid it."""

    value: Any = None
    error: BaseException | None = None


Apply = Callable[[Sequence[Operation[D]]], Awaitable[Sequence[Result]]]
"""Applies a batch durably; answers one result per operation, in order, and does not raise."""


class GroupCommit(Generic[D]):
    """Gathers operations and applies them batch by batch. Lives inside its `async with`, whose end drains."""

    def __init__(self, apply: Apply[D]) -> None:
        self._apply = apply
        self._waiting: deque[tuple[Operation[D], asyncio.Future[Any]]] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="store-writer")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task

    async def submit(self, operation: Callable[[D], T]) -> T:
        """Apply the operation and return its value once it is durable.

        A caller that is canceled leaves the batch as it is: its operation may or may not have been applied.
        """
        if self._closing:
            raise StoreUnavailable("the database is being closed")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((operation, future))
        self._wake.set()
        return await future

    async def _run(self) -> None:
        try:
            while not (self._closing and not self._waiting):
                await self._wake.wait()
                if not self._closing:
                    self._wake.clear()
                while self._waiting:
                    await self._next_batch()
        finally:
            self._closing = True
            _give_up(future for _, future in self._waiting)

    async def _next_batch(self) -> None:
        taken = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
        batch = [(operation, future) for operation, future in taken if not future.done()]
        if not batch:
            return
        try:
            results = await self._apply([operation for operation, _ in batch])
            for (_, future), result in zip(batch, results, strict=True):
                _resolve(future, result)
        finally:
            _give_up(future for _, future in batch)


def _give_up(futures: Iterable[asyncio.Future[Any]]) -> None:
    """Answer those that have no answer yet: only a canceled writer leaves any, and nobody waits for ever."""
    for future in futures:
        _resolve(future, Result(error=StoreUnavailable("the write was given up; its end is not known")))


def _resolve(future: asyncio.Future[Any], result: Result) -> None:
    if future.done():
        return
    if result.error is None:
        future.set_result(result.value)
    else:
        future.set_exception(result.error)
