"""Time, pauses and random ids for the simulator.

The only module of the simulator that looks at a clock. It is no `Clock`: the simulator stands for another
program, whose time the service under test does not control, so nothing here can be frozen by a test.
"""

from __future__ import annotations

import asyncio
import time
import uuid


def milliseconds() -> int:
    """Wall clock, UTC milliseconds since the epoch: the `timestamp` of ComfyUI's messages."""
    return int(time.time() * 1000)  # noqa: TID251  # the simulator is another program with a clock of its own


def monotonic() -> float:
    """Seconds on a clock that never goes back, for durations only."""
    return time.monotonic()  # noqa: TID251  # the simulator is another program with a clock of its own


def local_time() -> time.struct_time:
    """Local calendar time, for the `%year%` variables in a file name prefix."""
    return time.localtime()


async def pause(seconds: float) -> None:
    """Wait; zero or less still lets every other coroutine run once."""
    await asyncio.sleep(max(0.0, seconds))  # noqa: TID251  # a node that takes time is what is simulated


def new_id() -> str:
    """A canonical version 4 UUID, as ComfyUI mints for a prompt without an id."""
    return str(uuid.uuid4())  # noqa: TID251  # ids of another program
