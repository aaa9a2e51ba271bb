"""One example of the state machine: its world, how it begins and ends, what holds at each step; no rule.

The rules are in `machine_clients.py` and `machine.py`.
"""

import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine, MutableMapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

import msgspec
import structlog
from hypothesis.stateful import RuleBasedStateMachine, invariant

from comfyd.app import wire
from comfyd.simulator import SimulatorOptions
from comfyd.store.base import Store
from comfyd.tasks import Status, Task, TaskFilter
from tests.faults.machine_ledger import Broken
from tests.faults.machine_world import Wire, World
from tests.faults.virtual_time import Program, VirtualLoop, running_loop
from tests.support.logs import captured_logs

T = TypeVar("T")

QUIET_SECONDS: Final = 2 * 3600
"""Virtual time within which everything ends once all is well. Most examples need seconds."""
AFTERWARDS_SECONDS: Final = 30
"""For what must not happen any more: a ghost that is run, a task that comes back."""
MOST_TASKS: Final = 12
UNEXPECTED: Final = frozenset({"error", "critical"})
"""Levels of log lines that no fault of this machine explains."""
SHM: Final = Path("/dev/shm")  # noqa: S108 - a disk in memory, where there is one


class Figures(msgspec.Struct, kw_only=True):
    """What a run of the machine did."""

    examples: int = 0
    steps: Counter[str] = msgspec.field(default_factory=Counter)
    statuses: Counter[str] = msgspec.field(default_factory=Counter)
    runs: int = 0
    excused: Counter[str] = msgspec.field(default_factory=Counter)
    virtual_seconds: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        return "\n".join(
            [
                f"examples {self.examples}, steps {self.steps.total()}",
                f"seconds {self.seconds:.1f}, virtual hours {self.virtual_seconds / 3600:.1f}",
                f"tasks {_told(self.statuses)}",
                f"runs on the GPU {self.runs}, second ones {self.excused.total()}: {_told(self.excused)}",
                f"steps {_told(self.steps)}",
            ]
        )


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"


class Example(RuleBasedStateMachine):
    """One example. `wiring` makes the comfyd that is tested; `figures` are those of all examples."""

    wiring: ClassVar[Wire] = staticmethod(wire)
    figures: ClassVar[Figures] = Figures()

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        folder = SHM if SHM.is_dir() else None
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        self.lines = self.stack.enter_context(captured_logs(_of_the_living))
        self.loop: VirtualLoop = self.stack.enter_context(running_loop())
        self.loop.set_exception_handler(self._unheard)
        self.unheard: list[str] = []
        self.opened: World | None = None
        self.began = time.monotonic()

    @property
    def world(self) -> World:
        """What `begin` made."""
        assert self.opened is not None
        return self.opened

    def run(self, step: Coroutine[Any, Any, T]) -> T:
        """Let the world go on until this step is done."""
        frame = sys._getframe(1)  # noqa: SLF001 - the rule's name, for the figures
        self.figures.steps[frame.f_code.co_name] += 1
        return self.loop.run_until_complete(step)

    def _unheard(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An error that nobody waited for."""
        task = context.get("task") or context.get("future")
        comfyd = self.world.comfyd
        ours = comfyd is not None and not comfyd.program.dead and task in comfyd.program.tasks
        if ours or "handle" in context:
            self.unheard.append(f"{context['message']}: {context.get('exception')!r}")

    # beginning and end

    def open_world(self, options: SimulatorOptions) -> World:
        """The world, to be entered."""
        self.opened = World(self.loop, self.folder, options, type(self).wiring)
        return self.opened

    def teardown(self) -> None:
        """Make all well, wait until it is quiet, and judge; after a failure only tidy up."""
        failing = sys.exc_info()[0] is not None
        try:
            if self.opened is not None and not failing:
                self.run(self._end())
        finally:
            try:
                if self.opened is not None:
                    self.loop.run_until_complete(self.opened.__aexit__())
            finally:
                self._count(judged=self.opened is not None and not failing)
                self.stack.close()

    def _count(self, *, judged: bool) -> None:
        self.figures.examples += judged
        self.figures.virtual_seconds += self.loop.time()
        self.figures.seconds += time.monotonic() - self.began
        if self.opened is not None and judged:
            log = self.world.simulator.executions
            self.figures.runs += sum(execution.event == "start" for execution in log)
            self.figures.excused += self.world.ledger.excused
            self.figures.statuses.update(wish.status.value for wish in self.world.ledger.tasks)

    async def _end(self) -> None:
        world = self.world
        await world.heal()
        comfyd = world.comfyd
        patience = QUIET_SECONDS
        while await self._busy():
            patience -= 1
            if patience < 0:
                raise Broken(f"lost: in hours all did not end: {await self._unended()}")
            await asyncio.sleep(1.0)
        await asyncio.sleep(AFTERWARDS_SECONDS)
        assert not await self._busy(), "it was quiet, and is no more"
        assert comfyd is world.comfyd, "comfyd died although all was well"
        world.ledger.judge(await self.rows(), world.simulator.executions, world.config.files)
        self._nothing_unexpected()

    async def _unended(self) -> list[Task]:
        return [task for task in await self.rows() if not task.status.terminal]

    async def _busy(self) -> bool:
        counts = await self.world.read(lambda store: store.counts())
        return bool(counts[Status.QUEUED] + counts[Status.RUNNING]) or self._comfyui_busy()

    def _comfyui_busy(self) -> bool:
        queue = self.world.simulator._process.queue  # noqa: SLF001 - what HTTP would tell, without the time
        return bool(queue.pending or queue.running)

    async def rows(self) -> list[Task]:
        """All tasks in the database."""
        return await self.world.read(_every_task)

    @invariant()
    def promises_hold(self) -> None:
        """What is to hold at every moment; while comfyd is down nobody can look."""
        comfyd = self.world.comfyd
        if comfyd is not None and not comfyd.died.is_set():
            self.world.ledger.see(self.loop.run_until_complete(self.rows()))
        self._nothing_unexpected()

    def _nothing_unexpected(self) -> None:
        unexpected = [line for line in self.lines if line["log_level"] in UNEXPECTED]
        assert not unexpected, f"comfyd logged what nothing explains: {unexpected[0]}"
        assert not self.unheard, f"an error that nobody heard: {self.unheard[0]}"


def _of_the_living(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Drop what a comfyd says that was killed already."""
    program = Program.current()
    if program is not None and program.dead:
        raise structlog.DropEvent
    return line


async def _every_task(store: Store) -> list[Task]:
    page = await store.list_tasks(TaskFilter(), None, 10 * MOST_TASKS)
    return [task for listed in page.tasks if (task := await store.get(listed.id)) is not None]
