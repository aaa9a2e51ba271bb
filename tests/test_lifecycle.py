"""What becomes of a task when an attempt ends."""

import pytest

from comfyd.lifecycle import FREE_STRAYS, FREE_SUSPECTS, RetryPolicy, decide
from comfyd.tasks import (
    Attempt,
    Canceled,
    Failed,
    Interrupted,
    Interruption,
    Outcome,
    Policy,
    Settlement,
    Status,
    Succeeded,
    Task,
    TaskError,
)
from tests.support.values import artefact, task

POLICY = RetryPolicy(first_ms=1_000, most_ms=8_000)
NOW = 50_000
BOOM = TaskError(code="execution_error", message="boom", retryable=True)


def settle(outcome: Outcome, row: Task) -> Settlement:
    return decide(row, outcome, POLICY, NOW, jitter=1.0)


def test_success_keeps_the_artefacts() -> None:
    settlement = settle(Succeeded(artefacts=(artefact(),)), task())
    assert (settlement.status, settlement.outcome) == (Status.SUCCEEDED, "succeeded")
    assert settlement.artefacts == (artefact(),)
    assert settlement.available_at is None


def test_a_retryable_failure_waits_longer_each_time() -> None:
    row = task(policy=Policy(max_attempts=10))
    pauses = []
    for failures in range(6):
        settlement = settle(Failed(error=BOOM), task(policy=row.policy, failures=failures))
        assert settlement.status is Status.QUEUED
        assert settlement.failures == failures + 1
        assert settlement.available_at is not None
        pauses.append(settlement.available_at - NOW)
    assert pauses == [1_000, 2_000, 4_000, 8_000, 8_000, 8_000]


@pytest.mark.parametrize(("jitter", "pause"), [(0.0, 500), (0.5, 750), (1.0, 1_000)])
def test_jitter_spreads_the_upper_half_of_the_pause(jitter: float, pause: int) -> None:
    assert POLICY.pause(1, jitter) == pause


def test_the_last_attempt_fails_the_task() -> None:
    settlement = settle(Failed(error=BOOM), task(failures=2, policy=Policy(max_attempts=3)))
    assert settlement.status is Status.FAILED
    assert settlement.error == BOOM
    assert settlement.failures == 3


def test_a_failure_that_repeats_itself_is_not_tried_again() -> None:
    error = TaskError(code="execution_error", message="bad pattern", retryable=False)
    assert settle(Failed(error=error), task()).status is Status.FAILED


def test_a_lost_prompt_costs_nothing_and_goes_back_at_once() -> None:
    row = task(failures=1, suspects=1, strays=1)
    settlement = settle(Interrupted(reason=Interruption.LOST, message="gone"), row)
    assert (settlement.status, settlement.available_at) == (Status.QUEUED, NOW)
    assert (settlement.failures, settlement.suspects, settlement.strays) == (1, 1, 1)


def test_a_suspect_is_run_again_twice_and_then_blamed() -> None:
    row = task()
    for count in range(1, FREE_SUSPECTS + 1):
        settlement = settle(Interrupted(reason=Interruption.SUSPECT, message="died"), row)
        assert (settlement.status, settlement.suspects) == (Status.QUEUED, count)
        row = task(suspects=count)
    settlement = settle(Interrupted(reason=Interruption.SUSPECT, message="died"), row)
    assert settlement.status is Status.FAILED
    assert settlement.error is not None
    assert settlement.error.code == "backend_crashed"


def test_strays_are_forgiven_three_times() -> None:
    forgiven = settle(Interrupted(reason=Interruption.STRAY, message="x"), task(strays=FREE_STRAYS - 1))
    assert forgiven.status is Status.QUEUED
    blamed = settle(Interrupted(reason=Interruption.STRAY, message="x"), task(strays=FREE_STRAYS))
    assert blamed.status is Status.FAILED
    assert blamed.error is not None
    assert blamed.error.code == "interrupted"


@pytest.mark.parametrize(
    ("outcome", "word"),
    [
        (Canceled(message="canceled"), "canceled"),
        (Succeeded(artefacts=(artefact(),)), "succeeded"),
        (Failed(error=BOOM), "canceled"),
        (Interrupted(reason=Interruption.LOST, message="gone"), "canceled"),
    ],
)
def test_a_cancel_wins_over_every_outcome_and_says_if_it_came_late(outcome: Outcome, word: str) -> None:
    settlement = settle(outcome, task(cancel_requested_at=NOW - 1))
    assert (settlement.status, settlement.outcome) == (Status.CANCELED, word)
    assert settlement.artefacts == ()


def test_what_may_have_run_unseen_waits_when_it_repeats() -> None:
    unanswered = Interrupted(reason=Interruption.LOST, message="gone", details={"unanswered": True})
    error = TaskError(code="lost", message="gone", retryable=True, details={"unanswered": True})
    first = settle(unanswered, task())
    assert (first.available_at, first.error) == (NOW, error)
    before = tuple(
        Attempt(id=str(number), task_id="t", number=number, claimed_at=0, error=error) for number in (1, 2)
    )
    assert settle(unanswered, task(attempts=before)).available_at == NOW + 2_000
    plain = Interrupted(reason=Interruption.LOST, message="gone")
    assert settle(plain, task(attempts=before)).available_at == NOW
