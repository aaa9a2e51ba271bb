"""`comfyd.workflows.values`: which values fit, what a template renders, and its JSON Schema."""

import copy
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # ships no types

from comfyd.errors import InvalidInputs, InvalidWorkflow
from comfyd.graphs import GraphLimits, check_structure
from comfyd.workflows import (
    INPUT_TYPES,
    TemplateInput,
    WorkflowTemplate,
    apply_inputs,
    fit_value,
    json_schema,
    render,
)

# A loaded machine is slow, not wrong.
QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LIMITS = GraphLimits()
GRAPH = check_structure(
    {
        "1": {"class_type": "A", "inputs": {"x": 1, "y": "old", "seed": 5}, "_meta": {"title": "First"}},
        "2": {"class_type": "B", "inputs": {"x": ["1", 0]}, "_meta": {"title": "Second"}},
    },
    LIMITS,
)


def spec(kind: Any = "integer", **more: Any) -> TemplateInput:
    return TemplateInput(**{"name": "x", "node": "1", "field": "x", "type": kind, **more})


def template(*inputs: TemplateInput, description: str = "") -> WorkflowTemplate:
    return WorkflowTemplate(
        name="t", title="T", description=description, graph=GRAPH, inputs=inputs, version="0" * 16
    )


def wrong(values: dict[str, Any], *inputs: TemplateInput) -> dict[str, list[str]]:
    with pytest.raises(InvalidInputs) as caught:
        render(template(*inputs), values, random.Random(1))
    assert caught.value.code == "invalid_inputs"
    return dict(caught.value.details["inputs"])


@pytest.mark.parametrize(
    ("given_spec", "value", "expected"),
    [
        (spec(), 5, 5),
        (spec(), 5.0, 5),
        (spec(minimum=1, maximum=9), 9, 9),
        (spec(), 2**64 - 1, 2**64 - 1),
        (spec("number"), 5, 5),
        (spec("number"), 0.5, 0.5),
        (spec("number"), 10**30, 1e30),
        (spec("string"), "", ""),
        (spec("text"), "a\nb", "a\nb"),
        (spec("boolean"), False, False),
        (spec("choice", choices=("a", 1)), 1.0, 1),
        (spec("image"), "sub/a.png [input]", "sub/a.png [input]"),
        (spec("file"), "3d/a.glb", "3d/a.glb"),
    ],
)
def test_a_value_that_fits_is_taken_as_the_graph_wants_it(
    given_spec: TemplateInput, value: object, expected: object
) -> None:
    fitted, problem = fit_value(given_spec, value)
    assert problem is None
    assert fitted == expected
    assert type(fitted) is type(expected)


@pytest.mark.parametrize(
    ("given_spec", "value", "words"),
    [
        (spec(), True, "must be an integer, not a boolean"),
        (spec(), "5", "must be an integer, not a string"),
        (spec(), None, "must be an integer, not null"),
        (spec(), [1], "not a list"),
        (spec(), {}, "not an object"),
        (spec(), 5.5, "must be an integer, not 5.5"),
        (spec(), float("nan"), "must be an integer, not nan"),
        (spec(), float("inf"), "must be an integer, not inf"),
        (spec(), 2**64, "at most 18446744073709551615"),
        (spec(), -(10**400), "at least -9223372036854775808"),
        (spec(minimum=1), 0, "must be at least 1, not 0"),
        (spec(maximum=9), 10, "must be at most 9, not 10"),
        (spec("number", minimum=0.5), 0.4, "must be at least 0.5, not 0.4"),
        (spec("number"), "0.5", "must be a number, not a string"),
        (spec("number"), False, "must be a number, not a boolean"),
        (spec("number"), 10**400, "below 1.8e308"),
        (spec("string"), 5, "must be a string, not a number"),
        (spec("text"), "x" * 100_001, "at most 100000 characters"),
        (spec("boolean"), 1, "must be true or false, not a number"),
        (spec("choice", choices=("euler", "ddim")), "eulr", "of euler, ddim; not eulr; did you mean euler?"),
        (spec("choice", choices=(1, 2)), True, "must be one of 1, 2; not True"),
        (spec("image"), 5, "must be the name of a file"),
        (spec("image"), "", "names no file"),
        (spec("image"), "x" * 501, "at most 500"),
        (spec("image"), "/etc/passwd", "absolute"),
        (spec("mask"), "a/../b", "leaves"),
        (spec("video"), "a\\b", "backslash"),
        (spec("audio"), "a.wav [output]", "another folder"),
        (spec("file"), "a.glb [temp] ", "another folder"),
        (spec("image"), "ftp://x/a.png", "is an address"),
        (spec("image"), "https://x/a b.png", "must be an http(s) url"),
        (spec("image"), "data:image/png,AA", "must be an http(s) url"),
        (spec("image"), "upload:cat.png", "must be an http(s) url"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_told_why(given_spec: TemplateInput, value: object, words: str) -> None:
    assert words in (fit_value(given_spec, value)[1] or "")
    assert words in wrong({"x": value}, given_spec)["x"][0]


def test_rendering_sets_given_default_and_drawn_values_and_tells_them() -> None:
    rendered = render(
        template(
            spec(name="a"),
            spec("string", name="b", field="y", default="from default"),
            spec(name="s", field="seed", random=True),
        ),
        {"a": 7.0},
        random.Random(3),
    )
    assert rendered.inputs == {"a": 7, "b": "from default", "s": rendered.inputs["s"]}
    assert rendered.graph["1"]["inputs"] == {"x": 7, "y": "from default", "seed": rendered.inputs["s"]}


def test_what_is_not_given_keeps_the_graphs_own_value() -> None:
    rendered = render(template(spec()), {}, random.Random(1))
    assert rendered.inputs == {}
    assert rendered.graph == GRAPH


def test_the_templates_graph_is_never_changed() -> None:
    before = copy.deepcopy(GRAPH)
    rendered = render(template(spec()), {"x": 9}, random.Random(1))
    rendered.graph["2"]["inputs"]["x"] = "changed"
    assert before == GRAPH


def test_an_optional_field_is_added_to_its_node() -> None:
    rendered = render(template(spec(field="new", optional=True)), {"x": 9}, random.Random(1))
    assert rendered.graph["1"]["inputs"]["new"] == 9


def test_every_wrong_input_is_named_at_once() -> None:
    told = wrong(
        {"n": "x", "promt": "hi", "x" * 300: 1}, spec(name="n"), spec("text", name="prompt", required=True)
    )
    assert told["n"] == ["must be an integer, not a string"]
    assert told["prompt"] == ["is required"]
    assert "did you mean prompt?" in told["promt"][0]
    assert all(len(name) < 110 for name in told)
    assert wrong({"a": 1}) == {"a": ["unknown: the inputs are none"]}


def test_a_required_input_with_a_default_may_be_left_out() -> None:
    assert render(template(spec(required=True, default=4)), {}, random.Random(1)).inputs == {"x": 4}


@pytest.mark.parametrize(
    ("bounds", "low", "high"),
    [
        ({}, 0, 2**53 - 1),
        ({"maximum": 2**64 - 1}, 0, 2**53 - 1),
        ({"minimum": 10, "maximum": 12}, 10, 12),
        ({"minimum": 9.5, "maximum": 10.5}, 10, 10),
        ({"minimum": -5, "maximum": -3}, -5, -3),
        ({"maximum": -3}, -3, -3),
        ({"minimum": 2**60}, 2**60, 2**60),
    ],
)
def test_a_drawn_seed_fits_its_own_input(bounds: dict[str, Any], low: int, high: int) -> None:
    seeded = spec(random=True, **bounds)
    chance = random.Random(1)
    drawn = {render(template(seeded), {}, chance).inputs["x"] for _ in range(60)}
    assert min(drawn) >= low
    assert max(drawn) <= high
    assert len(drawn) == min(high - low + 1, 60)
    assert all(fit_value(seeded, value)[1] is None for value in drawn)


def test_the_same_source_draws_the_same_seeds() -> None:
    seeded = template(spec(random=True))
    assert render(seeded, {}, random.Random(5)) == render(seeded, {}, random.Random(5))
    assert render(seeded, {}, random.Random(5)) != render(seeded, {}, random.Random(6))


def test_the_schema_says_what_a_form_needs() -> None:
    schema = json_schema(
        template(
            spec("text", name="p", required=True, title="Prompt", description="What to show."),
            spec(name="s", random=True, minimum=0),
            spec("number", name="n", default=0.5, minimum=0, maximum=1, step=0.05),
            spec("choice", name="c", choices=("a", "b"), default="a"),
            spec("image", name="i"),
            spec("boolean", name="b", required=True, default=True),
            description="Words.",
        )
    )
    Draft202012Validator.check_schema(schema)
    assert schema["required"] == ["p"]
    assert (schema["title"], schema["description"]) == ("T", "Words.")
    assert schema["additionalProperties"] is False
    assert schema["properties"]["p"]["title"] == "Prompt"
    assert schema["properties"]["p"]["description"] == "What to show."
    assert "at random" in schema["properties"]["s"]["description"]
    number = schema["properties"]["n"]
    assert (number["default"], number["minimum"], number["maximum"], number["x-step"]) == (0.5, 0, 1, 0.05)
    assert schema["properties"]["c"]["enum"] == ["a", "b"]
    assert schema["properties"]["i"]["type"] == "string"
    assert schema["properties"]["i"]["description"].startswith("An image file")
    assert "description" not in json_schema(template())


SPECS = st.builds(
    lambda kind, low, high, choices, required: spec(
        kind,
        minimum=low if kind in {"integer", "number"} else None,
        maximum=high if kind in {"integer", "number"} else None,
        choices=tuple(choices) if kind == "choice" else (),
        required=required,
    ),
    st.sampled_from(INPUT_TYPES),
    st.none() | st.integers(-9, 3),
    st.none() | st.integers(3, 9),
    st.lists(st.text(max_size=2) | st.integers(-2, 2) | st.booleans(), min_size=1, max_size=3),
    st.booleans(),
)
FILE_NAMES = st.lists(
    st.sampled_from(
        [
            "a",
            "..",
            ".",
            "/",
            "\\",
            "C:",
            "~",
            " ",
            "[temp]",
            "[input]",
            "[output]",
            "://",
            "data:",
            "\n",
            "\x00",
        ]
    ),
    max_size=5,
).map("".join)
VALUES: st.SearchStrategy[object] = (
    st.none()
    | st.booleans()
    | st.integers(-12, 12)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([5.0, -0.0, 1e300])
    | st.text(max_size=3)
    | FILE_NAMES
    | st.just([])
    | st.just({})
)


@QUIET
@given(SPECS, st.dictionaries(st.sampled_from(["x", "y"]), VALUES, max_size=2))
def test_the_schema_and_rendering_agree_on_what_is_valid(
    one: TemplateInput, values: dict[str, object]
) -> None:
    made = template(one)
    valid = Draft202012Validator(json_schema(made)).is_valid(values)
    try:
        rendered = render(made, values, random.Random(1))
    except InvalidInputs as error:
        assert not valid, error.details  # noqa: PT017 (that it raises is one of two good answers)
    else:
        assert valid
        check_structure(rendered.graph, LIMITS)


REFERENCE = f"upload:{'0123456789abcdef' * 4}.png"
PARTS = [
    "http://", "HTTPS://", "ftp://", "x.example", "/a.png", "a", ".", "..", "/", " ", "\n", "\t", "\x00",
    "data:", "DATA:", "image/png", ";", "base64", ",", "AAAA", "=", "\r\n", "upload:", REFERENCE,
    "\x7f", REFERENCE[7:], "Upload:", "é", "[input]", " [output]", "\\", "~", "C:", "\u2028", "\ufeff",
]  # fmt: skip
GOOD = [
    "http://x/a.png",
    " https://x\n",
    "data:;base64,",
    "data:image/png; base64 ,AA==",
    REFERENCE,
    "b/a.png",
]
SOURCES = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=7).map("".join),
    st.sampled_from(GOOD),
    st.tuples(st.sampled_from(GOOD), st.sampled_from(PARTS)).map("".join),
    st.tuples(st.sampled_from(PARTS), st.sampled_from(GOOD)).map("".join),
    st.sampled_from(["a", "http://a"]).flatmap(lambda text: st.integers(490, 510).map(lambda n: text * n)),
    st.integers(4_090, 4_100).map(lambda length: "http://" + "a" * length),
    st.text(max_size=6),
)


@QUIET
@given(SOURCES)
def test_the_pattern_of_file_inputs_is_what_they_take(value: str) -> None:
    schema = json_schema(template(spec("image")))
    Draft202012Validator.check_schema(schema)
    assert Draft202012Validator(schema).is_valid({"x": value}) == (fit_value(spec("image"), value)[1] is None)


@pytest.mark.parametrize("value", GOOD)
@pytest.mark.parametrize("kind", ["image", "video", "audio", "file"])
def test_files_from_elsewhere_fit_every_file_input_as_they_are(kind: Any, value: str) -> None:
    assert fit_value(spec(kind), value) == (value, None)


@pytest.mark.parametrize("end", ["\n", "\r", "\x00", "\x7f"])
def test_a_file_name_ends_with_no_control_character(end: str) -> None:
    schema = json_schema(template(spec("image")))
    assert not Draft202012Validator(schema).is_valid({"x": f"a.png{end}"})
    assert fit_value(spec("image"), f"a.png{end}")[1] is not None


def test_a_long_data_uri_is_a_file_but_no_text() -> None:
    uri = "data:image/png;base64," + "A" * 5_000_000
    assert fit_value(spec("image"), uri)[1] is None
    assert "at most" in (fit_value(spec("text"), uri)[1] or "")


def test_addresses_set_inputs_of_a_raw_graph() -> None:
    changed = apply_inputs(GRAPH, {"1.x": 9, "Second.x": "literal"}, LIMITS)
    assert changed["1"]["inputs"]["x"] == 9
    assert changed["2"]["inputs"]["x"] == "literal"
    assert GRAPH["2"]["inputs"]["x"] == ["1", 0]
    assert apply_inputs(GRAPH, {}, LIMITS) is GRAPH


def test_every_wrong_address_is_named() -> None:
    with pytest.raises(InvalidInputs) as caught:
        apply_inputs(GRAPH, {"1.q": 9, "Third.x": 1, "1.x": 1, "First.x": 2}, LIMITS)
    assert set(caught.value.details["inputs"]) == {"1.q", "Third.x", "First.x"}
    assert "same input as 1.x" in caught.value.details["inputs"]["First.x"][0]


@pytest.mark.parametrize("value", [["9", 0], ["2", 0], float("nan")])
def test_a_value_that_breaks_the_graph_is_refused(value: object) -> None:
    with pytest.raises(InvalidWorkflow):
        apply_inputs(GRAPH, {"1.x": value}, LIMITS)
