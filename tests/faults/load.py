"""Clients under which comfyd is killed: what they want, what they do about it, and the log that they keep.

A client repeats whatever has no answer, under the same key; it never looks into a database.
"""

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Literal, TypeVar

import aiohttp
import msgspec

Answer = TypeVar("Answer")
Verb = Literal["cancel", "retry", "delete"]
Graph = dict[str, Any]

TERMINAL: Final = frozenset({"COMPLETED", "FAILED", "CANCELED"})
EVENTS: Final = ("task.started", "task.output", "task.completed", "task.failed", "task.canceled")
MISSING: Final = "MISSING"
"""What a task that is 404 is seen as."""
ACCEPTED: Final = frozenset({200, 202})
AGAIN_SECONDS: Final = 0.05
PACE_SECONDS: Final = 0.02
LOOK_SECONDS: Final = 0.1
PAGE: Final = 1_000


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a client wants once: a task, and what is to happen to it."""

    number: int
    key: str
    """Its `Idempotency-Key`."""
    graph: Graph
    colors: dict[str, int]
    """Save node -> the colour that its picture has: no two jobs share one."""
    start: float = 0.0
    """When it is asked for: in seconds after the load begins, or in what the clients' `pace` counts."""
    twins: int = 1
    """How many requests with its key are sent at the same moment."""
    cancel: float | None = None
    """Cancel so many seconds after it was accepted."""
    cancel_running: bool = False
    """Count them from when it was seen to be worked on."""
    retry: bool = False
    delete: bool = False
    hook: str
    """Where its webhook goes: it wants to hear of everything."""

    @property
    def body(self) -> dict[str, Any]:
        """The body of the request. The key stands in the metadata too: twins in the database show."""
        return {
            "workflow": self.graph,
            "metadata": {"key": self.key},
            "webhook_url": self.hook,
            "webhook_events": EVENTS,
        }


class Submit(msgspec.Struct, frozen=True, kw_only=True):
    """One request for a task, times in seconds; `status` None: no answer, so nobody knows."""

    number: int
    key: str
    sent: float
    got: float
    status: int | None = None
    task_id: str | None = None


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request about a task."""

    verb: Verb
    task_id: str
    sent: float
    got: float
    status: int | None = None


class Sighting(msgspec.Struct, frozen=True, kw_only=True):
    """A status that a client was shown; of a row of equal ones only the first."""

    task_id: str
    sent: float
    got: float
    word: str


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One output as the task names it, and as it was read."""

    task_id: str
    node_id: str
    told_sha256: str
    told_bytes: int
    sha256: str
    bytes: int
    color: int | None
    """None: the picture is not of one colour, or no picture."""


class ClientLog:
    """All that clients did and saw. Lives as long as a run."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.submits: list[Submit] = []
        self.asks: list[Ask] = []
        self.sightings: list[Sighting] = []
        self.results: list[Result] = []
        self.prompts: dict[str, set[str]] = {}
        """Task -> the ids of the attempts that it was seen with."""


def solid(color: int, inverts: int = 0) -> Graph:
    """A picture of one colour, after so many negatives."""
    graph = {"1": _node("EmptyImage", width=8, height=8, batch_size=1, color=color)}
    graph["9"] = _node("SaveImage", images=[_negatives(graph, "1", inverts), 0], filename_prefix="s")
    return graph


def twice_saved(color: int, inverts: int) -> Graph:
    """A picture that is saved, and so many negatives later once more."""
    graph = solid(color)
    graph["8"] = _node("SaveImage", images=[_negatives(graph, "1", inverts), 0], filename_prefix="s")
    return graph


def loaded(url: str) -> Graph:
    """A picture of the client's, saved."""
    return {
        "1": _node("LoadImage", image=url),
        "9": _node("SaveImage", images=["1", 0], filename_prefix="s"),
    }


def negative(color: int, times: int = 1) -> int:
    """The colour after so many negatives."""
    return color ^ 0xFFFFFF if times % 2 else color


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _negatives(graph: Graph, node: str, times: int) -> str:
    for number in range(times):
        graph[f"i{number}"] = _node("ImageInvert", image=[node, 0])
        node = f"i{number}"
    return node


class Clients:
    """Some clients of one comfyd, which is not always there. Lives as long as a run."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, log: ClientLog, chance: random.Random
    ) -> None:
        self._session = session
        self._url = url
        self._log = log
        self._chance = chance
        self._began = time.monotonic()
        self._seen: dict[str, Sighting] = {}
        self._looked = 0.0
        self._moved = asyncio.Condition()
        self.done = asyncio.Event()
        """All that was wanted has happened."""
        self.pace: Callable[[], float] = lambda: time.monotonic() - self._began
        """How far the run is; infinite: it ends, and nothing new is asked for."""

    async def work(self, jobs: Sequence[Job], clients: int, patience: float) -> None:
        """Until all jobs are through, or the patience is at its end: then the log says what is missing."""
        self._log.jobs.extend(jobs)
        self._began = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience), asyncio.TaskGroup() as group:
                looking = group.create_task(self._look())
                mine = [sorted(jobs, key=lambda job: job.start)[number::clients] for number in range(clients)]
                await asyncio.gather(*(self._client(share) for share in mine))
                looking.cancel()
        self.done.set()

    async def _client(self, jobs: Sequence[Job]) -> None:
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                while self.pace() < job.start:
                    await asyncio.sleep(PACE_SECONDS)
                if self.pace() == math.inf:
                    break
                answers = await asyncio.gather(*(self._submitted(job) for _ in range(job.twins)))
                group.create_task(self._follow(job, answers[0]))

    async def _follow(self, job: Job, task_id: str) -> None:
        if job.cancel is not None:
            if job.cancel_running:
                await self._until(task_id, lambda word: word != "PENDING")
            await asyncio.sleep(job.cancel)
            await self._asked("cancel", task_id)
        await self._until(task_id, TERMINAL.__contains__)
        if job.retry:
            await self._asked("retry", task_id)
            asked = time.monotonic()
            async with self._moved:  # what was seen before is of the run before
                await self._moved.wait_for(lambda: self._looked > asked)
            await self._until(task_id, TERMINAL.__contains__)
        if job.delete:
            await _until_answered(lambda: self.note(task_id))  # afterwards nobody knows its prompts
            await self._asked("delete", task_id)

    async def _submitted(self, job: Job) -> str:
        """The task's id, however often it has to be asked for."""

        async def once() -> str | None:
            sent = time.monotonic()
            headers = {"Idempotency-Key": job.key}
            status, document = await self._call("POST", "/api/tasks", json=job.body, headers=headers)
            task_id = document["task_id"] if status in ACCEPTED else None
            got = time.monotonic()
            self._log.submits.append(
                Submit(number=job.number, key=job.key, sent=sent, got=got, status=status, task_id=task_id)
            )
            assert status is None or status in ACCEPTED or status >= 500, document
            if task_id is not None:
                self._saw(task_id, document["status"], sent, got)
            return task_id

        return await _until_answered(once)

    async def _asked(self, verb: Verb, task_id: str) -> None:
        async def once() -> int | None:
            sent = time.monotonic()
            path, method = f"/api/tasks/{task_id}", "DELETE" if verb == "delete" else "POST"
            status, document = await self._call(method, path if verb == "delete" else f"{path}/{verb}")
            got = time.monotonic()
            self._log.asks.append(Ask(verb=verb, task_id=task_id, sent=sent, got=got, status=status))
            if status in ACCEPTED:
                self._saw(task_id, document["status"], sent, got)
            return status if status is not None and status < 500 else None

        await _until_answered(once)

    async def _look(self) -> None:
        """See the list of tasks again and again."""
        while True:
            sent = time.monotonic()
            status, document = await self._call("GET", f"/api/tasks?limit={PAGE}")
            if status == 200:
                got = time.monotonic()
                for task in document["tasks"]:
                    self._saw(task["task_id"], task["status"], sent, got)
                self._looked = sent
                async with self._moved:
                    self._moved.notify_all()
            await asyncio.sleep(LOOK_SECONDS)

    async def _until(self, task_id: str, condition: Callable[[str], bool]) -> None:
        """Until the list shows it so."""
        async with self._moved:
            await self._moved.wait_for(lambda: task_id in self._seen and condition(self._seen[task_id].word))

    def _saw(self, task_id: str, word: str, sent: float, got: float) -> None:
        """Keep what is news. What was asked before the last news came may be older than that."""
        last = self._seen.get(task_id)
        if last is None or (last.word != word and sent > last.got):
            self._seen[task_id] = Sighting(task_id=task_id, sent=sent, got=got, word=word)
            self._log.sightings.append(self._seen[task_id])

    async def note(self, task_id: str) -> dict[str, Any] | None:
        """The task as it is told now; None if nobody answers, or it is not there."""
        sent = time.monotonic()
        status, document = await self._call("GET", f"/api/tasks/{task_id}")
        got = time.monotonic()
        if status == 200:
            self._saw(task_id, document["status"], sent, got)
            self._log.prompts.setdefault(task_id, set()).update(each["id"] for each in document["attempts"])
            return dict(document)
        if status == 404:
            self._saw(task_id, MISSING, sent, got)
        return None

    async def _call(self, method: str, path: str, **options: Any) -> tuple[int | None, Any]:
        """Status and JSON body; None where the connection broke before they were whole."""
        try:
            async with self._session.request(method, self._url + path, **options) as answer:
                text = await answer.read()
                return answer.status, msgspec.json.decode(text) if text else None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None, None


async def _until_answered(once: Callable[[], Awaitable[Answer | None]]) -> Answer:
    while (answer := await once()) is None:
        await asyncio.sleep(AGAIN_SECONDS)
    return answer
