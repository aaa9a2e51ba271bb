"""One world to break: ComfyUI (simulated) and comfyd as processes, clients, a webhook receiver; never a mock.

Both processes can be killed and come back on their ports with their folders. All chance is one seeded
`Random`.
"""

import asyncio
import contextlib
import hashlib
import io
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
from PIL import Image

from comfyd.failpoints import VARIABLE
from comfyd.simulator.executions import Execution, read_log
from tests.faults.checker import Evidence, Verdict, broken, check, opened, read_rows
from tests.faults.load import ClientLog, Clients, Job, Result
from tests.faults.receiver import SECRET, Receiver, open_receiver
from tests.support.comfyd import ComfydProcess
from tests.support.comfyui import ComfyUIProcess
from tests.support.sources import Sources, open_sources

PATIENCE: Final = 60.0
LOOK_SECONDS: Final = 0.02
RECOVERY_MOST: Final = 20.0
"""What a recovery that does not end within it counts as, in seconds."""
RECOVERED_SECONDS: Final = 5.0
"""What is promised of a recovery."""
SLOW_RECOVERED_SECONDS: Final = 10.0
"""The same while ComfyUI has trouble of its own."""
IN_FLIGHT: Final = 2


class Comfyd(ComfydProcess):
    """comfyd with a failpoint for one life, started without waiting for it."""

    def arm(self, failpoint: str | None) -> None:
        """For the lives that begin from now on; None is none."""
        self._settings[VARIABLE] = failpoint or ""

    @property
    def database(self) -> Path:
        """Its file."""
        return self.folder / "data" / "comfyd.db"


class World:
    """The rig of one run. Lives as long as the block of `open_world`.

    `kills` counts what was killed. `recoveries` are the seconds from the moment at which both sides answered
    to the one at which every attempt of the life before was adopted or settled. `broken` is what was wrong
    with the database after a kill.
    """

    def __init__(self, comfyd: Comfyd, comfyui: ComfyUIProcess, parts: "Parts") -> None:
        self.comfyd = comfyd
        self.comfyui = comfyui
        self.chance = parts.chance
        self.receiver = parts.receiver
        self.sources = parts.sources
        self.log = ClientLog()
        self.kills: Counter[str] = Counter()
        self.recoveries: list[float] = []
        self.broken: list[str] = []
        self.evicted = False
        self._session = parts.session
        self._clients = Clients(parts.session, comfyd.url, self.log, parts.chance)
        self._deaths: list[int] = []
        self._faults: dict[str, Any] = {}
        self._left: set[str] = set()
        self._measuring: asyncio.Task[None] | None = None

    # --- comfyd ---------------------------------------------------------------------------------------------

    async def comfyd_up(self, failpoint: str | None = None) -> bool:
        """Start it; False if it died before it answered."""
        self.comfyd.arm(failpoint)
        self.comfyd.spawn()
        async with asyncio.timeout(PATIENCE):
            while not await self._answers(f"{self.comfyd.url}/api/health"):
                if self.comfyd.exit_code() is not None:
                    assert failpoint is not None, f"comfyd does not start:\n{self.comfyd.log_text()}"
                    self._buried()
                    return False
                await asyncio.sleep(LOOK_SECONDS)
        self._measure()
        return True

    async def comfyd_down(self) -> None:
        """Kill it, if it is there."""
        await asyncio.to_thread(self.comfyd.kill)
        self._buried()

    async def comfyd_dies(self, patience: float = PATIENCE) -> bool:
        """Wait until it is dead; False if it does not die."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while self.comfyd.exit_code() is None:
                    await asyncio.sleep(LOOK_SECONDS)
                self._buried()
                return True
        return False

    def _buried(self) -> None:
        """It is dead: look at what it left."""
        code = self.comfyd.exit_code()
        if code != -signal.SIGKILL:
            self.broken.append(f"comfyd ended by itself, with {code}: {self.comfyd.log_text()[-2000:]}")
        self.kills["comfyd"] += 1
        self._look_at_the_rest()

    def _look_at_the_rest(self) -> None:
        """Remember what was under way; of a dead comfyd look whether the database is whole, too."""
        if self._measuring is not None:
            self._measuring.cancel()
        if not self.comfyd.database.exists():
            return
        with opened(self.comfyd.database) as connection:
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'attempts'").fetchone():
                return
            if self.comfyd.exit_code() is not None:
                self.broken += broken(connection)
            self._left = {
                id_ for (id_,) in connection.execute("SELECT id FROM attempts WHERE ended_at IS NULL")
            }

    def _measure(self) -> None:
        self._measuring = asyncio.create_task(self._recover(self._left))

    async def _recover(self, left: set[str]) -> None:
        """Measure how long what the last life left stays in the air."""
        async with asyncio.timeout(PATIENCE):
            while (queued := await self._queued()) is None:
                await asyncio.sleep(LOOK_SECONDS)
        began = time.monotonic()
        while self._in_the_air(left, queued or set()) and time.monotonic() - began < RECOVERY_MOST:
            await asyncio.sleep(LOOK_SECONDS)
            queued = await self._queued()
        self.recoveries.append(time.monotonic() - began)

    async def recovered(self) -> float:
        """Seconds that the last recovery took."""
        if self._measuring is not None:
            await asyncio.wait([self._measuring])
        return self.recoveries[-1]

    def _in_the_air(self, left: set[str], queued: set[str]) -> list[str]:
        """Those that are neither settled, nor followed in ComfyUI's queue, nor waiting for a place in it."""
        with opened(self.comfyd.database) as connection:
            live = dict(connection.execute("SELECT id, step FROM attempts WHERE ended_at IS NULL"))
        return [
            attempt
            for attempt, step in live.items()
            if attempt in left
            and not (step == "submitted" and attempt in queued)
            and not (step == "claimed" and len(queued) >= IN_FLIGHT)
        ]

    # --- ComfyUI --------------------------------------------------------------------------------------------

    async def comfyui_up(self) -> None:
        """Start it, with the switches that it had."""
        await self.comfyui.start_async()
        await self.switch()
        if self.comfyd.exit_code() is None:
            self._measure()

    def comfyui_down(self) -> None:
        """Kill it."""
        self._deaths.append(_now())
        self.comfyui.kill()
        self._deaths.append(_now())
        self.kills["comfyui"] += 1
        self._look_at_the_rest()

    async def switch(self, **faults: Any) -> None:
        """Set switches of the simulator; they outlive it."""
        self._faults.update(faults)
        self.evicted = self.evicted or faults.get("history_limit") is not None
        await self._control("faults", self._faults)

    async def accident(self, name: str) -> None:
        """One of the simulator's accidents."""
        await self._control("accidents", {"accident": name})

    async def _control(self, what: str, document: dict[str, Any]) -> None:
        async with self._session.post(f"{self.comfyui.url}/simulator/{what}", json=document) as answer:
            assert answer.status == 200, await answer.text()

    async def _queued(self) -> set[str] | None:
        """The prompts in ComfyUI's queue; None if it does not answer."""
        try:
            async with self._session.get(f"{self.comfyui.url}/queue") as answer:
                queue = await answer.json()
                return {item[1] for part in ("queue_running", "queue_pending") for item in queue[part]}
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return None

    def executions(self) -> list[Execution]:
        """What ran so far."""
        return read_log(self.comfyui.folder / "executions.jsonl")

    async def until(self, condition: Callable[[], bool], patience: float) -> bool:
        """Wait for it; False if it does not come."""
        deadline = time.monotonic() + patience
        while not condition():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(LOOK_SECONDS)
        return True

    def running(self) -> bool:
        """Whether a prompt is between its start and its end."""
        log = self.executions()
        return bool(log) and log[-1].event == "start"

    # --- clients --------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def load(
        self, jobs: Sequence[Job], clients: int = 4, patience: float = PATIENCE
    ) -> AsyncIterator[Clients]:
        """Clients at work while the block runs; it is left when they are through, or their patience is."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._clients.work(jobs, clients, patience))
            yield self._clients

    async def verdict(self) -> Verdict:
        """Read the results, stop comfyd, and count."""
        await self._hear()
        await asyncio.gather(*(self._read(task_id) for task_id in {s.task_id for s in self.log.sightings}))
        await self.recovered()
        await asyncio.to_thread(self.comfyd.kill)
        evidence = Evidence(
            log=self.log,
            executions=self.executions(),
            rows=read_rows(self.comfyd.database),
            received=self.receiver.received,
            deaths=self._deaths,
            evicted=self.evicted,
        )
        verdict = check(evidence)
        verdict.found["other"] += self.broken
        return verdict

    async def repeats(self) -> int:
        """How many attempts this life of comfyd has repeated, by its metrics."""
        async with self._session.get(f"{self.comfyd.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        counted = [line.rpartition(" ")[2] for line in lines if line.startswith("comfyd_task_retries_total{")]
        return round(sum(map(float, counted)))

    async def _hear(self) -> None:
        """Give the webhooks that are owed the time that they take."""

        def all_told() -> bool:
            with opened(self.comfyd.database) as connection:
                asked = "SELECT 1 FROM deliveries WHERE status = 'pending' LIMIT 1"
                return connection.execute(asked).fetchone() is None

        await self.until(all_told, RECOVERY_MOST)

    async def _read(self, task_id: str) -> None:
        """Fetch what the task has made."""
        document = await self._clients.note(task_id)
        for output in (document or {}).get("outputs", ()):
            async with self._session.get(output["url"]) as answer:
                data = await answer.read()
            self.log.results.append(
                Result(
                    task_id=task_id,
                    node_id=output["node_id"],
                    told_sha256=output["sha256"],
                    told_bytes=output["size_bytes"],
                    sha256=hashlib.sha256(data).hexdigest(),
                    bytes=len(data),
                    color=_color(data),
                )
            )

    async def _answers(self, url: str) -> bool:
        try:
            async with self._session.get(url) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """What a world stands on."""

    chance: random.Random
    session: aiohttp.ClientSession
    receiver: Receiver
    sources: Sources


@asynccontextmanager
async def open_world(
    folder: Path, seed: str, *, node_seconds: float = 0.03, settings: dict[str, str] | None = None
) -> AsyncIterator[World]:
    """A world with a ComfyUI that runs and a comfyd that does not; nothing of it runs after the block."""
    (folder / "comfyui").mkdir(parents=True)
    options = ["--node-seconds", str(node_seconds), "--no-previews"]
    comfyui = ComfyUIProcess("simulator-0.3.75", folder=folder / "comfyui", options=options)
    timeout = aiohttp.ClientTimeout(total=15)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # each life of a server has its own
    async with (
        aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
        open_receiver(random.Random(seed)) as receiver,
        open_sources() as sources,
        comfyui,
    ):
        comfyd = Comfyd(folder, comfyui.url, **_settings(settings or {}))
        parts = Parts(chance=random.Random(seed), session=session, receiver=receiver, sources=sources)
        try:
            yield World(comfyd, comfyui, parts)
        finally:
            comfyd.kill()


def _settings(chosen: dict[str, str]) -> dict[str, str]:
    return {
        "COMFYD__OUTBOUND__ALLOW": "127.0.0.1",
        "COMFYD__QUEUE__WORKERS": "8",
        "COMFYD__QUEUE__RETRY_DELAY": "0.1",
        "COMFYD__COMFYUI__0__REQUEST_TIMEOUT": "3",
        "COMFYD__LIMITS__LIST_PAGE": "1000",
        "COMFYD__WEBHOOKS__SECRET": SECRET,
        **chosen,
    }


def _color(data: bytes) -> int | None:
    """Of a picture that has only one."""
    with contextlib.suppress(OSError), Image.open(io.BytesIO(data)) as picture:
        colors = picture.convert("RGB").getcolors()
        if colors is not None and len(colors) == 1:
            return int.from_bytes(picture.convert("RGB").tobytes()[:3])
    return None


def _now() -> int:
    """UTC milliseconds, as in the execution log."""
    return int(time.time() * 1000)
