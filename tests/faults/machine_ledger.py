"""What the world saw, and whether comfyd kept its promises: lost, dup, regress, phantom, idem_split.

Knows what clients asked, what was done to ComfyUI, and what that really ran; never talks to anybody. The
simulator's execution log is the clock here: a fault is known by how many of its lines there were.
"""

import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec
from PIL import Image

from comfyd.simulator.executions import Execution
from comfyd.tasks import Attempt, Status, Task

GHOST_SECONDS: Final = 4.0
"""A POST that ComfyUI looks at so late may run although its attempt counts as lost (Q6)."""
LATER: Final = 1 << 60
VIEW_ERRORS: Final = frozenset({"output_unavailable", "backend_unclear"})
"""How a task may fail when ComfyUI does not serve what it made."""

Window = tuple[int, int]
"""Lines of the execution log: from the first that a fault met, to the first that it did not."""


class Broken(AssertionError):
    """A promise was broken; begins with the counter that is not 0."""


class Wish(msgspec.Struct, kw_only=True):
    """One submission, as its client knows it."""

    color: int
    """Of the picture that it is to become: no two are alike."""
    priority: int = 0
    key: str | None = None
    task_id: str | None = None
    """None until an answer came: then it is a promise."""
    status: Status = Status.QUEUED
    """As it was last seen."""
    cancels: int = 0
    """Cancels that were sent since it was last queued, answered or not."""
    reruns: list[int] = []
    """How many attempts there were when the client had it run again."""
    deleted: bool = False
    refused: bool = False
    """comfyd said that it did not take it."""


class Stranger(msgspec.Struct, kw_only=True):
    """A prompt that somebody else gave to ComfyUI."""

    prompt_id: str
    at: int
    """When, as the ledger counts moments."""


class Run(msgspec.Struct, kw_only=True):
    """One prompt on the GPU: the lines of its start and its end, and how it ended."""

    prompt_id: str
    began: int
    ended: int = LATER
    outcome: str | None = None
    """None: ComfyUI died under it."""


class Ledger:
    """All that is known from outside. Lives as long as its world."""

    def __init__(self) -> None:
        self.wishes: list[Wish] = []
        self.strangers: list[Stranger] = []
        self.ghosts: set[str] = set()
        """Attempts whose POST may have been looked at long after it was sent."""
        self.crashes: list[int] = []
        self.strays: list[Window] = []
        self.forgetting: list[Window] = []
        """While ComfyUI dropped history."""
        self.unserved: list[Window] = []
        """While `/view` was faulty."""
        self.swept: list[int] = []
        """When ComfyUI's queue was emptied, by somebody or by its death; in moments."""
        self.excused: Counter[str] = Counter()
        """Second runs by what made them unavoidable."""
        self._moment = 0

    @property
    def tasks(self) -> list[Wish]:
        """What was promised and not taken back."""
        return [wish for wish in self.wishes if wish.task_id is not None and not wish.deleted]

    @property
    def keyed(self) -> list[Wish]:
        """What was sent with a key."""
        return [wish for wish in self.wishes if wish.key is not None]

    def moment(self) -> int:
        """Count one."""
        self._moment += 1
        return self._moment

    # what was done

    def crashed(self, log: Sequence[Execution]) -> None:
        """ComfyUI dies now."""
        self.crashes.append(len(log))
        self.swept.append(self.moment())

    def strayed(self, began: int, log: Sequence[Execution]) -> None:
        """Somebody interrupted whatever ran between that line and now."""
        self.strays.append((began, len(log)))

    def forget_history(self, log: Sequence[Execution]) -> None:
        """From now on ComfyUI drops history."""
        if not _open(self.forgetting):
            self.forgetting.append((len(log), LATER))

    def keep_history(self, log: Sequence[Execution]) -> None:
        """It does no more."""
        _close(self.forgetting, log)

    def spoil_files(self, log: Sequence[Execution]) -> None:
        """From now on `/view` is faulty."""
        if not _open(self.unserved):
            self.unserved.append((len(log), LATER))

    def serve_files(self, log: Sequence[Execution]) -> None:
        """It is so no more."""
        _close(self.unserved, log)

    # what is promised at each moment

    def see(self, tasks: Sequence[Task]) -> None:
        """Judge the rows as they are now. Raises `Broken`."""
        rows = {task.id: task for task in tasks}
        for wish in self.tasks:
            task = rows.get(wish.task_id or "")
            if task is None:
                raise Broken(f"lost: task {wish.task_id} is not in the database any more")
            if wish.status.terminal and task.status is not wish.status:
                raise Broken(f"regress: task {task.id} was {wish.status} and is {task.status}")
            if task.status is Status.CANCELED and not wish.cancels:
                raise Broken(f"phantom: task {task.id} was canceled, and nobody had asked for it")
            wish.status = task.status
            _one_live_attempt(task)

    # what is promised in the end

    def judge(self, tasks: Sequence[Task], log: Sequence[Execution], files: Path) -> None:
        """Judge everything, once all is well again and quiet. Raises `Broken`."""
        self.see(tasks)
        runs = runs_of(log)
        self._no_strange_task(tasks)
        for wish in self.tasks:
            (task,) = (task for task in tasks if task.id == wish.task_id)
            if not task.status.terminal:
                raise Broken(f"lost: task {task.id} is still {task.status}: {task.attempts[-1:]}")
            self._fairly_failed(task)
            self._runs(wish, task, runs)
            if task.status is Status.SUCCEEDED:
                _own_picture(wish, task, files)
        self._strangers(runs)

    def _no_strange_task(self, tasks: Sequence[Task]) -> None:
        """Each row is of a wish, and no wish has two."""
        colors = Counter(int(task.metadata["color"]) for task in tasks)
        for color, count in colors.items():
            (wish,) = (wish for wish in self.wishes if wish.color == color)
            if count > 1:
                raise Broken(f"idem_split: {count} tasks of one wish (key {wish.key})")
            if wish.refused:
                raise Broken(f"phantom: a submission that was refused is a task ({color=})")
            if wish.deleted:
                raise Broken(f"regress: task {wish.task_id} was deleted and is there again")

    def _fairly_failed(self, task: Task) -> None:
        if task.status is not Status.FAILED:
            return
        code = task.error.code if task.error is not None else None
        suspects = sum(attempt.outcome == "suspect" for attempt in task.attempts)
        strays = sum(attempt.outcome == "stray" for attempt in task.attempts)
        fair = (
            (code == "backend_crashed" and suspects > 2 and (len(self.crashes) > 2 or self.forgetting))
            or (code == "interrupted" and strays > 3 and len(self.strays) > 3)
            or (code in VIEW_ERRORS and self.unserved)
        )
        if not fair:
            raise Broken(f"lost: task {task.id} failed without a reason: {task.error}")

    def _runs(self, wish: Wish, task: Task, runs: Sequence[Run]) -> None:
        """Every run of the task after its first has an excuse, and is on record as an attempt."""
        attempts = {attempt.id: attempt for attempt in task.attempts}
        own = [run for run in runs if run.prompt_id in attempts]
        counted = Counter(run.prompt_id for run in own)
        if twice := [prompt_id for prompt_id, count in counted.items() if count > 1]:
            raise Broken(f"dup: one prompt ran twice: {twice}")
        for first, second in pairwise(own):
            why = self._excuse(wish, attempts, first, second)
            if why is None:
                told = "\n".join(str(attempt) for attempt in task.attempts)
                raise Broken(f"dup: task {task.id} ran again for no reason: {first} {second}\n{told}")
            self.excused[why] += 1
        succeeded = Counter(
            _generation(wish, attempt.number) for attempt in task.attempts if attempt.outcome == "succeeded"
        )
        if any(count > 1 for count in succeeded.values()):
            raise Broken(f"dup: task {task.id} succeeded twice")
        for run in own:
            self._fairly_interrupted(run, attempts[run.prompt_id], wish)
        for attempt in task.attempts:
            if attempt.outcome in {"suspect", "stray"} and attempt.id not in counted:
                raise Broken(f"phantom: an attempt that never ran counts as one that did: {attempt}")

    def _excuse(self, wish: Wish, attempts: dict[str, Attempt], first: Run, second: Run) -> str | None:
        """Why the second run could not be helped; None if it could."""
        before, after = attempts[first.prompt_id], attempts[second.prompt_id]
        between = (first.began, second.began)
        unknown = before.executed_at is None
        excuses = {
            "asked by the client": _generation(wish, before.number) != _generation(wish, after.number),
            "ComfyUI died under it": first.outcome is None
            and any(first.began <= crash <= second.began for crash in self.crashes),
            "interrupted by somebody": first.outcome == "interrupted" and self._strayed(first),
            "history lost with ComfyUI": unknown
            and any(first.began < crash <= second.began for crash in self.crashes),
            "history evicted": unknown and any(_overlap(window, between) for window in self.forgetting),
            "a ghost": bool({first.prompt_id, second.prompt_id} & self.ghosts),
            "its output was not served": (_failed_of(before, VIEW_ERRORS) or before.outcome == "suspect")
            and any(_overlap(window, between) for window in self.unserved),
        }
        return next((why for why, holds in excuses.items() if holds), None)

    def _strayed(self, run: Run) -> bool:
        return any(_overlap(window, (run.began, run.ended)) for window in self.strays)

    def _fairly_interrupted(self, run: Run, attempt: Attempt, wish: Wish) -> None:
        if run.outcome != "interrupted" or self._strayed(run) or run.prompt_id in self.ghosts:
            return
        if attempt.outcome not in {"canceled", "succeeded"} and not wish.cancels:
            raise Broken(f"phantom: prompt {run.prompt_id} was interrupted by comfyd for nothing: {attempt}")

    def _strangers(self, runs: Sequence[Run]) -> None:
        """Prompts of others ran once and to their end, unless somebody else saw to that."""
        by_id: dict[str, list[Run]] = defaultdict(list)
        for run in runs:
            by_id[run.prompt_id].append(run)
        for stranger in self.strangers:
            ran = by_id[stranger.prompt_id]
            if not ran and not any(moment > stranger.at for moment in self.swept):
                raise Broken(f"phantom: the prompt of a stranger never ran: {stranger}")
            for run in ran:
                if run.outcome == "interrupted" and not self._strayed(run):
                    raise Broken(f"phantom: the prompt of a stranger was interrupted: {run}")


def runs_of(log: Sequence[Execution]) -> list[Run]:
    """The runs in the order of their starts."""
    runs: list[Run] = []
    going: dict[str, Run] = {}
    for line, execution in enumerate(log):
        if execution.event == "start":
            run = Run(prompt_id=execution.prompt_id, began=line)
            going[execution.prompt_id] = run
            runs.append(run)
        else:
            run = going[execution.prompt_id]
            run.ended, run.outcome = line, execution.outcome
    return runs


def _one_live_attempt(task: Task) -> None:
    live = [attempt for attempt in task.attempts if attempt.ended_at is None]
    if len(live) != (task.status is Status.RUNNING):
        raise Broken(f"dup: task {task.id} is {task.status} with {len(live)} live attempts")


def _generation(wish: Wish, number: int) -> int:
    """How often the client had had the task run again when it made this attempt."""
    return sum(number > attempts for attempts in wish.reruns)


def _failed_of(attempt: Attempt, codes: frozenset[str]) -> bool:
    return attempt.outcome == "failed" and attempt.error is not None and attempt.error.code in codes


def _own_picture(wish: Wish, task: Task, files: Path) -> None:
    """The one picture, whole, and of the colour that was asked for."""
    if len(task.artefacts) != 1:
        raise Broken(f"phantom: task {task.id} has {len(task.artefacts)} results instead of 1")
    (artefact,) = task.artefacts
    data = (files / artefact.key).read_bytes()
    if len(data) != artefact.size_bytes:
        raise Broken(f"phantom: the result of task {task.id} has {len(data)} bytes instead of {artefact}")
    try:
        with Image.open(io.BytesIO(data)) as picture:
            pixel = picture.convert("RGB").getpixel((0, 0))
    except OSError as exc:
        raise Broken(f"phantom: the result of task {task.id} is no whole picture") from exc
    assert isinstance(pixel, tuple)
    red, green, blue = pixel[:3]
    color = (red << 16) | (green << 8) | blue
    if color != wish.color:
        raise Broken(f"phantom: the result of task {task.id} is of colour {color} instead of {wish.color}")


def _overlap(window: Window, other: Window) -> bool:
    return window[0] <= other[1] and other[0] <= window[1]


def _open(windows: list[Window]) -> bool:
    return bool(windows) and windows[-1][1] == LATER


def _close(windows: list[Window], log: Sequence[Execution]) -> None:
    if _open(windows):
        windows[-1] = (windows[-1][0], len(log))
