"""`comfyd.graphs.structure`: what is a graph, and what would hurt ComfyUI."""

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comfyd.errors import InvalidWorkflow, WorkflowFormatUi
from comfyd.graphs import Graph, GraphLimits, check_structure, class_types, is_link, links, title

# A loaded machine is slow, not wrong.
QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LIMITS = GraphLimits()
GRAPH: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "ratio": 0.5, "on": True, "none": None}},
    "2": {
        "class_type": "ImageInvert",
        "inputs": {"image": ["1", 0], "list": {"__value__": ["1", 0, {"deep": [1, 2]}]}},
        "_meta": {"title": "Invert"},
        "is_changed": "x",
    },
}


def refused(value: object, limits: GraphLimits = LIMITS) -> InvalidWorkflow:
    with pytest.raises(InvalidWorkflow) as caught:
        check_structure(value, limits)
    json.dumps(caught.value.details)
    return caught.value


def only_problem(value: object, node_id: str) -> dict[str, Any]:
    error = refused(value)
    assert list(error.details["node_errors"]) == [node_id], error.details
    (problem,) = error.details["node_errors"][node_id]["errors"]
    return dict(problem)


def test_a_graph_comes_back_as_a_deep_copy_with_meta_on_every_node() -> None:
    graph = check_structure(GRAPH, LIMITS)
    assert graph["1"] == {**GRAPH["1"], "_meta": {}}
    assert set(graph["2"]) == {"class_type", "inputs", "_meta"}
    assert graph["2"]["inputs"] == GRAPH["2"]["inputs"]
    graph["2"]["inputs"]["list"]["__value__"].append("more")
    graph["2"]["inputs"]["image"].append("more")
    assert len(GRAPH["2"]["inputs"]["list"]["__value__"]) == 3
    assert GRAPH["2"]["inputs"]["image"] == ["1", 0]


@pytest.mark.parametrize("meta", [None, [], "x", 5])
def test_a_meta_that_is_no_object_becomes_one(meta: object) -> None:
    graph = check_structure({"1": {"class_type": "A", "inputs": {}, "_meta": meta}}, LIMITS)
    assert graph["1"]["_meta"] == {}


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "null"), ([], "a list"), ("x", "a string"), (5, "a plain value"), ({}, "empty")],
)
def test_what_is_no_object_of_nodes_is_refused_by_name(value: object, words: str) -> None:
    error = refused(value)
    assert words in error.message
    assert error.code == "invalid_workflow"
    assert error.details["node_errors"] == {}


@pytest.mark.parametrize(
    "value",
    [
        {"nodes": [], "links": []},
        {"nodes": [{"id": 1, "type": "KSampler"}], "links": [], "version": 0.4},
        {"prompt": {"nodes": [], "links": []}},
        {"workflow": {"nodes": [], "links": []}},
    ],
)
def test_the_editors_format_is_refused_with_how_to_export(value: object) -> None:
    with pytest.raises(WorkflowFormatUi, match=re.escape("Workflow > Export (API)")):
        check_structure(value, LIMITS)


def test_a_wrapped_graph_is_told_apart_from_a_node_with_that_id() -> None:
    assert 'only what is under "prompt"' in refused({"prompt": GRAPH, "client_id": "x"}).message
    check_structure({"prompt": {"class_type": "A", "inputs": {}}}, LIMITS)


@pytest.mark.parametrize(
    ("node", "kind", "words"),
    [
        (5, "invalid_node", "must be an object"),
        (None, "invalid_node", "must be an object"),
        ({"inputs": {}}, "missing_node_type", "has no class_type"),
        ({"class_type": 5, "inputs": {}}, "missing_node_type", "must be a string"),
        ({"class_type": "", "inputs": {}}, "missing_node_type", "must be a string"),
        ({"class_type": "A"}, "invalid_inputs", "has no inputs"),
        ({"class_type": "A", "inputs": None}, "invalid_inputs", "has no inputs"),
        ({"class_type": "A", "inputs": []}, "invalid_inputs", "must be an object"),
        ({"class_type": "A", "inputs": "x"}, "invalid_inputs", "must be an object"),
    ],
)
def test_a_node_that_would_stop_comfyui_is_refused_even_when_nothing_is_linked_to_it(
    node: object, kind: str, words: str
) -> None:
    problem = only_problem({**GRAPH, "9": node}, "9")
    assert problem["type"] == kind
    assert problem["input"] is None
    assert words in problem["message"]


@pytest.mark.parametrize(
    ("link", "words"),
    [
        (["7", 0], "node 7, which does not exist"),
        (["1", -1], "not -1"),
        (["1", "0"], "not 0"),
        (["1", 0.0], "not 0.0"),
        (["1", True], "not True"),
        (["1", None], "not None"),
        ([1, 0], "as a string"),
        ([["1", 0], 0], "as a string"),
    ],
)
def test_a_link_that_leads_nowhere_is_refused(link: object, words: str) -> None:
    problem = only_problem({**GRAPH, "9": {"class_type": "A", "inputs": {"image": link}}}, "9")
    assert problem["type"] == "bad_linked_input"
    assert problem["input"] == "image"
    assert words in problem["message"]


@pytest.mark.parametrize("value", [[], ["1"], ["1", 0, 0], [1.0, 2.0, 3.0]])
def test_other_lists_are_left_to_be_judged_by_the_class(value: object) -> None:
    check_structure({**GRAPH, "9": {"class_type": "A", "inputs": {"unknown": value}}}, LIMITS)


def test_every_problem_is_told_with_class_and_title() -> None:
    error = refused(
        {
            "1": {"class_type": "A", "inputs": {"x": ["8", 0], "y": ["9", 0]}, "_meta": {"title": "First"}},
            "2": {"class_type": "B"},
        }
    )
    entry = error.details["node_errors"]["1"]
    assert (entry["class_type"], entry["title"]) == ("A", "First")
    assert [problem["input"] for problem in entry["errors"]] == ["x", "y"]
    assert "2" in error.details["node_errors"]
    assert error.message.startswith("The workflow cannot run: node 2 (B): has no inputs")
    assert error.message.endswith("(and 2 more problems)")


def test_the_message_names_title_class_and_input() -> None:
    node = {"class_type": "A", "inputs": {"x": ["8", 0]}, "_meta": {"title": "First"}}
    assert 'node 1 "First" (A), input x: is linked to node 8' in refused({"1": node}).message


def test_a_thousand_problems_are_answered_with_a_hundred() -> None:
    error = refused({str(number): {"class_type": "A"} for number in range(1000)})
    assert len(error.details["node_errors"]) == 100
    links_to_nothing = {f"i{number}": ["x", 0] for number in range(150)}
    error = refused({"1": {"class_type": "A", "inputs": links_to_nothing}})
    assert len(error.details["node_errors"]["1"]["errors"]) == 100
    assert error.details["not_listed"] == 50


def ring(size: int) -> dict[str, Any]:
    return {
        str(number): {"class_type": "Ring", "inputs": {"x": [str((number + 1) % size), 0]}}
        for number in range(size)
    }


def test_a_cycle_is_named_on_each_of_its_nodes_along_the_data() -> None:
    error = refused({**GRAPH, "a": _node("b"), "b": _node("c", "1"), "c": _node("a"), "d": _node("a")})
    assert set(error.details["node_errors"]) == {"a", "b", "c"}
    problem = error.details["node_errors"]["a"]["errors"][0]
    assert problem["type"] == "dependency_cycle"
    assert set(problem["cycle_nodes"]) == {"a", "b", "c"}
    cycle = re.findall(r"(\w) \(N\)", problem["message"])
    assert cycle[0] == cycle[-1]
    assert ("c", "b") in set(itertools.pairwise(cycle)), "c gives to b, as b is linked to c"


def _node(*sources: str) -> dict[str, Any]:
    return {"class_type": "N", "inputs": {f"x{n}": [source, 0] for n, source in enumerate(sources)}}


def test_a_node_linked_to_itself_is_a_cycle() -> None:
    assert only_problem(ring(1), "0")["cycle_nodes"] == ["0"]


def test_a_cycle_of_thousands_of_nodes_needs_no_recursion_and_a_short_answer() -> None:
    error = refused(ring(4000))
    assert len(error.details["node_errors"]) == 100
    assert len(json.dumps(error.details)) < 200_000
    assert "more -> " in error.message


def test_a_chain_of_thousands_and_a_mesh_of_many_paths_are_no_cycle() -> None:
    chain = {str(n): _node(*([str(n - 1)] if n else [])) for n in range(4000)}
    check_structure(dict(reversed(chain.items())), LIMITS)
    # 2 ** 200 paths
    check_structure({str(n): _node(*([str(n - 1), str(n - 1)] if n else [])) for n in range(200)}, LIMITS)


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = {"a": value} if depth % 2 else [value]
    return value


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({str(n): {"class_type": "A", "inputs": {}} for n in range(11)}, "too_many_nodes"),
        ({"1": {"class_type": "A", "inputs": {"x": "y" * 101}}}, "string_too_long"),
        ({"1": {"class_type": "A" * 101, "inputs": {}}}, "string_too_long"),
        ({"1": {"class_type": "A", "inputs": {"x" * 101: 1}}}, "string_too_long"),
        ({"1": {"class_type": "A", "inputs": {str(n): "y" * 90 for n in range(20)}}}, "workflow_too_large"),
        ({"1": {"class_type": "A", "inputs": {"x": list(range(1000))}}}, "workflow_too_large"),
        ({"1": {"class_type": "A", "inputs": {"x": "ü" * 100, **{str(n): "ü" * 70 for n in range(6)}}}},
         "workflow_too_large"),
        ({"1": {"class_type": "A", "inputs": {"x": nested(7)}}}, "nested_too_deep"),
        ({"1": {"class_type": "A", "inputs": {"x": nested(100_000)}}}, "nested_too_deep"),
        ({"1": {"class_type": "A", "inputs": {}, "_meta": {"x": nested(8)}}}, "nested_too_deep"),
    ],
)  # fmt: skip
def test_each_limit_refuses_what_is_past_it(value: object, kind: str) -> None:
    limits = GraphLimits(nodes=10, depth=9, string_length=100, size_bytes=1000)
    error = refused(value, limits)
    assert [problem["type"] for problem in error.details["errors"]] == [kind]


def test_what_is_just_within_the_limits_passes() -> None:
    limits = GraphLimits(nodes=10, depth=9, string_length=100, size_bytes=2000)
    check_structure({"1": {"class_type": "A", "inputs": {"x": nested(6), "y": "z" * 100}}}, limits)


@pytest.mark.parametrize("depth", [3, 201])
def test_a_depth_that_cannot_work_is_refused_at_once(depth: int) -> None:
    with pytest.raises(ValueError, match="depth"):
        GraphLimits(depth=depth)


@pytest.mark.parametrize("node_id", ["", "x" * 101, "a\nb", "\x00"])
def test_a_node_id_is_short_and_printable(node_id: str) -> None:
    error = refused({node_id: {"class_type": "A", "inputs": {}}})
    assert error.details["errors"][0]["type"] == "invalid_node_id"


@pytest.mark.parametrize(
    "value", [2**64, -(2**63) - 1, float("nan"), float("inf"), "\ud800", {1, 2}, {1: 2}, {"\udfff": 1}]
)
def test_a_value_that_json_cannot_carry_is_refused(value: object) -> None:
    problem = only_problem({"1": {"class_type": "A", "inputs": {"x": value}}}, "1")
    assert problem["type"] == "invalid_input_type"
    assert problem["input"] == "x"


def test_a_class_or_title_that_json_cannot_carry_is_refused() -> None:
    assert only_problem({"1": {"class_type": "\ud800", "inputs": {}}}, "1")["type"] == "invalid_node"
    meta = {"title": "\ud800"}
    assert (
        only_problem({"1": {"class_type": "A", "inputs": {}, "_meta": meta}}, "1")["type"] == "invalid_node"
    )


def test_the_largest_seed_passes() -> None:
    check_structure({"1": {"class_type": "A", "inputs": {"seed": 2**64 - 1, "low": -(2**63)}}}, LIMITS)


def test_titles_classes_and_links_are_read() -> None:
    graph = check_structure(GRAPH, LIMITS)
    assert title(graph, "2") == "Invert"
    assert title(graph, "1") == "EmptyImage"
    assert class_types(graph) == {"EmptyImage", "ImageInvert"}
    assert list(links(graph["2"])) == [("image", "1", 0)]
    assert not is_link(["1", True])


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent / "graphs").glob("*.json")), ids=lambda p: p.stem
)
def test_a_real_graph_passes_unchanged(path: Path) -> None:
    graph: Graph = json.loads(path.read_bytes())
    checked = check_structure(graph, LIMITS)
    assert {node_id: node["inputs"] for node_id, node in checked.items()} == {
        node_id: node["inputs"] for node_id, node in graph.items()
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
IDS = st.sampled_from(["1", "2", "3", "a.b", ""])
NODES = st.fixed_dictionaries(
    {},
    optional={
        "class_type": st.sampled_from(["A", "B", ""]) | JSON,
        "inputs": st.dictionaries(
            st.sampled_from(["x", "y"]), st.tuples(IDS, st.integers(-1, 2)).map(list) | JSON, max_size=2
        )
        | JSON,
        "_meta": JSON,
    },
)
GRAPHLIKE = st.dictionaries(IDS, NODES, max_size=4) | st.dictionaries(
    st.sampled_from(["nodes", "links", "prompt", "workflow", "1"]), JSON | NODES, max_size=3
)


@QUIET
@given(JSON | GRAPHLIKE | st.dictionaries(IDS, NODES | JSON, max_size=3))
def test_any_json_is_either_refused_properly_or_a_graph_that_stays_one(value: object) -> None:
    try:
        graph = check_structure(value, GraphLimits(depth=6, nodes=3))
    except InvalidWorkflow as error:
        orjson.dumps([error.message, error.details])
    else:
        assert check_structure(graph, LIMITS) == graph
        assert orjson.loads(orjson.dumps(graph)) == graph


@QUIET
@given(st.integers(0, 10_000), st.integers(2, 8))
def test_a_cycle_is_found_exactly_when_there_is_no_order(seed: int, size: int) -> None:
    chance = random.Random(seed)
    graph = {
        str(n): _node(*[str(chance.randrange(size)) for _ in range(chance.randrange(3))]) for n in range(size)
    }
    waiting = {node_id: {link[0] for link in node["inputs"].values()} for node_id, node in graph.items()}
    while free := [node_id for node_id, sources in waiting.items() if not sources]:
        for node_id in free:
            del waiting[node_id]
        for sources in waiting.values():
            sources.difference_update(free)
    if waiting:
        told = refused(graph).details["node_errors"]
        assert set(told) <= set(waiting)
    else:
        check_structure(graph, LIMITS)
