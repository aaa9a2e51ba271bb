"""Whether one ComfyUI can be worked with, as its answers show; never asks it anything."""

from collections.abc import Callable
from typing import Final

import msgspec

from comfyd.clock import Clock

SILENT_PROBES: Final = 3
"""So many probes in a row without an answer and ComfyUI is not ready; one proves nothing (Q20)."""


class BackendState(msgspec.Struct, frozen=True, kw_only=True):
    """How a backend stands now."""

    ready: bool
    """ComfyUI answers over HTTP and works: prompts may be sent."""
    reason: str | None
    """Why it is not ready, in plain words; None when it is."""
    sick: bool = False
    """It answers and does not work (Q9). One that does not answer is down, not sick."""
    version: str | None
    """What ComfyUI calls itself; kept while it is away."""
    socket: bool
    """The WebSocket is open. Without it prompts are followed by polling."""
    since: int
    """Since when `ready` is what it is; UTC milliseconds."""
    timeouts: int
    """Requests in a row that were not answered in time."""


class Health:
    """What the answers of one backend add up to. Lives as long as the backend."""

    def __init__(self, clock: Clock, on_change: Callable[[], None]) -> None:
        self._clock = clock
        self._on_change = on_change
        self._up = False
        self._down_for: str | None = "not asked yet"
        self._sick_for: str | None = None
        self.version: str | None = None
        self.since = clock.now()
        self.timeouts = 0
        self.life = 0
        """Counts up when ComfyUI may have been started anew: what was learned of it may be wrong now."""
        self.falls = 0
        """Counts up while it is down: who is up again after that was started anew. Silence proves nothing."""
        self._silent_probes = 0

    @property
    def ready(self) -> bool:
        """It answers and works."""
        return self._up and self._sick_for is None

    @property
    def sick(self) -> bool:
        """It answers and does not work."""
        return self._up and self._sick_for is not None

    @property
    def reason(self) -> str | None:
        """Why it is not ready; None when it is."""
        return self._sick_for if self._up else self._down_for

    def answered(self) -> None:
        """Some request was answered, whatever the answer."""
        self.timeouts = 0

    def timed_out(self) -> None:
        """Some request was not."""
        self.timeouts += 1

    def passed(self, version: str | None) -> None:
        """A probe was answered as it should."""
        self._silent_probes = 0
        self.version = version
        self._set(True, None, self._sick_for)

    def diagnosed(self, reason: str | None) -> None:
        """How it works was looked at: `reason` says why it is sick, None that it is not."""
        self._set(self._up, self._down_for, reason)

    def renewed(self) -> None:
        """ComfyUI may have been started anew: the WebSocket had to be opened."""
        self.life += 1

    def refused(self, reason: str) -> None:
        """ComfyUI takes no connections: it is down."""
        self.life += 1
        self.failed(reason)

    def failed(self, reason: str) -> None:
        """ComfyUI answered a probe with something else than it should."""
        self._silent_probes = 0
        self.falls += 1
        self._set(False, reason, self._sick_for)

    def silent(self, reason: str) -> None:
        """A probe got no answer; too many of them in a row and it is not ready."""
        self._silent_probes += 1
        if self._silent_probes >= SILENT_PROBES or not self._up:
            self._set(False, reason, self._sick_for)

    def changed(self) -> None:
        """What can be given to it has changed."""
        self._on_change()

    def _set(self, up: bool, down_for: str | None, sick_for: str | None) -> None:
        ready, sick = self.ready, self.sick
        self._up, self._down_for, self._sick_for = up, down_for, sick_for
        if self.ready != ready:
            self.since = self._clock.now()
        if (self.ready, self.sick) != (ready, sick):  # down and sick are both not ready, and not the same
            self._on_change()
