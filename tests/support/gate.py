"""A gate between a process and its kernel: chosen system calls stop here, and a test says how they end.

It is the kernel's own (seccomp with user notification, Linux 5.5, no rights and no tools needed), so what
comfyd and SQLite see is what a real disk would have answered. Never built into comfyd: `gated.py` shuts the
gate in the new process, before that becomes comfyd.
"""

import contextlib
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final, Self

import msgspec

from tests.support.comfyd import ComfydProcess
from tests.support.gated import CALLS

RECEIVE: Final = 0xC0502100
SEND: Final = 0xC0182101
GO_ON: Final = 1
NOTICE: Final = struct.Struct("=QIIiIQ6Q")
"""`struct seccomp_notif`: id, thread, flags, number, architecture, instruction, arguments."""
REPLY: Final = struct.Struct("=QqiI")
"""`struct seccomp_notif_resp`: id, value, error, flags."""
GATED: Final = Path(__file__).with_name("gated.py")


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One system call that waits: the process has not gone on, and does not until this is decided."""

    name: str
    thread: int
    descriptor: int
    path: str
    """What the descriptor is: a file's path, or `socket:[…]`."""
    length: int
    """The third argument: how many bytes, for those that write."""

    def sync(self) -> None:
        """Sync the file in the place of the process: when this returns, that has ended."""
        opened = os.open(f"/proc/{self.thread}/fd/{self.descriptor}", os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


Decide = Callable[[Call], int | None]
"""How a call ends: None lets it go on, 0 says that it was done, any other number is its errno."""


class Gate:
    """Decides on chosen calls of a process. Lives as long as the test's block; `decide` runs on a thread."""

    def __init__(self, names: tuple[str, ...], decide: Decide) -> None:
        self._names = names
        self._decide = decide
        self._watching: list[threading.Thread] = []
        self._stop = threading.Event()
        self.failures: list[BaseException] = []
        """What went wrong in `decide`: the calls went on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._watching:
            thread.join(20)
        assert self.failures == []

    def popen(self, arguments: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """`python *arguments`, which cannot make one of the calls without being asked."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            command = [sys.executable, str(GATED), str(theirs.fileno()), ",".join(self._names), *arguments]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], **options)
            theirs.close()
            ours.settimeout(20)
            _, (listener,), _, _ = socket.recv_fds(ours, 1, 1)
        thread = threading.Thread(target=self._watch, args=(listener,), name="gate")
        self._watching.append(thread)
        thread.start()
        return process

    def _watch(self, listener: int) -> None:
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        try:
            while not self._stop.is_set():
                for _, event in poll.poll(50):
                    if not event & select.POLLIN:
                        return  # nobody is left behind the gate
                    self._next(listener)
        finally:
            os.close(listener)

    def _next(self, listener: int) -> None:
        buffer = bytearray(NOTICE.size)
        with contextlib.suppress(FileNotFoundError):  # whoever called was killed meanwhile
            fcntl.ioctl(listener, RECEIVE, buffer)
            number, thread, _, call, _, _, descriptor, _, length, *_ = NOTICE.unpack(buffer)
            verdict = self._verdict(CALLS[call], thread, descriptor & 0xFFFFFFFF, length)
            error, flags = (0, GO_ON) if verdict is None else (-verdict, 0)
            fcntl.ioctl(listener, SEND, REPLY.pack(number, 0, error, flags))

    def _verdict(self, name: str, thread: int, descriptor: int, length: int) -> int | None:
        try:
            path = str(Path(f"/proc/{thread}/fd/{descriptor}").readlink())
            return self._decide(
                Call(name=name, thread=thread, descriptor=descriptor, path=path, length=length)
            )
        except FileNotFoundError:
            return None  # killed meanwhile
        except Exception as exc:  # noqa: BLE001 # a process that waits for ever would hide what went wrong
            self.failures.append(exc)
            return None


class GatedComfyd(ComfydProcess):
    """`comfyd serve` behind a gate."""

    def __init__(self, gate: Gate, folder: Path, comfyui: str, **settings: str) -> None:
        super().__init__(folder, comfyui, **settings)
        self._gate = gate

    def _launch(self, environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        return self._gate.popen(
            ["-m", "comfyd", "serve"],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
