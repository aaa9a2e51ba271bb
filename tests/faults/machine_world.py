"""The world of the state machine: one comfyd and one simulated ComfyUI in one loop of virtual time.

It can hurt either, and bring both back; it never judges (`machine_ledger.py`) and never chooses
(`machine.py`).
"""

import asyncio
import inspect
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, Self, TypeVar, cast

import aiohttp
import msgspec

from comfyd.app import Ground, Service, open_ground, wire, working
from comfyd.errors import InsufficientStorage, StoreError, StoreUnavailable
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.simulator.faults import Faults
from comfyd.store.base import Store
from comfyd.store.sqlite import SqliteStore
from comfyd.tasks import Attempt, Step
from tests.faults.machine_ledger import GHOST_SECONDS, Broken, Ledger
from tests.faults.virtual_time import Program, VirtualClock, VirtualLoop
from tests.support.service import configuration

T = TypeVar("T")

WRITES: Final = frozenset(
    {"add", "claim", "record", "settle", "cancel", "retry", "delete", "files_gone", "record_try", "redeliver"}
)
"""The verbs of `Store` that a full disk refuses."""
NO_LIMIT: Final = 4_294_967_294
"""SQLite's own bound on the pages of a file."""
UNWANTED_LOOPS: Final = frozenset({"workflows", "disk", "watchdog", "figures"})
"""They look at a folder, a disk, the machine's clock or counters every second or two: the dearest part of an
hour, and nothing changes there."""
GRACE_MS: Final = 2_000
STOP_SECONDS: Final = 60
"""Within which comfyd ends after SIGTERM, whatever state ComfyUI is in."""
FOREIGN_TIMEOUT: Final = aiohttp.ClientTimeout(total=60)

Wire = Callable[[Ground], Service]


class Died(Exception):
    """comfyd was killed while it was asked: nobody knows what it still did."""


class Fuse(msgspec.Struct, kw_only=True):
    """Where comfyd dies: at the `left`-th call of this verb, before it or once it is durable."""

    verb: str
    step: Step | None = None
    """For `record`: the step that is recorded."""
    after: bool
    left: int

    def burns(self, verb: str, arguments: tuple[Any, ...], *, after: bool) -> bool:
        """Count one call down; True when this is the one."""
        if verb != self.verb or after is not self.after:
            return False
        if self.step is not None and cast("Attempt", arguments[0]).step is not self.step:
            return False
        self.left -= 1
        return self.left == 0


class Tap:
    """Stands before comfyd's store: refuses like a full disk, kills at a fuse, and is silent to the dead.

    Whatever verb `Store` has is passed on by its name. Lives as long as its comfyd.
    """

    def __init__(self, inner: Store, comfyd: "Comfyd", ledger: Ledger, faults: Faults) -> None:
        self._inner = inner
        self._comfyd = comfyd
        self._ledger = ledger
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._inner, name)
        if not inspect.iscoroutinefunction(verb):
            return verb

        async def asked(*arguments: Any, **options: Any) -> Any:
            await self._before(name, arguments)
            answer = await verb(*arguments, **options)
            await self._after(name, arguments)
            return answer

        return asked

    async def _before(self, verb: str, arguments: tuple[Any, ...]) -> None:
        self._refuse_the_dead()
        if self._comfyd.world.disk_full and verb in WRITES:
            raise InsufficientStorage("the disk with the database is full")
        await self._die_at_the_fuse(verb, arguments, after=False)
        if verb == "record" and self._faults_make_ghosts():
            self._ledger.ghosts.add(cast("Attempt", arguments[0]).id)

    async def _after(self, verb: str, arguments: tuple[Any, ...]) -> None:
        self._refuse_the_dead()
        await self._die_at_the_fuse(verb, arguments, after=True)

    def _faults_make_ghosts(self) -> bool:
        return max(self._faults.prompt_stall_seconds, self._faults.http_delay_seconds) >= GHOST_SECONDS

    def _refuse_the_dead(self) -> None:
        if self._comfyd.program.dead:
            raise StoreUnavailable("this comfyd was killed")

    async def _die_at_the_fuse(self, verb: str, arguments: tuple[Any, ...], *, after: bool) -> None:
        fuse = self._comfyd.world.fuse
        if fuse is None or not fuse.burns(verb, arguments, after=after):
            return
        self._comfyd.world.fuse = None
        self._comfyd.program.sever()
        self._comfyd.died.set()
        await asyncio.Event().wait()  # until it is cancelled with all the rest


class Comfyd:
    """One process of comfyd, from its start to its end. `service` is there once it is up."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.program = Program()
        self.died = asyncio.Event()
        self.stopping = asyncio.Event()
        self.up: asyncio.Future[Service] = asyncio.get_running_loop().create_future()
        self.store: SqliteStore | None = None
        self.main = self.program.start(self._main())
        self.reaper = asyncio.ensure_future(self._reap())

    async def _main(self) -> None:
        world = self.world
        async with open_ground(world.config, world.clock) as ground:
            self.store = cast("SqliteStore", ground.store)
            tap = Tap(ground.store, self, world.ledger, world.simulator.faults)
            service = world.wire(msgspec.structs.replace(ground, store=cast("Store", tap)))
            loops = tuple(loop for loop in service.loops if loop.name not in UNWANTED_LOOPS)
            service = msgspec.structs.replace(service, loops=loops)
            async with working(service, GRACE_MS, asyncio.Event()):
                self.up.set_result(service)
                await self.stopping.wait()

    async def _reap(self) -> None:
        """Let it end at once when it died by itself."""
        await self.died.wait()
        await self.program.kill()

    async def kill(self) -> None:
        """End it as kill -9 would."""
        self.died.set()
        await self.reaper
        if not self.main.cancelled():
            self.main.exception()  # it may have died of being cut off

    async def stop(self) -> None:
        """End it as SIGTERM does; it may still die of its fuse."""
        self.stopping.set()
        ended, _ = await asyncio.wait(
            {self.main, self.reaper}, timeout=STOP_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        if not ended:
            await self.kill()
            raise Broken(f"stuck: comfyd did not end within {STOP_SECONDS} s after SIGTERM")
        if self.died.is_set():
            await self.kill()
            return
        self.reaper.cancel()
        self.main.result()

    async def service(self) -> Service:
        """The wired service, once it works."""
        first: set[asyncio.Future[Any]] = {self.main, self.up}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not self.up.done():
            self.main.result()
        return self.up.result()

    async def ask(self, work: Callable[[Service], Coroutine[Any, Any, T]]) -> T:
        """Let a client's wish be done inside this process. Raises `Died`."""
        wish = self.program.start(work(await self.service()))
        died = asyncio.ensure_future(self.died.wait())
        await asyncio.wait({wish, died}, return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        if wish.done() and not wish.cancelled() and (wish.exception() is None or not self.program.dead):
            return wish.result()
        raise Died


class World:
    """Everything there is. Open it in its loop; `comfyd` is None while that is down."""

    def __init__(self, loop: VirtualLoop, data: Path, options: SimulatorOptions, wiring: Wire = wire) -> None:
        self.wire = wiring
        self.clock = VirtualClock(loop)
        self.ledger = Ledger()
        self.simulator = Simulator(options)
        self.data = data
        self.disk_full = False
        self.fuse: Fuse | None = None
        self.comfyd: Comfyd | None = None
        self._turn = asyncio.Lock()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.simulator)
        self._foreigner = await self._stack.enter_async_context(
            aiohttp.ClientSession(timeout=FOREIGN_TIMEOUT)
        )
        self.config = configuration(
            self.data, self.simulator.url, workers=4, retention=0.0, retry_delay=1.0, retry_delay_max=30.0
        )
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()
        await self._stack.aclose()

    # comfyd

    async def start(self) -> Comfyd:
        """comfyd as it works, started if it is down."""
        async with self._turn:
            if self.comfyd is not None and self.comfyd.died.is_set():
                await self._kill()
            if self.comfyd is None:
                self.comfyd = Comfyd(self)
            await self.comfyd.service()
            return self.comfyd

    async def kill(self) -> None:
        """End comfyd as kill -9 would."""
        async with self._turn:
            await self._kill()

    async def _kill(self) -> None:
        if self.comfyd is not None:
            comfyd, self.comfyd = self.comfyd, None
            await comfyd.kill()

    async def stop(self) -> None:
        """End comfyd as SIGTERM does."""
        async with self._turn:
            if self.comfyd is not None:
                comfyd, self.comfyd = self.comfyd, None
                await comfyd.stop()

    async def read(self, query: Callable[[SqliteStore], Awaitable[T]]) -> T:
        """What the database itself says. If comfyd dies meanwhile, the next one is asked."""
        while True:
            comfyd = await self.start()
            assert comfyd.store is not None
            try:
                return await query(comfyd.store)
            except (StoreError, sqlite3.ProgrammingError, ValueError):
                if not comfyd.died.is_set():
                    raise

    async def pages(self, most: int) -> None:
        """Bound the size of the database's file: SQLite then finds the disk full. Lost at a restart."""

        def limit(connection: sqlite3.Connection) -> None:
            connection.execute(f"PRAGMA max_page_count = {most}")

        await self.read(lambda store: store._writer.call(limit))  # noqa: SLF001 - it is a bound of this connection

    # ComfyUI

    async def crash_comfyui(self) -> None:
        """End ComfyUI as kill -9 would."""
        if not self.simulator.crashed.is_set():
            self.ledger.crashed(self.simulator.executions)
            await self.simulator.crash()

    async def restart_comfyui(self) -> None:
        """Let ComfyUI be there again."""
        if self.simulator.crashed.is_set():
            await self.simulator.restart()
        await self.simulator.start_listening()

    async def foreign(self, path: str, body: Any) -> int | None:
        """What somebody else sends to ComfyUI; the status, None where that does not answer."""
        try:
            async with self._foreigner.post(f"{self.simulator.url}{path}", json=body) as response:
                await response.read()
                return response.status
        except (aiohttp.ClientError, TimeoutError):
            return None

    async def heal(self) -> None:
        """End all faults, and bring back what is down."""
        healthy = Faults()
        faults = self.simulator.faults
        for name in healthy.document():
            setattr(faults, name, getattr(healthy, name))
        self.ledger.keep_history(self.simulator.executions)
        self.ledger.serve_files(self.simulator.executions)
        self.disk_full = False
        self.fuse = None
        await self.restart_comfyui()
        await self.start()
        await self.pages(NO_LIMIT)
