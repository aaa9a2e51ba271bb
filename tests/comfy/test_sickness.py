"""When a ComfyUI that answers counts as sick, look by look."""

from comfyd.comfy.sickness import CHANCE_FIRST_MS, CHANCE_MOST_MS, Look, Sickness
from comfyd.comfy.sightings import QueueView

STUCK = 30_000
STOP = 60_000
STEP = 5_000


class Patient:
    """A ComfyUI whose queue the test sets, looked at every five seconds."""

    def __init__(self, stuck_ms: int = STUCK, stop_ms: int = STOP) -> None:
        self.sickness = Sickness(stuck_ms, stop_ms)
        self.at = 0
        self.life = 0
        self.falls = 0
        self.running: tuple[str, ...] = ()
        self.pending: tuple[str, ...] = ()
        self.ended: frozenset[str] = frozenset()

    def look(self, seconds: int, step: int = STEP) -> str:
        """Look for so long; how it is then."""
        for _ in range(0, seconds * 1000, step):
            self.at += step
            view = QueueView(running=self.running, pending=self.pending)
            look = Look(view=view, ended=self.ended, life=self.life, falls=self.falls, at=self.at)
            self.sickness.looked(look)
        return self.sickness.condition

    def fall_sick(self) -> None:
        """Its worker dies while a prompt waits."""
        self.running, self.pending = (), ("p",)
        assert self.look(35) == "sick"


def test_prompts_that_wait_while_nothing_runs_make_it_sick_after_the_limit() -> None:
    patient = Patient()
    patient.pending = ("a", "b")
    assert patient.look(30) == "well"
    assert patient.look(5) == "sick"
    assert patient.sickness.reason is not None
    assert "prompts have waited for 30 s and nothing runs" in patient.sickness.reason


def test_an_empty_queue_and_one_that_is_worked_are_well() -> None:
    patient = Patient()
    assert patient.look(3600) == "well"
    patient.running, patient.pending = ("foreign",), tuple(f"p{number}" for number in range(50))
    assert patient.look(36_000) == "well"


def test_a_single_long_pause_between_looks_proves_nothing() -> None:
    patient = Patient()
    patient.pending = ("a",)
    assert patient.look(5) == "well"
    assert patient.look(3600, step=3_600_000) == "well"
    assert patient.look(15) == "well"
    assert patient.look(5) == "sick"


def test_time_outs_neither_count_nor_cure() -> None:
    patient = Patient()
    patient.pending = ("a",)
    patient.look(30)
    for _ in range(10):
        patient.sickness.unanswered()
        assert patient.look(5) == "well"
    assert patient.look(5) == "sick"
    patient.sickness.unanswered()
    assert patient.sickness.condition == "sick"


def test_a_sign_of_life_between_looks_is_one_of_a_worker_that_lives() -> None:
    patient = Patient()
    patient.pending = ("a",)
    for _ in range(20):
        patient.sickness.stirred()
        assert patient.look(25) == "well"


def test_it_is_well_as_soon_as_something_runs_again() -> None:
    patient = Patient()
    patient.fall_sick()
    patient.running, patient.pending = ("p",), ()
    assert patient.look(5) == "well"
    assert patient.sickness.reason is None


def test_a_new_life_without_the_old_prompts_is_a_restart() -> None:
    patient = Patient()
    patient.fall_sick()
    patient.life, patient.pending = 1, ()
    assert patient.look(5) == "well"


def test_a_socket_that_broke_is_not_a_restart() -> None:
    patient = Patient()
    patient.fall_sick()
    patient.life = 1
    assert patient.look(60) == "sick"


def test_a_socket_that_broke_while_the_queue_was_empty_is_not_a_restart() -> None:
    patient = Patient()
    for expected in ("probation", "sick", "sick"):
        patient.fall_sick()
        patient.pending = ()
        assert patient.look(5) == expected
        patient.life += 1
        assert patient.look(5) == expected
    assert patient.look(900) == "probation"
    patient.life += 1
    assert patient.look(5) == "probation"


def test_one_that_was_down_while_its_queue_was_empty_was_restarted() -> None:
    patient = Patient()
    for _ in range(2):
        patient.fall_sick()
        patient.pending = ()
        patient.look(5)
    assert patient.look(5) == "sick"
    patient.life, patient.falls = 1, 1
    assert patient.look(5) == "well"


def test_an_emptied_queue_gives_it_one_chance_and_the_next_one_only_later() -> None:
    patient = Patient()
    pauses = []
    for _ in range(8):
        patient.fall_sick()
        patient.pending = ()
        before = patient.at
        while patient.look(5) == "sick":
            assert patient.at - before <= 2 * CHANCE_MOST_MS
        assert patient.sickness.on_probation
        pauses.append(patient.at - before)
        assert patient.look(60) == "probation"  # nobody has tried it
    assert pauses[0] == STEP
    assert pauses[1:6] == [CHANCE_FIRST_MS << number for number in range(4)] + [CHANCE_MOST_MS]
    assert pauses[6:] == [CHANCE_MOST_MS] * 2


def test_foreign_prompts_that_come_to_a_sick_one_do_not_cure_it() -> None:
    patient = Patient()
    patient.fall_sick()
    patient.pending = ("another",)
    assert patient.look(5) == "sick"


def test_one_prompt_that_runs_ends_the_probation() -> None:
    patient = Patient()
    for _ in range(3):
        patient.fall_sick()
        patient.pending = ()
        patient.look(900)
        assert patient.sickness.on_probation
    patient.sickness.stirred()
    assert patient.look(5) == "well"
    patient.fall_sick()
    patient.pending = ()
    assert patient.look(5) == "probation"  # as the first time


def test_a_prompt_that_will_not_stop_makes_it_sick_until_it_goes() -> None:
    patient = Patient()
    patient.running = ("a",)
    assert patient.look(600) == "well"
    patient.sickness.asked_to_stop("a")
    assert patient.look(60) == "well"
    assert patient.look(5) == "sick"
    assert "prompt a runs on, asked to stop for 60 s" in str(patient.sickness.reason)
    patient.sickness.stirred()
    assert patient.look(600) == "sick"
    patient.running = ()
    assert patient.look(5) == "well"


def test_a_prompt_that_waits_is_not_one_that_will_not_stop() -> None:
    patient = Patient()
    patient.running, patient.pending = ("foreign",), ("a",)
    patient.sickness.asked_to_stop("a")
    assert patient.look(600) == "well"
    patient.running, patient.pending = ("a",), ()
    assert patient.look(60) == "well"
    assert patient.look(5) == "sick"


def test_what_was_asked_of_a_prompt_that_went_is_forgotten() -> None:
    patient = Patient()
    patient.running = ("a",)
    patient.sickness.asked_to_stop("a")
    patient.look(30)
    patient.running = ()
    patient.look(5)
    patient.running = ("a",)
    assert patient.look(600) == "well"


def test_a_prompt_of_which_the_end_was_told_does_not_run_on() -> None:
    patient = Patient()
    patient.running, patient.pending, patient.ended = ("a",), ("b",), frozenset({"a", "z"})
    assert patient.look(30) == "well"
    assert patient.look(5) == "sick"
    assert "prompt a ended" in str(patient.sickness.reason)
    patient.running, patient.pending = ("b",), ()
    assert patient.look(5) == "well"


def test_what_has_no_limit_is_never_sick() -> None:
    patient = Patient(stuck_ms=0, stop_ms=0)
    patient.pending = ("a",)
    assert patient.look(3600) == "well"
    patient.running, patient.ended = ("b",), frozenset({"b"})
    patient.sickness.asked_to_stop("b")
    assert patient.look(3600) == "well"
    assert patient.sickness.look_every_ms is None
    assert Sickness(600, 0).look_every_ms == 100
