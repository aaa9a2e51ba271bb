"""A ComfyUI that needs no GPU: for `comfyd simulate` and the demo, for tests and for client developers.

Shares no code with `comfyd.comfy` and imports nothing of comfyd, so that no misunderstanding hides in both.
"""

from comfyd.simulator.command import main
from comfyd.simulator.executions import Execution, read_log
from comfyd.simulator.faults import Faults
from comfyd.simulator.options import CHECKPOINTS, SimulatorOptions
from comfyd.simulator.simulator import Simulator
from comfyd.simulator.sockets import SocketCount

__all__ = [
    "CHECKPOINTS",
    "Execution",
    "Faults",
    "Simulator",
    "SimulatorOptions",
    "SocketCount",
    "main",
    "read_log",
]
