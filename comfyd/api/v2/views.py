"""Tasks in the words of the Comfy API v2; never asks anybody.

The one table of its status words stands here.
"""

from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

import msgspec
from msgspec import UNSET
from starlette.requests import HTTPConnection

from comfyd.api.faces import COMFY_V2
from comfyd.api.links import Link
from comfyd.api.sights import Sight
from comfyd.api.state import State, state_of
from comfyd.api.v2.schemas import (
    JobErrorView,
    JobItemView,
    JobMetricsView,
    JobOutputView,
    JobProgressView,
    JobStatusWord,
    JobUrlsView,
    JobView,
)
from comfyd.api.views import TYPES, moment, progress_view
from comfyd.tasks import Artefact, Status, Task, TaskError

NODE_FAILED: Final = "execution_error"
"""What comfyd calls the failure of a node, or of a prompt where ComfyUI does not say which node it was."""
FOR_EVER_MS: Final = 36_525 * 86_400_000
"""How far away the end of what is kept for ever is said to be: it has to be a date."""

_WORDS: Final[dict[Status, JobStatusWord]] = {
    Status.QUEUED: "queued",
    Status.RUNNING: "running",
    Status.SUCCEEDED: "succeeded",
    Status.FAILED: "failed",
    Status.CANCELED: "canceled",
}
STATUSES: Final[dict[str, Status | None]] = {
    **{word: status for status, word in _WORDS.items()},
    "canceling": Status.RUNNING,
    "expired": None,
}
"""The status that a task has whose job is called this; None for what comfyd never says."""


def word(task: Task) -> JobStatusWord:
    """The status of the job."""
    if task.status is Status.RUNNING and task.cancel_requested_at is not None:
        return "canceling"
    return _WORDS[task.status]


def kept_until(state: State, ended_at: int | None) -> int:
    """When a task is forgotten, in UTC milliseconds; one that has not ended as if it did now."""
    keeps = round(state.config.queue.retention * 1000) or FOR_EVER_MS
    return (state.clock.now() if ended_at is None else ended_at) + keeps


def job_view(
    connection: HTTPConnection,
    sight: Sight,
    position: int | None,
    outputs: tuple[JobOutputView, ...],
    kept: int,
) -> JobView:
    """The task as clients see it; `position` in the queue, and `kept` as of `kept_until`."""
    task = sight.task
    return JobView(
        id=task.id,
        status=word(task),
        created_at=moment(task.created_at),
        started_at=moment(task.started_at),
        completed_at=moment(task.completed_at),
        expires_at=moment(kept),
        queue_position=position,
        progress=_progress_view(sight),
        outputs=outputs,
        error=_error_view(task),
        metrics=_metrics_view(task),
        metadata=task.metadata,
        priority=task.priority,
        urls=_urls_view(connection, task.id),
    )


def item_view(task: Task, job: JobView) -> JobItemView:
    """The same in a list."""
    times = (task.created_at, task.started_at, task.cancel_requested_at, task.completed_at)
    return JobItemView(
        **msgspec.structs.asdict(job),
        create_time=job.created_at,
        update_time=moment(max(time for time in times if time is not None)),
    )


def job_output_view(task_id: str, artefact: Artefact, link: Link, kept: int) -> JobOutputView:
    """A stored result; `kept` says how long, where the link does not expire before."""
    return JobOutputView(
        node_id=artefact.node_id,
        name=artefact.name,
        type=TYPES[artefact.type],
        content_type=artefact.content_type,
        size_bytes=artefact.size_bytes,
        id=artefact.id,
        hash=None if artefact.blake3 is None else f"blake3:{artefact.blake3}",
        url=link.url,
        url_expires_at=moment(kept if link.expires_at is None else link.expires_at),
        job_id=task_id,
        sha256=artefact.sha256,
        width=UNSET if artefact.width is None else artefact.width,
        height=UNSET if artefact.height is None else artefact.height,
        duration=UNSET if artefact.duration is None else artefact.duration,
        text=UNSET if artefact.text is None else artefact.text,
    )


def _progress_view(sight: Sight) -> JobProgressView | None:
    """None where it is not known: a job that failed or was canceled."""
    if sight.task.status in {Status.FAILED, Status.CANCELED}:
        return None
    view = progress_view(sight.task, sight.progress)
    return msgspec.convert(view, JobProgressView, from_attributes=True)


def _error_view(task: Task) -> JobErrorView | None:
    if task.status is Status.CANCELED:
        return JobErrorView(code="canceled", message="the job was canceled", node_id=None, class_type=None)
    if task.error is None:
        return None
    node_id = _text(task.error, "node_id")
    failed = task.error.code == NODE_FAILED and node_id is not None
    return JobErrorView(
        code="node_execution_error" if failed else task.error.code,
        message=task.error.message,
        node_id=node_id,
        class_type=_text(task.error, "class_type"),
    )


def _text(error: TaskError, name: str) -> str | None:
    detail = error.details.get(name)
    return detail if isinstance(detail, str) else None


def _metrics_view(task: Task) -> JobMetricsView:
    """Of the last attempt: what was before it is all waiting."""
    if not task.attempts:
        return JobMetricsView(queue_ms=None, execution_ms=None)
    last = task.attempts[-1]
    began = last.seen_running_at
    if began is None and last.executed_at is not None and last.execution_ms is not None:
        began = last.executed_at - last.execution_ms
    queued = None if began is None else max(began - task.created_at, 0)
    return JobMetricsView(queue_ms=queued, execution_ms=last.execution_ms)


def _urls_view(connection: HTTPConnection, task_id: str) -> JobUrlsView:
    own = f"{_root(connection)}{COMFY_V2}/jobs/{task_id}"
    return JobUrlsView(self=own, events=f"{own}/events", cancel=f"{own}/cancel")


def _root(connection: HTTPConnection) -> str:
    """What stands before our paths where the client asks, as far as it is known.

    Host and scheme are left to the client, who knows them better than whoever sits behind a proxy.
    """
    public = state_of(connection).config.server.public_url
    path: str = connection.scope.get("root_path", "") if public is None else urlsplit(public).path
    return path.rstrip("/")


def outputs_of(sight: Sight, links: Sequence[Link], kept: int) -> tuple[JobOutputView, ...]:
    """All results that there are, each with its link."""
    return tuple(
        job_output_view(sight.task.id, artefact, link, kept)
        for artefact, link in zip(sight.artefacts, links, strict=True)
    )
