"""The node classes a simulated ComfyUI can run, by class name. Importing it registers them all."""

from comfyd.simulator.nodes import images, media, sampling, savers, solids, text
from comfyd.simulator.nodes.base import NodeContext, Result, change_marks, registry

__all__ = [
    "NodeContext",
    "Result",
    "change_marks",
    "images",
    "media",
    "registry",
    "sampling",
    "savers",
    "solids",
    "text",
]
