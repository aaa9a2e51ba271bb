"""What the routes work with, put together by whoever opens it; never opens or closes anything itself."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from starlette.requests import HTTPConnection

from comfyd.api.links import Links
from comfyd.catalog import Catalog
from comfyd.clock import Clock
from comfyd.comfy.backend import Backend
from comfyd.config import Config
from comfyd.control import Control
from comfyd.disk import Room
from comfyd.estimate import Estimator
from comfyd.library import Library
from comfyd.loops import Health
from comfyd.metrics import Metrics
from comfyd.progress import Board
from comfyd.storage.opening import Storages
from comfyd.store.base import Store
from comfyd.submission import Submission
from comfyd.uploads import Uploads


def _nobody() -> None:
    """This process delivers nothing: whoever does looks at the table by itself."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that a route may use. Lives as long as the process; all of it is open."""

    config: Config
    clock: Clock
    store: Store
    storages: Storages
    links: Links
    uploads: Uploads
    library: Library
    room: Room
    board: Board
    submission: Submission
    control: Control
    estimator: Estimator
    catalog: Catalog
    backends: tuple[Backend, ...]
    metrics: Metrics
    health: Health
    closing: asyncio.Event
    """Set when the process is asked to stop: streams and waiting requests end then."""
    started_at: int
    """UTC milliseconds."""
    version: str
    wake_deliverer: Callable[[], None] = _nobody
    """Call after making a delivery due. What nobody calls for is found due a little later all the same."""


def state_of(connection: HTTPConnection) -> State:
    """The state that `create_api` was given."""
    return cast("State", connection.app.state.comfyd)
