"""Who may prepare and who may go to ComfyUI next, strictly by urgency; never touches a task's row.

A slot is a place in one ComfyUI's own queue (`in_flight` of each). A few tasks more are prepared ahead
(`prefetch`), so that the GPU does not wait; a free slot goes to the most urgent prepared task, not the first.
"""

import asyncio
import heapq
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Final, Protocol

from comfyd.tasks import Ready

FETCHING: Final = 24
"""Tasks for each ComfyUI that may wait for their inputs beside those that are prepared: a slow url must not
keep the GPU from what is ready."""

_INSIDE: Final = "inside"
_NOWHERE: Final = ""
"""What the door tells in place of a backend's name."""


class Readiness(Protocol):
    """What of a backend's state decides here."""

    @property
    def ready(self) -> bool:
        """Whether it can take a prompt."""


class Host(Protocol):
    """What of a backend decides here."""

    name: str
    in_flight: int

    @property
    def state(self) -> Readiness:
        """Whether it can work."""


class TurnedAway(Exception):
    """Raised by `Slots.admit`: a more urgent task is there, and whoever waits should bring that instead."""


class _Line:
    """Places that wait, most urgent first; each waits on a future that is told a backend's name."""

    def __init__(self) -> None:
        self._heap: list[tuple[Ready, int, asyncio.Future[str], Place]] = []
        self._ticket = 0

    def join(self, place: "Place") -> asyncio.Future[str]:
        """Stand in line; a cancelled future has left it."""
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._ticket += 1
        heapq.heappush(self._heap, (place.ready, self._ticket, future, place))
        return future

    def first(self) -> "Place | None":
        """Who is next; None if nobody waits."""
        while self._heap and self._heap[0][2].done():
            heapq.heappop(self._heap)
        return self._heap[0][3] if self._heap else None

    def call(self, host: str) -> None:
        """Tell the first one."""
        heapq.heappop(self._heap)[2].set_result(host)

    def turn_away(self, ready: Ready) -> bool:
        """Tell the least urgent one, if it is less urgent than this, that it waits in vain."""
        last = max((entry for entry in self._heap if not entry[2].done()), default=None)
        if last is None or not ready < last[0]:
            return False
        last[2].set_result(_NOWHERE)
        return True

    def disperse(self) -> None:
        """Cancel all who wait."""
        for _, _, future, _ in self._heap:
            future.cancel()


class Place:
    """The right of one task to be prepared, and then its slot. Made by `Slots.admit`; ends with its block."""

    def __init__(self, slots: "Slots", ready: Ready) -> None:
        self._slots = slots
        self.ready = ready
        self.host: str | None = None
        self.is_fetching = False
        self.released = asyncio.Event()
        """Set when the prompt has ended: what is left to do needs no ComfyUI."""

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Within this block the task waits for its inputs, and others may be prepared meanwhile."""
        self.is_fetching = True
        self._slots.changed()
        try:
            yield
        finally:
            self.is_fetching = False

    async def acquire(self) -> str:
        """Wait for a slot; the name of the backend that has one. The place keeps it until `release`."""
        return await self._slots.seat(self)

    def release(self) -> None:
        """Give the slot back: the prompt has ended. May be called again."""
        self.released.set()
        self._slots.leave(self)


class Slots:
    """The slots of all backends and the line before them. Lives as long as the process."""

    def __init__(self, hosts: Sequence[Host], prefetch: int) -> None:
        self._hosts = {host.name: host for host in hosts}
        self._used = dict.fromkeys(self._hosts, 0)
        self._prefetch = prefetch
        self._staged: list[Place] = []
        self._closed = False
        self._door = _Line()
        self._line = _Line()

    @property
    def used(self) -> dict[str, int]:
        """How many prompts of ours each backend holds."""
        return dict(self._used)

    @asynccontextmanager
    async def admit(self, ready: Ready) -> AsyncIterator[Place]:
        """Wait until this task may be prepared: a backend can work, and few more urgent ones are prepared.

        Raises `TurnedAway` if it is to make way at the door.
        """
        place = Place(self, ready)
        future = self._door.join(place)
        try:
            self.changed()
            if await future == _NOWHERE:
                raise TurnedAway
            yield place
        finally:
            future.cancel()
            self._unstage(place)
            self.leave(place)

    @asynccontextmanager
    async def readmit(self, ready: Ready) -> AsyncIterator[Place]:
        """A place at once, for a task that an earlier process had admitted."""
        place = Place(self, ready)
        self._staged.append(place)
        try:
            yield place
        finally:
            self._unstage(place)
            self.leave(place)

    def turn_away(self, ready: Ready) -> bool:
        """This task may find nobody to bring it: the last one at the door makes way, if it is less urgent."""
        return self._door.turn_away(ready)

    def close(self) -> None:
        """Nobody is seated any more: all who wait for a slot, or at the door, are cancelled."""
        self._closed = True
        self._door.disperse()
        self._line.disperse()

    @asynccontextmanager
    async def adopt(self, ready: Ready, host: str) -> AsyncIterator[Place]:
        """A place with a slot at once: the prompt is in that backend already."""
        place = Place(self, ready)
        place.host = host
        self._used[host] += 1
        try:
            yield place
        finally:
            self.leave(place)

    async def seat(self, place: Place) -> str:
        """Wait for the slot of an admitted place."""
        future = self._line.join(place)
        if self._closed:
            future.cancel()
        self.changed()
        try:
            place.host = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._used[future.result()] -= 1
            future.cancel()
            self.changed()
            raise
        return place.host

    def leave(self, place: Place) -> None:
        """Take a place's slot back, if it has one."""
        if place.host is not None:
            self._used[place.host] -= 1
            place.host = None
        self.changed()

    def changed(self) -> None:
        """Something that decides has changed: give slots to the most urgent, then admit the next ones."""
        if self._closed:
            return
        while (seated := self._line.first()) is not None and (host := self._free_host()) is not None:
            self._used[host] += 1
            self._unstage(seated)
            self._line.call(host)
        while (entering := self._door.first()) is not None and self._may_enter(entering.ready):
            self._staged.append(entering)
            self._door.call(_INSIDE)

    def _unstage(self, place: Place) -> None:
        self._staged = [staged for staged in self._staged if staged is not place]

    def _free_host(self) -> str | None:
        """The ready backend with the most free slots; None if there is none."""
        free = {
            name: host.in_flight - self._used[name] for name, host in self._hosts.items() if host.state.ready
        }
        name = max(free, key=free.__getitem__, default=None)
        return name if name is not None and free[name] > 0 else None

    def _may_enter(self, ready: Ready) -> bool:
        """Whether there is room behind the more urgent ones: a late urgent task passes the prepared ones."""
        hosts = [host for host in self._hosts.values() if host.state.ready]
        if not hosts:
            return False
        free = sum(max(host.in_flight - self._used[host.name], 0) for host in hosts)
        room = self._prefetch * len(hosts) + free
        ahead = [staged for staged in self._staged if staged.ready < ready]
        fetching = min(sum(staged.is_fetching for staged in ahead), FETCHING * len(hosts))
        return len(ahead) - fetching < room
