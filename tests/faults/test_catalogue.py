"""Every fault of the catalogue is injected by some test, and no test names a fault that is not there."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.catalogue import FAULTS

TESTS = Path(__file__).parents[1]


def named_faults(source: str) -> Iterator[int]:
    """The numbers that a file gives to `pytest.mark.fault`; `AssertionError` for what is no number."""
    for call in ast.walk(ast.parse(source)):
        match call:
            case ast.Call(
                func=ast.Attribute(value=ast.Attribute(attr="mark"), attr="fault"), args=args, keywords=[]
            ):
                for value in args:
                    assert isinstance(value, ast.Constant), f"line {value.lineno}: name faults by number"
                    assert isinstance(value.value, int), f"line {value.lineno}: name faults by number"
                    yield value.value
            case _:
                pass


def in_tests() -> dict[int, list[str]]:
    """Each number that is named, and the files that name it."""
    found: dict[int, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for number in named_faults(path.read_text()):
            found.setdefault(number, []).append(path.relative_to(TESTS).as_posix())
    return found


def test_numbers_are_read_from_every_place_where_pytest_takes_marks() -> None:
    source = """
pytestmark = [pytest.mark.fault(1)]

@pytest.mark.parametrize("way", [pytest.param(1, marks=pytest.mark.fault(2))])
@pytest.mark.fault(3, 4)
async def test_it(way): ...
"""
    assert sorted(named_faults(source)) == [1, 2, 3, 4]


@pytest.mark.parametrize("value", ['"5"', "NUMBER"])
def test_a_mark_that_names_no_number_is_an_error(value: str) -> None:
    with pytest.raises(AssertionError, match="by number"):
        list(named_faults(f"@pytest.mark.fault({value})\ndef test_it(): ..."))


def test_every_fault_of_the_catalogue_is_injected_by_some_test() -> None:
    missing = {number: FAULTS[number] for number in sorted(set(FAULTS) - set(in_tests()))}
    assert missing == {}


def test_no_test_names_a_fault_that_the_catalogue_does_not_have() -> None:
    unknown = {number: files for number, files in in_tests().items() if number not in FAULTS}
    assert unknown == {}
