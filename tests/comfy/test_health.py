"""When a backend counts as ready."""

from comfyd.clock import SystemClock
from comfyd.comfy.health import SILENT_PROBES, Health


class Ticking(SystemClock):
    """A millisecond passes with each look."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 0

    def now(self) -> int:
        """See `Clock`."""
        self.time += 1
        return self.time


def test_what_changes_is_told_and_nothing_else() -> None:
    changes: list[bool] = []
    health = Health(Ticking(), lambda: changes.append(health.ready))
    assert (health.ready, health.reason, health.since) == (False, "not asked yet", 1)
    health.failed("a")
    health.passed("1.2")
    health.passed("1.3")
    assert (health.ready, health.reason, health.version, health.since) == (True, None, "1.3", 2)
    health.refused("connection refused")
    health.failed("b")
    assert (health.ready, health.reason, health.version, health.since) == (False, "b", "1.3", 3)
    assert changes == [True, False]


def test_only_silence_that_lasts_makes_it_not_ready() -> None:
    health = Health(Ticking(), lambda: None)
    health.passed(None)
    for _ in range(SILENT_PROBES - 1):
        health.silent("no answer")
    assert health.ready
    health.passed(None)
    for _ in range(SILENT_PROBES):
        assert health.ready
        health.silent("no answer")
    assert (health.ready, health.reason) == (False, "no answer")


def test_silence_before_the_first_answer_is_the_reason() -> None:
    health = Health(Ticking(), lambda: None)
    health.silent("no answer")
    assert (health.ready, health.reason) == (False, "no answer")


def stands(health: Health) -> tuple[bool, bool, str | None]:
    return health.ready, health.sick, health.reason


def test_one_that_answers_and_does_not_work_is_sick_and_one_that_is_down_is_not() -> None:
    changes: list[tuple[bool, bool]] = []
    health = Health(Ticking(), lambda: changes.append((health.ready, health.sick)))
    health.diagnosed("a")
    assert stands(health) == (False, False, "not asked yet")
    health.passed(None)
    assert stands(health) == (False, True, "a")
    health.diagnosed("b")
    assert health.reason == "b"
    assert changes == [(False, True)]
    health.diagnosed(None)
    assert stands(health) == (True, False, None)
    health.diagnosed("c")
    health.refused("refused")
    assert stands(health) == (False, False, "refused")
    health.passed(None)
    assert stands(health) == (False, True, "c")  # until somebody has looked
    health.diagnosed(None)
    health.changed()
    assert changes == [
        (False, True),
        (True, False),
        (False, True),
        (False, False),
        (False, True),
        (True, False),
        (True, False),
    ]


def test_a_refusal_or_a_new_socket_is_a_new_life_and_a_time_out_is_not() -> None:
    health = Health(Ticking(), lambda: None)
    health.refused("x")
    health.renewed()
    health.timed_out()
    assert (health.life, health.falls, health.timeouts) == (2, 1, 1)
    health.answered()
    assert health.timeouts == 0
