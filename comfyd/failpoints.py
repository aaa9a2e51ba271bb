"""Named places where a test may end the process, as a power cut would; unarmed they do nothing.

They stand between the durable writes of a task's and of a message's way, and the steps that others can see.
`COMFYD_FAILPOINT=name` kills the process when it reaches that place, `name:3` when it does so for the third
time. Module state, and not an object that is handed down: a kill knows no owner.
"""

import os
import signal
from typing import Final

from comfyd.errors import ConfigError

VARIABLE: Final = "COMFYD_FAILPOINT"
NAMES: Final = (
    # leg 1
    "accept.checked",
    "accept.committed",
    "cancel.committed",
    "retry.committed",
    "delete.committed",
    # leg 2
    "adopt.begun",
    "claim.taken",
    "claim.committed",
    "inputs.fetched",
    "inputs.uploaded",
    "slot.given",
    "intent.committed",
    "post.answered",
    "submitted.committed",
    "running.committed",
    "early.committed",
    "early.stored",
    "stop.asked",
    "stop.verified",
    "verdict.known",
    "collected.committed",
    "output.fetched",
    "output.stored",
    "outputs.stored",
    "settle.decided",
    "settle.committed",
    # webhooks
    "webhook.taken",
    "webhook.answered",
    "webhook.committed",
)
"""In the order in which a task meets them."""


class _Armed:
    """The place that ends the process, and how often it is passed before."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.left = 0

    def arm(self, name: str | None, left: int = 1) -> None:
        """This one; none for None."""
        self.name, self.left = name, left


_armed: Final = _Armed()


def arm(text: str | None) -> None:
    """Arm what `COMFYD_FAILPOINT` names; nothing for None or ''. Raises `ConfigError` for what is no name."""
    name, _, count = (text or "").partition(":")
    if not name:
        _armed.arm(None)
        return
    if name not in NAMES or not (count or "1").isdecimal() or int(count or "1") < 1:
        message = f"{VARIABLE}={text}: must be one of {', '.join(NAMES)}, with :COUNT from 1 or without"
        raise ConfigError(message, details={"key": VARIABLE})
    _armed.arm(name, int(count or "1"))


def reach(name: str) -> None:
    """This place is passed."""
    if _armed.name == name:
        _armed.left -= 1
        if _armed.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
