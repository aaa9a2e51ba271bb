"""Who gets a place, and who holds up whom."""

from comfyd.webhooks.lanes import (
    EACH,
    EACH_LATE,
    KEPT,
    KEPT_SLOW,
    QUICK,
    REMEMBERED,
    SLOW,
    Lanes,
    Manners,
    Place,
)


def entered(lanes: Lanes, endpoint: str) -> Place:
    place = lanes.enter(endpoint)
    assert place is not None
    return place


def over(lanes: Lanes, endpoint: str, *, status: int | None, lingers: bool = False) -> None:
    """One try at this endpoint, from its beginning to its end."""
    place = entered(lanes, endpoint)
    if lingers:
        place.linger()
    place.heard(status=status)
    place.leave()


def test_an_endpoint_that_is_not_known_has_one_place_and_four_when_it_has_answered() -> None:
    lanes = Lanes()
    place = entered(lanes, "a")
    assert lanes.enter("a") is None
    assert lanes.busy() == {"a"}
    place.heard(status=500)
    place.leave()
    assert [lanes.enter("a") is not None for _ in range(EACH + 1)] == [True] * EACH + [False]
    assert lanes.busy() == {"a"}


def test_one_that_hung_has_one_place_in_the_slow_lane() -> None:
    lanes = Lanes()
    over(lanes, "a", status=200)
    over(lanes, "a", status=None, lingers=True)
    entered(lanes, "a")
    assert (lanes.quick, lanes.slow) == (0, 1)
    assert lanes.enter("a") is None


def test_one_that_refuses_at_once_is_trusted() -> None:
    lanes = Lanes()
    over(lanes, "refusing", status=None)
    assert [lanes.enter("refusing") is not None for _ in range(EACH + 1)] == [True] * EACH + [False]
    assert (lanes.quick, lanes.slow) == (EACH, 0)


def test_one_that_answers_late_has_two_places_in_the_slow_lane_until_it_answers_at_once() -> None:
    lanes = Lanes()
    over(lanes, "late", status=200, lingers=True)
    places = [entered(lanes, "late") for _ in range(EACH_LATE)]
    assert lanes.enter("late") is None
    assert lanes.busy() == {"late"}
    assert (lanes.quick, lanes.slow) == (0, EACH_LATE)
    for place in places:
        place.heard(status=200)
        place.leave()
    entered(lanes, "late")
    assert (lanes.quick, lanes.slow) == (1, 0)


def test_those_that_always_answer_late_take_no_quick_places() -> None:
    lanes = Lanes()
    late = [f"late-{number}" for number in range(SLOW)]
    for endpoint in late:
        over(lanes, endpoint, status=200, lingers=True)
    over(lanes, "good", status=200)
    for _ in range(EACH):
        for endpoint in late:
            place = lanes.enter(endpoint)
            if place is not None:
                place.linger()
    assert (lanes.quick, lanes.slow) == (0, SLOW)
    assert set(late) <= lanes.busy()
    for _ in range(EACH):
        entered(lanes, "good").linger()
    assert lanes.quick == EACH
    entered(lanes, "fresh")


def test_those_that_hang_leave_slow_places_to_those_that_answer_late() -> None:
    lanes = Lanes()
    for number in range(SLOW):
        over(lanes, f"hung-{number}", status=None, lingers=True)
    over(lanes, "late", status=200, lingers=True)
    taken = [lanes.enter(f"hung-{number}") is not None for number in range(SLOW)]
    assert taken == [True] * (SLOW - KEPT_SLOW) + [False] * KEPT_SLOW
    assert "hung-255" in lanes.busy()
    assert "late" not in lanes.busy()
    entered(lanes, "late")


def test_whoever_lingers_makes_room_in_the_quick_lane() -> None:
    lanes = Lanes()
    places = [entered(lanes, f"fresh-{number}") for number in range(QUICK - KEPT)]
    assert lanes.enter("one more") is None
    places[0].linger()
    places[0].linger()
    assert (lanes.quick, lanes.slow) == (QUICK - KEPT - 1, 1)
    entered(lanes, "one more")
    for place in places:
        place.leave()
    assert (lanes.quick, lanes.slow) == (1, 0)


def test_the_last_places_are_kept_for_those_that_answered() -> None:
    lanes = Lanes()
    over(lanes, "good", status=200)
    for number in range(QUICK - KEPT):
        entered(lanes, f"fresh-{number}")
    assert lanes.enter("fresh") is None
    entered(lanes, "good")


def test_a_full_slow_lane_keeps_those_that_hung_out_and_nobody_else() -> None:
    lanes = Lanes()
    over(lanes, "hung", status=None, lingers=True)
    for number in range(SLOW):
        entered(lanes, f"fresh-{number}").linger()
    stays = entered(lanes, "stays")
    stays.linger()
    assert (lanes.quick, lanes.slow) == (1, SLOW)
    assert lanes.enter("hung") is None
    assert "hung" in lanes.busy()
    assert lanes.room
    entered(lanes, "fresh")


def test_there_is_an_end_to_all_room() -> None:
    lanes = Lanes()
    for number in range(SLOW):
        entered(lanes, f"slow-{number}").linger()
    for number in range(QUICK):
        over(lanes, f"quick-{number}", status=200)
    for number in range(QUICK):
        entered(lanes, f"quick-{number}")
    assert not lanes.room


def test_only_so_many_endpoints_are_remembered() -> None:
    lanes = Lanes()
    for number in range(REMEMBERED + 1):
        lanes.remember(f"e{number}", Manners.QUICK)
    entered(lanes, "e0")
    entered(lanes, "e1")
    entered(lanes, "e1")
    assert lanes.enter("e0") is None
