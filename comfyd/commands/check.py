"""`comfyd check`: tries every part of the set-up and says in plain words what is wrong; never mends it."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TextIO

import msgspec

from comfyd.catalog import Catalog, graph_limits
from comfyd.clock import Clock, SystemClock
from comfyd.comfy.backend import Backend
from comfyd.commands.exits import Exit
from comfyd.config import ComfyUIConfig, Config, StorageConfig, StorageName, masked
from comfyd.errors import ComfydError, StoreError
from comfyd.graphs import GraphLimits
from comfyd.settings import named
from comfyd.storage.base import Storage
from comfyd.storage.local import LocalStorage
from comfyd.storage.opening import open_storage
from comfyd.store.sqlite import open_sqlite

PATIENCE_S: Final = 5.0
"""How long a ComfyUI may be silent here: somebody sits in front of the screen."""
STORAGE_PATIENCE_S: Final = 10.0
"""How long a storage may take, with all requests of its probe."""


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
    answers = asyncio.gather(*(comfyui(server, index, clock) for index, server in servers))
    reached, kept = await asyncio.gather(answers, data(config, clock))
    findings = [*reached, *restarts(config.comfyui), *kept]
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


def restarts(servers: Sequence[ComfyUIConfig]) -> list[Finding]:
    """The commands that start a ComfyUI anew whose program is not there."""
    return [
        Finding(
            part="restart",
            good=False,
            text=f"{server.restart[0]} cannot be found or run: set comfyui.{index}.restart",
        )
        for index, server in enumerate(servers)
        if server.restart and shutil.which(server.restart[0]) is None
    ]


async def data(config: Config, clock: Clock) -> list[Finding]:
    """Whether the queue opens, and the storages take, give back and delete a probe."""
    folder = config.database.parent
    used = _used_storages(config.storage)
    try:
        await asyncio.to_thread(folder.mkdir, mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        text = f"{folder} cannot be made ({error.strerror}): set data.dir to a folder that can be written"
        # The local storage is mostly in this folder, and would only say the same.
        elsewhere = {part: name for part, name in used.items() if name != "local"}
        queue = Finding(part="queue", good=False, text=text)
        return [queue, *await _storages(elsewhere, config, clock, ours=False)]
    try:
        async with open_sqlite(config.database) as store:
            waiting = sum((await store.counts()).values())
            queue = Finding(part="queue", good=True, text=f"{config.database} {waiting} tasks")
            return [queue, *await _storages(used, config, clock, ours=True)]
    except StoreError as error:
        taken = isinstance(error.__cause__, BlockingIOError)
        text = f"{folder} in use by a running comfyd" if taken else f"{error.message} (data.dir)"
        queue = Finding(part="queue", good=taken, text=text)
        return [queue, *await _storages(used, config, clock, ours=False)]


def _used_storages(storage: StorageConfig) -> Mapping[str, StorageName]:
    """The storages that results may go to without being asked for, by the word for their part."""
    used: dict[str, StorageName] = {"storage": storage.provider}
    # What is written down is tried. The default one is used only by Cloudflare Images, which refuses a lot.
    if storage.fallback != storage.provider and (
        storage.fallback != "local" or "cf_images" in storage.usable
    ):
        used["fallback"] = storage.fallback
    return used


async def _storages(
    used: Mapping[str, StorageName], config: Config, clock: Clock, *, ours: bool
) -> list[Finding]:
    probes = (storage(name, config, clock, ours=ours) for name in used.values())
    found = zip(used, await asyncio.gather(*probes), strict=True)
    return [Finding(part=part, good=good, text=text) for part, (good, text) in found]


async def storage(
    name: StorageName, config: Config, clock: Clock, *, ours: bool, patience: float = STORAGE_PATIENCE_S
) -> tuple[bool, str]:
    """Whether one storage works, and what is said of it. `ours`: no other comfyd works in the local one."""
    try:
        async with asyncio.timeout(patience), _opened(name, config, clock, ours=ours) as opened:
            await opened.ping()
    except TimeoutError:
        text = f"{name}: no answer within {patience:g} s: mend the network, or set {_address(name)}"
    except (ComfydError, OSError) as error:
        advice = _advice(name, error)
        text = advice if advice.startswith(f"{name}:") else f"{name}: {advice}"
    else:
        return True, f"{_place(name, config)} written, read and deleted a probe"
    return False, " ".join(text.split())


@asynccontextmanager
async def _opened(name: StorageName, config: Config, clock: Clock, *, ours: bool) -> AsyncIterator[Storage]:
    if name == "local" and not ours:
        # Opening it would throw away what a running comfyd is writing at this moment.
        yield LocalStorage(config.files)
        return
    async with open_storage(name, config, clock) as opened:
        yield opened


def _place(name: StorageName, config: Config) -> str:
    """Where a storage is, for people; never with a secret."""
    if name == "local":
        return str(config.files)
    table = getattr(config.storage, name)
    if name == "cf_images":
        return f"cf_images account {table.account_id}"
    return f"{name} bucket {table.bucket}{f' at {masked(table.endpoint)}' if table.endpoint else ''}"


def _address(name: StorageName) -> str:
    """The key that says where a storage is."""
    return f"storage.{name}.{'dir' if name == 'local' else 'endpoint'}"


def _advice(name: StorageName, error: ComfydError | OSError) -> str:
    """What went wrong, with the key that mends it, if one does."""
    text = str(error)
    key = error.details.get("key") if isinstance(error, ComfydError) else None
    if key is None:
        return f"{text}: set storage.local.dir to a folder that can be written" if name == "local" else text
    if key in text:
        return text if named(key) in text else text.replace(key, named(key), 1)
    # Another provider is a way out of everything, and hardly what is meant.
    return text if key == "storage.provider" else f"{text}; see {named(key)}"


def templates(folder: Path, limits: GraphLimits) -> list[Finding]:
    """Whether every workflow template can be read."""
    catalog = Catalog(folder, limits)
    catalog.refresh()
    problems = [Finding(part="workflows", good=False, text=problem.message) for problem in catalog.problems()]
    names = ", ".join(template.name for template in catalog.list())
    text = f"{folder} {names or 'holds no template yet: `comfyd init` writes three'}"
    summary = Finding(part="workflows", good=True, text=text)
    return problems if problems and not names else [*problems, summary]
