"""Values that fit a template's inputs, and the graph they make; never changes the template."""

import difflib
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comfyd.errors import InvalidInputs
from comfyd.graphs import (
    Graph,
    GraphLimits,
    check_structure,
    file_name_problem,
    is_remote,
    parse_address,
    set_input,
)
from comfyd.workflows.templates import FILE_TYPES, Scalar, TemplateInput, WorkflowTemplate

MAX_TEXT = 100_000  # characters
MAX_FILE_NAME = 500
# What a JSON document holds exactly in every common reader of it.
MIN_INTEGER, MAX_INTEGER = -(2**63), 2**64 - 1
# Drawn seeds stay exact in readers that keep numbers as doubles (JavaScript), so that a run can be repeated.
MAX_DRAWN = 2**53 - 1
_SHOWN = 100

# `_file_problem` as a regular expression, for the JSON Schema; a test keeps them equal. It ends with
# `(?![\s\S])` because `$` means the same only outside of Python, where it also stands before a line break.
FILE_PATTERN = (
    r"^(?:\s*[Hh][Tt][Tt][Pp][Ss]?://\S{1,4096}\s*|\s*data:[^,]*;\s*base64\s*,[^\x00]*"
    r"|\s*upload:[0-9a-f]{64}\.[a-z0-9]{1,16}\s*"
    r"|(?=[^\x00-\x1f\x7f]{1,500}(?![\s\S]))(?!\s*(?:\[input\]\s*)?$)(?![/~])(?![A-Za-z]:)"
    r"(?!\s*(?:[Dd][Aa][Tt][Aa]|[Uu][Pp][Ll][Oo][Aa][Dd]|[Hh][Tt][Tt][Pp][Ss]?):)(?!.*://)"
    r"(?!(?:.*/)?\s*\.\.\s*(?:/|(?:\[input\]\s*)?$))(?!.*\\)(?!.*\[(?:output|temp)\]\s*$)[^\x00-\x1f\x7f]*)"
    r"(?![\s\S])"
)
_REMOTE = re.compile(FILE_PATTERN.partition("|(?=")[0] + r")(?![\s\S])")


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A template's graph with its inputs set. `inputs` are the values used: given, default and drawn."""

    graph: Graph
    inputs: dict[str, Any]


def render(template: WorkflowTemplate, values: Mapping[str, object], seed_source: random.Random) -> Rendered:
    """Return the template's graph with these values, the defaults and drawn seeds.

    Raises `InvalidInputs`, whose `details["inputs"]` names each wrong, unknown and missing one.
    """
    wrong: dict[str, list[str]] = {}
    used: dict[str, Any] = {}
    known = [spec.name for spec in template.inputs]
    for name in values:
        if name not in known:
            wrong[_short(name)] = [
                f"unknown: the inputs are {', '.join(known) or 'none'}{_hint(name, known)}"
            ]
    for spec in template.inputs:
        if spec.name in values:
            value, problem = fit_value(spec, values[spec.name])
            if problem is None:
                used[spec.name] = value
            else:
                wrong[spec.name] = [problem]
        elif spec.default is not None:
            used[spec.name] = spec.default
        elif spec.random:
            used[spec.name] = _draw(spec, seed_source)
        elif spec.required:
            wrong[spec.name] = ["is required"]
    if wrong:
        raise _invalid(wrong)
    graph = {node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in template.graph.items()}
    for spec in template.inputs:
        if spec.name in used:
            graph[spec.node]["inputs"][spec.field] = used[spec.name]
    return Rendered(graph=graph, inputs=used)


def apply_inputs(graph: Graph, inputs: Mapping[str, object], limits: GraphLimits) -> Graph:
    """Return a checked raw graph with inputs set by `"node_id.input"` or `"Node title.input"`.

    Any JSON value goes, by the rules of the API format: a list is a link. The result is checked again. Raises
    `InvalidInputs` naming each wrong address, `InvalidWorkflow` if the graph is none afterwards.
    """
    wrong: dict[str, list[str]] = {}
    seen: dict[object, str] = {}
    changed = graph
    for name, value in inputs.items():
        try:
            address = parse_address(graph, name)
        except InvalidInputs as error:
            wrong.update(error.details["inputs"])
            continue
        if address in seen:
            wrong[_short(name)] = [f"sets the same input as {_short(seen[address])}"]
        seen[address] = name
        changed = set_input(changed, address, value)
    if wrong:
        raise _invalid(wrong)
    return check_structure(changed, limits) if seen else graph


def fit_value(spec: TemplateInput, value: object) -> tuple[Any, str | None]:
    """Return the value as the graph takes it, and None or what is wrong with it."""
    if spec.type in FILE_TYPES:
        return value, _file_problem(value)
    if spec.type in {"string", "text"}:
        if not isinstance(value, str):
            return None, f"must be a string, not {_kind(value)}"
        if len(value) > MAX_TEXT:
            return None, f"must be at most {MAX_TEXT} characters long, not {len(value)}"
        return value, None
    if spec.type == "boolean":
        return value, None if isinstance(value, bool) else f"must be true or false, not {_kind(value)}"
    if spec.type == "choice":
        return _fit_choice(spec, value)
    return _fit_number(spec, value)


def json_schema(template: WorkflowTemplate) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the template's inputs object: valid there is valid for `render`."""
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": template.title,
        "type": "object",
        "properties": {spec.name: _property(spec) for spec in template.inputs},
        "required": [
            spec.name
            for spec in template.inputs
            if spec.required and spec.default is None and not spec.random
        ],
        "additionalProperties": False,
    }
    if template.description:
        schema["description"] = template.description
    return schema


def _property(spec: TemplateInput) -> dict[str, Any]:
    found: dict[str, Any] = {"title": spec.title or spec.name}
    description = [spec.description] if spec.description else []
    if spec.random:
        description.append("Drawn at random when left out.")
    if spec.type in FILE_TYPES:
        article = "An" if spec.type in {"image", "audio"} else "A"
        kind = spec.type if spec.type == "file" else f"{spec.type} file"
        description.append(
            f"{article} {kind}: an http(s) url, a data URI in base64, the reference of an upload "
            "(POST /api/inputs), or a name in ComfyUI's input folder."
        )
        found |= {"type": "string", "minLength": 1, "pattern": FILE_PATTERN}
    elif spec.type in {"string", "text"}:
        found |= {"type": "string", "maxLength": MAX_TEXT}
    elif spec.type == "choice":
        found["enum"] = list(spec.choices)
    elif spec.type == "integer":
        bounds = {"minimum": MIN_INTEGER, "maximum": MAX_INTEGER}
        found |= {"type": "integer", **bounds, **_bounds(spec)}
    elif spec.type == "number":
        found |= {"type": "number", **_bounds(spec)}
    else:
        found["type"] = "boolean"
    if spec.default is not None:
        found["default"] = spec.default
    if description:
        found["description"] = " ".join(description)
    found["x-comfyd-type"] = spec.type
    if spec.step is not None:
        found["x-step"] = spec.step
    return found


def _bounds(spec: TemplateInput) -> dict[str, int | float]:
    bounds = {"minimum": spec.minimum, "maximum": spec.maximum}
    return {name: bound for name, bound in bounds.items() if bound is not None}


def _fit_choice(spec: TemplateInput, value: object) -> tuple[Scalar | None, str | None]:
    for choice in spec.choices:
        # true is not 1 in JSON
        if isinstance(choice, bool) == isinstance(value, bool) and choice == value:
            return choice, None
    shown = ", ".join(str(choice) for choice in spec.choices[:50])
    hint = _hint(value, [choice for choice in spec.choices if isinstance(choice, str)])
    return None, f"must be one of {shown}; not {_short(value)}{hint}"


def _fit_number(spec: TemplateInput, value: object) -> tuple[int | float | None, str | None]:
    wanted = "an integer" if spec.type == "integer" else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, f"must be {wanted}, not {_kind(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return None, f"must be {wanted}, not {value}"
    number, minimum, maximum = value, spec.minimum, spec.maximum
    if spec.type == "integer":
        if isinstance(value, float) and not value.is_integer():
            return None, f"must be an integer, not {value}"
        number = int(value)
        minimum = MIN_INTEGER if minimum is None else minimum
        maximum = MAX_INTEGER if maximum is None else maximum
    elif not MIN_INTEGER <= value <= MAX_INTEGER:
        try:
            number = float(value)  # what no JSON document holds as an integer
        except OverflowError:
            return None, "must be a number below 1.8e308"
    if minimum is not None and number < minimum:
        return None, f"must be at least {minimum}, not {_short(number)}"
    if maximum is not None and number > maximum:
        return None, f"must be at most {maximum}, not {_short(number)}"
    return number, None


def _file_problem(value: object) -> str | None:
    if not isinstance(value, str):
        return f"must be the name of a file, a url, a data URI or an upload, not {_kind(value)}"
    if is_remote(value):
        wanted = (
            'an http(s) url without blanks, "data:...;base64,..." or "upload:..." as POST /api/inputs gives'
        )
        return None if _REMOTE.match(value) else f"must be {wanted}"
    if len(value) > MAX_FILE_NAME:
        return f"must be at most {MAX_FILE_NAME} characters long, not {len(value)}"
    if "://" in value:
        return "is an address of another kind than http and https"
    if re.search(r"\[(?:output|temp)\]\s*$", value):
        return "names another folder than ComfyUI's input folder"
    return file_name_problem(value)


def _draw(spec: TemplateInput, seed_source: random.Random) -> int:
    high = min(math.floor(spec.maximum) if spec.maximum is not None else MAX_DRAWN, MAX_DRAWN)
    low = math.ceil(spec.minimum) if spec.minimum is not None else min(0, high)
    return seed_source.randint(low, max(low, high))


def _invalid(wrong: dict[str, list[str]]) -> InvalidInputs:
    name, messages = next(iter(wrong.items()))
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return InvalidInputs(f"Input {name}: {messages[0]}{more}", details={"inputs": wrong})


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _hint(value: object, known: list[str]) -> str:
    near = difflib.get_close_matches(value[:_SHOWN], known[:300], n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else ""
