"""Tasks and what belongs to them in the words of this API; never asks anybody.

The one table of status words stands here.
"""

from datetime import UTC, datetime
from typing import Final, Literal, overload

from comfyd.api.schemas import (
    AttemptView,
    DeliveryTryView,
    DeliveryView,
    OutputView,
    ProgressView,
    StatusWord,
    TaskErrorView,
    TaskView,
    UrlsView,
)
from comfyd.config import masked
from comfyd.deliveries import Delivery
from comfyd.estimate import Estimate
from comfyd.progress import Progress
from comfyd.tasks import Artefact, Attempt, OutputType, Status, Task, TaskError

WORDS: Final[dict[Status, StatusWord]] = {
    Status.QUEUED: "PENDING",
    Status.RUNNING: "PROCESSING",
    Status.SUCCEEDED: "COMPLETED",
    Status.FAILED: "FAILED",
    Status.CANCELED: "CANCELED",
}
STATUSES: Final[dict[str, Status]] = {word: status for status, word in WORDS.items()}

TYPES: Final[dict[OutputType, Literal["image", "video", "audio", "text", "latent", "file"]]] = {
    OutputType.IMAGE: "image",
    OutputType.VIDEO: "video",
    OutputType.AUDIO: "audio",
    OutputType.TEXT: "text",
    OutputType.LATENT: "latent",
    OutputType.FILE: "file",
}


@overload
def moment(milliseconds: int) -> str: ...
@overload
def moment(milliseconds: None) -> None: ...
def moment(milliseconds: int | None) -> str | None:
    """RFC 3339 in UTC, to the millisecond."""
    if milliseconds is None:
        return None
    seconds, rest = divmod(milliseconds, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:03d}Z"


def task_view(
    task: Task, estimate: Estimate, progress: Progress | None, outputs: tuple[OutputView, ...], base: str
) -> TaskView:
    """The task as clients see it. `base` is the url that comfyd is reached under."""
    return TaskView(
        task_id=task.id,
        status=WORDS[task.status],
        workflow=task.workflow,
        inputs=task.inputs,
        priority=task.priority,
        created_at=moment(task.created_at),
        started_at=moment(task.started_at),
        completed_at=moment(task.completed_at),
        cancel_requested=task.cancel_requested_at is not None,
        queue_position=estimate.queue_position,
        eta_seconds=estimate.eta_seconds,
        progress=progress_view(task, progress),
        outputs=outputs,
        error=error_view(task.error),
        attempts=tuple(_attempt_view(attempt) for attempt in task.attempts),
        metadata=task.metadata,
        urls=urls_view(task.id, base),
    )


def progress_view(task: Task, progress: Progress | None) -> ProgressView:
    """How far it is: all of it when it succeeded, nothing while it waits, not known when it failed."""
    if task.status is Status.RUNNING and progress is not None:
        return ProgressView(
            value=progress.value,
            nodes_done=progress.nodes_done,
            nodes_total=progress.nodes_total,
            current_node=progress.current_node,
            current_node_class=progress.current_node_class,
            step=progress.step,
            steps=progress.steps,
            message=progress.message,
        )
    value: float | None = 0.0
    done: int | None = 0
    if task.status is Status.SUCCEEDED:
        value, done = 1.0, task.nodes_total
    elif task.status.terminal:
        value, done = None, None
    return ProgressView(
        value=value,
        nodes_done=done,
        nodes_total=task.nodes_total,
        current_node=None,
        current_node_class=None,
        step=None,
        steps=None,
        message=None,
    )


def output_view(artefact: Artefact, url: str, data: str | None) -> OutputView:
    """A stored result with the url to fetch it from, and itself in base64 where that was asked for."""
    return OutputView(
        node_id=artefact.node_id,
        name=artefact.name,
        type=TYPES[artefact.type],
        content_type=artefact.content_type,
        size_bytes=artefact.size_bytes,
        sha256=artefact.sha256,
        width=artefact.width,
        height=artefact.height,
        duration=artefact.duration,
        url=url,
        storage=artefact.storage,
        text=artefact.text,
        data=data,
    )


def error_view(error: TaskError | None) -> TaskErrorView | None:
    """Why a task or an attempt failed."""
    if error is None:
        return None
    return TaskErrorView(
        code=error.code, message=error.message, details=error.details, retryable=error.retryable
    )


def _attempt_view(attempt: Attempt) -> AttemptView:
    return AttemptView(
        number=attempt.number,
        id=attempt.id,
        backend=attempt.backend,
        started_at=moment(attempt.claimed_at),
        ended_at=moment(attempt.ended_at),
        outcome=attempt.outcome,
        error=error_view(attempt.error),
    )


def urls_view(task_id: str, base: str) -> UrlsView:
    """Where to go on from a task."""
    own = f"{base}/api/tasks/{task_id}"
    # http becomes ws and https wss
    return UrlsView(
        self=own,
        events=f"{own}/events",
        ws=f"ws{own.removeprefix('http')}/ws",
        cancel=f"{own}/cancel",
        retry=f"{own}/retry",
        deliveries=f"{base}/api/deliveries?task_id={task_id}",
    )


def delivery_view(delivery: Delivery) -> DeliveryView:
    """A message owed to a webhook, with its tries."""
    return DeliveryView(
        id=delivery.id,
        task_id=delivery.task_id,
        type=delivery.type,
        url=shown_url(delivery.url),
        status=delivery.status,
        created_at=moment(delivery.created_at),
        next_at=moment(delivery.next_at),
        ended_at=moment(delivery.ended_at),
        tries=tuple(
            DeliveryTryView(
                number=made.number,
                at=moment(made.at),
                duration_ms=made.duration_ms,
                status=made.status,
                error=made.error,
            )
            for made in delivery.tries
        ),
    )


def shown_url(url: str) -> str:
    """A webhook's url as it may be seen: its query often holds a token, and stands as `?...`."""
    plain, mark, _ = url.partition("#")[0].partition("?")
    return masked(plain) + (mark and "?...")
