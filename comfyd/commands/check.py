"""`comfyd check`: tries every part of the set-up and says in plain words what is wrong; never mends it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TextIO

import msgspec

from comfyd.catalog import Catalog, graph_limits
from comfyd.clock import Clock, SystemClock
from comfyd.comfy.backend import Backend
from comfyd.commands.exits import Exit
from comfyd.config import ComfyUIConfig, Config, masked
from comfyd.errors import ComfydError, StoreError
from comfyd.graphs import GraphLimits
from comfyd.storage.local import LocalStorage, open_local
from comfyd.store.sqlite import open_sqlite

PATIENCE_S: Final = 5.0
"""How long a ComfyUI may be silent here: somebody sits in front of the screen."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One part of the set-up, and how it stands."""

    part: str
    good: bool
    text: str

    def line(self) -> str:
        """As it is printed."""
        return f"{'ok ' if self.good else 'BAD'} {self.part:<9} {self.text}"


def run(config: Config, out: TextIO) -> int:
    """Print one line per part; 1 if anything is bad."""
    good = asyncio.run(_check(config, SystemClock(), out))
    return Exit.OK if good else Exit.FAILED


async def _check(config: Config, clock: Clock, out: TextIO) -> bool:
    servers = enumerate(config.comfyui)
    findings = list(await asyncio.gather(*(comfyui(server, index, clock) for index, server in servers)))
    findings += await data(config)
    findings += await asyncio.to_thread(templates, Path(config.workflows.dir), graph_limits(config.limits))
    for finding in findings:
        print(finding.line(), file=out)
    return all(finding.good for finding in findings)


async def comfyui(server: ComfyUIConfig, index: int, clock: Clock) -> Finding:
    """Whether one ComfyUI answers."""
    quick = msgspec.structs.replace(server, request_timeout=min(server.request_timeout, PATIENCE_S))
    url = masked(server.url)
    async with Backend.open(quick, clock) as backend:
        await backend.probe()
        state = backend.state
    if state.ready:
        return Finding(
            part="comfyui", good=True, text=f"{url} ComfyUI {state.version or 'of unknown version'}"
        )
    key = "comfyui.url (COMFYUI_URL)" if index == 0 else f"comfyui.{index}.url"
    reason = (state.reason or "not ready").removesuffix(f" at {url}")
    text = f"{url} {reason}: start ComfyUI or set {key}"
    return Finding(part="comfyui", good=False, text=text)


async def data(config: Config) -> list[Finding]:
    """Whether the queue opens and the storage takes, gives back and deletes a probe."""
    folder = config.database.parent
    try:
        await asyncio.to_thread(folder.mkdir, mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        text = f"{folder} cannot be made ({error.strerror}): set data.dir to a folder that can be written"
        return [Finding(part="queue", good=False, text=text)]
    try:
        async with open_sqlite(config.database) as store:
            waiting = sum((await store.counts()).values())
            queue = Finding(part="queue", good=True, text=f"{config.database} {waiting} tasks")
            return [queue, await storage(config.files, ours=True)]
    except StoreError as error:
        taken = isinstance(error.__cause__, BlockingIOError)
        text = f"{folder} in use by a running comfyd" if taken else f"{error.message} (data.dir)"
        return [Finding(part="queue", good=taken, text=text), await storage(config.files, ours=False)]


async def storage(folder: Path, *, ours: bool) -> Finding:
    """Whether the storage works. `ours` says that no other comfyd is at work in it."""
    try:
        async with _storage(folder, ours=ours) as opened:
            await opened.ping()
    except (ComfydError, OSError) as error:
        text = f"{error}: set storage.local.dir to a folder that can be written"
        return Finding(part="storage", good=False, text=text)
    return Finding(part="storage", good=True, text=f"{folder} written, read and deleted a probe")


@asynccontextmanager
async def _storage(folder: Path, *, ours: bool) -> AsyncIterator[LocalStorage]:
    if not ours:
        # Opening it would throw away what a running comfyd is writing at this moment.
        yield LocalStorage(folder)
        return
    async with open_local(folder) as opened:
        yield opened


def templates(folder: Path, limits: GraphLimits) -> list[Finding]:
    """Whether every workflow template can be read."""
    catalog = Catalog(folder, limits)
    catalog.refresh()
    problems = [Finding(part="workflows", good=False, text=problem.message) for problem in catalog.problems()]
    names = ", ".join(template.name for template in catalog.list())
    text = f"{folder} {names or 'holds no template yet: `comfyd init` writes three'}"
    summary = Finding(part="workflows", good=True, text=text)
    return problems if problems and not names else [*problems, summary]
