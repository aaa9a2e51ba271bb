"""A task as it is at this moment: its row, and what only memory knows of it; never how it is shown."""

import msgspec

from comfyd.api.state import State
from comfyd.api.waiting import found
from comfyd.progress import Progress
from comfyd.tasks import Artefact, Status, Task


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What the board had of a running task before its row was read."""

    progress: Progress | None = None
    artefacts: tuple[Artefact, ...] = ()


class Sight(msgspec.Struct, frozen=True, kw_only=True):
    """One look at a task."""

    task: Task
    progress: Progress | None
    """None while nothing runs, or nothing is known yet."""
    artefacts: tuple[Artefact, ...]
    """What there is of it so far."""


async def look(state: State, task_id: str) -> Sight:
    """Raises `TaskNotFound`."""
    # A task that ends between the two looks is read as running and has no progress any more.
    before = Seen(progress=state.board.progress(task_id), artefacts=state.board.artefacts(task_id))
    return sight_of(state, await found(state, task_id), before)


def sight_of(state: State, task: Task, before: Seen | None = None) -> Sight:
    """A task whose row was read already; `before` is for one of which the board has nothing any more."""
    before = before or Seen()
    artefacts = task.artefacts
    if task.status is Status.RUNNING:
        artefacts = state.board.artefacts(task.id) or before.artefacts
    return Sight(
        task=task,
        progress=state.board.progress(task.id) or before.progress,
        artefacts=artefacts,
    )
