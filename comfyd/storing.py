"""The outputs of one attempt on their way to their storage; never how one file gets there.

What a node saved is stored while the next ones run, where that takes a while. Before, the attempt's row is
told of it: whoever takes the attempt up after a crash knows what there may be to forget.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Final, Self

import msgspec
import structlog

from comfyd import failpoints
from comfyd.artefacts import ArtefactWriter, Source
from comfyd.clock import Clock
from comfyd.errors import StaleClaim
from comfyd.progress import Board, Progress
from comfyd.tasks import Artefact, Attempt, OutputFile, Task

log = structlog.get_logger("comfyd.storing")

AT_ONCE: Final = 4
"""Files of one task that are transferred at the same time."""
EARLY_MS: Final = 500
"""How long after its node a file is stored early: a prompt that has ended by then needs no row told of it."""

Place = tuple[str, int]
"""Node id and index: what an output is known by within its attempt."""
Tell = Callable[[OutputFile], Awaitable[None]]
"""Makes it durable that this file may be in the storage. Raises `StaleClaim`."""


class Storing:
    """The outputs of one attempt. Lives as long as it is worked on.

    Left with an error, it forgets what was stored; left because the process stops, it leaves everything to
    the next one, which finds it under the same keys.
    """

    def __init__(
        self, task: Task, attempt: Attempt, writer: ArtefactWriter, board: Board, clock: Clock
    ) -> None:
        self._task = task
        self._writer = writer
        self._board = board
        self._clock = clock
        self._path = "/".join(part for part in (task.output.prefix, task.id, str(attempt.number)) if part)
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._named: set[OutputFile] = set(attempt.collected)
        self._early: set[asyncio.Task[None]] = set()
        self._late = False
        self._begun: dict[Place, tuple[OutputFile, asyncio.Task[Artefact]]] = {}
        self._inline_left = writer.inline_bytes

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        await self.no_more_early()
        if kind is None:
            return
        await self._drop(list(self._begun))
        if issubclass(kind, Exception):  # and not because the process stops
            files = self._named.union(file for file, _ in self._begun.values())
            self._board.withdrawn(self._task.id)
            await self._writer.forget(self._path, list(files), self._task.output)

    def begin_early(self, file: OutputFile, source: Source, tell: Tell) -> None:
        """Store this file soon, if the prompt still runs by then."""
        if self._late:
            return
        work = asyncio.ensure_future(self._wait_and_begin(file, source, tell))
        self._early.add(work)
        work.add_done_callback(self._early.discard)

    async def _wait_and_begin(self, file: OutputFile, source: Source, tell: Tell) -> None:
        await self._clock.sleep(EARLY_MS)
        try:
            await tell(file)
        except StaleClaim as exc:  # whoever follows the prompt will find out, too
            log.info("output.late", node=file.node_id, reason=exc.message)
            return
        self._named.add(file)
        self._begin(file, source)
        failpoints.reach("early.stored")

    async def no_more_early(self) -> None:
        """The prompt has ended: what has not begun early waits for `finish`."""
        self._late = True
        waiting = list(self._early)
        for work in waiting:
            work.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    async def finish(self, files: Sequence[OutputFile], source: Source) -> tuple[Artefact, ...]:
        """Wait until exactly these are stored. Raises what `ArtefactWriter.write` does."""
        await self._forget_others(files)
        self._named.update(files)
        for file in files:
            self._begin(file, source)
        waiting = [self._begun[file.node_id, file.index][1] for file in files]
        if waiting:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
        for work in waiting:
            if work.done() and (error := work.exception()) is not None:
                raise error
        return tuple(work.result() for work in waiting)

    async def _forget_others(self, files: Sequence[OutputFile]) -> None:
        """Drop what was begun and is none of these, or has failed: that is tried again."""
        wanted = set(files)
        over = [
            place
            for place, (file, work) in self._begun.items()
            if file not in wanted or (work.done() and (work.cancelled() or work.exception() is not None))
        ]
        await self._drop(over)
        for place in over:
            del self._begun[place]
        self._board.withdrawn(self._task.id, set(over))
        others = self._named - wanted
        if others:
            await self._writer.forget(self._path, list(others), self._task.output, files)
            self._named -= others

    def _begin(self, file: OutputFile, source: Source) -> None:
        place = (file.node_id, file.index)
        if place not in self._begun:
            self._begun[place] = (file, asyncio.ensure_future(self._one(file, source)))

    async def _one(self, file: OutputFile, source: Source) -> Artefact:
        async with self._gate:
            artefact = await self._writer.write(self._path, file, self._task.output, source, self._say)
        if artefact.data is not None and artefact.size_bytes > self._inline_left:
            artefact = msgspec.structs.replace(artefact, data=None)
        elif artefact.data is not None:
            self._inline_left -= artefact.size_bytes
        self._board.stored(self._task.id, artefact)
        return artefact

    def _say(self, message: str) -> None:
        """Show what is being waited for, where the task's progress is shown."""
        nodes = self._task.nodes_total
        executed = Progress(value=1.0, nodes_done=nodes, nodes_total=nodes)  # where an earlier process saw it
        progress = self._board.progress(self._task.id) or executed
        self._board.report(self._task.id, msgspec.structs.replace(progress, message=message))

    async def _drop(self, places: Sequence[Place]) -> None:
        """Stop what is under way; nothing is written any more when this returns."""
        work = [self._begun[place][1] for place in places]
        for each in work:
            each.cancel()
        await asyncio.gather(*work, return_exceptions=True)
