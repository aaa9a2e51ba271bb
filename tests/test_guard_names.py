"""A name server that hangs holds up neither other names nor the end of the process."""

import asyncio
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import pytest

from comfyd.errors import FetchFailed
from comfyd.guard import Guard, SystemNames, open_client

PATIENCE = 20.0


class NameServer:
    """Answers for `good...`; for the rest it is silent until `done`, and then knows nothing."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.free = threading.Event()
        """Whether it answers for the good ones, too."""
        self.free.set()
        self.asked: list[str] = []
        self.daemons: list[bool] = []

    def ask(self, host: str) -> list[str]:
        """See `Ask`."""
        self.asked.append(host)
        self.daemons.append(threading.current_thread().daemon)
        if host.startswith("good"):
            self.free.wait(PATIENCE)
            return ["192.0.2.1", "2001:db8::1"]
        self.done.wait(PATIENCE)
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    async def heard(self, count: int) -> None:
        """Until it was asked so often."""
        async with asyncio.timeout(PATIENCE):
            while len(self.asked) < count:
                await asyncio.sleep(0.005)


@pytest.fixture
def server() -> Iterator[NameServer]:
    made = NameServer()
    yield made
    made.done.set()
    made.free.set()


async def test_a_name_is_looked_up_on_a_thread_that_no_exit_waits_for(server: NameServer) -> None:
    names = SystemNames(ask=server.ask)
    assert await names("good.test") == ["192.0.2.1", "2001:db8::1"]
    assert await names("good.test") == ["192.0.2.1", "2001:db8::1"]
    assert server.asked == ["good.test"] * 2  # nothing is kept
    assert server.daemons == [True, True]


async def test_the_system_knows_this_machine() -> None:
    assert "127.0.0.1" in await SystemNames()("127.0.0.1")


async def test_what_the_name_server_says_no_to_is_told(server: NameServer) -> None:
    server.done.set()
    with pytest.raises(socket.gaierror) as caught:
        await SystemNames(ask=server.ask)("unknown.test")
    assert caught.value.errno == socket.EAI_NONAME


async def test_a_look_up_that_hangs_ends_in_time_and_keeps_its_thread(server: NameServer) -> None:
    names = SystemNames(2, 0.1, server.ask)
    for _ in range(3):  # one thread, however often it is asked for
        with pytest.raises(socket.gaierror) as caught:
            await names("dead.test")
        assert caught.value.errno == socket.EAI_AGAIN
    assert server.asked == ["dead.test"]
    assert await names("good.test")
    with pytest.raises(socket.gaierror):
        await names("other.test")
    with pytest.raises(socket.gaierror, match="no answer"):
        await names("good.test")  # both threads hang
    assert server.asked == ["dead.test", "good.test", "other.test"]
    server.done.set()
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                assert await names("good.test")
            except socket.gaierror:
                continue
            break


async def test_those_who_wait_for_a_place_share_one_look_up(server: NameServer) -> None:
    names = SystemNames(2, PATIENCE, server.ask)
    server.free.clear()
    dead = [asyncio.ensure_future(names(f"dead{number}.test")) for number in range(2)]
    await server.heard(2)
    waiting = [asyncio.ensure_future(names("good.test")) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    server.done.set()
    await asyncio.wait(dead, timeout=PATIENCE)
    await server.heard(3)
    server.free.set()
    answers = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), PATIENCE)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert answers[1] == answers[2] == ["192.0.2.1", "2001:db8::1"]
    assert all(isinstance(one.exception(), socket.gaierror) for one in dead)
    assert server.asked.count("good.test") == 1


async def test_a_machine_without_a_thread_to_spare_is_a_failure_that_may_pass(server: NameServer) -> None:
    names = SystemNames(1, PATIENCE, server.ask)
    usual = threading.stack_size(1 << 47)  # more than there are addresses
    try:
        for _ in range(2):  # and the place is given back
            with pytest.raises(socket.gaierror) as caught:
                await names("good.test")
            assert caught.value.errno == socket.EAI_AGAIN
    finally:
        threading.stack_size(usual)
    assert await names("good.test")


async def test_a_client_says_in_plain_words_that_the_name_server_is_silent(server: NameServer) -> None:
    async with open_client(Guard.of([]), lookup=SystemNames(1, 0.05, server.ask)) as client:
        with pytest.raises(
            FetchFailed, match=r"^dead\.test cannot be looked up: .* does not answer$"
        ) as caught:
            async with client.get("http://dead.test/"):
                pass
        assert caught.value.retryable


def test_a_look_up_that_hangs_does_not_hold_up_the_exit() -> None:
    script = """
        import asyncio, time
        from comfyd.guard import Guard, SystemNames, open_client

        async def main():
            names = SystemNames(ask=lambda host: time.sleep(15))
            async with open_client(Guard.of([]), lookup=names) as client:
                try:
                    async with asyncio.timeout(0.1), client.post("http://dead.test/", b"", {}):
                        pass
                except TimeoutError:
                    print("gave up", flush=True)

        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"gave up\n"
        gave_up = time.monotonic()
        assert process.wait(PATIENCE) == 0
    assert time.monotonic() - gave_up < 8
