"""The switches that make a simulated ComfyUI misbehave on purpose.

They change what the server does from the next request, message or node on; they never repair what already
went wrong. Everything is off by default: a simulator nobody touches behaves like a healthy ComfyUI.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import msgspec

SocketFault = Literal["none", "deaf", "hang", "refuse"]
ViewFault = Literal["none", "short", "cut", "error", "missing", "stall", "garbled"]


@dataclass
class Faults:
    """Mutable switches, living as long as their simulator; a restart keeps them.

    Durations are seconds. Counters (`..._answers_lost`, `interrupts_ignored`, `view_faults_left`) count down
    to zero with every use; a negative counter never ends.
    """

    # HTTP
    http_delay_seconds: float = 0.0  # every route answers that much later
    http_statuses: dict[str, int] = field(default_factory=dict)  # path without /api -> status, nothing done
    # POST /prompt
    prompt_stall_seconds: float = 0.0  # body read, looked at only after that time (a blocked event loop)
    prompt_answer_seconds: float = 0.0  # queued at once, answered only after that time
    prompt_answers_lost: int = 0  # queued, and never answered: the connection just hangs
    prompt_answers_cut: int = 0  # queued, and the connection is reset instead of an answer
    # refusals and failures
    secrets_repeated: bool = False  # what is said of a refused prompt or a failed node shows its secrets
    # WebSocket
    sockets: SocketFault = "none"  # deaf: pings answered, no messages; hang, refuse: never opens
    # history
    history_delay_seconds: float = 0.0  # the entry appears that long after execution_success
    history_limit: int | None = None  # keep only that many entries (None: ComfyUI's 10000)
    # interrupt and worker
    interrupts_ignored: int = 0  # that many interrupts answer 200 and do nothing
    uninterruptible: set[str] = field(default_factory=set)  # classes that never look at the flag
    class_seconds: dict[str, float] = field(default_factory=dict)  # extra time per node of a class
    poison: set[str] = field(default_factory=set)  # the whole server dies when it starts such a node
    cycles_found: int = 0  # prompts that fail on a cycle found while running, with a stale status (Q14)
    worker_dead: bool = False  # HTTP lives, prompts are accepted, nothing runs
    # GET /view
    # short: half the file with a fitting Content-Length; cut: the connection ends in mid-file;
    # stall: half the file, then nothing until the switch is changed; garbled: zeros in its second half
    view: ViewFault = "none"
    view_faults_left: int = -1

    def change(self, document: dict[str, Any]) -> None:
        """Set the named switches from JSON values; an unknown name or a wrong type is `ValueError`."""
        unknown = sorted(set(document) - {item.name for item in fields(self)})
        if unknown:
            raise ValueError(f"no such switch: {', '.join(unknown)}")
        merged = {**asdict(self), **document}
        try:
            changed = msgspec.convert(merged, Faults)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from error
        for name in document:
            setattr(self, name, getattr(changed, name))

    def document(self) -> dict[str, Any]:
        """All switches as JSON values."""
        values = asdict(self)
        return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}

    def use(self, counter: str) -> bool:
        """Count one use of a counter down; True when the fault applies this time."""
        left = int(getattr(self, counter))
        if left == 0:
            return False
        setattr(self, counter, max(left - 1, -1) if left > 0 else left)
        return True
