"""What webhooks are told, as the bytes of one message: `{type, timestamp, data}`; never sends one.

A message stays small whatever the task holds: what does not fit is left out in a fixed order, and the message
says that something is missing.
"""

import asyncio
from collections.abc import Iterable
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from comfyd.api.links import Links
from comfyd.api.schemas import Moment, StatusWord, StoredView, TaskErrorView, UrlsView
from comfyd.api.views import WORDS, error_view, moment, urls_view
from comfyd.config import ServerConfig
from comfyd.deliveries import Delivery
from comfyd.tasks import EventType, Task

LIMIT: Final = 19_999
"""Bytes of a message, at most."""
TEXT: Final = 200
"""Characters that a message which would be longer keeps of each text output."""
MESSAGE: Final = 500
"""Characters that it keeps of the error's message."""
METADATA: Final = 8_000
"""Bytes of metadata that it keeps, in whole pairs."""
OUTPUTS: Final = 100
"""Outputs that are looked at: each takes more than 200 bytes, so that no more can fit."""

Truncated = Annotated[bool, Meta(description="Whether something was left out to keep the message small.")]


class TaskNotice(msgspec.Struct, frozen=True, kw_only=True):
    """The task as it was when it happened, in the words of `TaskView`."""

    task_id: str
    status: StatusWord
    workflow: str | None
    priority: int
    created_at: Moment
    started_at: Moment | None
    completed_at: Moment | None
    cancel_requested: bool
    outputs: tuple[StoredView, ...]
    outputs_total: Annotated[int, Meta(description="How many there are, of which `outputs` are the first.")]
    error: TaskErrorView | None
    metadata: dict[str, str]
    urls: UrlsView
    truncated: Truncated


class OutputNotice(msgspec.Struct, frozen=True, kw_only=True):
    """One output of a task."""

    task_id: str
    output: Annotated[StoredView | None, Meta(description="Null where it is too long for a message.")]
    metadata: dict[str, str]
    urls: UrlsView
    truncated: Truncated


class TaskMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What a webhook is told of a task."""

    type: EventType
    timestamp: Annotated[Moment, Meta(description="When it happened.")]
    data: TaskNotice


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What a webhook is told of an output."""

    type: EventType
    timestamp: Annotated[Moment, Meta(description="When it happened.")]
    data: OutputNotice


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a message whose length is not known beforehand."""

    outputs: tuple[StoredView, ...]
    error: TaskErrorView | None
    metadata: dict[str, str]
    truncated: bool


class Notices:
    """Writes messages. Lives as long as the process; `base` is the url that comfyd is reached under."""

    def __init__(self, links: Links, base: str) -> None:
        self._links = links
        self._base = base

    async def render(self, delivery: Delivery) -> bytes:
        """The message as JSON of at most `LIMIT` bytes. The urls in it are made now."""
        task = delivery.subject
        artefacts = task.artefacts[:OUTPUTS]
        if delivery.output is not None:
            artefacts = (task.artefacts[delivery.output],)
        views = await asyncio.gather(
            *(self._links.output(artefact, self._base, data=False) for artefact in artefacts)
        )
        draft = Draft(
            outputs=tuple(msgspec.convert(view, StoredView, from_attributes=True) for view in views),
            error=error_view(task.error),
            metadata=task.metadata,
            truncated=delivery.output is None and len(artefacts) < len(task.artefacts),
        )
        return self._fitted(delivery, draft)

    def _fitted(self, delivery: Delivery, draft: Draft) -> bytes:
        """The message with all of the draft, or with as much of it as fits."""
        body = self._written(delivery, draft)
        for shorter in (_short_texts, _short_error, _less_metadata):
            if len(body) <= LIMIT:
                return body
            draft = shorter(draft)
            body = self._written(delivery, draft)
        if len(body) <= LIMIT:
            return body
        rest = msgspec.structs.replace(draft, outputs=())
        fit = _fitting(draft.outputs, LIMIT - len(self._written(delivery, rest)))
        return self._written(delivery, msgspec.structs.replace(rest, outputs=draft.outputs[:fit]))

    def _written(self, delivery: Delivery, draft: Draft) -> bytes:
        task, urls = delivery.subject, urls_view(delivery.task_id, self._base)
        timestamp = moment(delivery.created_at)
        if delivery.output is None:
            told = _task_notice(task, draft, urls)
            return msgspec.json.encode(TaskMessage(type=delivery.type, timestamp=timestamp, data=told))
        output = OutputNotice(
            task_id=task.id,
            output=draft.outputs[0] if draft.outputs else None,
            metadata=draft.metadata,
            urls=urls,
            truncated=draft.truncated,
        )
        return msgspec.json.encode(OutputMessage(type=delivery.type, timestamp=timestamp, data=output))


def base_of(server: ServerConfig) -> str:
    """What urls in messages begin with, without a slash at the end: nobody asks, whose `Host` would tell."""
    return (server.public_url or server.local_url).rstrip("/")


def _task_notice(task: Task, draft: Draft, urls: UrlsView) -> TaskNotice:
    return TaskNotice(
        task_id=task.id,
        status=WORDS[task.status],
        workflow=task.workflow,
        priority=task.priority,
        created_at=moment(task.created_at),
        started_at=moment(task.started_at),
        completed_at=moment(task.completed_at),
        cancel_requested=task.cancel_requested_at is not None,
        outputs=draft.outputs,
        outputs_total=len(task.artefacts),
        error=draft.error,
        metadata=draft.metadata,
        urls=urls,
        truncated=draft.truncated,
    )


def _short_texts(draft: Draft) -> Draft:
    outputs = tuple(
        output if output.text is None else msgspec.structs.replace(output, text=_short(output.text, TEXT))
        for output in draft.outputs
    )
    return msgspec.structs.replace(draft, outputs=outputs, truncated=True)


def _short_error(draft: Draft) -> Draft:
    error = draft.error
    if error is None:
        return draft
    error = msgspec.structs.replace(error, message=_short(error.message, MESSAGE), details={})
    return msgspec.structs.replace(draft, error=error)


def _less_metadata(draft: Draft) -> Draft:
    pairs = tuple(draft.metadata.items())
    # a pair as an array of two texts is longer than in an object
    return msgspec.structs.replace(draft, metadata=dict(pairs[: _fitting(pairs, METADATA)]))


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


def _fitting(parts: Iterable[object], room: int) -> int:
    """How many of the parts, from the first on, fit in so many bytes with a comma behind each."""
    count = 0
    for part in parts:
        room -= len(msgspec.json.encode(part)) + 1
        if room < 0:
            break
        count += 1
    return count
