"""What a simulated node class is: an async function from inputs to a result, registered under its class name.

The registry is filled by importing the sibling modules; it holds no state of a run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from comfyd.simulator import timing

if TYPE_CHECKING:
    from comfyd.simulator.folders import Folders
    from comfyd.simulator.options import SimulatorOptions

T = TypeVar("T")
Inputs = dict[str, Any]
Step = Callable[[float, float, "tuple[str, bytes] | None"], None]

THREAD_PIXELS = (
    128 * 128
)  # smaller pictures are worked on in the event loop: a thread costs more than they do


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeContext:
    """What a node may use while it runs. `step` reports progress and raises if the run was interrupted."""

    node_id: str
    prompt: dict[str, Any]
    extra_pnginfo: Any
    folders: Folders
    options: SimulatorOptions
    step: Step
    watched: Callable[[], bool]  # whether anyone would see a preview

    async def tick(self) -> None:
        """Let the time of one sampler or tile step pass."""
        await timing.pause(self.options.step_seconds)

    async def work(self, pixels: int, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function that draws or encodes about that many pixels, in a thread when it would be felt."""
        if pixels <= THREAD_PIXELS:
            return function(*arguments)
        return await asyncio.to_thread(function, *arguments)


@dataclass(frozen=True, slots=True)
class Result:
    """Output slots of a node, and its UI output if it has one."""

    outputs: tuple[Any, ...] = ()
    ui: dict[str, Any] | None = field(default=None)


NodeFunction = Callable[[NodeContext, Inputs], Awaitable[Result]]
ChangeFunction = Callable[["Folders", Inputs], "str | None"]

registry: dict[str, NodeFunction] = {}
change_marks: dict[str, ChangeFunction] = {}


def node(*class_names: str) -> Callable[[NodeFunction], NodeFunction]:
    """Register a function as what these classes do."""

    def register(function: NodeFunction) -> NodeFunction:
        for name in class_names:
            registry[name] = function
        return function

    return register


def changes(*class_names: str) -> Callable[[ChangeFunction], ChangeFunction]:
    """Register a function as the IS_CHANGED of these classes."""

    def register(function: ChangeFunction) -> ChangeFunction:
        for name in class_names:
            change_marks[name] = function
        return function

    return register
