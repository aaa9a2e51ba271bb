"""Virtual time: it passes when nothing else can happen, and only then."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NoReturn

import aiosqlite
import pytest

from comfyd.app import open_ground, wire, working
from comfyd.artefacts import _on_a_daemon
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.tasks import Status
from tests.faults.virtual_time import EPOCH_MS, Program, Stuck, VirtualClock, VirtualLoop, running_loop
from tests.support.service import Bench, colored, configuration

SLOW = 0.15
"""Real seconds that a thread takes here; far more virtual time than the time-outs beside it."""


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    """A loop of virtual time."""
    with running_loop() as made:
        yield made


def test_an_hour_takes_no_time(loop: VirtualLoop) -> None:
    began = time.monotonic()
    loop.run_until_complete(asyncio.sleep(3600))
    assert loop.time() == 3600
    assert time.monotonic() - began < 5


def test_timers_fire_in_their_order_and_on_time(loop: VirtualLoop) -> None:
    heard: list[tuple[float, int]] = []

    def hear(delay: int) -> None:
        heard.append((loop.time(), delay))

    async def main() -> None:
        for delay in (5, 1, 3, 1):
            loop.call_later(delay, hear, delay)
        await asyncio.sleep(10)

    loop.run_until_complete(main())
    assert heard == [(1, 1), (1, 1), (3, 3), (5, 5)]


async def in_the_executor() -> None:
    await asyncio.to_thread(time.sleep, SLOW)


async def in_sqlite() -> None:
    async with aiosqlite.connect(":memory:") as connection:
        await connection.create_function("slow", 0, lambda: time.sleep(SLOW))
        await connection.execute_fetchall("SELECT slow()")


async def on_a_daemon() -> None:
    with pytest.raises(OSError, match="as it should"):
        await _on_a_daemon(fails_slowly)


def fails_slowly() -> NoReturn:
    time.sleep(SLOW)
    raise OSError("as it should")


@pytest.mark.parametrize("work", [in_the_executor, in_sqlite, on_a_daemon])
def test_time_stands_still_while_a_thread_works(
    loop: VirtualLoop, work: Callable[[], Awaitable[None]]
) -> None:
    async def main() -> None:
        async with asyncio.timeout(0.001):
            await work()

    loop.run_until_complete(main())
    assert loop.time() == 0


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
    await writer.wait_closed()


def test_time_stands_still_while_bytes_are_on_their_way(loop: VirtualLoop) -> None:
    size = 3_000_000

    async def main() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        async with server, asyncio.timeout(0.001):
            for _ in range(20):
                reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
                writer.write(bytes(size))
                writer.write_eof()
                assert len(await reader.read()) == size
                writer.close()
                await writer.wait_closed()

    loop.run_until_complete(main())
    assert loop.time() == 0


def test_a_peer_that_says_nothing_runs_into_the_timeout(loop: VirtualLoop) -> None:
    async def main() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(600):
                    await reader.read()
            writer.close()
            await writer.wait_closed()

    loop.run_until_complete(main())
    assert loop.time() == 600


@pytest.mark.parametrize("by_thread", [True, False])
def test_what_can_never_go_on_is_an_error(*, by_thread: bool) -> None:
    release = threading.Event()

    async def main() -> None:
        if by_thread:
            await asyncio.to_thread(release.wait, 20)
        else:
            await asyncio.Event().wait()

    with running_loop(patience=0.05) as loop:
        with pytest.raises(Stuck):
            loop.run_until_complete(main())
        release.set()


class Visitors:
    """A server that keeps what it was sent, and how its connections ended."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.ends: list[str] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while data := await reader.read(100):
                self.heard.append(data)
            self.ends.append("closed")
        except ConnectionResetError:
            self.ends.append("reset")
        writer.close()


def test_a_killed_program_has_no_effect_and_takes_nobody_along(loop: VirtualLoop) -> None:
    visitors, told = Visitors(), []

    async def visit(port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"hello")
            await asyncio.sleep(100)
        finally:
            writer.write(b"farewell")
            try:
                await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                told.append("refused")
            writer.transport.abort()

    async def main() -> None:
        server = await asyncio.start_server(visitors, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            killed, other = Program(), Program()
            doomed, spared = killed.start(visit(port)), other.start(asyncio.sleep(50, "spared"))
            await asyncio.sleep(1)
            await killed.kill()
            assert doomed.cancelled()
            assert await spared == "spared"

    loop.run_until_complete(main())
    assert visitors.heard == [b"hello"]
    assert len(visitors.ends) == 1
    assert told == ["refused"]


def test_what_a_program_starts_is_killed_with_it(loop: VirtualLoop) -> None:
    async def main() -> None:
        program, ticks = Program(), []

        async def grandchild() -> None:
            while True:
                await asyncio.sleep(1)
                ticks.append(loop.time())

        async def child() -> None:
            program.keep = asyncio.create_task(grandchild())  # type: ignore[attr-defined] # a task needs a holder

        await program.start(child())
        await asyncio.sleep(3.5)
        await program.kill()
        await asyncio.sleep(10)
        assert ticks == [1, 2, 3]

    loop.run_until_complete(main())


def test_a_task_that_cannot_be_killed_is_an_error(loop: VirtualLoop) -> None:
    alive = True

    async def stubborn() -> None:
        while alive:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                continue

    async def main() -> None:
        nonlocal alive
        program = Program()
        task = program.start(stubborn())
        await asyncio.sleep(0)
        with pytest.raises(Stuck):
            await program.kill()
        alive = False
        await task

    loop.run_until_complete(main())


def test_the_clock_goes_with_the_loop(loop: VirtualLoop) -> None:
    clock = VirtualClock(loop)
    loop.run_until_complete(clock.sleep(1500))
    assert (clock.now(), clock.monotonic()) == (EPOCH_MS + 1500, 1500)
    clock.ahead_ms = -1000
    assert (clock.now(), clock.monotonic()) == (EPOCH_MS + 500, 1500)
    assert VirtualClock(loop, 7).new_id() == VirtualClock(loop, 7).new_id()
    assert clock.new_id()[14] == "4"
    assert 0 <= clock.jitter() < 1


def test_ten_minutes_without_comfyui_take_a_moment(loop: VirtualLoop, tmp_path: Path) -> None:
    async def main() -> None:
        clock = VirtualClock(loop)
        async with (
            Simulator(SimulatorOptions(node_seconds=1.0)) as simulator,
            open_ground(configuration(tmp_path, simulator.url), clock) as ground,
        ):
            service = wire(ground)
            bench = Bench(ground, service)
            async with working(service, 200, asyncio.Event()):
                tasks = [await bench.submit(colored(color)) for color in range(3)]
                await asyncio.sleep(1.5)
                await simulator.crash()
                began, cpu = loop.time(), time.process_time()
                await asyncio.sleep(600)
                took, cpu = loop.time() - began, time.process_time() - cpu
                await simulator.restart()
                ended = [await bench.ended(task.id) for task in tasks]
        assert took == pytest.approx(600)
        assert cpu < 5
        assert [task.status for task in ended] == [Status.SUCCEEDED] * 3

    loop.run_until_complete(main())
