"""`comfyd serve`: the REST API and the workers in one process; never returns before it is told to."""

import asyncio

from comfyd.app import listen, serve
from comfyd.config import Config


def run(config: Config) -> int:
    """Serve until SIGTERM or SIGINT, then 0. Raises `ConfigError` and `StoreError`."""
    with listen(config) as listening:
        asyncio.run(serve(config, listening))
    return 0
