"""Places and slots go by urgency, never by who came first."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from comfyd.slots import FETCHING, Place, Slots
from comfyd.tasks import Ready


class State:
    """How a host stands."""

    def __init__(self) -> None:
        self.ready = True


class FakeHost:
    """A backend, as far as slots know one."""

    def __init__(self, name: str = "a", in_flight: int = 1) -> None:
        self.name = name
        self.in_flight = in_flight
        self.state = State()


def ready(seq: int, priority: int = 0) -> Ready:
    return Ready(rank=-priority, seq=seq, task_id=f"t{seq}")


class Line:
    """Tasks that enter, sit and leave when the test says so."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.log: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.leave: dict[str, asyncio.Event] = {}

    def come(self, who: Ready) -> None:
        """Somebody wants in."""
        self.leave[who.task_id] = asyncio.Event()
        self.tasks[who.task_id] = asyncio.ensure_future(self._live(who))

    async def _live(self, who: Ready) -> None:
        async with self.slots.admit(who) as place:
            self.log.append(f"enter {who.task_id}")
            host = await place.acquire()
            self.log.append(f"sit {who.task_id} {host}")
            await self.leave[who.task_id].wait()

    async def go(self, who: Ready) -> None:
        """They are done."""
        self.leave[who.task_id].set()
        await self.tasks[who.task_id]
        await settle()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def line(*hosts: FakeHost, prefetch: int = 1) -> AsyncIterator[Line]:
    made = Line(Slots(hosts, prefetch))
    try:
        yield made
    finally:
        for task in made.tasks.values():
            task.cancel()
        await asyncio.gather(*made.tasks.values(), return_exceptions=True)


async def test_only_slots_and_prefetch_get_in() -> None:
    async with line(FakeHost(in_flight=2), prefetch=1) as made:
        for seq in range(6):
            made.come(ready(seq))
        await settle()
        assert sorted(made.log) == ["enter t0", "enter t1", "enter t2", "sit t0 a", "sit t1 a"]


async def test_order_is_first_in_first_out_within_a_priority() -> None:
    async with line(FakeHost(), prefetch=2) as made:
        tasks = [ready(seq) for seq in range(8)]
        for who in tasks:
            made.come(who)
        await settle()
        for who in tasks:
            await made.go(who)
        assert [entry for entry in made.log if entry.startswith("sit")] == [f"sit t{n} a" for n in range(8)]


async def test_a_late_urgent_task_passes_the_prepared_ones() -> None:
    async with line(FakeHost(), prefetch=1) as made:
        running, prepared, urgent = ready(1), ready(2), ready(3, priority=5)
        for who in (running, prepared):
            made.come(who)
        await settle()
        made.come(urgent)
        await settle()
        assert "enter t3" in made.log
        await made.go(running)
        assert made.log[-1] == "sit t3 a"
        await made.go(urgent)
        assert made.log[-1] == "sit t2 a"


async def test_nobody_enters_while_no_backend_can_work() -> None:
    host = FakeHost()
    host.state.ready = False
    async with line(host) as made:
        made.come(ready(1))
        await settle()
        assert made.log == []
        host.state.ready = True
        made.slots.changed()
        await settle()
        assert made.log == ["enter t1", "sit t1 a"]


async def test_the_emptier_backend_is_taken() -> None:
    async with line(FakeHost("a", 2), FakeHost("b", 3)) as made:
        for seq in range(5):
            made.come(ready(seq))
        await settle()
        assert made.slots.used == {"a": 2, "b": 3}
        assert made.log[-5].endswith(" b")


async def test_an_adopted_prompt_takes_a_slot_at_once_even_above_the_number() -> None:
    slots = Slots([FakeHost()], 0)
    async with AsyncExitStack() as stack:
        for seq in range(2):
            await stack.enter_async_context(slots.adopt(ready(seq), "a"))
        assert slots.used == {"a": 2}
    assert slots.used == {"a": 0}


async def test_a_released_slot_is_given_on_and_only_once() -> None:
    slots = Slots([FakeHost()], 1)
    async with slots.admit(ready(1)) as first, slots.admit(ready(2)) as second:
        await first.acquire()
        waiting = asyncio.ensure_future(second.acquire())
        await settle()
        assert not waiting.done()
        first.release()
        first.release()
        assert await waiting == "a"
        assert slots.used == {"a": 1}


@pytest.mark.parametrize("granted", [False, True])
async def test_a_cancelled_wait_gives_its_slot_back(granted: bool) -> None:
    host = FakeHost()
    slots = Slots([host], 1)
    async with slots.admit(ready(1)) as place:
        host.state.ready = False
        waiting = asyncio.ensure_future(place.acquire())
        await settle()
        if granted:
            host.state.ready = True
            slots.changed()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert slots.used == {"a": 0}
    assert slots.used == {"a": 0}


async def test_a_cancelled_newcomer_leaves_the_door() -> None:
    async with line(FakeHost(), prefetch=0) as made:
        for seq in range(3):
            made.come(ready(seq))
        await settle()
        made.tasks["t1"].cancel()
        await settle()
        await made.go(ready(0))
        assert made.log[-1] == "sit t2 a"


async def test_a_place_without_a_slot_may_be_released() -> None:
    slots = Slots([FakeHost()], 1)
    place = Place(slots, ready(1))
    place.release()
    assert slots.used == {"a": 0}


async def test_each_backend_has_its_own_prefetch() -> None:
    async with line(FakeHost("a"), FakeHost("b"), prefetch=2) as made:
        for seq in range(10):
            made.come(ready(seq))
        await settle()
        assert sum(entry.startswith("enter") for entry in made.log) == 6


# those that wait for their files


class Fetching:
    """Tasks that enter, fetch until told, and then sit; each in the order in which it gets there."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.entered: list[str] = []
        self.seated: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.tasks: list[asyncio.Task[None]] = []

    def come(self, who: Ready, *, slow: bool = False) -> None:
        """Somebody wants in; a slow one fetches until `arrive`."""
        gate = self.gates[who.task_id] = asyncio.Event()
        if not slow:
            gate.set()
        self.tasks.append(asyncio.ensure_future(self._live(who, gate)))

    async def _live(self, who: Ready, gate: asyncio.Event) -> None:
        async with self.slots.admit(who) as place:
            self.entered.append(who.task_id)
            with place.fetching():
                await gate.wait()
            await place.acquire()
            self.seated.append(who.task_id)
            await asyncio.Event().wait()

    async def arrive(self, task_id: str) -> None:
        """Its files are here."""
        self.gates[task_id].set()
        await settle()

    async def go(self, task_id: str) -> None:
        """The one that sits is done, or the one that fetches is canceled."""
        index = list(self.gates).index(task_id)
        self.tasks[index].cancel()
        await settle()


@asynccontextmanager
async def fetching(*hosts: FakeHost, prefetch: int = 1) -> AsyncIterator[Fetching]:
    made = Fetching(Slots(hosts, prefetch))
    try:
        yield made
    finally:
        for task in made.tasks:
            task.cancel()
        await asyncio.gather(*made.tasks, return_exceptions=True)


async def test_slow_files_do_not_keep_others_from_a_slot() -> None:
    async with fetching(FakeHost(), prefetch=0) as made:
        for seq in range(FETCHING):
            made.come(ready(seq), slow=True)
        made.come(ready(FETCHING))
        await settle()
        assert made.seated == [f"t{FETCHING}"]


async def test_no_more_than_so_many_wait_for_their_files_beside_the_prepared_ones() -> None:
    async with fetching(FakeHost(), FakeHost("b"), prefetch=1) as made:
        for seq in range(100):
            made.come(ready(seq), slow=True)
        await settle()
        assert made.entered == [f"t{n}" for n in range(2 * FETCHING + 4)]  # two slots, two prepared ahead


async def test_a_slot_waits_for_nobody_and_goes_to_the_most_urgent_that_is_ready() -> None:
    async with fetching(FakeHost(), prefetch=2) as made:
        made.come(ready(0), slow=True)
        made.come(ready(1))
        made.come(ready(2))
        made.come(ready(3), slow=True)
        await settle()
        assert made.seated == ["t1"]
        await made.arrive("t3")
        await made.arrive("t0")
        await made.go("t1")
        await made.go("t0")
        assert made.seated == ["t1", "t0", "t2"]


async def test_files_that_all_arrive_at_once_make_no_room_for_more() -> None:
    async with fetching(FakeHost(), prefetch=1) as made:
        for seq in range(4):
            made.come(ready(seq), slow=True)
        await settle()
        for seq in range(4):
            await made.arrive(f"t{seq}")
        made.come(ready(9))
        await settle()
        assert (made.seated, "t9" in made.entered) == (["t0"], False)
        for seq in range(3):
            await made.go(f"t{seq}")
        assert made.seated == ["t0", "t1", "t2", "t3"]
        assert "t9" in made.entered


async def test_an_urgent_one_enters_however_many_wait_for_their_files() -> None:
    async with fetching(FakeHost(), prefetch=0) as made:
        for seq in range(3 * FETCHING):
            made.come(ready(seq), slow=True)
        made.come(ready(999, priority=1))
        await settle()
        assert made.seated == ["t999"]


async def test_who_is_canceled_while_fetching_makes_room_for_the_next_one() -> None:
    async with fetching(FakeHost(), prefetch=0) as made:
        for seq in range(FETCHING + 2):
            made.come(ready(seq), slow=True)
        await settle()
        assert len(made.entered) == FETCHING + 1
        await made.go("t0")
        assert made.entered[-1] == f"t{FETCHING + 1}"
