"""What ComfyUI sends is read, however exotic, and nothing exotic gets further."""

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.comfy.wire import Undecodable, decode, decode_object

ANYTHING = msgspec.json.Decoder(Any)
FLOATS = msgspec.json.Decoder(dict[str, float | None])


def test_numbers_that_are_not_finite_become_null() -> None:
    assert decode('{"a": NaN, "b": Infinity, "c": -Infinity, "d": 1e400, "e": 2}', FLOATS) == {
        "a": None,
        "b": None,
        "c": None,
        "d": None,
        "e": 2.0,
    }


def test_huge_whole_numbers_beside_a_nan_do_not_crash() -> None:
    digits = "9" * 400
    assert decode_object(f'{{"a": NaN, "b": {digits}, "c": 12345678901234567890, "d": 3}}'.encode()) == {
        "a": None,
        "b": None,
        "c": 1.2345678901234567e19,
        "d": 3,
    }


def test_a_lone_surrogate_becomes_a_question_mark() -> None:
    assert decode_object(b'{"\\ud800": ["x\\udfff", true]}') == {"?": ["x?", True]}


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 200_000, b'{"a": NaN' * 3, b'{"a":' * 100_000])
def test_what_is_no_json_is_undecodable(data: bytes) -> None:
    with pytest.raises(Undecodable):
        decode(data, ANYTHING)


def test_a_list_is_no_object() -> None:
    with pytest.raises(Undecodable, match="not a JSON object"):
        decode_object(b"[]")


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    try:
        value = decode(raw, ANYTHING)
    except Undecodable:
        return
    msgspec.json.encode(value)
    assert not (isinstance(value, float) and not math.isfinite(value))
