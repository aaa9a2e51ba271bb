"""An event loop whose time is not the machine's: when nothing can happen any more, the next timer is due.

Programs that talk over loopback run in it as they are, and hours of theirs pass in seconds. Time stands still
while a thread works or a byte is on its way, so that no time-out fires because the machine is slow. A thread
is waited for before anything else goes on, so that the order of things does not depend on its speed either (a
thread that waits for the loop would wait for ever). `Program` is one of several programs in the loop, which
can be killed alone. Never used by comfyd itself.
"""

import asyncio
import contextvars
import random
import selectors
import socket
import sys
import threading
import uuid
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Ready = list[tuple[selectors.SelectorKey, int]]

EPOCH_MS: Final = 1_700_000_000_000
"""UTC milliseconds when the time of a loop is 0."""
PATIENCE: Final = 30.0
"""Real seconds that a thread may work, or nothing may happen, before that counts as stuck."""
ANSWERED_BY_A_THREAD: Final = frozenset(
    {
        ("aiosqlite.core", "_connect"),
        ("aiosqlite.core", "_execute"),
        ("aiosqlite.core", "stop"),
        ("asyncio.base_events", "shutdown_default_executor"),
        ("asyncio.futures", "wrap_future"),  # `run_in_executor`, and with it `asyncio.to_thread`
        ("comfyd.artefacts", "_on_a_daemon"),
    }
)
"""Who makes futures that a thread resolves: module and function."""
KILL_ROUNDS: Final = 100

_program: contextvars.ContextVar["Program | None"] = contextvars.ContextVar("program", default=None)


class Stuck(Exception):
    """Nothing can happen any more, and no timer is set; or a thread never answers."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """The loop. Whoever makes it closes it; `running_loop` does both."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self._seconds = 0.0
        self._by_threads: dict[asyncio.Future[Any], asyncio.Task[Any] | None] = {}
        """What threads will resolve, and the task that waits for it."""
        self._told = threading.Condition()
        self.jumps = 0
        """How often time passed."""
        self._patience = patience
        self._patient = _Selector(self._await_threads, self._pass, patience)
        super().__init__(self._patient)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._seconds

    def close(self) -> None:
        """See `asyncio.AbstractEventLoop`."""
        super().close()
        self._patient.close_messenger()

    def _pass(self, seconds: float) -> None:
        self._seconds += seconds
        self.jumps += 1

    def _await_threads(self) -> None:
        """Wait until every thread that works for us has called; what it says is then to be run."""
        with self._told:
            if not self._told.wait_for(self._none_works, self._patience):
                raise Stuck(f"waited {self._patience:g} s in vain for a thread")

    def _none_works(self) -> bool:
        return all(future.done() for future in tuple(self._by_threads))

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[Ts]], object], *arguments: *Ts, context: Any = None
    ) -> asyncio.Handle:
        """See `asyncio.AbstractEventLoop`. Which future it is about stands in the call, somehow."""
        handle = super().call_soon_threadsafe(callback, *arguments, context=context)
        said = {id(found) for found in (*list[object](arguments)[:1], *_within(callback))}
        with self._told:
            for future in [future for future in self._by_threads if id(future) in said]:
                del self._by_threads[future]
            self._told.notify()
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        """See `asyncio.AbstractEventLoop`. Those that a thread will resolve are remembered until then."""
        future: asyncio.Future[Any] = super().create_future()
        frame = sys._getframe(1)  # noqa: SLF001 - who asks is all that tells these futures from others
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) in ANSWERED_BY_A_THREAD:
            with self._told:
                self._by_threads[future] = asyncio.current_task(self)
            future.add_done_callback(self._forget)
        return future

    def _forget(self, future: asyncio.Future[Any]) -> None:
        with self._told:
            self._by_threads.pop(future, None)

    def waiting_for_threads(self) -> set[asyncio.Task[Any] | None]:
        """The tasks that wait for a thread just now."""
        return {task for future, task in self._by_threads.items() if not future.done()}

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        """See `asyncio.AbstractEventLoop`. The task belongs to the program that made it."""
        task: asyncio.Task[Any] = super().create_task(coro, **options)
        program = _program.get()
        if program is not None:
            program.tasks.add(task)
        return task

    async def create_connection(self, *arguments: Any, **options: Any) -> Any:
        """See `asyncio.AbstractEventLoop`. A dead program opens none."""
        program = _program.get()
        if program is not None and program.dead:
            raise ConnectionRefusedError("the program was killed")
        return await super().create_connection(*arguments, **options)

    def _make_socket_transport(self, *arguments: Any, **options: Any) -> asyncio.Transport:
        transport: asyncio.Transport = super()._make_socket_transport(*arguments, **options)  # type: ignore[misc] # where every stream of asyncio is made; not in its stubs
        program = _program.get()
        if program is not None:
            program.transports.add(transport)
        return transport


def _within(callback: Any) -> Iterator[Any]:
    """What a bound method or a closure holds."""
    yield getattr(callback, "__self__", None)
    for cell in getattr(callback, "__closure__", None) or ():
        yield cell.cell_contents


class _Selector(selectors.DefaultSelector):
    """Where the loop would wait for the machine's clock it waits for threads and bytes, then time passes."""

    def __init__(
        self, await_threads: Callable[[], None], let_pass: Callable[[float], None], patience: float
    ) -> None:
        super().__init__()
        self._patience = patience
        self._await_threads = await_threads
        self._let_pass = let_pass
        with socket.create_server(("127.0.0.1", 0)) as server:
            self._sending = socket.create_connection(server.getsockname()[:2])
            self._receiving, _ = server.accept()
        self._sending.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._receiving.settimeout(PATIENCE)

    def close_messenger(self) -> None:
        """Close what the loop does not know of."""
        self._sending.close()
        self._receiving.close()

    def select(self, timeout: float | None = None) -> Ready:
        """What is ready now; if nothing is, `timeout` seconds are over."""
        self._await_threads()
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        self._overtake_nothing()
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            ready = super().select(self._patience)
            if not ready:
                raise Stuck("nothing can happen any more, and no timer is set")
            return ready
        self._let_pass(timeout)
        return []

    def _overtake_nothing(self) -> None:
        """Wait until what was sent before has arrived: loopback delivers in order, also between sockets."""
        self._sending.send(b".")
        self._receiving.recv(1)


class Program:
    """One program in the loop: what runs in `start`, and all that comes of it, until it ends or is killed.

    `kill` is as near to SIGKILL as one process allows: its connections are reset, it can open no other, and
    all its tasks are cancelled at once. Unlike under SIGKILL their `finally` blocks run, so whatever else
    they could reach (a database, say) has to look at `dead`; files that a thread is writing are finished.
    """

    def __init__(self) -> None:
        self.dead = False
        """Nothing it does may have an effect any more."""
        self.tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self.transports: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()

    def start(self, main: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run this as the program."""
        context = contextvars.copy_context()
        context.run(_program.set, self)
        return context.run(asyncio.get_running_loop().create_task, main)

    @staticmethod
    def current() -> "Program | None":
        """The one that this is called in, if any."""
        return _program.get()

    def sever(self) -> None:
        """From now on it has no effect; `kill` ends it."""
        self.dead = True
        for transport in list(self.transports):
            transport.abort()

    async def kill(self) -> None:
        """End it. Raises `Stuck` if a task does not let itself be cancelled."""
        self.sever()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        left: set[asyncio.Task[Any]] = set()
        for _ in range(KILL_ROUNDS):
            left = {task for task in self.tasks if not task.done()} - {asyncio.current_task()}
            if not left:
                return
            for task in left - loop.waiting_for_threads():  # what a thread has begun would be nobody's
                task.cancel()
            await asyncio.wait(left, timeout=0.01)
        raise Stuck(f"{len(left)} tasks of a killed program go on: {list(left)[:3]}")


class VirtualClock:
    """A `Clock` that goes with a loop; ids and chance are the same in each run. Lives as long as the loop."""

    def __init__(self, loop: VirtualLoop, seed: int = 0) -> None:
        self._loop = loop
        self._random = random.Random(seed)
        self.ahead_ms = 0
        """How much the wall clock was set forward (or, below zero, back)."""

    def now(self) -> int:
        """UTC milliseconds."""
        return EPOCH_MS + self.ahead_ms + self.monotonic()

    def monotonic(self) -> int:
        """Milliseconds since the loop was made."""
        return round(self._loop.time() * 1000)

    async def sleep(self, milliseconds: int) -> None:
        """Wait."""
        await asyncio.sleep(milliseconds / 1000)

    def new_id(self) -> str:
        """A UUID version 4 in canonical form."""
        return str(uuid.UUID(int=self._random.getrandbits(128), version=4))

    def jitter(self) -> float:
        """In 0..1."""
        return self._random.random()


@contextmanager
def running_loop(patience: float = PATIENCE) -> Generator[VirtualLoop, None, None]:
    """A loop, closed at the end with all that is left in it."""
    loop = VirtualLoop(patience)
    try:
        yield loop
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
