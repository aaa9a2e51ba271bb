"""The one place that repeats: every background actor is a step, looped and supervised here.

Never decides what a step does. A step that raises is logged, shown on `/api/ready` and tried again after a
pause that doubles up to a bound; a step that returns says how long to wait before the next.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, Self

import msgspec
import structlog

from comfyd.clock import Clock

log = structlog.get_logger("comfyd.loops")

BACKOFF_FIRST_MS: Final = 250
BACKOFF_MOST_MS: Final = 10_000
CANCEL_AGAIN_SECONDS: Final = 3.0

Step = Callable[[], Awaitable[int]]
"""One step of an actor; it answers how many milliseconds to wait before the next."""


class Loop(msgspec.Struct, frozen=True, kw_only=True):
    """A background actor: its name, its step, and what errors are expected of it (shown, not traced)."""

    name: str
    step: Step
    expected: tuple[type[Exception], ...] = ()
    jittered: bool = False
    """Whether the pause after an error is spread, so that many processes do not come back at once."""


class Health:
    """Which loops are sick, in plain words. Lives as long as the process."""

    def __init__(self) -> None:
        self._sick: dict[str, str] = {}

    def problems(self) -> dict[str, str]:
        """Name of a sick loop -> what is wrong with it."""
        return dict(self._sick)

    def sick(self, name: str, reason: str) -> None:
        """This loop's last step failed."""
        self._sick[name] = reason

    def well(self, name: str) -> None:
        """This loop's last step succeeded."""
        self._sick.pop(name, None)


async def run(loop: Loop, clock: Clock, health: Health) -> None:
    """Repeat a loop's step for ever; ends only by cancellation."""
    pause = BACKOFF_FIRST_MS
    while True:
        try:
            wait = await loop.step()
        except loop.expected as exc:
            health.sick(loop.name, str(exc))
            log.info("loop.waiting", loop=loop.name, reason=str(exc), pause_ms=pause)
        except Exception as exc:  # one of the two broad catches: a sick loop is seen, not dead
            health.sick(loop.name, f"{type(exc).__name__}: {exc}")
            log.exception("loop.failed", loop=loop.name, pause_ms=pause)
        else:
            health.well(loop.name)
            pause = BACKOFF_FIRST_MS
            _leave_if_canceled(loop, health)
            await clock.sleep(wait)
            continue
        _leave_if_canceled(loop, health)
        spread = clock.jitter() / 2 if loop.jittered else 0.0
        await clock.sleep(round(pause * (1 - spread)))
        pause = min(pause * 2, BACKOFF_MOST_MS)


def _leave_if_canceled(loop: Loop, health: Health) -> None:
    """End a loop whose cancellation got lost in its step, as when an error of its tidying up replaced it."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        health.sick(loop.name, "it was stopped")  # seen, if nobody wanted that
        raise asyncio.CancelledError


async def stop(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel these until they have ended.

    Once is not enough: a cancellation that meets aiohttp's own time-out in the same turn of the loop comes
    out of it as `TimeoutError` (aiohttp 3.14), and whoever asks ComfyUI goes on asking. Not too soon, either:
    what a task tidies up at its end takes a moment.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_SECONDS)


class Crew:
    """The running loops of a process. Enter it to start them, leave it to stop them."""

    def __init__(self, loops: Sequence[Loop], clock: Clock, health: Health) -> None:
        self._loops = loops
        self._clock = clock
        self._health = health
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(run(loop, self._clock, self._health), name=loop.name) for loop in self._loops
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        await stop(self._tasks)
