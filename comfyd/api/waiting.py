"""Waiting on behalf of a client: until a task ends, the client is gone or comfyd stops; never longer."""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, Final

from starlette.types import Receive

from comfyd.api.state import State
from comfyd.errors import TaskNotFound
from comfyd.progress import Watcher
from comfyd.tasks import Task

LOOK_SECONDS: Final = 15.0
"""How often a waiting reader looks at the row by itself: the row is the truth, events only wake."""


async def found(state: State, task_id: str) -> Task:
    """The task. Raises `TaskNotFound`."""
    task = await state.store.get(task_id)
    if task is None:
        raise TaskNotFound(f"there is no task {task_id}")
    return task


async def until_ended(state: State, task_id: str, seconds: float, receive: Receive) -> Task:
    """The task as soon as it has ended, and after `seconds` in any case. Raises `TaskNotFound`."""
    with state.board.watch(task_id) as watcher:
        task = await found(state, task_id)
        if task.status.terminal or seconds == 0:
            return task
        await unless_stopped(_ended(state, task_id, watcher, seconds), gone(receive), state.closing)
        return await found(state, task_id)


async def _ended(state: State, task_id: str, watcher: Watcher, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not watcher.overrun:
                event = await watcher.next(LOOK_SECONDS)
                if (event is None or event.final) and (await found(state, task_id)).status.terminal:
                    return


async def unless_stopped(
    work: Coroutine[Any, Any, None], left: Coroutine[Any, Any, None], closing: asyncio.Event
) -> bool:
    """Do the work, but drop it when the client has left or the process stops; whether it was done.

    The work's own exceptions come out.
    """
    working = asyncio.create_task(work)
    stops = [asyncio.create_task(left), asyncio.create_task(_set(closing))]
    try:
        await asyncio.wait([working, *stops], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return False
        working.result()
        return True
    finally:
        for task in (working, *stops):
            task.cancel()
        await asyncio.gather(working, *stops, return_exceptions=True)


async def _set(event: asyncio.Event) -> None:
    await event.wait()


async def gone(receive: Receive) -> None:
    """Returns when the client has closed its connection; what it still sends is dropped."""
    while (await receive())["type"] not in {"http.disconnect", "websocket.disconnect"}:
        pass
