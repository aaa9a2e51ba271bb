"""`comfyd.graphs.edit`: addresses, prefixes and the shape of a graph."""

import copy
import ntpath
import posixpath
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from comfyd.errors import InvalidInputs
from comfyd.graphs import (
    Address,
    Graph,
    GraphLimits,
    check_structure,
    find_node,
    parse_address,
    replace_texts,
    rewrite_prefixes,
    safe_prefix,
    set_input,
    shape_key,
)

# A loaded machine is slow, not wrong.
QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def graph(**more: Any) -> Graph:
    nodes = {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 8, "format.codec": "x"},
            "_meta": {"title": "A"},
        },
        "2": {
            "class_type": "ImageBlur",
            "inputs": {"image": ["1", 0], "sigma": 1},
            "_meta": {"title": "Same"},
        },
        "3": {
            "class_type": "ImageBlur",
            "inputs": {"image": ["2", 0], "sigma": 2},
            "_meta": {"title": "Same"},
        },
        "4.1": {"class_type": "Text", "inputs": {"text": "t"}, "_meta": {"title": "v1.5 prompt"}},
        **more,
    }
    return check_structure(nodes, GraphLimits())


@pytest.mark.parametrize(
    ("address", "node_id", "name"),
    [
        ("1.width", "1", "width"),
        ("A.width", "1", "width"),
        ("1.format.codec", "1", "format.codec"),
        ("A.format.codec", "1", "format.codec"),
        ("4.1.text", "4.1", "text"),
        ("v1.5 prompt.text", "4.1", "text"),
    ],
)
def test_an_address_names_a_node_by_id_or_title(address: str, node_id: str, name: str) -> None:
    assert parse_address(graph(), address) == Address(node_id=node_id, name=name)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("Same.sigma", "2 nodes have the title 'Same': name one by its id: 2 (ImageBlur), 3 (ImageBlur)"),
        ("nowhere.sigma", "no node has the id or the title 'nowhere'"),
        ("Sane.sigma", "did you mean 'Same'?"),
        ("2.sigmas", "node 2 (ImageBlur) has no input 'sigmas'; did you mean 'sigma'?"),
        ("plain", 'an address is "node_id.input"'),
        ("", 'an address is "node_id.input"'),
        ("." * 3000, "no node has"),
    ],
)
def test_an_address_that_leads_nowhere_is_an_input_error(address: str, words: str) -> None:
    with pytest.raises(InvalidInputs) as caught:
        parse_address(graph(), address)
    ((name, messages),) = caught.value.details["inputs"].items()
    assert len(name) < 130
    assert words in messages[0]


def test_texts_are_replaced_however_deep_and_nothing_else_is() -> None:
    deep = graph(
        **{
            "5": {
                "class_type": "X",
                "inputs": {
                    "a": "t",
                    "b": {"__value__": ["t", {"t": ["t", "tt", 1, None]}, {"u": 2}]},
                    "c": {"u": ["v"]},
                },
                "_meta": {"title": "t"},
            },
            "t": {"class_type": "t", "inputs": {"x": ["t2", 0], "y": "other"}},
            "t2": {"class_type": "Y", "inputs": {"t": 3}},
            "7": {"class_type": "Z", "inputs": {"x": ["t", 0], "y": "t"}},
        }
    )
    before = copy.deepcopy(deep)
    made = replace_texts(deep, {"t": "new", "missing": "z"})
    assert deep == before
    assert made["4.1"]["inputs"] == {"text": "new"}
    assert made["5"] == {
        "class_type": "X",
        "inputs": {
            "a": "new",
            "b": {"__value__": ["new", {"t": ["new", "tt", 1, None]}, {"u": 2}]},
            "c": {"u": ["v"]},
        },
        "_meta": {"title": "t"},
    }
    assert made["7"]["inputs"] == {"x": ["t", 0], "y": "new"}
    assert made["5"]["inputs"]["c"] is deep["5"]["inputs"]["c"]
    for node_id in ("1", "2", "3", "t", "t2"):
        assert made[node_id] is deep[node_id]


def test_an_id_comes_before_a_title() -> None:
    named = graph(**{"9": {"class_type": "X", "inputs": {}, "_meta": {"title": "1"}}})
    assert find_node(named, "1") == "1"


def test_setting_an_input_leaves_the_given_graph_as_it_was() -> None:
    before = graph()
    after = set_input(before, Address(node_id="1", name="width"), 16)
    assert before["1"]["inputs"]["width"] == 8
    assert after["1"]["inputs"]["width"] == 16
    assert after["2"] is before["2"]


def saver(value: object) -> Graph:
    return graph(
        **{"9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": value}}}
    )


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("ComfyUI", "ComfyUI"),
        ("ref/multi/main", "ref/multi/main"),
        ("%date:yyyy-MM-dd%/%width%x%height%", "%date:yyyy-MM-dd%/%width%x%height%"),
        ("../../etc/x", "etc/x"),
        ("/etc/x", "etc/x"),
        ("a\\..\\..\\b", "a/b"),
        ("C:\\x\\y", "x/y"),
        ("C:D:x", "x"),
        ("a/./b/ .. /c", "a/b/c"),
        (".../x", "x"),
        ("..", "ComfyUI"),
        ("", "ComfyUI"),
        ("a\nb\x00c", "a_b_c"),
        (5, "5"),
        ({"__value__": "w"}, "w"),
        ("/".join("abcdefghijkl"), "e/f/g/h/i/j/k/l"),
        ("ü" * 300, "ü" * 75),
    ],
)
def test_a_prefix_moves_under_the_folder_and_stays_there(prefix: object, expected: str) -> None:
    before = saver(prefix)
    after = rewrite_prefixes(before, "comfyd/attempt")
    assert after["9"]["inputs"]["filename_prefix"] == f"comfyd/attempt/{expected}"
    assert before["9"]["inputs"]["filename_prefix"] == prefix
    assert after["9"]["inputs"]["images"] == ["1", 0]


@pytest.mark.parametrize("value", [["4.1", 0], None, {"other": 1}])
def test_a_linked_prefix_is_left_alone(value: object) -> None:
    assert rewrite_prefixes(saver(value), "f")["9"]["inputs"]["filename_prefix"] == value


def test_a_graph_without_prefixes_is_the_same() -> None:
    assert rewrite_prefixes(graph(), "f") == graph()


@QUIET
@given(st.text() | st.text(alphabet="./\\ C:a%~\x00", max_size=30))
@example("..\\..\\x")
@example("." * 151 + "a")
@example("\ud800")
def test_no_prefix_escapes(prefix: str) -> None:
    name = safe_prefix(prefix)
    assert name
    assert len(name.encode()) <= 8 * 151
    assert posixpath.normpath(f"root/{name}").startswith("root/")
    assert ntpath.normpath(f"root/{name}").startswith("root\\")
    # Windows forgets spaces and dots at the end of a name
    bare = "/".join(part.strip().rstrip(" .") for part in name.split("/"))
    assert posixpath.normpath(f"root/{bare}").startswith("root/")
    assert safe_prefix(name) == name


def test_the_shape_forgets_values_titles_and_order_but_not_classes_and_links() -> None:
    shape = shape_key(graph())
    other = set_input(graph(), Address(node_id="1", name="width"), 99)
    other["2"]["_meta"]["title"] = "renamed"
    assert shape_key(dict(reversed(other.items()))) == shape
    assert shape_key(set_input(graph(), Address(node_id="3", name="image"), ["1", 0])) != shape
    assert shape_key(graph(**{"9": {"class_type": "X", "inputs": {}}})) != shape
    assert re.fullmatch(r"[0-9a-f]{32}", shape)
