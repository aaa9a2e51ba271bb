"""Time, waiting, new ids and chance, as one object that is handed down; never a global."""

import asyncio
import random
import time
import uuid
from typing import Protocol


class Clock(Protocol):
    """What the rest of comfyd knows of time. Tests pass one that they turn by hand."""

    def now(self) -> int:
        """UTC, in integer milliseconds since the epoch. May jump; never measure a duration with it."""

    def monotonic(self) -> int:
        """Milliseconds since some moment. Never jumps."""

    async def sleep(self, milliseconds: int) -> None:
        """Wait."""

    def new_id(self) -> str:
        """A random UUID version 4 in canonical form, the only one that every ComfyUI takes as prompt id."""

    def jitter(self) -> float:
        """A random number in 0..1, for spreading retries."""


class SystemClock:
    """The real one. One lives as long as the process."""

    def __init__(self) -> None:
        self._random = random.SystemRandom()

    def now(self) -> int:
        """See `Clock`."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> int:
        """See `Clock`."""
        return time.monotonic_ns() // 1_000_000

    async def sleep(self, milliseconds: int) -> None:
        """See `Clock`."""
        await asyncio.sleep(milliseconds / 1000)

    def new_id(self) -> str:
        """See `Clock`."""
        return str(uuid.uuid4())

    def jitter(self) -> float:
        """See `Clock`."""
        return self._random.random()
