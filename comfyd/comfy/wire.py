"""Reading what ComfyUI sends as JSON, also where it is not quite JSON; never interprets it.

Python's own writer, which ComfyUI uses, puts `NaN`, `Infinity` and lone surrogates on the wire (Q16). Nothing
read here holds a number that is not finite or a text that is not UTF-8: such numbers become null, such
characters `?`.
"""

import json
import math
from typing import Any, Final, TypeVar

import msgspec

T = TypeVar("T")

Json = Any

_EXACT_DIGITS: Final = 19


class Undecodable(ValueError):
    """Not JSON, not of the expected shape, or nested too deeply."""


def decode(data: bytes | str, decoder: msgspec.json.Decoder[T]) -> T:
    """The value as the decoder's type; the fast way first. Raises `Undecodable`."""
    try:
        return decoder.decode(data)
    except RecursionError as error:
        raise Undecodable("nested too deeply") from error
    except ValueError:
        pass  # the exotic forms: read once more, slowly
    try:
        return decoder.decode(msgspec.json.encode(_tolerant(data)))
    except (ValueError, RecursionError) as error:
        raise Undecodable(f"not the expected JSON: {error}") from error


_ANYTHING: Final = msgspec.json.Decoder(Json)


def decode_object(data: bytes) -> dict[str, Json]:
    """A JSON object. Raises `Undecodable`."""
    value = decode(data, _ANYTHING)
    if not isinstance(value, dict):
        raise Undecodable("not a JSON object")
    return value


def _tolerant(data: bytes | str) -> Json:
    """What Python's own reader makes of it, without what only Python understands."""
    value = json.loads(data, parse_constant=_nothing, parse_float=_finite, parse_int=_whole)
    return _speakable(value)


def _nothing(_name: str) -> None:
    """`NaN`, `Infinity`, `-Infinity`."""


def _finite(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def _whole(digits: str) -> float | int | None:
    return int(digits) if len(digits) <= _EXACT_DIGITS else _finite(digits)


def _speakable(value: Json) -> Json:
    """The same with every text fit for UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_speakable(item) for item in value]
    if isinstance(value, dict):
        return {_speakable(key): _speakable(item) for key, item in value.items()}
    return value
