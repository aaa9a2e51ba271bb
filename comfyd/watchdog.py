"""Sees when the event loop does not answer, and says where it hangs; never ends the process.

The loop feeds it by a step that should come every quarter of a second; a thread of its own looks whether it
did. A loop that hangs answers nobody, so this is what is left to say why.
"""

import sys
import threading
import traceback
from collections.abc import Callable
from typing import Final, Self

import structlog

from comfyd.clock import Clock

log = structlog.get_logger("comfyd.watchdog")

FEED_MS: Final = 250
"""How often the loop feeds it."""
PATIENCE_MS: Final = 2_000
"""How long the loop may be silent."""
LOOK_SECONDS: Final = 0.25
FRAMES: Final = 10
"""How many of the loop's innermost frames are shown."""


class Watchdog:
    """Watches the event loop of the thread that enters it, until that leaves; its figures work without.

    `observe` is told by how many milliseconds each feeding came too late.
    """

    def __init__(self, clock: Clock, observe: Callable[[int], None], patience_ms: int = PATIENCE_MS) -> None:
        self._clock = clock
        self._observe = observe
        self._patience_ms = patience_ms
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._watched = 0
        self._fed: int | None = None
        self._looked = 0
        self._silent_since: int | None = None

    def __enter__(self) -> Self:
        self._watched = threading.get_ident()
        self._fed = self._looked = self._clock.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    async def step(self) -> int:
        """One step of the loop that feeds it."""
        now = self._clock.monotonic()
        if self._fed is not None:
            self._observe(max(now - self._fed - FEED_MS, 0))
        self._fed = now
        return FEED_MS

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """One look of the thread: speaks when the loop falls silent, and when it is back."""
        now, fed = self._clock.monotonic(), self._fed or 0
        asleep, self._looked = now - self._looked - round(LOOK_SECONDS * 1000), now
        if self._silent_since is not None:
            if fed != self._silent_since:
                log.warning("loop.back", seconds=(fed - self._silent_since) / 1000)
                self._silent_since = None
        elif asleep >= self._patience_ms:
            # Then this thread did not run either: the process was stopped or the machine slept, and the loop
            # gets as long again. A library that keeps the interpreter to itself looks the same from here.
            log.warning("process.stood_still", seconds=asleep / 1000)
            self._fed = now
        elif now - fed >= self._patience_ms:
            self._silent_since = fed
            log.warning("loop.blocked", seconds=(now - fed) / 1000, stack=self._stack())

    def _stack(self) -> list[str]:
        """Where the loop's thread is now, innermost frame first."""
        frame = sys._current_frames().get(self._watched)  # noqa: SLF001 # the documented way to another thread's stack
        walked = traceback.walk_stack(frame) if frame is not None else iter(())
        found = traceback.StackSummary.extract(walked, limit=FRAMES, lookup_lines=False)
        return [f"{entry.filename}:{entry.lineno} {entry.name}" for entry in found]
