"""Leg 1: a request becomes a queued task. Never runs anything; stores nothing of a request that is wrong."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from comfyd import graphs, workflows
from comfyd.catalog import Catalog
from comfyd.clock import Clock
from comfyd.comfy.backend import Backend
from comfyd.config import LimitsConfig, QueueConfig
from comfyd.errors import BackendError, InvalidWorkflow, QueueFull
from comfyd.queue import TaskQueue
from comfyd.store.base import Store
from comfyd.tasks import Added, Graph, IdempotencyKey, NewTask, OutputOptions, Policy, Status

REFRESH_MS: Final = 5_000
"""How long what a ComfyUI said of its classes is believed before a refusal makes it be asked again."""
ASK_SECONDS: Final = 5.0
"""How long a ComfyUI may keep a client waiting with its classes: then the task is taken unchecked."""
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


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """A graph to run, the template that it came from, and the input values that are in it."""

    graph: Graph
    workflow: str | None = None
    inputs: dict[str, Any] | None = None


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
            return Rendered(graph=graph, workflow=template.name, inputs=rendered.inputs)
        graph = graphs.check_structure(request.workflow, self._limits)
        if request.inputs:
            graph = workflows.apply_inputs(graph, request.inputs, self._limits)
        return Rendered(graph=graph, inputs=request.inputs or None)


class GraphChecker:
    """Holds graphs against what the ComfyUIs can do. Lives as long as the process."""

    def __init__(self, backends: Sequence[Backend], clock: Clock, patience: float = ASK_SECONDS) -> None:
        self._backends = backends
        self._patience = patience
        self._clock = clock
        self._refreshed: dict[str, int] = {}

    async def needed_nodes(self, graph: Graph) -> int:
        """How many of the graph's nodes will run. A graph is right if one ComfyUI can run it.

        While none answers nothing can be said, and the task is to wait: all nodes count. Raises
        `InvalidWorkflow`.
        """
        refusal: InvalidWorkflow | None = None
        for backend in self._backends:
            try:
                async with asyncio.timeout(self._patience):
                    return await self._needed_on(backend, graph)
            except (BackendError, TimeoutError):
                continue
            except InvalidWorkflow as exc:
                refusal = refusal or exc
        if refusal is not None:
            raise refusal
        return len(graph)

    async def _needed_on(self, backend: Backend, graph: Graph) -> int:
        """The same for one ComfyUI. Before a refusal it is asked anew: a model may be new there."""
        replaceable = await backend.replaceable_classes()
        known = await backend.object_info()
        try:
            graphs.check_against(graph, known, replaceable=replaceable)
        except InvalidWorkflow:
            now, asked = self._clock.monotonic(), self._refreshed.get(backend.name)
            if asked is not None and now - asked < REFRESH_MS:
                raise
            self._refreshed[backend.name] = now
            known = await backend.object_info(refresh=True)
            graphs.check_against(graph, known, replaceable=replaceable)
        return len(graphs.executable_nodes(graph, known))


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What a task may take where the request names nothing, and how many may wait."""

    policy: Policy
    queued_tasks: int

    @classmethod
    def of(cls, queue: QueueConfig, limits: LimitsConfig) -> "Terms":
        """From the configuration, whose times are in seconds and whose 0 is 'no limit'."""
        policy = Policy(
            max_attempts=queue.max_attempts,
            timeout_ms=_milliseconds(queue.timeout),
            start_timeout_ms=_milliseconds(queue.start_timeout),
            stall_timeout_ms=_milliseconds(queue.stall_timeout),
        )
        return cls(policy=policy, queued_tasks=limits.queued_tasks)

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

    def __init__(
        self,
        renderer: Renderer,
        checker: GraphChecker,
        store: Store,
        queue: TaskQueue,
        clock: Clock,
        terms: Terms,
    ) -> None:
        self._renderer = renderer
        self._checker = checker
        self._store = store
        self._queue = queue
        self._clock = clock
        self._terms = terms

    async def submit(self, request: SubmitRequest, key: IdempotencyKey | None = None) -> Added:
        """Check everything, then make the task durable; it is on disk when this returns.

        Raises `RequestError` for what is wrong with the request, `QueueFull`, and `StoreError`.
        """
        if (await self._store.counts())[Status.QUEUED] >= self._terms.queued_tasks:
            raise QueueFull(
                f"{self._terms.queued_tasks} tasks are queued; try again later",
                details={"retry_after": FULL_RETRY_S},
            )
        rendered = self._renderer.render(request)
        needed = await self._checker.needed_nodes(rendered.graph)
        new = NewTask(
            id=self._clock.new_id(),
            graph=rendered.graph,
            priority=request.priority,
            workflow=rendered.workflow,
            shape=graphs.shape_key(rendered.graph),
            nodes_total=needed,
            inputs=rendered.inputs,
            metadata=request.metadata,
            policy=self._terms.policy_of(request),
            output=request.output,
        )
        added = await self._store.add(new, key, self._clock.now())
        if not added.replayed:
            self._queue.offer(added.task)
        return added


def _milliseconds(seconds: float | None) -> int | None:
    return max(round(seconds * 1000), 1) if seconds else None
