"""`comfyd.workflows.files`: templates from text, errors with file and line, and the `.toml` to start from."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comfyd.errors import TemplateError
from comfyd.graphs import GraphLimits
from comfyd.workflows import TemplateInput, WorkflowTemplate, parse_template, template_toml

# A loaded machine is slow, not wrong.
QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
GRAPH: dict[str, Any] = {
    "1": {
        "class_type": "KSampler",
        "inputs": {"seed": 5, "steps": 20, "cfg": 7.5, "sampler_name": "euler", "on": True, "model": ["2", 0],
                   "list": {"__value__": [1]}},
        "_meta": {"title": "Sampler"},
    },
    "2": {"class_type": "Loader", "inputs": {"ckpt_name": "a.safetensors"}, "_meta": {"title": "Twin"}},
    "3": {"class_type": "LoadImage", "inputs": {"image": "a.png [output]"}, "_meta": {"title": "Twin"}},
}  # fmt: skip
JSON = json.dumps(GRAPH, indent=2).encode()
N = '[inputs.n]\nnode = "1"\nfield = '


def parse(toml: str | None, text: bytes = JSON) -> WorkflowTemplate:
    return parse_template("my-flow", text, None if toml is None else toml.encode())


def one(body: str) -> TemplateInput:
    (found,) = parse("[inputs.n]\n" + body).inputs
    return found


def broken(toml: str | None, text: bytes = JSON) -> TemplateError:
    with pytest.raises(TemplateError) as caught:
        parse(toml, text)
    line = caught.value.details.get("line")
    place = caught.value.details["file"] + (f":{line}" if line is not None else "")
    assert caught.value.message.startswith(place)
    return caught.value


def test_a_node_is_named_by_id_number_or_title() -> None:
    assert one('node = "1"\nfield = "steps"').node == "1"
    assert one('node = 1\nfield = "steps"').node == "1"
    assert one('node = "Sampler"\nfield = "steps"').node == "1"


@pytest.mark.parametrize(
    ("field", "kind", "default"),
    [("steps", "integer", 20), ("cfg", "number", 7.5), ("sampler_name", "string", "euler"),
     ("on", "boolean", True)],
)  # fmt: skip
def test_type_and_default_come_from_the_graph_when_not_said(field: str, kind: str, default: object) -> None:
    found = one(f'node = "1"\nfield = "{field}"')
    assert (found.type, found.default) == (kind, default)


def test_everything_that_can_be_said_is_kept() -> None:
    found = one(
        'node = "1"\nfield = "steps"\ntype = "integer"\ntitle = "T"\ndescription = "D"\n'
        "default = 5\nminimum = 1\nmaximum = 9\nstep = 2\nrequired = true\n"
    )
    assert found == TemplateInput(
        name="n",
        node="1",
        field="steps",
        type="integer",
        title="T",
        description="D",
        default=5,
        minimum=1,
        maximum=9,
        step=2,
        required=True,
    )
    chosen = one('node = "1"\nfield = "sampler_name"\ntype = "choice"\nchoices = ["euler", "ddim"]')
    assert (chosen.choices, chosen.default) == (("euler", "ddim"), "euler")
    drawn = one('node = "1"\nfield = "seed"\nrandom = true')
    assert (drawn.random, drawn.default) == (True, None)
    new = one('node = "1"\nfield = "new"\ntype = "string"\noptional = true')
    assert (new.optional, new.default) == (True, None)
    needed = one('node = "3"\nfield = "image"\ntype = "image"\nrequired = true')
    assert (needed.required, needed.default) == (True, None)


def test_title_and_description_may_be_all_there_is_and_the_inputs_are_then_found() -> None:
    found = parse('title = "T"\ndescription = "D"')
    assert (found.title, found.description) == ("T", "D")
    assert [item.name for item in found.inputs] == [item.name for item in parse(None).inputs]
    assert parse(None).title == "My flow"
    assert parse("[inputs]").inputs == ()


def test_the_version_stands_for_the_content_of_both_files() -> None:
    versions = {
        parse(None).version,
        parse("").version,
        parse('title = "T"').version,
        parse(None, JSON + b"\n").version,
        parse(" ", JSON).version,
    }
    assert len(versions) == 4  # no .toml and an empty one say the same
    assert parse(None).version == parse(None).version


@pytest.mark.parametrize(
    ("toml", "line", "words"),
    [
        ('title = "x\n', 1, "is not TOML"),
        ('title = "x"\n[inputs.n]\nnode = \n', 3, "is not TOML"),
        ('title = "x"\n\ntitel = "y"\n', 3, "titel: unknown key"),
        ("title = 5\n", 1, "title: Expected `str`, got `int`"),
        ("inputs = 5\n", None, "inputs: Expected"),
        (N + '"steps"\nminium = 5\n', 4, "inputs.n.minium: unknown key"),
        ('[inputs.n]\nnode = "1"\n', 1, "inputs.n.field: is missing"),
        ("[inputs]\nn = 5\n", None, "inputs.n: Expected `object`"),
        ('[inputs.a]\nnode="1"\nfield="cfg"\n' + N + "7\n", 6, "inputs.n.field: Expected"),
        (N + '"steps"\ntype = "int"\n', 4, "inputs.n.type: Invalid enum value 'int'"),
        (N + '"steps"\ndefault = 1999-01-01\n', 4, "inputs.n.default: Expected"),
        (N + '"steps"\nminimum = true\n', 4, "inputs.n.minimum: Expected"),
        ('[inputs."a b"]\nnode = "1"\nfield = "steps"\n', 1, "an input's name is a letter"),
        ('[inputs.n]\nnode = "9"\nfield = "steps"\n', 2, "inputs.n.node: no node has the id or the title"),
        ('[inputs.n]\nnode = "Twin"\nfield = "x"\n', 2, "2 (Loader), 3 (LoadImage)"),
        (N + '"stepz"\n', 3, "inputs.n.field: node 1 has no such input (it has: seed"),
        (N + '"model"\n', 3, "is linked to node 2"),
        (N + '"new"\noptional = true\n', 1, "inputs.n.type: is needed"),
        (N + '"list"\n', 1, "inputs.n.type: is needed"),
        (N + '"steps"\ntype = "string"\n', 3, "must be a string, not a number: say a"),
        (N + '"steps"\ntype="string"\nrequired=true\n', 4, "the graph has 20 there"),
        (N + '"steps"\nmaximum = 5\n', 3, "must be at most 5, not 20: say a default"),
        ('[inputs.n]\nnode = "3"\nfield = "image"\ntype = "image"\n', 3, "names another folder"),
        (N + '"steps"\ndefault = 5.5\n', 4, "inputs.n.default: must be an integer"),
        (N + '"on"\nmaximum = 5\n', 4, "goes with the types integer and number"),
        (N + '"cfg"\nmaximum = inf\n', 4, "must be finite"),
        (N + '"cfg"\nminimum = 5\nmaximum = 4\n', 4, "5 is more than the maximum 4"),
        (N + '"cfg"\nchoices = [1]\n', 4, "goes with the type choice"),
        (N + '"cfg"\ntype = "choice"\n', 4, "choice needs choices"),
        (N + '"cfg"\ntype = "choice"\nchoices=[nan]\n', 5, "must be finite"),
        (N + '"cfg"\nrandom = true\n', 4, "goes with the type integer"),
        (N + '"seed"\nrandom = true\ndefault = 5\n', 4, "neither default nor required"),
        (N + '"seed"\nrandom = true\nrequired = true\n', 4, "neither default nor"),
        (N + '"cfg"\n[inputs.b]\nnode = "Sampler"\nfield = "cfg"\n', 6, "as inputs.n does"),
        ('[inputs]\na = {node = "1", field = "stepz"}\n', 2, "no such input"),
        ("x = [\n1", 2, "is not TOML"),
        ("x = " + "[" * 20_000, None, "nested too deep"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_toml_is_told_with_its_line(toml: str, line: int | None, words: str) -> None:
    error = broken(toml)
    assert error.details["file"] == "my-flow.toml"
    assert error.details.get("line") == line, error.message
    assert words in error.message


def test_bytes_that_are_no_text_are_told_with_their_line() -> None:
    with pytest.raises(TemplateError) as caught:
        parse_template("a", JSON, b'title = "x"\n\xff', toml_file="workflows/a.toml")
    assert caught.value.message.startswith("workflows/a.toml:2: is not UTF-8")
    assert broken(None, b"\xff").details["file"] == "my-flow.json"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (b"", 1, "is not JSON"),
        (b'{"1":\n  {,}}', 2, "is not JSON"),
        (b'{\n"1": NaN}', 2, "NaN is no JSON"),
        (b"[" * 100_000, None, "nested too deep"),
        (b"1" * 10_000, None, "integer"),
        (b"[]", None, "not a list"),
        (b'{"nodes": [], "links": []}', None, "Export (API)"),
        (
            b'{"1": {"class_type": "A", "inputs": {}},\n "2": {"class_type": "B"}}',
            2,
            "node 2 (B): has no inputs",
        ),
        ('{\n"ü": {"class_type": "A"}}'.encode(), 2, "has no inputs"),
        (b'{"\\u0031": {"class_type": "A"}}', None, "has no inputs"),
    ],
)
def test_what_is_wrong_in_the_json_is_told_with_its_line(text: bytes, line: int | None, words: str) -> None:
    error = broken(None, text)
    assert error.details.get("line") == line, error.message
    assert words in error.message


def test_limits_and_byte_order_marks_are_minded() -> None:
    with pytest.raises(TemplateError, match="may have 1"):
        parse_template("a", JSON, None, limits=GraphLimits(nodes=1))
    found = parse_template("a", b"\xef\xbb\xbf" + JSON, b'\xef\xbb\xbftitle = "T"\r\n')
    assert found.title == "T"


def test_the_toml_of_a_template_without_inputs_says_so() -> None:
    found = parse("[inputs]")
    assert parse(template_toml(found)).inputs == ()


def test_the_toml_names_each_node_in_a_comment() -> None:
    assert 'node = "1"  # Sampler (KSampler)' in template_toml(parse(None))
    plain = json.dumps({"1": {"class_type": "KSampler", "inputs": {"seed": 5}}}).encode()
    assert 'node = "1"  # KSampler\n' in template_toml(parse(None, plain))


REAL = [
    *(Path(__file__).parent / "graphs").glob("*.json"),
    *(Path(__file__).parents[1] / "workflows").glob("*.json"),
]


@pytest.mark.parametrize("path", REAL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_printed_toml_says_the_same_as_the_graph_alone(path: Path) -> None:
    text = path.read_bytes()
    found = parse_template(path.stem, text, None)
    again = parse_template(path.stem, text, template_toml(found).encode())
    assert again.inputs == found.inputs
    assert (again.title, again.description) == (found.title, found.description)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@QUIET
@given(
    TEXT,
    TEXT,
    TEXT,
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(2**63), 2**64 - 1),
    st.lists(TEXT | st.integers(-9, 9) | st.booleans(), min_size=1, max_size=3),
)
def test_any_template_survives_being_printed_and_read(
    title: str, node_title: str, text: str, number: float, whole: int, choices: list[str | int | bool]
) -> None:
    graph = {
        "1": {
            "class_type": "A",
            "inputs": {"a": text, "b": number, "c": whole},
            "_meta": {"title": node_title},
        }
    }
    nodes: dict[str, Any] = {"node": "1"}
    made = WorkflowTemplate(
        name="t",
        title=title or "t",
        description=text,
        graph=parse_template("t", json.dumps(graph).encode(), None).graph,
        inputs=(
            TemplateInput(
                name="a", field="a", type="text", default=text, title=title, description=text, **nodes
            ),
            TemplateInput(
                name="b", field="b", type="number", default=number, minimum=min(number, 0), **nodes
            ),
            TemplateInput(name="c", field="c", type="integer", default=whole, maximum=max(whole, 0), **nodes),
            TemplateInput(name="d", field="d", type="choice", choices=tuple(choices), optional=True, **nodes),
        ),
        version="",
    )
    again = parse_template("t", json.dumps(graph).encode(), template_toml(made).encode())
    assert again.inputs == made.inputs
    assert (again.title, again.description) == (made.title, made.description)
