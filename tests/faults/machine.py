"""The state machine: Hypothesis submits, cancels, kills, drops, clears and lets time pass, in any order.

    python -m tests.faults.machine EXAMPLES [SEED]

prints what was done, or the shortest series of steps that breaks a promise, with the seed that leads there.
Which promises those are stands in `machine_ledger.py`.
"""

import asyncio
import sys
from typing import Any, Final

import msgspec
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from comfyd.app import wire
from comfyd.tasks import Step
from tests.faults.machine_clients import Clients
from tests.faults.machine_example import Figures
from tests.faults.machine_ledger import GHOST_SECONDS, Stranger
from tests.faults.machine_world import NO_LIMIT, Fuse, Wire
from tests.support.service import colored

STEPS: Final = 20
VIEW_FAULTS: Final = ("cut", "error", "missing", "short", "stall")

moments = st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.5, 1.0, 2.5, 7.0, 20.0])
absences = st.sampled_from([0.0, 0.5, 3.0, 0.2, 1.0, 8.0, 30.0, 600.0])
fuses = st.builds(
    Fuse,
    verb=st.sampled_from(["add", "claim", "record", "settle", "cancel", "retry", "delete"]),
    step=st.none(),
    after=st.booleans(),
    left=st.integers(1, 2),
) | st.builds(
    Fuse,
    verb=st.just("record"),
    step=st.sampled_from([Step.SUBMITTING, Step.SUBMITTED, Step.COLLECTED]),
    after=st.booleans(),
    left=st.integers(1, 2),
)


class Machine(Clients):
    """The whole: what clients do, and what befalls comfyd, ComfyUI and the machine they are on."""

    # comfyd

    @rule(absent=absences)
    def kill_comfyd(self, absent: float) -> None:
        """Kill -9; after a while it is started again."""

        async def step() -> None:
            await self.world.kill()
            await asyncio.sleep(absent)
            await self.world.start()

        self.run(step())

    @rule(absent=absences)
    def stop_comfyd(self, absent: float) -> None:
        """SIGTERM; after a while it is started again."""

        async def step() -> None:
            await self.world.stop()
            await asyncio.sleep(absent)
            await self.world.start()

        self.run(step())

    @rule(fuse=fuses)
    def light_fuse(self, fuse: Fuse) -> None:
        """Let comfyd die at its next write of that kind, before it or right after it."""
        self.world.fuse = msgspec.structs.replace(fuse)
        self.figures.steps["light_fuse"] += 1

    # ComfyUI

    @rule(absent=absences)
    def kill_comfyui(self, absent: float) -> None:
        """Kill -9; after a while it is started again."""

        async def step() -> None:
            await self.world.crash_comfyui()
            await asyncio.sleep(absent)
            await self.world.restart_comfyui()

        self.run(step())

    @rule(absent=absences)
    def kill_both(self, absent: float) -> None:
        """The machine they are on loses power."""

        async def step() -> None:
            await self.world.crash_comfyui()
            await self.world.kill()
            await asyncio.sleep(absent)
            await self.world.start()
            await self.world.restart_comfyui()

        self.run(step())

    @rule(seconds=absences)
    def refuse_connections(self, seconds: float) -> None:
        """Nobody gets through to ComfyUI; what it has goes on."""

        async def step() -> None:
            await self.world.simulator.stop_listening()
            await asyncio.sleep(seconds)
            await self.world.restart_comfyui()

        self.run(step())

    @rule(mode=st.sampled_from(["drop", "none", "deaf", "hang", "refuse"]))
    def break_sockets(self, mode: Any) -> None:
        """The WebSockets break, or go wrong from now on."""
        if mode == "drop":
            self.world.simulator.drop_sockets()
        else:
            self.world.simulator.faults.sockets = mode
        self.figures.steps["break_sockets"] += 1

    @rule(seconds=st.sampled_from([0.0, 1.0, 4.0, 8.0, 30.0]), lost=st.integers(0, 2), cut=st.integers(0, 2))
    def spoil_posts(self, seconds: float, lost: int, cut: int) -> None:
        """POST /prompt is looked at late, and some are not answered."""

        async def step() -> None:
            faults = self.world.simulator.faults
            faults.prompt_stall_seconds = seconds
            faults.prompt_answers_lost, faults.prompt_answers_cut = lost, cut
            await self._mark_ghosts(seconds)

        self.run(step())

    @rule(seconds=st.sampled_from([0.0, 0.3, 3.0, 6.0]))
    def slow_down(self, seconds: float) -> None:
        """Every answer of ComfyUI takes that long."""

        async def step() -> None:
            self.world.simulator.faults.http_delay_seconds = seconds
            await self._mark_ghosts(seconds)

        self.run(step())

    async def _mark_ghosts(self, seconds: float) -> None:
        """What is on its way just now may be looked at late, too."""
        if seconds >= GHOST_SECONDS:
            for task in await self.rows():
                self.world.ledger.ghosts.update(attempt.id for attempt in task.attempts[-1:])

    @rule(path=st.sampled_from(["/queue", "/prompt", "/history", "/object_info", "/system_stats", ""]))
    def answer_500(self, path: str) -> None:
        """One route of ComfyUI fails; '' ends that."""
        self.world.simulator.faults.http_statuses = {path: 500} if path else {}
        self.figures.steps["answer_500"] += 1

    @rule(seconds=st.sampled_from([0.0, 0.5, 5.0]), limit=st.sampled_from([None, 0, 1]))
    def spoil_history(self, seconds: float, limit: int | None) -> None:
        """History comes late, or is dropped."""
        faults, ledger = self.world.simulator.faults, self.world.ledger
        faults.history_delay_seconds, faults.history_limit = seconds, limit
        if limit is None:
            ledger.keep_history(self.world.simulator.executions)
        else:
            ledger.forget_history(self.world.simulator.executions)
        self.figures.steps["spoil_history"] += 1

    @rule(seconds=st.sampled_from([0.0, 0.1, 2.0, 15.0, 90.0]))
    def nodes_take(self, seconds: float) -> None:
        """How long each picture takes from now on."""
        self.world.simulator.faults.class_seconds["EmptyImage"] = seconds
        self.figures.steps["nodes_take"] += 1

    @rule(dead=st.booleans())
    def worker_dead(self, *, dead: bool) -> None:
        """ComfyUI answers and works no more."""
        self.world.simulator.faults.worker_dead = dead
        self.figures.steps["worker_dead"] += 1

    @rule(ignored=st.integers(0, 3), deaf_nodes=st.booleans())
    def lose_interrupts(self, ignored: int, *, deaf_nodes: bool) -> None:
        """Interrupts do nothing, or nodes do not look."""
        faults = self.world.simulator.faults
        faults.interrupts_ignored = ignored
        faults.uninterruptible = {"EmptyImage", "SaveImage"} if deaf_nodes else set()
        self.figures.steps["lose_interrupts"] += 1

    @rule(fault=st.sampled_from(VIEW_FAULTS), count=st.sampled_from([1, 2, 5]))
    def spoil_files(self, fault: Any, count: int) -> None:
        """`/view` goes wrong some times."""
        faults = self.world.simulator.faults
        faults.view, faults.view_faults_left = fault, count
        self.world.ledger.spoil_files(self.world.simulator.executions)
        self.figures.steps["spoil_files"] += 1

    # somebody else

    @rule(how=st.sampled_from(["prompt", "clear", "interrupt"]))
    def meddle(self, how: str) -> None:
        """Somebody else uses ComfyUI: runs a prompt, clears the queue, stops whatever runs."""
        world, ledger = self.world, self.world.ledger

        async def step() -> None:
            began = len(world.simulator.executions)
            if how == "clear":
                await world.foreign("/queue", {"clear": True})
                ledger.swept.append(ledger.moment())
            elif how == "interrupt":
                await world.foreign("/interrupt", {})
                ledger.strayed(began, world.simulator.executions)
            else:
                prompt_id, at = world.clock.new_id(), ledger.moment()
                body = {"prompt": colored(0x700000 + at), "prompt_id": prompt_id}
                if await world.foreign("/prompt", body) == 200:
                    ledger.strangers.append(Stranger(prompt_id=prompt_id, at=at))

        self.run(step())

    # the machine they are on

    @rule(how=st.sampled_from(["refuse", "pages", "room"]))
    def fill_disk(self, how: str) -> None:
        """The database's disk is full: for every write, or for what makes its file longer; or no more."""

        async def step() -> None:
            self.world.disk_full = how == "refuse"
            await self.world.pages(1 if how == "pages" else NO_LIMIT)

        self.run(step())

    @rule(seconds=st.sampled_from([-600, -5, 5, 600]))
    def set_clock(self, seconds: int) -> None:
        """Somebody sets the wall clock."""
        self.world.clock.ahead_ms += seconds * 1000
        self.figures.steps["set_clock"] += 1

    @rule(seconds=moments)
    def wait(self, seconds: float) -> None:
        """A moment passes."""
        self.run(asyncio.sleep(seconds))

    @rule(seconds=st.sampled_from([30.0, 45.0, 60.0, 90.0, 120.0, 300.0, 600.0, 3600.0]))
    def wait_long(self, seconds: float) -> None:
        """A long time passes."""
        self.run(asyncio.sleep(seconds))

    @rule()
    def heal(self) -> None:
        """All is well again."""
        self.run(self.world.heal())


def run_machine(examples: int, seed: int, *, shrink: bool = True, wiring: Wire = wire) -> Figures:
    """Run so many examples from this seed. Raises what broke, after printing the series that leads to it."""
    figures_ = Figures()

    class Seeded(Machine):
        figures = figures_

    Seeded.wiring = staticmethod(wiring)
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    seeded(seed)(Seeded)
    chosen = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        print_blob=True,
        phases=phases,
        verbosity=Verbosity.normal,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(Seeded, settings=chosen)
    except BaseException as broken:
        broken.add_note(f"again: python -m tests.faults.machine {examples} {seed}")
        raise
    return figures_


if __name__ == "__main__":
    print(run_machine(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
