"""What is done to a world: each scene is one run, in the short form and the long one; never judged here.

A scene's seed gives its jobs and its moments, and is all that is needed to see it again.
"""

import asyncio
import io
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec
from PIL import Image

from tests.faults.checker import Verdict
from tests.faults.load import Job, Submit, loaded, negative, solid, twice_saved
from tests.faults.rig import PATIENCE, World, open_world

State = Literal[
    "healthy",
    "crash while running",
    "crash after saving",
    "worker slow",
    "socket dropped",
    "answer lost",
    "history evicted",
]
STATES: Final[tuple[State, ...]] = (
    "healthy",
    "crash while running",
    "crash after saving",
    "worker slow",
    "socket dropped",
    "answer lost",
    "history evicted",
)
Victim = Literal["comfyd", "comfyui"]
FORGETFUL: Final = frozenset({"crash while running", "crash after saving", "history evicted"})
"""Those after which ComfyUI does not know what it ran: a second run may have to be."""
REACH_SECONDS: Final = 20.0
"""How long a load is given to reach a failpoint."""
UNWILLING: Final = 0.05
"""The part of webhooks that the receiver of a random run refuses once."""
LONG: Final = 40
"""Nodes of a prompt that takes a second."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a scene."""

    seed: str
    verdict: Verdict
    kills: Mapping[str, int]
    recoveries: tuple[float, ...]
    reached: bool = True
    """Whether comfyd died at the failpoint."""
    repeats: int = 0
    """Attempts that comfyd's last life has counted as repeated."""
    submits: tuple[Submit, ...] = ()

    def told(self) -> str:
        """For people: what was counted, and how to see it again."""
        slowest = max(self.recoveries, default=0.0)
        return f"seed {self.seed}; slowest recovery {slowest:.2f} s\n{self.verdict}"


class Jobs:
    """Makes jobs of colours that nobody else has. Lives as long as a scene."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._colors: set[int] = set()
        self._number = 0

    def picture(self, **wants: object) -> Job:
        """One that takes two nodes."""
        color = self._color()
        return self._job(solid(color), {"9": color}, wants)

    def long(self, nodes: int = LONG, **wants: object) -> Job:
        """One that can be interrupted between many nodes."""
        color = self._color()
        return self._job(solid(color, nodes), {"9": negative(color, nodes)}, wants)

    def early(self, nodes: int = LONG, **wants: object) -> Job:
        """One that saves a picture long before its end."""
        color = self._color()
        colors = {"9": color, "8": negative(color, nodes)}
        return self._job(twice_saved(color, nodes), colors, wants)

    def loaded(self, **wants: object) -> Job:
        """One with a picture of the client's own server."""
        color = self._color()
        file = io.BytesIO()
        Image.new("RGB", (8, 8), f"#{color:06x}").save(file, "PNG")
        url = self._world.sources.file(f"/{color:06x}.png", file.getvalue(), "image/png")
        return self._job(loaded(url), {"9": color}, wants)

    def any(self, span: float) -> Job:
        """One of a mixed load: a tenth repeats its key, a fifth is canceled."""
        chance = self._world.chance
        wants: dict[str, object] = {"start": chance.uniform(0, span)}
        if chance.random() < 0.1:
            wants["twins"] = chance.randint(2, 3)
        if chance.random() < 0.2:
            wants["cancel"] = chance.uniform(0, 1)
            wants["cancel_running"] = chance.random() < 0.5
        elif chance.random() < 0.05:
            wants["retry" if chance.random() < 0.5 else "delete"] = True
        kinds: list[tuple[Callable[..., Job], int]] = [
            (self.picture, 6),
            (self.long, 2),
            (self.early, 1),
            (self.loaded, 1),
        ]
        (make,) = chance.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
        return make(**wants)

    def _job(self, graph: dict[str, object], colors: dict[str, int], wants: Mapping[str, object]) -> Job:
        self._number += 1
        job = Job(
            number=self._number,
            key=f"key-{self._number}-{self._world.chance.getrandbits(32):08x}",
            graph=graph,
            colors=colors,
            hook=self._world.receiver.url,
        )
        return msgspec.structs.replace(job, **wants)

    def _color(self) -> int:
        while True:
            color = self._world.chance.randrange(1, 0xFFFFFF)
            if not {color, negative(color)} & self._colors:
                self._colors |= {color, negative(color)}
                return color


def jobs_for(name: str, jobs: Jobs) -> list[Job]:
    """A small load that reaches this failpoint."""
    made = [jobs.picture(), jobs.picture(), jobs.picture(start=0.2)]
    if name.startswith("inputs."):
        made.append(jobs.loaded())
    elif name.startswith("early."):
        made.insert(0, jobs.early())
    elif name.startswith(("cancel.", "stop.", "running.", "adopt.")):
        made.insert(0, jobs.long(cancel=0.2, cancel_running=True))
        made.append(jobs.picture(cancel=0.0))
    elif name.startswith("retry."):
        made.insert(0, jobs.picture(retry=True))
    elif name.startswith("delete."):
        made.insert(0, jobs.picture(delete=True))
    return made


def mixed_for(name: str, jobs: Jobs) -> list[Job]:
    """The same, among others of every kind."""
    others = [
        jobs.loaded(),
        jobs.early(),
        jobs.long(cancel=0.2, cancel_running=True),
        jobs.picture(cancel=0.0, start=0.1),
        jobs.picture(retry=True),
        jobs.picture(delete=True, twins=2),
    ]
    return jobs_for(name, jobs) + others


async def failpoint(folder: Path, name: str, seed: str, *, mixed: bool = False) -> Outcome:
    """kill -9 of comfyd at one failpoint."""
    return await pair(folder, name, "healthy", seed, mixed=mixed)


async def pair(folder: Path, name: str, state: State, seed: str, *, mixed: bool = False) -> Outcome:
    """kill -9 of comfyd at one failpoint, while ComfyUI has its own trouble."""
    impatient = {"COMFYD__COMFYUI__0__REQUEST_TIMEOUT": "1"} if state == "answer lost" else {}
    async with open_world(folder, seed, settings=impatient) as world:
        jobs = (mixed_for if mixed else jobs_for)(name, Jobs(world))
        await before(world, state)
        if name == "adopt.begun":  # needs a life before the one that dies there
            await world.comfyd_up()
        else:
            await world.comfyd_up(name)
        async with world.load(jobs):
            if name == "adopt.begun":
                await world.until(world.running, REACH_SECONDS)
                await world.comfyd_down()
                await world.comfyd_up(name)
            reached = await world.comfyd_dies(REACH_SECONDS)
            if not reached:
                await world.comfyd_down()
            await between(world, state)
            await world.comfyd_up()
            await after(world, state)
        return await _outcome(world, seed, reached=reached)


async def before(world: World, state: State) -> None:
    """What is wrong with ComfyUI from the start."""
    if state == "worker slow":
        await world.switch(http_delay_seconds=0.1, class_seconds={"EmptyImage": 0.3})
    elif state == "answer lost":
        await world.switch(prompt_answers_cut=1, prompt_answers_lost=1)
    elif state == "crash after saving":
        await world.switch(history_delay_seconds=0.5)


async def between(world: World, state: State) -> None:
    """What happens to ComfyUI while comfyd is dead."""
    if state == "crash while running":
        await world.until(world.running, 0.5)
        world.comfyui_down()
        await world.comfyui_up()
    elif state == "crash after saving":
        await world.until(lambda: not world.running(), 3)
        world.comfyui_down()
        await world.comfyui_up()
        await world.switch(history_delay_seconds=0.0)
    elif state == "socket dropped":
        await world.accident("drop_sockets")
    elif state == "history evicted":
        await world.switch(history_limit=0)
        await world.until(lambda: not world.running(), 3)


async def after(world: World, state: State) -> None:
    """What happens to ComfyUI once comfyd is back."""
    if state == "socket dropped":
        for _ in range(3):
            await asyncio.sleep(world.chance.uniform(0, 0.3))
            await world.accident("drop_sockets")
    elif state == "history evicted":
        await asyncio.sleep(0.5)
        await world.switch(history_limit=None)
    elif state == "worker slow":
        await asyncio.sleep(0.5)
        await world.switch(http_delay_seconds=0.0, class_seconds={})


async def same_key(folder: Path, name: str, seed: str, twins: int = 8) -> Outcome:
    """Many requests under one key at the moment at which comfyd dies, repeated when it is back."""
    async with open_world(folder, seed) as world:
        jobs = Jobs(world)
        # two tasks are accepted in any case; how many twins are not answered from the row is chance
        await world.comfyd_up(f"{name}:{world.chance.randint(1, 2)}")
        async with world.load([jobs.picture(twins=twins), jobs.picture(start=0.3)]):
            reached = await world.comfyd_dies(REACH_SECONDS)
            if not reached:
                await world.comfyd_down()
            await world.comfyd_up()
        return await _outcome(world, seed, reached=reached)


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """How big a run of random kills is; after the monotonic moment `until` nothing more is killed."""

    kills: int
    tasks: int
    clients: int
    until: float | None = None
    patience: float = PATIENCE

    def over(self) -> bool:
        """Whether it is time to end."""
        return self.until is not None and time.monotonic() > self.until


async def random_kills(folder: Path, victim: Victim, seed: str, size: Size) -> Outcome:
    """kill -9 of one of the two at random moments under load."""
    kill: Callable[[World], Awaitable[None]] = kill_comfyd if victim == "comfyd" else kill_comfyui
    async with open_world(folder, seed, node_seconds=0.02) as world:
        jobs = Jobs(world)
        await world.comfyd_up()
        world.receiver.unwilling = UNWILLING
        wanted = [jobs.any(size.kills - 1) for _ in range(size.tasks)]
        async with world.load(wanted, size.clients, size.patience) as clients:
            clients.pace = lambda: world.kills[victim]
            while world.kills[victim] < size.kills and not size.over() and not clients.done.is_set():
                await kill(world)
            clients.pace = lambda: math.inf
        return await _outcome(world, seed)


async def kill_comfyd(world: World) -> None:
    """After a moment of work; a quarter of the time while it starts, once more."""
    await asyncio.sleep(world.chance.uniform(0, 0.7))
    await world.comfyd_down()
    if world.chance.random() < 0.25:
        world.comfyd.arm(None)
        world.comfyd.spawn()
        await asyncio.sleep(world.chance.uniform(0, 1))
        await world.comfyd_down()
    await world.comfyd_up()


async def kill_comfyui(world: World) -> None:
    """At any moment, or while a prompt runs; it is back at once or after a moment."""
    await asyncio.sleep(world.chance.uniform(0, 0.7))
    if world.chance.random() < 0.5:
        await world.until(world.running, 1)
    world.comfyui_down()
    await asyncio.sleep(world.chance.choice([0, 0, 0.3, 1]))
    await world.comfyui_up()


async def _outcome(world: World, seed: str, *, reached: bool = True) -> Outcome:
    repeats = await world.repeats()
    verdict = await world.verdict()
    return Outcome(
        seed=seed,
        verdict=verdict,
        kills=dict(world.kills),
        recoveries=tuple(world.recoveries),
        reached=reached,
        repeats=repeats,
        submits=tuple(world.log.submits),
    )


def seeds(word: str, count: int, base: int) -> list[str]:
    """As many seeds as there are runs to make; each is a word that can be typed again."""
    chance = random.Random(f"{base} {word}")
    return [f"{word}-{base}-{chance.getrandbits(16):04x}" for _ in range(count)]


def shuffle(items: list[tuple[str, State]], base: int) -> None:
    """Another order, the same for the same base."""
    random.Random(base).shuffle(items)
