"""Clocks that tests turn by hand."""

import asyncio
import uuid

from comfyd.clock import SystemClock


class HandClock:
    """Time stands still until `advance`; sleeping turns it on at once and lets other tasks run."""

    def __init__(self, now: int = 1_700_000_000_000) -> None:
        self.time = now
        self.slept: list[int] = []

    def now(self) -> int:
        """UTC milliseconds."""
        return self.time

    def monotonic(self) -> int:
        """The same, as if it never jumped."""
        return self.time

    def advance(self, milliseconds: int) -> None:
        """Turn the clock on."""
        self.time += milliseconds

    async def sleep(self, milliseconds: int) -> None:
        """Remember the pause, and be there already."""
        self.slept.append(milliseconds)
        self.time += milliseconds
        await asyncio.sleep(0)

    def new_id(self) -> str:
        """A random id."""
        return str(uuid.uuid4())

    def jitter(self) -> float:
        """In the middle."""
        return 0.5


class JumpingClock(SystemClock):
    """A wall clock that somebody sets, by `shift` milliseconds; the other one goes on as it did."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.shift = shift

    def now(self) -> int:
        """See `Clock`."""
        return super().now() + self.shift
