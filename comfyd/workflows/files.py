"""A template from the text of its `.json` and `.toml`, and the `.toml` of a template; reads no file
itself."""

import hashlib
import json
import math
import re
import tomllib
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import msgspec

from comfyd.errors import InvalidWorkflow, TemplateError
from comfyd.graphs import Graph, GraphLimits, check_structure, find_node, is_link, title
from comfyd.workflows.discovery import discover_inputs
from comfyd.workflows.templates import FILE_TYPES, InputType, Scalar, TemplateInput, WorkflowTemplate
from comfyd.workflows.values import fit_value

_INPUT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


class _InputTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[inputs.<name>]` as it may be written."""

    node: str | int
    field: str
    type: InputType | None = None
    title: str = ""
    description: str = ""
    default: str | bool | int | float | None = None
    minimum: int | float | None = None
    maximum: int | float | None = None
    step: int | float | None = None
    choices: list[str | bool | int | float] = []
    required: bool = False
    random: bool = False
    optional: bool = False


class _TemplateTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole `.toml` as it may be written. Without `inputs` they are found from the graph."""

    title: str = ""
    description: str = ""
    inputs: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Source:
    """One file: its name for messages, its text for finding lines."""

    file: str
    text: str

    def fail(self, message: str, line: int | None = None, column: int | None = None) -> NoReturn:
        """Raise the `TemplateError` that names the file and the line."""
        details: dict[str, Any] = {"file": self.file}
        place = self.file
        if line is not None:
            details["line"] = line
            place += f":{line}"
        if column is not None:
            details["column"] = column
            place += f":{column}"
        raise TemplateError(f"{place}: {message}", details=details)


def parse_template(
    name: str,
    json_text: bytes,
    toml_text: bytes | None,
    *,
    json_file: str | None = None,
    toml_file: str | None = None,
    limits: GraphLimits | None = None,
) -> WorkflowTemplate:
    """Return the template, or raise `TemplateError` with the file, the line and what to mend.

    `json_file` and `toml_file` are the names that messages use; by default `<name>.json` and `<name>.toml`.
    """
    graph = _parse_graph(_decoded(json_file or f"{name}.json", json_text), limits or GraphLimits())
    table, source = _TemplateTable(), None
    if toml_text is not None:
        source = _decoded(toml_file or f"{name}.toml", toml_text)
        table = _parse_table(source)
    if table.inputs is None or source is None:
        inputs = discover_inputs(graph)
    else:
        inputs = tuple(_parse_input(source, graph, key, value) for key, value in table.inputs.items())
        _refuse_twice(source, inputs)
    content = hashlib.sha256(len(json_text).to_bytes(8, "big") + json_text + (toml_text or b""))
    return WorkflowTemplate(
        name=name,
        title=table.title or name.replace("-", " ").replace("_", " ").strip().capitalize(),
        description=table.description,
        graph=graph,
        inputs=inputs,
        version=content.hexdigest()[:16],
    )


def template_toml(template: WorkflowTemplate) -> str:
    """Return the `.toml` that says what the template is: one to start from when there was none."""
    lines = [f"title = {_toml(template.title)}", f"description = {_toml(template.description)}"]
    if not template.inputs:
        lines += ["", "[inputs]"]
    for spec in template.inputs:
        lines += ["", f"[inputs.{spec.name}]"]
        node = template.graph[spec.node]
        lines.append(f"node = {_toml(spec.node)}  # {_comment(title(template.graph, spec.node), node)}")
        lines += [f"{key} = {_toml(value)}" for key, value in _written(spec)]
    return "\n".join(lines) + "\n"


def _written(spec: TemplateInput) -> list[tuple[str, Any]]:
    written: list[tuple[str, Any]] = [("field", spec.field), ("type", spec.type)]
    written += [(key, value) for key in ("title", "description") if (value := getattr(spec, key))]
    numbers = ("default", "minimum", "maximum", "step")
    written += [(key, value) for key in numbers if (value := getattr(spec, key)) is not None]
    if spec.choices:
        written.append(("choices", list(spec.choices)))
    written += [(key, True) for key in ("required", "random", "optional") if getattr(spec, key)]
    return written


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for one control character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return repr(value)


def _comment(heading: str, node: dict[str, Any]) -> str:
    text = heading if heading == node["class_type"] else f"{heading} ({node['class_type']})"
    return "".join(character if character.isprintable() else " " for character in text[:100])


def _decoded(file: str, text: bytes) -> _Source:
    try:
        return _Source(file, text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        _Source(file, "").fail("is not UTF-8 text", line=text.count(b"\n", 0, error.start) + 1)


def _parse_graph(source: _Source, limits: GraphLimits) -> Graph:
    def refuse(constant: str) -> NoReturn:
        line = next((n for n, text in enumerate(source.text.splitlines(), 1) if constant in text), None)
        source.fail(f"{constant} is no JSON", line=line)

    try:
        value = json.loads(source.text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        source.fail(f"is not JSON: {error.msg}", error.lineno, error.colno)
    except RecursionError:
        source.fail("is nested too deep")
    except ValueError as error:  # an integer of thousands of digits
        source.fail(str(error))
    try:
        return check_structure(value, limits)
    except InvalidWorkflow as error:
        node_id = next(iter(error.details["node_errors"]), None)
        line = None
        if node_id is not None:
            match = re.search(rf"{re.escape(json.dumps(node_id, ensure_ascii=False))}\s*:\s*\{{", source.text)
            line = source.text.count("\n", 0, match.start()) + 1 if match else None
        source.fail(error.message, line=line)


def _parse_table(source: _Source) -> _TemplateTable:
    try:
        table = tomllib.loads(source.text.replace("\r\n", "\n"))
    except tomllib.TOMLDecodeError as error:
        match = re.search(r"^(.*) \(at line (\d+), column (\d+)\)$", str(error))
        if match:
            source.fail(f"is not TOML: {match[1]}", int(match[2]), int(match[3]))
        source.fail(f"is not TOML: {error}", line=source.text.count("\n") + 1)
    except RecursionError:
        source.fail("is nested too deep")
    try:
        return msgspec.convert(table, _TemplateTable)
    except msgspec.ValidationError as error:
        _fail_table(source, (), table, error)


def _parse_input(source: _Source, graph: Graph, name: str, value: Any) -> TemplateInput:
    path = ("inputs", name)
    if not _INPUT_NAME.fullmatch(name):
        rule = "an input's name is a letter, then up to 63 letters, digits, - and _"
        source.fail(f"inputs.{name}: {rule}", _line(source, path))
    try:
        table = msgspec.convert(value, _InputTable)
    except msgspec.ValidationError as error:
        _fail_table(source, path, value, error)

    def fail(key: str, message: str) -> NoReturn:
        source.fail(f"inputs.{name}.{key}: {message}", _line(source, (*path, key)))

    try:
        node_id = find_node(graph, str(table.node))
    except LookupError as error:
        fail("node", str(error))
    literal = graph[node_id]["inputs"].get(table.field)
    if literal is None and not table.optional:
        has = ", ".join(graph[node_id]["inputs"]) or "none"
        fail(
            "field", f"node {node_id} has no such input (it has: {has}); say optional = true to set it anyway"
        )
    if is_link(literal):
        fail("field", f"is linked to node {literal[0]} in the graph: name the field of that node instead")
    spec = TemplateInput(
        name=name,
        node=node_id,
        field=table.field,
        type=table.type or _type_of(literal) or fail("type", "is needed: it cannot be told from the graph"),
        title=table.title,
        description=table.description,
        minimum=table.minimum,
        maximum=table.maximum,
        step=table.step,
        choices=tuple(table.choices),
        required=table.required,
        random=table.random,
        optional=table.optional,
    )
    contradiction = _contradiction(spec, table)
    if contradiction is not None:
        fail(*contradiction)
    return _with_default(spec, table.default, literal, fail)


def _with_default(spec: TemplateInput, default: Scalar | None, literal: Any, fail: Any) -> TemplateInput:
    """Give the input its default: the one written, or the graph's own value if none is needed otherwise."""
    if default is not None:
        fitted, problem = fit_value(spec, default)
        if problem is not None:
            fail("default", problem)
        return replace(spec, default=fitted)
    if literal is None:
        return spec
    if spec.required or spec.random:
        # No default, but the type must be one that the field can take.
        loose = replace(spec, minimum=None, maximum=None)
        if spec.type not in {*FILE_TYPES, "choice"} and fit_value(loose, literal)[1] is not None:
            fail(
                "type",
                f"the graph has {json.dumps(literal)[:100]} there, which is not of the type {spec.type}",
            )
        return spec
    fitted, problem = fit_value(spec, literal)
    if problem is not None:
        hint = "say a default or required = true"
        fail("field", f"the graph's own value {problem}: {hint}")
    return replace(spec, default=fitted)


def _contradiction(spec: TemplateInput, table: _InputTable) -> tuple[str, str] | None:
    """The key that does not go with the others, and why."""
    numeric = spec.type in {"integer", "number"}
    for key in ("minimum", "maximum", "step"):
        bound = getattr(spec, key)
        if bound is not None and not numeric:
            return key, f"goes with the types integer and number, not {spec.type}"
        if bound is not None and not math.isfinite(bound):
            return key, "must be finite"
    if spec.minimum is not None and spec.maximum is not None and spec.minimum > spec.maximum:
        return "minimum", f"{spec.minimum} is more than the maximum {spec.maximum}"
    if spec.choices and spec.type != "choice":
        return "choices", f"goes with the type choice, not {spec.type}"
    if not spec.choices and spec.type == "choice":
        return "type", "choice needs choices"
    if any(isinstance(choice, float) and not math.isfinite(choice) for choice in spec.choices):
        return "choices", "must be finite"
    if spec.random and spec.type != "integer":
        return "random", f"goes with the type integer, not {spec.type}"
    if spec.random and (spec.required or table.default is not None):
        return "random", "draws a value, so neither default nor required can mean anything"
    return None


def _type_of(literal: object) -> InputType | None:
    kinds: dict[type, InputType] = {bool: "boolean", int: "integer", float: "number", str: "string"}
    return kinds.get(type(literal))


def _refuse_twice(source: _Source, inputs: tuple[TemplateInput, ...]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for spec in inputs:
        other = seen.setdefault((spec.node, spec.field), spec.name)
        if other != spec.name:
            message = f"inputs.{spec.name}: sets {spec.field} of node {spec.node}, as inputs.{other} does"
            source.fail(message, _line(source, ("inputs", spec.name, "field")))


def _fail_table(
    source: _Source, path: tuple[str, ...], value: Any, error: msgspec.ValidationError
) -> NoReturn:
    """Say a wrong or unknown key of a table by its path and line."""
    message = str(error)
    unknown = re.search(r"unknown field `(.*)`", message, re.DOTALL)
    if unknown:
        source.fail(f"{'.'.join((*path, unknown[1]))}: unknown key", _line(source, (*path, unknown[1])))
    missing = re.search(r"missing required field `(.*)`", message)
    if missing:
        source.fail(f"{'.'.join((*path, missing[1]))}: is missing", _line(source, path))
    where = re.search(r"^(.*) - at `\$\.?([A-Za-z_]*).*`$", message, re.DOTALL)
    if where and isinstance(value, dict):
        source.fail(f"{'.'.join((*path, where[2]))}: {where[1]}", _line(source, (*path, where[2])))
    source.fail(f"{'.'.join(path)}: {message}", _line(source, path))


def _line(source: _Source, path: tuple[str, ...]) -> int | None:
    """The line on which a key stands, or else its table; None when it is written in a way not looked for
    here."""
    table, key = (path[:2], path[2:]) if path[:1] == ("inputs",) else ((), path)
    header: int | None = None
    inside = not table
    for number, line in enumerate(source.text.splitlines(), 1):
        bare = line.strip()
        heading = re.match(r"\[\s*([^\[\]]*?)\s*\]\s*(?:#.*)?$", bare)
        if heading:
            parts = tuple(part.strip().strip("\"'") for part in heading[1].split(".", 1))
            inside = parts == table
            header = number if inside else header
        elif inside and key and re.match(rf"[\"']?{re.escape(key[0])}[\"']?\s*[.=]", bare):
            return number
        elif table and re.match(rf"[\"']?{re.escape(table[-1])}[\"']?\s*=\s*\{{", bare):
            header = number
    return header
