"""`comfyd serve`: the REST API and the workers in one process; never returns before it is told to."""

import asyncio

import uvloop

from comfyd.config import Config
from comfyd.serving import listen, serve


def run(config: Config) -> int:
    """Serve until SIGTERM or SIGINT, then 0. Raises `ConfigError` and `StoreError`."""
    with listen(config) as listening, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(config, listening))
    return 0
