"""Server-Sent Events, however they are cut."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.commands import events
from comfyd.commands.events import EventParser, ServerEvent

STREAM = (
    b": hello\n\n"
    b'event: status\nid: 7\ndata: {"status": "PENDING"}\n\n'
    b'event:progress\r\ndata:{"value":\r\ndata: 0.5}\r\n\r\n'
    b': still here\n\ndata: {"a": 1}\n\n\n'
    b'event: status\ndata: {"half'
)
WANTED = [
    ServerEvent(name="status", data={"status": "PENDING"}),
    ServerEvent(name="progress", data={"value": 0.5}),
    ServerEvent(name="message", data={"a": 1}),
]


@given(st.lists(st.integers(min_value=0, max_value=len(STREAM)), max_size=20))
def test_events_do_not_depend_on_where_the_stream_is_cut(cuts: list[int]) -> None:
    parser = EventParser()
    edges = [0, *sorted(cuts), len(STREAM)]
    found = [event for start, end in pairwise(edges) for event in parser.feed(STREAM[start:end])]
    assert found == WANTED


@pytest.mark.parametrize("data", [b"data: nonsense\n\n", b"data: [1]\n\n", b"event: \xff\n\n"])
def test_what_is_no_event_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        list(EventParser().feed(data))


def test_an_endless_event_is_refused() -> None:
    parser = EventParser()
    with pytest.raises(ValueError, match="too long"):
        list(parser.feed(b"data: " + b"x" * events.EVENT_BYTES))


def test_a_long_event_in_small_pieces_is_read_in_linear_time() -> None:
    parser = EventParser()
    data = {"picture": "x" * 4_000_000}
    stream = b"data: " + json.dumps(data).encode() + b"\n\n"
    found = [
        event for start in range(0, len(stream), 4096) for event in parser.feed(stream[start : start + 4096])
    ]
    assert found == [ServerEvent(name="message", data=data)]
