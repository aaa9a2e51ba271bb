"""What becomes of a task when an attempt ends: one pure function; never a clock, a database or chance.

queued ──claim──▶ running ──settle──▶ succeeded | failed | canceled
  ▲                  │
  └──── settle ──────┘   (a retry after a pause, or a free re-run at once)
"""

from typing import Any, Final, assert_never

import msgspec

from comfyd.tasks import (
    Canceled,
    Failed,
    Interrupted,
    Interruption,
    Outcome,
    Settlement,
    Status,
    Succeeded,
    Task,
    TaskError,
)

FREE_SUSPECTS: Final = 2
"""Re-runs of a task that was executing when ComfyUI died, before it is held to be the cause."""
FREE_STRAYS: Final = 3
"""Re-runs of a task that somebody else interrupted."""


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Exponential back-off: the first pause and the longest, in milliseconds."""

    first_ms: int
    most_ms: int

    def pause(self, failures: int, jitter: float) -> int:
        """The pause after this many failures: doubling, and spread by `jitter` (0..1) over its upper half."""
        full = min(self.first_ms << min(failures - 1, 32), self.most_ms)
        return round(full * (0.5 + jitter / 2))


def decide(task: Task, outcome: Outcome, policy: RetryPolicy, now: int, jitter: float) -> Settlement:
    """The one transition that this outcome leads to."""
    if isinstance(outcome, Canceled) or task.cancel_requested_at is not None:
        return _settle(task, Status.CANCELED, _word(outcome))
    match outcome:
        case Succeeded(artefacts=artefacts):
            return _settle(task, Status.SUCCEEDED, "succeeded", artefacts=artefacts)
        case Failed(error=error):
            return _failed(task, error, policy, now, jitter)
        case Interrupted():
            return _interrupted(task, outcome, policy, now, jitter)
        case _:
            assert_never(outcome)


def _word(outcome: Outcome) -> str:
    """What is kept with the attempt of a canceled task: a prompt that had ended first says so."""
    return "succeeded" if isinstance(outcome, Succeeded) else "canceled"


def _failed(task: Task, error: TaskError, policy: RetryPolicy, now: int, jitter: float) -> Settlement:
    failures = task.failures + 1
    if error.retryable and failures < task.policy.max_attempts:
        due = now + policy.pause(failures, jitter)
        return _settle(task, Status.QUEUED, "failed", available_at=due, error=error, failures=failures)
    return _settle(task, Status.FAILED, "failed", error=error, failures=failures)


def _interrupted(
    task: Task, outcome: Interrupted, policy: RetryPolicy, now: int, jitter: float
) -> Settlement:
    error = TaskError(code=outcome.reason, message=outcome.message, retryable=True, details=outcome.details)
    suspects = task.suspects + (outcome.reason is Interruption.SUSPECT)
    strays = task.strays + (outcome.reason is Interruption.STRAY)
    if suspects > FREE_SUSPECTS:
        crashed = TaskError(
            code="backend_crashed",
            message=f"ComfyUI died {suspects} times while it executed this task; it is not tried again",
        )
        return _settle(task, Status.FAILED, outcome.reason, error=crashed, suspects=suspects)
    if strays > FREE_STRAYS:
        strayed = TaskError(
            code="interrupted", message=f"somebody else interrupted this task in ComfyUI {strays} times"
        )
        return _settle(task, Status.FAILED, outcome.reason, error=strayed, strays=strays)
    due = now + _pause(task, outcome, policy, jitter)
    return _settle(
        task, Status.QUEUED, outcome.reason, available_at=due, error=error, suspects=suspects, strays=strays
    )


def _pause(task: Task, outcome: Interrupted, policy: RetryPolicy, jitter: float) -> int:
    """None, but where the same has come before and may come again at once."""
    before = sum(
        attempt.error is not None
        and attempt.error.details == outcome.details
        and attempt.claimed_at >= (task.started_at or 0)
        for attempt in task.attempts
    )
    return policy.pause(before, jitter) if outcome.details and before else 0


def _settle(task: Task, status: Status, outcome: str, **changes: Any) -> Settlement:
    """A settlement that keeps the task's counters but for what changes."""
    kept = Settlement(
        status=status, outcome=outcome, failures=task.failures, suspects=task.suspects, strays=task.strays
    )
    return msgspec.structs.replace(kept, **changes)
