"""Who may be tried now, so that a receiver that hangs holds up nobody else; never sends anything.

A try begins in the quick lane. After half a second without an answer it moves over to the slow one, so that
the quick one is free again however many hang. Beside that, an endpoint is trusted by what it did last:

- one that answered at once has up to `EACH` tries under way, and the last places of the quick lane are its
  kind's;
- one that is not known yet has one at a time in the quick lane, until it has answered;
- one that answered late has two at a time and begins in the slow lane;
- one that hung has one at a time and begins in the slow lane, whose last places are not for its kind.
"""

import enum
from collections import Counter
from typing import Final

EACH: Final = 4
"""Tries under way at one endpoint that answers at once."""
EACH_LATE: Final = 2
"""Tries under way at one that answers late."""
QUICK: Final = 128
"""Tries under way in all, less those that wait for an answer for longer than `LINGER_SECONDS`."""
KEPT: Final = 32
"""Of these, for endpoints that answered at once last time."""
SLOW: Final = 256
"""Tries that wait for longer than that."""
KEPT_SLOW: Final = 64
"""Of these, for whoever does not hang."""
AT_ONCE: Final = QUICK + SLOW
"""Tries under way in all."""
LINGER_SECONDS: Final = 0.5
REMEMBERED: Final = 10_000
"""Endpoints whose manners are known, at most: the rest is met as if for the first time."""


class Manners(enum.Enum):
    """What an endpoint did last."""

    QUICK = "quick"
    """It answered at once, if only with a no, or a refused connection: it is no burden."""
    LATE = "late"
    """It answered after `LINGER_SECONDS`."""
    HUNG = "hung"
    """It did not answer."""


class Lanes:
    """The places for tries under way. Lives as long as the process."""

    def __init__(self) -> None:
        self.quick = 0
        self.slow = 0
        self._at: Counter[str] = Counter()
        self._manners: dict[str, Manners] = {}

    @property
    def room(self) -> bool:
        """Whether there is a place for anybody."""
        return self.quick < QUICK or self.slow < SLOW

    def busy(self) -> set[str]:
        """Endpoints that can get no place now, as far as they are known."""
        busy = {endpoint for endpoint, tries in self._at.items() if tries >= self._most(endpoint)}
        full = {manners for manners in (Manners.LATE, Manners.HUNG) if not self._slow_room(manners)}
        if full:
            busy |= {endpoint for endpoint, manners in self._manners.items() if manners in full}
        return busy

    def enter(self, endpoint: str) -> "Place | None":
        """A place for a try at this endpoint; None if there is none now."""
        if self._at[endpoint] >= self._most(endpoint):
            return None
        manners = self._manners.get(endpoint)
        if manners in {Manners.LATE, Manners.HUNG}:
            return Place(self, endpoint, slow=True) if self._slow_room(manners) else None
        most = QUICK if manners is Manners.QUICK else QUICK - KEPT
        return Place(self, endpoint, slow=False) if self.quick < most else None

    def _slow_room(self, manners: Manners | None) -> bool:
        return self.slow < (SLOW - KEPT_SLOW if manners is Manners.HUNG else SLOW)

    def _most(self, endpoint: str) -> int:
        manners = self._manners.get(endpoint)
        return EACH if manners is Manners.QUICK else EACH_LATE if manners is Manners.LATE else 1

    def count(self, endpoint: str, tries: int, *, slow: bool) -> None:
        """So many more, or fewer, are under way at this endpoint."""
        if slow:
            self.slow += tries
        else:
            self.quick += tries
        self._at[endpoint] += tries
        if not self._at[endpoint]:
            del self._at[endpoint]

    def remember(self, endpoint: str, manners: Manners) -> None:
        """How this endpoint behaved just now."""
        self._manners.pop(endpoint, None)
        self._manners[endpoint] = manners
        if len(self._manners) > REMEMBERED:
            del self._manners[next(iter(self._manners))]


class Place:
    """One try's place in a lane. `leave` it once."""

    def __init__(self, lanes: Lanes, endpoint: str, *, slow: bool) -> None:
        self._lanes = lanes
        self._endpoint = endpoint
        self._slow = slow
        self._lingers = False
        lanes.count(endpoint, 1, slow=slow)

    def linger(self) -> None:
        """It waits for long now: move over, if there is room."""
        self._lingers = True
        if not self._slow and self._lanes.slow < SLOW:
            self._lanes.count(self._endpoint, -1, slow=False)
            self._slow = True
            self._lanes.count(self._endpoint, 1, slow=True)

    def heard(self, *, status: int | None) -> None:
        """The try is over, with this status or with none."""
        slow = Manners.HUNG if status is None else Manners.LATE
        self._lanes.remember(self._endpoint, slow if self._lingers else Manners.QUICK)

    def leave(self) -> None:
        """Give the place up."""
        self._lanes.count(self._endpoint, -1, slow=self._slow)
