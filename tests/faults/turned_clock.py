"""A clock that runs by itself and can be turned on: whoever sleeps then wakes, as if hours had passed."""

import asyncio
import contextlib

from comfyd.clock import SystemClock


class TurnedClock(SystemClock):
    """The system's clock, ahead of it by what it was turned. Lives in one event loop."""

    def __init__(self) -> None:
        super().__init__()
        self._ahead = 0
        self._turned = asyncio.Event()

    def now(self) -> int:
        """See `Clock`."""
        return super().now() + self._ahead

    def monotonic(self) -> int:
        """See `Clock`."""
        return super().monotonic() + self._ahead

    async def sleep(self, milliseconds: int) -> None:
        """See `Clock`."""
        end = self.monotonic() + milliseconds
        await asyncio.sleep(0)
        while (left := end - self.monotonic()) > 0:
            turned = self._turned
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left / 1000):
                    await turned.wait()

    def turn(self, milliseconds: int) -> None:
        """Turn it on; whoever sleeps looks whether it is time."""
        self._ahead += milliseconds
        before, self._turned = self._turned, asyncio.Event()
        before.set()

    async def pass_time(self, milliseconds: int, step: int = 5_000, real: float = 0.005) -> None:
        """Let so much time pass in steps, after each of which everybody has `real` seconds to act."""
        for _ in range(0, milliseconds, step):
            self.turn(step)
            await asyncio.sleep(real)
