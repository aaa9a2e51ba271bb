"""The one worker of a simulated ComfyUI: takes prompts one by one, runs their nodes, tells of it.

The order of messages and of the entry in the history is ComfyUI's. An exception outside a node kills the
worker while HTTP goes on answering (Q9); that is not mended here.
"""

from __future__ import annotations

import asyncio
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from comfyd.simulator import timing
from comfyd.simulator.cache import CacheEntry, NodeCache, is_link
from comfyd.simulator.executions import Execution, ExecutionLog, Outcome
from comfyd.simulator.nodes import NodeContext, Result, change_marks, registry
from comfyd.simulator.progress import Progress
from comfyd.simulator.schedule import Schedule
from comfyd.simulator.validation import type_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from comfyd.simulator.catalog import Catalog
    from comfyd.simulator.faults import Faults
    from comfyd.simulator.folders import Folders
    from comfyd.simulator.options import SimulatorOptions
    from comfyd.simulator.prompt_queue import PromptQueue, QueueItem
    from comfyd.simulator.sockets import Sockets

THROTTLE_SECONDS = 0.1
THROTTLE_PART = 0.005  # of the whole bar


class Interrupted(Exception):
    """The interrupt flag was seen."""


class NodeFailed(Exception):
    """A node raised; `details` are the fields of `execution_error`."""

    def __init__(self, details: dict[str, Any]) -> None:
        super().__init__(details["exception_message"])
        self.details = details


@dataclass(slots=True)
class Run:
    """One prompt while it runs."""

    item: QueueItem
    extra_data: dict[str, Any]
    progress: Progress
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    ui: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def client_id(self) -> Any:
        """The client that gets the messages; None for nobody in particular."""
        return self.extra_data.get("client_id")

    @property
    def prompt(self) -> dict[str, Any]:
        """The graph."""
        return self.item.prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the worker works with."""

    catalog: Catalog
    folders: Folders
    queue: PromptQueue
    sockets: Sockets
    options: SimulatorOptions
    faults: Faults
    log: ExecutionLog
    crash: Callable[[], None]


class Engine:
    """The worker and its cache. Lives as long as one server process."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._behaviour = parts.options.behaviour
        self._cache = NodeCache(self._change_mark)
        self._interrupt = False
        self._success = True  # of the last node that ran: what `status_str` is made from (Q14)

    def interrupt(self) -> None:
        """Set the global flag; whatever looks at it next is interrupted."""
        if not self._parts.faults.use("interrupts_ignored"):
            self._interrupt = True

    async def work(self) -> None:
        """Run prompts for ever, one at a time."""
        queue = self._parts.queue
        while True:
            await queue.ready()
            if self._parts.faults.worker_dead:
                await timing.pause(0.02)
                continue
            if queue.pending:
                await self._run_item(queue.take())
            if queue.take_flags().get("free_memory"):
                self._cache.clear()

    async def _run_item(self, item: QueueItem) -> None:
        parts = self._parts
        extra_data = {**item.extra_data, **item.sensitive}
        client_id = extra_data.get("client_id")
        run = Run(item, extra_data, Progress(item.prompt_id, client_id, parts.sockets))
        self._interrupt = False
        parts.sockets.client_id = client_id
        self._log(run, "start", None)
        outcome = await self._run_prompt(run)
        parts.sockets.last_node_id = None
        self._log(run, "end", outcome)
        if parts.faults.history_delay_seconds > 0:
            await timing.pause(parts.faults.history_delay_seconds)
        status = {
            "status_str": "success" if self._success else "error",
            "completed": self._success,
            "messages": run.messages,
        }
        result = {
            "outputs": {node_id: ui["output"] for node_id, ui in run.ui.items()},
            "meta": {node_id: ui["meta"] for node_id, ui in run.ui.items()},
        }
        parts.queue.finish(item, result, status)
        if parts.faults.history_limit is not None:
            while len(parts.queue.history) > parts.faults.history_limit:
                parts.queue.evict(parts.faults.history_limit)
        if client_id is not None:
            parts.sockets.send("executing", {"node": None, "prompt_id": item.prompt_id}, client_id)

    async def _run_prompt(self, run: Run) -> Outcome:
        prompt = run.prompt
        self._tell(run, "execution_start")
        self._cache.use_prompt(prompt)
        run.cached = [node_id for node_id in prompt if self._cache.get(node_id) is not None]
        self._tell(run, "execution_cached", nodes=list(run.cached))
        schedule = Schedule(prompt, self._is_output(prompt), lambda node: self._cache.get(node) is not None)
        for node_id in run.item.outputs:
            schedule.add(node_id)
        if self._parts.faults.use("cycles_found"):
            self._tell_cycle(run, next(iter(prompt)))
            return "error"
        while schedule:
            node_id = schedule.next()
            try:
                await self._run_node(run, node_id)
            except Interrupted:
                self._success = False
                self._tell(run, "execution_interrupted", broadcast=True, **self._where(run, node_id))
                return "interrupted"
            except NodeFailed as failure:
                self._success = False
                details = {**self._where(run, node_id), **failure.details, "current_outputs": list(prompt)}
                self._tell(run, "execution_error", **details)
                return "error"
            self._success = True
            schedule.done(node_id)
        self._tell(run, "execution_success")
        return "success"

    async def _run_node(self, run: Run, node_id: str) -> None:
        """Run one node, or use its cached result. Raises `Interrupted` or `NodeFailed`."""
        sockets = self._parts.sockets
        cached = self._cache.get(node_id)
        if cached is not None:
            if run.client_id is not None:
                self._tell_executed(run, node_id, cached.ui["output"] if cached.ui else None)
            if cached.ui is not None and (run.client_id is not None or self._behaviour.cached_outputs_always):
                run.ui[node_id] = cached.ui
            run.progress.finish(node_id)
            return
        run.progress.start(node_id)
        if run.client_id is not None:
            sockets.last_node_id = node_id
            executing = {"node": node_id, "display_node": node_id, "prompt_id": run.item.prompt_id}
            sockets.send("executing", executing, run.client_id)
        result = await self._call(run, node_id)
        ui = None
        if result.ui is not None:
            meta = {"node_id": node_id, "display_node": node_id, "parent_node": None, "real_node_id": node_id}
            ui = run.ui[node_id] = {"meta": meta, "output": result.ui}
            if run.client_id is not None:
                self._tell_executed(run, node_id, result.ui)
        self._cache.put(node_id, CacheEntry(result.outputs, ui))
        run.progress.finish(node_id)
        run.executed.append(node_id)

    async def _call(self, run: Run, node_id: str) -> Result:
        """Call the function of a node with its inputs."""
        node = run.prompt[node_id]
        class_type = node["class_type"]
        faults, options = self._parts.faults, self._parts.options
        inputs: dict[str, Any] = {}
        try:
            inputs.update(self._inputs(node))
            self._look_at_flag(class_type)
            if class_type in faults.poison:
                self._parts.crash()
                await asyncio.Event().wait()
            await timing.pause(options.node_seconds + faults.class_seconds.get(class_type, 0.0))
            return await registry[class_type](self._context(run, node_id, class_type), inputs)
        except Interrupted:
            raise
        except Exception as error:  # ComfyUI reports whatever a node raises
            repeated = run.item.sensitive if faults.secrets_repeated else {}
            shown = inputs | self._hidden(run, class_type) | repeated
            raise NodeFailed(
                {
                    "exception_message": f"{error}{repeated or ''}\n",
                    "exception_type": type_name(error),
                    "traceback": [*traceback.format_tb(error.__traceback__), *map(str, repeated.values())],
                    "current_inputs": {name: [_shown(value)] for name, value in shown.items()},
                }
            ) from error

    def _inputs(self, node: dict[str, Any]) -> dict[str, Any]:
        """The values of a node's inputs: results of the nodes it is linked to, and known literals."""
        inputs = {}
        specs = self._parts.catalog.classes[node["class_type"]].inputs
        for name, value in node["inputs"].items():
            if is_link(value):
                entry = self._cache.get(value[0])
                inputs[name] = entry.outputs[value[1]] if entry is not None else None
            elif name.partition(".")[0] in specs:
                inputs[name] = value
        return inputs

    def _hidden(self, run: Run, class_type: str) -> dict[str, Any]:
        """What ComfyUI hands to old-style savers besides their inputs, and shows with their errors."""
        if not self._parts.catalog.classes[class_type].takes_prompt:
            return {}
        return {"prompt": run.prompt, "extra_pnginfo": run.extra_data.get("extra_pnginfo")}

    def _context(self, run: Run, node_id: str, class_type: str) -> NodeContext:
        return NodeContext(
            node_id=node_id,
            prompt=run.prompt,
            extra_pnginfo=run.extra_data.get("extra_pnginfo"),
            folders=self._parts.folders,
            options=self._parts.options,
            step=_Stepper(
                run.progress,
                node_id,
                lambda: self._look_at_flag(class_type),
                throttled=self._behaviour.progress_throttled,
            ).step,
            watched=lambda: self._parts.sockets.listened(run.client_id),
        )

    def _look_at_flag(self, class_type: str) -> None:
        """Raise `Interrupted` if the flag is set, and reset it."""
        if self._interrupt and class_type not in self._parts.faults.uninterruptible:
            self._interrupt = False
            raise Interrupted

    def _is_output(self, prompt: dict[str, Any]) -> Callable[[str], bool]:
        classes = self._parts.catalog.classes
        return lambda node_id: classes[prompt[node_id]["class_type"]].is_output

    def _change_mark(self, class_type: str, inputs: dict[str, Any]) -> str | None:
        mark = change_marks.get(class_type)
        return None if mark is None else mark(self._parts.folders, inputs)

    def _tell(self, run: Run, event: str, *, broadcast: bool = False, **data: Any) -> None:
        """A message that also goes into the history."""
        message = {"prompt_id": run.item.prompt_id, **data, "timestamp": timing.milliseconds()}
        run.messages.append((event, message))
        if run.client_id is not None or broadcast:
            self._parts.sockets.send(event, message, run.client_id)

    def _tell_executed(self, run: Run, node_id: str, output: dict[str, Any] | None) -> None:
        message = {
            "node": node_id,
            "display_node": node_id,
            "output": output,
            "prompt_id": run.item.prompt_id,
        }
        self._parts.sockets.send("executed", message, run.client_id)

    def _tell_cycle(self, run: Run, node_id: str) -> None:
        """A cycle found while running: an error that leaves the success flag as it was (Q14)."""
        self._tell(
            run,
            "execution_error",
            **self._where(run, node_id),
            exception_message="Dependency cycle detected",
            exception_type="graph.DependencyCycleError",
            traceback=[],
            current_inputs=[],
            current_outputs=list(run.prompt),
        )

    def _where(self, run: Run, node_id: str) -> dict[str, Any]:
        node_type = run.prompt[node_id]["class_type"]
        return {"node_id": node_id, "node_type": node_type, "executed": list(run.executed)}

    def _log(self, run: Run, event: str, outcome: Outcome | None) -> None:
        ended = event == "end"
        self._parts.log.add(
            Execution(
                event="end" if ended else "start",
                prompt_id=run.item.prompt_id,
                client_id=None if run.client_id is None else str(run.client_id),
                number=run.item.number,
                at=timing.milliseconds(),
                executed=list(run.executed) if ended else [],
                cached=list(run.cached) if ended else [],
                outcome=outcome,
            )
        )


class _Stepper:
    """The progress bar of one node: looks at the interrupt flag, throttles (0.33.0), and tells."""

    def __init__(
        self, progress: Progress, node_id: str, look_at_flag: Callable[[], None], *, throttled: bool
    ) -> None:
        self._progress = progress
        self._node_id = node_id
        self._look_at_flag = look_at_flag
        self._throttled = throttled
        self._last: tuple[float, float] | None = None  # time and value of the last update that was told

    def step(self, value: float, maximum: float, preview: tuple[str, bytes] | None) -> None:
        """One step is done. Raises `Interrupted` if the flag is seen."""
        now = timing.monotonic()
        if self._throttled and preview is None and value < maximum and self._last is not None:
            time, told = self._last
            if now - time < THROTTLE_SECONDS or value - told < maximum * THROTTLE_PART:
                return
        self._last = (now, value)
        self._look_at_flag()
        self._progress.update(self._node_id, value, maximum, preview)


def _shown(value: Any) -> Any:
    """A value as `current_inputs` shows it."""
    return value if value is None or isinstance(value, (int, float, bool, str)) else str(value)
