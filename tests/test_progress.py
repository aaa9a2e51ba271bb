"""Progress adds up, and watchers see it without holding anybody up."""

import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.progress import EVENTS_HELD, Board, Preview, Progress, ProgressTracker, Watcher
from comfyd.tasks import Status
from tests.support.values import artefact

NODES = {"1": "EmptyImage", "2": "KSampler", "3": "SaveImage", "4": "PreviewImage"}


def test_progress_counts_nodes_and_the_part_of_the_running_one() -> None:
    tracker = ProgressTracker(NODES)
    tracker.cached(["1", "unknown"])
    assert tracker.snapshot() == Progress(value=0.25, nodes_done=1, nodes_total=4)
    tracker.started("2")
    tracker.stepped("2", 5, 20)
    snapshot = tracker.snapshot()
    assert (snapshot.value, snapshot.step, snapshot.steps) == (0.3125, 5, 20)
    assert (snapshot.current_node, snapshot.current_node_class) == ("2", "KSampler")
    tracker.started("3")
    assert tracker.snapshot().nodes_done == 2
    tracker.complete()
    assert tracker.snapshot().value == 1.0


def test_progress_never_falls_when_a_node_starts_over() -> None:
    tracker = ProgressTracker(NODES)
    tracker.started("2")
    tracker.stepped("2", 20, 20)
    high = tracker.snapshot().value
    tracker.stepped("2", 1, 20)
    assert tracker.snapshot().value == high
    assert tracker.snapshot().step == 1


def test_nodes_outside_the_graph_do_not_count() -> None:
    tracker = ProgressTracker({})
    tracker.started("5.0.0.3")
    tracker.stepped("5.0.0.3", 1, 2)
    tracker.finished("5.0.0.3")
    tracker.stepped("5", 1, 0)
    tracker.say("waiting")
    assert tracker.snapshot() == Progress(message="waiting")


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("started"), st.sampled_from(sorted(NODES))),
            st.tuples(st.just("finished"), st.sampled_from(sorted(NODES))),
            st.tuples(
                st.just("stepped"), st.sampled_from(sorted(NODES)), st.floats(-5, 50), st.floats(0, 30)
            ),
        )
    )
)
def test_progress_stays_in_range_and_never_falls(moves: list[tuple[str, str, float, float]]) -> None:
    tracker = ProgressTracker(NODES)
    last = 0.0
    for name, *arguments in moves:
        getattr(tracker, name)(*arguments)
        value = tracker.snapshot().value
        assert last <= value <= 1.0
        last = value


async def test_watchers_hear_what_happens_and_pollers_see_the_latest() -> None:
    board = Board()
    with board.watch("t") as watcher:
        assert board.watched("t")
        assert board.watchers == 1
        board.report("t", Progress(value=0.5))
        board.report("t", Progress(value=0.5))
        board.status("t", Status.SUCCEEDED)
        first, last = await watcher.next(), await watcher.next()
        assert first is not None
        assert last is not None
        assert (first.name, msgspec.json.decode(first.data)["value"]) == ("progress", 0.5)
        assert (last.name, last.final) == ("status", True)
        assert await watcher.next(timeout=0.01) is None
    assert board.progress("t") is None
    assert board.watchers == 0


async def test_progress_is_kept_while_a_task_runs() -> None:
    board = Board()
    board.report("t", Progress(value=0.2))
    board.status("t", Status.RUNNING)
    assert board.progress("t") == Progress(value=0.2)


async def test_two_watchers_of_one_task_get_the_same_bytes() -> None:
    board = Board()
    with board.watch("t") as one, board.watch("t") as two, board.watch("other") as other:
        board.publish("t", "log", {"message": "hello"})
        first, second = await one.next(), await two.next()
        assert first is not None
        assert second is not None
        assert first.data is second.data
        assert await other.next(timeout=0.01) is None
        assert board.watchers == 3


async def test_a_slow_watcher_loses_previews_first_then_progress_then_itself() -> None:
    board = Board()
    with board.watch("t") as watcher:
        for number in range(10):
            board.show("t", Preview(node_id="2", image_type="image/png", data=bytes([number])))
        for number in range(EVENTS_HELD):
            board.report("t", Progress(value=number / EVENTS_HELD))
        board.publish("t", "output", {"name": "kept"})
        assert not overrun(watcher)
        event = await watcher.next()
        assert event is not None
        assert event.name == "output"
        picture = await watcher.next()
        assert picture is not None
        assert picture.picture == board.preview("t")
        assert picture.picture is not None
        assert picture.picture.data == bytes([9])
        for number in range(EVENTS_HELD + 1):
            board.publish("t", "output", {"n": number})
        assert overrun(watcher)
        for _ in range(EVENTS_HELD):
            assert await watcher.next() is not None
        assert await watcher.next() is None


def overrun(watcher: Watcher) -> bool:
    """Asked through a function: it changes behind the type checker's back."""
    return watcher.overrun


async def test_a_waiting_watcher_is_woken() -> None:
    board = Board()
    with board.watch("t") as watcher:
        waiting = asyncio.ensure_future(watcher.next(timeout=5))
        await asyncio.sleep(0)
        board.status("t", Status.CANCELED)
        event = await waiting
        assert event is not None
        assert event.final


@pytest.mark.parametrize("status", list(Status))
def test_only_terminal_statuses_are_final(status: Status) -> None:
    board = Board()
    with board.watch("t") as watcher:
        board.status("t", status)
        assert watcher._events[0].final is status.terminal  # noqa: SLF001 - no loop to await in


async def test_board_keeps_the_last_picture_and_the_outputs_of_what_runs() -> None:
    board = Board()
    for data in (b"older", b"newest"):
        board.show("t", Preview(node_id="2", image_type="image/png", data=data))
    board.stored("t", artefact(key="t/1/2_0_a.png"))
    board.stored("u", artefact(key="u/1/2_0_a.png"))
    board.stored("u", artefact(key="u/1/2_1_a.png"))
    shown = board.preview("t")
    assert shown is not None
    assert (shown.data, shown.base64) == (b"newest", "bmV3ZXN0")
    assert sorted((task_id, each.key) for task_id, each in board.running_artefacts()) == [
        ("t", "t/1/2_0_a.png"),
        ("u", "u/1/2_0_a.png"),
        ("u", "u/1/2_1_a.png"),
    ]
    board.status("t", Status.QUEUED)
    board.status("u", Status.SUCCEEDED)
    assert board.preview("t") is None
    assert list(board.running_artefacts()) == []
