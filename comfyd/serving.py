"""One process on one port: listens, serves and works until a signal ends it; never wires what it serves."""

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
import uvicorn

from comfyd import __version__
from comfyd.api.routes import create_api
from comfyd.app import Service, open_ground, wire, working
from comfyd.clock import Clock, SystemClock
from comfyd.config import Config
from comfyd.errors import ConfigError, StoreUnavailable

log = structlog.get_logger("comfyd")


class _Server(uvicorn.Server):
    """uvicorn, but signals are comfyd's: a stop also has work to finish, and ends with exit code 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Within this block SIGTERM and SIGINT call `stop`."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def listen(config: Config) -> socket.socket:
    """Take the port. Raises `ConfigError` if somebody else has it."""
    host, port = config.server.host, config.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as exc:
        raise ConfigError(
            # `create_server` adds the address once more, in brackets
            f"server.port: cannot listen on {host}:{port}: {os.strerror(exc.errno) if exc.errno else exc}",
            details={"key": "server.port"},
        ) from exc
    # Accepted connections inherit this. The loop sets it only on sockets whose protocol number is not 0, and
    # without it every answer of two packets waits 40 ms for the client's delayed acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


async def serve(config: Config, listening: socket.socket, clock: Clock | None = None) -> None:
    """Serve and work until a signal ends it. Raises `StoreUnavailable` if the database breaks."""
    async with open_ground(config, clock or SystemClock()) as ground:
        service = wire(ground)
        server = _Server(_uvicorn_config(service))
        closing, hurry = service.state.closing, asyncio.Event()

        def stop() -> None:
            if closing.is_set():  # the second signal does not wait
                server.force_exit = True
                hurry.set()
            server.should_exit = True
            closing.set()

        host, port = listening.getsockname()[:2]
        log.info("serving", url=f"http://{host}:{port}", version=__version__, data=config.data.dir)
        broken = asyncio.ensure_future(ground.broken())
        with _signals(stop):
            async with working(service, round(config.server.grace * 1000), hurry):
                served = asyncio.ensure_future(server.serve(sockets=[listening]))
                closed = asyncio.ensure_future(closing.wait())
                with service.watchdog:
                    await asyncio.wait({served, closed, broken}, return_when=asyncio.FIRST_COMPLETED)
                server.should_exit = True
                closing.set()
                log.info("closing")
            await served
        closed.cancel()
        if broken.done():
            raise StoreUnavailable(broken.result())
        broken.cancel()
    log.info("closed")


def _uvicorn_config(service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        create_api(service.state),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        ws="wsproto",
        timeout_graceful_shutdown=max(round(service.state.config.server.grace), 1),
    )
