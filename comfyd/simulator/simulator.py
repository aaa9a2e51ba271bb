"""A ComfyUI that needs no GPU, as one object: open it in an event loop, use its url, close it.

It can crash and restart on the same port with the same folders, as a real server does under kill -9.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from aiohttp import web

from comfyd.simulator import control, timing
from comfyd.simulator.catalog import Catalog
from comfyd.simulator.executions import Execution, ExecutionLog
from comfyd.simulator.faults import Faults
from comfyd.simulator.folders import Folders
from comfyd.simulator.options import SimulatorOptions
from comfyd.simulator.server import Process, end

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import TracebackType

    from comfyd.simulator.sockets import SocketCount

BACKLOG = 1024


class Simulator:
    """One simulated ComfyUI. An async context manager: in the `async with` block it answers at `url`.

    `faults` are its switches. After `crash` nothing answers and `crashed` is set; `restart` brings up a new
    process on the same port: queue, history, cache, temp files and the prompt counter are gone, output
    files, switches and the execution log are not.
    """

    def __init__(self, options: SimulatorOptions | None = None) -> None:
        self.options = options or SimulatorOptions()
        self.faults = Faults()
        self.crashed = asyncio.Event()
        self._resources = contextlib.AsyncExitStack()
        self._background: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._port = self.options.port

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as resources:
            directory = self.options.directory
            if directory is None:
                directory = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="simulator-")))
            self._log = resources.enter_context(ExecutionLog(self.options.execution_log))
            self.folders = Folders(directory)
            self._catalog = Catalog(self.options, self.folders)
            await self.restart()
            self._resources = resources.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._process.stop()
        await end(self._runner, self._server, abruptly=True)
        await self._resources.aclose()

    @property
    def port(self) -> int:
        """The port it listens on, or listened on before a crash."""
        return self._port

    @property
    def url(self) -> str:
        """`http://host:port`, without a slash at the end."""
        return f"http://{self.options.host}:{self._port}"

    @property
    def executions(self) -> list[Execution]:
        """What was really run, oldest first, crashes included."""
        return self._log.entries

    @property
    def sockets(self) -> SocketCount:
        """Open WebSockets: now, at most, in all; of the present process."""
        return self._process.sockets.count()

    @property
    def secrets(self) -> dict[str, dict[str, Any]]:
        """What came with each prompt that the present process accepted and shows on no route, by its id."""
        return self._process.queue.secrets

    @property
    def worker_alive(self) -> bool:
        """False once the worker has died behind a living HTTP server."""
        return self._process.worker_alive

    async def crash(self) -> None:
        """Die like after kill -9: every connection is reset, everything in memory is gone."""
        self._stop_listening()
        await self._process.stop()
        await end(self._runner, None, abruptly=True)
        self.crashed.set()

    async def restart(self) -> None:
        """Start a new process, after a crash or for the first time."""
        self.folders.wipe_temp()
        actions = control.Actions(crash=self._crash_soon, drop_sockets=self.drop_sockets, refuse=self._refuse)
        self._process = Process(self.options, self.folders, self._catalog, self.faults, self._log, actions)
        self._runner = web.AppRunner(
            self._process.application, access_log=None, logger=_quiet_logger(), shutdown_timeout=0.1
        )
        await self._runner.setup()
        self._process.start()
        self.crashed.clear()
        await self.start_listening()

    def drop_sockets(self) -> int:
        """Break every open WebSocket without a closing handshake; returns how many there were."""
        return self._process.sockets.drop()

    async def start_listening(self) -> None:
        """Accept connections (again)."""
        if self._server is not None or self._runner.server is None:
            return
        listener = socket.create_server((self.options.host, self._port), backlog=BACKLOG)
        self._port = listener.getsockname()[1]
        self._server = await asyncio.get_running_loop().create_server(
            self._runner.server, sock=listener, backlog=BACKLOG
        )

    async def stop_listening(self) -> None:
        """Refuse new connections; open ones go on."""
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _crash_soon(self) -> None:
        """Crash from within a handler or the worker, which are part of what dies."""
        self._stop_listening()
        self._in_background(self.crash())

    def _refuse(self, seconds: float) -> None:
        async def refuse() -> None:
            self._stop_listening()
            await timing.pause(seconds)
            await self.start_listening()

        self._in_background(refuse())

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _quiet_logger() -> logging.Logger:
    """ComfyUI answers malformed requests with a 500 and a traceback in its log; here the 500 is enough."""
    logger = logging.getLogger("comfyd.simulator.http")
    logger.setLevel(logging.CRITICAL)
    return logger
