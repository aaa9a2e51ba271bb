"""The way to one ComfyUI: routes, the one shared WebSocket, outputs; never knows a task's state or a store.

Nothing of aiohttp is seen outside. `Backend` is the door; the rest are the values that go through it.
"""

from comfyd.comfy.backend import Backend
from comfyd.comfy.files import OutputStream
from comfyd.comfy.forwarding import ForwardedRequest, ForwardedResponse
from comfyd.comfy.health import BackendState
from comfyd.comfy.messages import (
    Executed,
    Executing,
    ExecutionCached,
    ExecutionError,
    ExecutionInterrupted,
    ExecutionStart,
    ExecutionSuccess,
    Message,
    NodeBlocked,
    NodeProgress,
    NodeState,
    NodeStates,
    Preview,
    ProgressText,
)
from comfyd.comfy.outputs import content_type, output_files, wanted, websocket_image_nodes
from comfyd.comfy.sightings import (
    Absent,
    Ended,
    HistoryEntry,
    NodeFailure,
    Pending,
    QueueView,
    Running,
    Sighting,
)
from comfyd.comfy.socket import Watch

__all__ = [
    "Absent",
    "Backend",
    "BackendState",
    "Ended",
    "Executed",
    "Executing",
    "ExecutionCached",
    "ExecutionError",
    "ExecutionInterrupted",
    "ExecutionStart",
    "ExecutionSuccess",
    "ForwardedRequest",
    "ForwardedResponse",
    "HistoryEntry",
    "Message",
    "NodeBlocked",
    "NodeFailure",
    "NodeProgress",
    "NodeState",
    "NodeStates",
    "OutputStream",
    "Pending",
    "Preview",
    "ProgressText",
    "QueueView",
    "Running",
    "Sighting",
    "Watch",
    "content_type",
    "output_files",
    "wanted",
    "websocket_image_nodes",
]
