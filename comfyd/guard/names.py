"""Addresses of host names as the system knows them, asked for on threads of its own; never judges one.

A name server that does not answer holds a thread for half a minute, and nothing can stop that: so it is none
of the threads on which comfyd writes files, and none that the end of the process waits for.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Thread
from typing import Final, TypeAlias

LOOK_UPS: Final = 32
"""Names that are asked for at once, unless told otherwise."""
LOOK_UP_SECONDS: Final = 10.0

Ask: TypeAlias = Callable[[str], Sequence[str]]
"""Host name -> its addresses; blocks. Raises `OSError`."""


def ask_system(host: str) -> Sequence[str]:
    """The addresses of a host; blocks, for a thread. Raises `OSError`."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [str(address[0]) for *_, address in found]


class SystemNames:
    """A `Lookup` in the system. Belongs to one event loop; holds nothing that has to be closed.

    `most` names are asked for at once, each of them once however many want to know, and nobody waits for
    longer than so many seconds. A thread that hangs keeps its place until it comes back.
    """

    def __init__(self, most: int = LOOK_UPS, seconds: float = LOOK_UP_SECONDS, ask: Ask = ask_system) -> None:
        self._places = asyncio.Semaphore(most)
        self._seconds = seconds
        self._ask = ask
        self._asked: dict[str, asyncio.Future[Sequence[str]]] = {}

    async def __call__(self, host: str) -> Sequence[str]:
        """See `Lookup`."""
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.shield(await self._answer(host))
        except TimeoutError:
            raise socket.gaierror(socket.EAI_AGAIN, "no answer") from None

    async def _answer(self, host: str) -> asyncio.Future[Sequence[str]]:
        if host not in self._asked:
            await self._places.acquire()
            if host in self._asked:  # somebody else was first
                self._places.release()
            else:
                self._begin(host)
        return self._asked[host]

    def _begin(self, host: str) -> None:
        loop = asyncio.get_running_loop()
        thread = Thread(target=self._run, args=(host, loop), name="comfyd-names", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the machine has no thread left
            self._places.release()
            raise socket.gaierror(socket.EAI_AGAIN, "no thread") from None
        self._asked[host] = loop.create_future()

    def _run(self, host: str, loop: asyncio.AbstractEventLoop) -> None:
        """On the thread."""
        outcome: Sequence[str] | OSError = OSError("the look-up broke")
        try:
            outcome = self._ask(host)
        except OSError as exc:
            outcome = exc
        finally:
            with suppress(RuntimeError):  # the loop is closed: nobody waits for it
                loop.call_soon_threadsafe(self._over, host, outcome)

    def _over(self, host: str, outcome: Sequence[str] | OSError) -> None:
        self._places.release()
        answer = self._asked.pop(host)
        if isinstance(outcome, OSError):
            answer.set_exception(outcome)
            answer.exception()  # perhaps nobody waits any more
        else:
            answer.set_result(outcome)
