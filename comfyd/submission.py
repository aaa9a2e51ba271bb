"""Leg 1: a request becomes a queued task. Never runs anything; stores nothing of a request that is wrong."""

import dataclasses
import random
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any, Final

import msgspec

from comfyd import failpoints, graphs, workflows
from comfyd.catalog import Catalog
from comfyd.clock import Clock
from comfyd.config import LimitsConfig, QueueConfig, StorageConfig
from comfyd.credentials import Credentials
from comfyd.disk import Room, to_its_end
from comfyd.errors import BlockedAddress, InputError, InvalidUrl, QueueFull
from comfyd.intake import Intake, Taken
from comfyd.library import Library
from comfyd.queue import TaskQueue
from comfyd.storage.opening import check_usable
from comfyd.store.base import Store
from comfyd.tasks import (
    Added,
    Graph,
    IdempotencyKey,
    NewTask,
    OutputOptions,
    Policy,
    Status,
    Webhook,
)

FULL_RETRY_S: Final = 10
"""What `Retry-After` says when the queue is full, in seconds."""


class SubmitRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks for: a template's name or a graph, its inputs, and how to go about it."""

    workflow: str | dict[str, Any]
    inputs: dict[str, Any] = {}
    priority: int = 0
    max_attempts: int | None = None
    timeout: float | None = None
    start_timeout: float | None = None
    metadata: dict[str, str] = {}
    output: OutputOptions = OutputOptions()
    webhook: Webhook | None = None
    credentials: dict[str, str] = {}
    """For ComfyUI, in the words of its `extra_data`; they never leave this process's memory but to there."""

    def __repr__(self) -> str:
        return "SubmitRequest(...)"


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """A graph to run, the template that it came from, and the input values that are in it."""

    graph: Graph
    workflow: str | None = None
    inputs: dict[str, Any] | None = None
    names: dict[str, str] = {}
    """`node.input` -> what the template calls it."""


class Renderer:
    """Makes the graph of a request. Lives as long as the process."""

    def __init__(self, catalog: Catalog, chance: random.Random, limits: graphs.GraphLimits) -> None:
        self._catalog = catalog
        self._chance = chance
        self._limits = limits

    def render(self, request: SubmitRequest) -> Rendered:
        """Raises `UnknownWorkflow`, `InvalidInputs`, `InvalidWorkflow`."""
        if isinstance(request.workflow, str):
            template = self._catalog.get(request.workflow)
            rendered = workflows.render(template, request.inputs, self._chance)
            graph = graphs.check_structure(rendered.graph, self._limits)
            names = {f"{spec.node}.{spec.field}": spec.name for spec in template.inputs}
            return Rendered(graph=graph, workflow=template.name, inputs=rendered.inputs, names=names)
        graph = graphs.check_structure(request.workflow, self._limits)
        if request.inputs:
            graph = workflows.apply_inputs(graph, request.inputs, self._limits)
        return Rendered(graph=graph, inputs=request.inputs or None)

    def check_lengths(self, graph: Graph) -> None:
        """Raise `InvalidWorkflow` for a data URI that stayed in the graph and is too long for a text."""
        limit = self._limits.string_length
        graphs.check_structure(graph, dataclasses.replace(self._limits, data_uri_length=limit))


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What a task may take where the request names nothing, and how many may wait."""

    policy: Policy
    queued_tasks: int
    room: Room
    """Whether the disk has room for one more."""
    storages: tuple[str, ...] = ("local",)
    """Those that a request may name."""

    @classmethod
    def of(cls, queue: QueueConfig, limits: LimitsConfig, storage: StorageConfig, room: Room) -> "Terms":
        """From the configuration, whose times are in seconds and whose 0 is 'no limit'."""
        policy = Policy(
            max_attempts=queue.max_attempts,
            timeout_ms=_milliseconds(queue.timeout),
            start_timeout_ms=_milliseconds(queue.start_timeout),
            stall_timeout_ms=_milliseconds(queue.stall_timeout),
        )
        return cls(policy=policy, queued_tasks=limits.queued_tasks, room=room, storages=storage.usable)

    def policy_of(self, request: SubmitRequest) -> Policy:
        """The task's own limits, and these where it names none."""
        return Policy(
            max_attempts=request.max_attempts or self.policy.max_attempts,
            timeout_ms=_milliseconds(request.timeout) or self.policy.timeout_ms,
            start_timeout_ms=_milliseconds(request.start_timeout) or self.policy.start_timeout_ms,
            stall_timeout_ms=self.policy.stall_timeout_ms,
        )


class Submission:
    """Checks requests and queues them. Lives as long as the process."""

    def __init__(  # noqa: PLR0913, PLR0917 - one for each stop on the way to a row
        self,
        renderer: Renderer,
        library: Library,
        intake: Intake,
        store: Store,
        credentials: Credentials,
        queue: TaskQueue,
        clock: Clock,
        terms: Terms,
    ) -> None:
        self._renderer = renderer
        self._library = library
        self._intake = intake
        self._credentials = credentials
        self._store = store
        self._queue = queue
        self._clock = clock
        self._terms = terms

    async def submit(self, request: SubmitRequest, key: IdempotencyKey | None = None) -> Added:
        """Check everything, then make the task durable; it is on disk when this returns.

        Raises `RequestError` for what is wrong with the request, `QueueFull`, `DiskFull`, and `StoreError`.
        """
        self._terms.room.check()
        if (await self._store.counts())[Status.QUEUED] >= self._terms.queued_tasks:
            raise QueueFull(
                f"as many tasks are queued as limits.queued_tasks allows: {self._terms.queued_tasks}",
                details={"retry_after": FULL_RETRY_S},
            )
        if request.output.storage is not None:
            check_usable(request.output.storage, self._terms.storages)
        if request.webhook is not None:
            self._check_webhook(request.webhook)
        async with AsyncExitStack() as stack:
            request = await self._resolved(request, stack)
            rendered = self._renderer.render(request)
            taken = await self._taken(rendered, stack)
            if taken.judged and graphs.remote_values(taken.graph):
                self._renderer.check_lengths(taken.graph)
            await self._intake.keep(taken, stack)
            # a write that began goes on without us: what happens to the files has to wait for its end
            new = self._new(request, rendered, taken)
            return await to_its_end(self._queued(new, request.credentials, key))

    def _check_webhook(self, webhook: Webhook) -> None:
        """What can be seen of its url; the message shows no more of it than its host."""
        try:
            self._intake.check_callback(webhook.url)
        except (BlockedAddress, InvalidUrl) as exc:
            details = {**exc.details, "field": "webhook_url"}
            raise type(exc)(f"webhook_url: {exc.message}", details=details) from None

    async def _resolved(self, request: SubmitRequest, stack: AsyncExitStack) -> SubmitRequest:
        """With references of uploads in place of assets, whose files nobody forgets until `stack` ends."""
        workflow = request.workflow
        if not isinstance(workflow, str):
            workflow = await self._library.resolve(workflow, stack)
        inputs = await self._library.resolve(request.inputs, stack)
        return msgspec.structs.replace(request, workflow=workflow, inputs=inputs)

    async def _taken(self, rendered: Rendered, stack: AsyncExitStack) -> Taken:
        try:
            return await self._intake.take(rendered.graph, stack)
        except InputError as exc:
            name = rendered.names.get(exc.details.get("input", ""))
            if name is not None:
                exc.details["name"] = name
            raise

    async def _queued(
        self, new: NewTask, credentials: Mapping[str, str], key: IdempotencyKey | None
    ) -> Added:
        failpoints.reach("accept.checked")
        if credentials:  # before the row is there: a worker may claim it at once
            self._credentials.keep(new.id, credentials)
        added: Added | None = None
        try:
            added = await self._store.add(new, key, self._clock.now())
        finally:
            if added is None or added.replayed:
                self._credentials.forget(new.id)
        failpoints.reach("accept.committed")
        if not added.replayed:
            self._queue.offer(added.task)
        return added

    def _new(self, request: SubmitRequest, rendered: Rendered, taken: Taken) -> NewTask:
        return NewTask(
            id=self._clock.new_id(),
            graph=taken.graph,
            priority=request.priority,
            workflow=rendered.workflow,
            shape=graphs.shape_key(taken.graph),
            nodes_total=taken.needed_nodes,
            inputs=taken.named(rendered.inputs),
            metadata=request.metadata,
            policy=self._terms.policy_of(request),
            output=request.output,
            uploads=taken.files,
            webhook=request.webhook,
            credentials=bool(request.credentials),
        )


def _milliseconds(seconds: float | None) -> int | None:
    return max(round(seconds * 1000), 1) if seconds else None
