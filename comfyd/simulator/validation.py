"""The checks of POST /prompt: from a graph to the outputs that will run, or to ComfyUI's own error shapes.

Reads the catalog and the input folder and coerces values inside the given graph; it never queues anything.
A malformed graph raises (TypeError, AttributeError, KeyError), which the route turns into ComfyUI's 500.
"""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from comfyd.simulator.catalog import DYNAMIC_COMBO, FILE_INPUTS, InputSpec, parse_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from comfyd.simulator.catalog import Catalog, NodeClass
    from comfyd.simulator.folders import Folders
    from comfyd.simulator.options import Flavor

type_converters: dict[str, type] = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
LONG_LIST = 20  # longer combo lists are not quoted in errors


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a check: `error` is None when at least one output is valid."""

    error: dict[str, Any] | None
    outputs: list[str]
    node_errors: dict[str, Any]


def check_prompt(prompt: Any, targets: Any, catalog: Catalog, folders: Folders, flavor: Flavor) -> Verdict:
    """Check a graph as POST /prompt does. `targets` are partial execution targets or None."""
    if flavor.graph_walked_early:
        for node in prompt.values():
            node.get("inputs", {}).items()
    outputs = set()
    for node_id in prompt:
        error = _class_error(node_id, prompt[node_id], catalog, flavor)
        if error is not None:
            return Verdict(error, [], {})
        node_class = catalog.classes[prompt[node_id]["class_type"]]
        if node_class.is_output and (targets is None or node_id in targets):
            outputs.add(node_id)
    if not outputs:
        return Verdict(_error("prompt_no_outputs", "Prompt has no outputs"), [], {})
    check = _GraphCheck(prompt, catalog, folders, flavor)
    for node_id in outputs:
        check.check_output(node_id)
    if not check.good_outputs:
        details = "\n".join(f"{reason['message']}: {reason['details']}" for reason in check.output_reasons)
        error = _error("prompt_outputs_failed_validation", "Prompt outputs failed validation", details)
        return Verdict(error, [], check.node_errors)
    return Verdict(None, check.good_outputs, check.node_errors)


class _GraphCheck:
    """The state of checking one graph: what is known of each node so far."""

    def __init__(self, prompt: dict[str, Any], catalog: Catalog, folders: Folders, flavor: Flavor) -> None:
        self.good_outputs: list[str] = []
        self.output_reasons: list[dict[str, Any]] = []
        self.node_errors: dict[str, Any] = {}
        self._prompt = prompt
        self._catalog = catalog
        self._folders = folders
        self._flavor = flavor
        self._validated: dict[Any, tuple[bool, list[dict[str, Any]]]] = {}
        self._path: list[str] = []  # the nodes being checked, from the output inwards
        self._cycle_errors: dict[str, dict[str, Any]] = {}

    def check_output(self, node_id: str) -> None:
        """Check one output node and everything upstream of it."""
        try:
            valid, reasons = self._check(node_id)
        except Exception as error:  # noqa: BLE001  # ComfyUI reports whatever a check raises
            extra = {
                "exception_type": type_name(error),
                "traceback": traceback.format_tb(error.__traceback__),
            }
            reason = _reason(
                "exception_during_validation", "Exception when validating node", str(error), extra
            )
            valid, reasons = False, [reason]
            self._validated[node_id] = (valid, reasons)
            self._path.clear()
        if valid:
            self.good_outputs.append(node_id)
            return
        self.output_reasons += reasons
        for failed, (node_valid, node_reasons) in self._validated.items():
            if node_valid or not node_reasons:
                continue
            entry = self.node_errors.setdefault(
                failed,
                {
                    "errors": node_reasons,
                    "dependent_outputs": [],
                    "class_type": self._prompt[failed]["class_type"],
                },
            )
            entry["dependent_outputs"].append(node_id)

    def _check(self, node_id: Any) -> tuple[bool, list[dict[str, Any]]]:
        if node_id in self._validated:
            return self._validated[node_id]
        if node_id in self._path:
            self._note_cycle(node_id)
            return False, []
        self._path.append(node_id)
        node = self._prompt[node_id]
        inputs = node["inputs"]
        errors: list[dict[str, Any]] = []
        valid = True
        for spec in self._specs(self._catalog.classes[node["class_type"]], inputs):
            if spec.name not in inputs:
                if spec.required and spec.kind != DYNAMIC_COMBO:
                    short = spec.name.rpartition(".")[2]
                    errors.append(
                        _reason(
                            "required_input_missing",
                            "Required input is missing",
                            short,
                            {"input_name": spec.name},
                        )
                    )
                continue
            if isinstance(inputs[spec.name], list):
                error, upstream_valid = self._check_link(spec, inputs[spec.name])
                valid = valid and upstream_valid
            else:
                error = self._check_value(spec, inputs, node["class_type"])
            if error is not None:
                errors.append(error)
        errors += self._check_file(node["class_type"], inputs)
        if node_id in self._cycle_errors:
            errors.append(self._cycle_errors[node_id])
        self._path.pop()
        self._validated[node_id] = (valid and not errors, errors)
        return self._validated[node_id]

    def _specs(self, node_class: NodeClass, inputs: dict[str, Any]) -> Iterator[InputSpec]:
        """The inputs of a node, with those its dynamic combos bring in."""
        for spec in node_class.inputs.values():
            yield spec
            if spec.kind != DYNAMIC_COMBO:
                continue
            for option in spec.options["options"]:
                if option["key"] == inputs.get(spec.name):
                    for section in ("required", "optional"):
                        nested = option["inputs"].get(section, {})
                        required = section == "required"
                        yield from parse_inputs(nested, required=required, prefix=f"{spec.name}.").values()

    def _check_link(self, spec: InputSpec, link: list[Any]) -> tuple[dict[str, Any] | None, bool]:
        """The error of a link itself, and whether the node behind it is valid."""
        if len(link) != 2:
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            return _input_reason("bad_linked_input", message, spec.name, spec, received_value=link), True
        source = link[0]
        received = self._catalog.classes[self._prompt[source]["class_type"]].outputs[link[1]]
        if not types_match(received, spec.kind):
            details = f"{spec.name}, received_type({received}) mismatch input_type({spec.kind})"
            message = "Return type mismatch between linked nodes"
            return (
                _input_reason(
                    "return_type_mismatch", message, details, spec, received_type=received, linked_node=link
                ),
                True,
            )
        depth = len(self._path)
        try:
            upstream_valid, _ = self._check(source)
        except Exception as error:  # noqa: BLE001  # ComfyUI reports whatever a check raises
            del self._path[depth:]
            reason = _input_reason(
                "exception_during_inner_validation",
                "Exception when validating inner node",
                str(error),
                spec,
                exception_message=str(error),
                exception_type=type_name(error),
                traceback=traceback.format_tb(error.__traceback__),
                linked_node=link,
            )
            self._validated[source] = (False, [reason])
            upstream_valid = False
        return None, upstream_valid

    def _check_value(self, spec: InputSpec, inputs: dict[str, Any], class_type: str) -> dict[str, Any] | None:
        """Coerce a literal value in place and hold it against range and choices."""
        value = inputs[spec.name]
        try:
            if isinstance(value, dict) and "__value__" in value:
                value = inputs[spec.name] = value["__value__"]
            if isinstance(spec.kind, str) and spec.kind in type_converters:
                value = inputs[spec.name] = type_converters[spec.kind](value)
        except Exception as error:  # noqa: BLE001  # ComfyUI reports whatever the conversion raises
            message = f"Failed to convert an input value to a {spec.kind} value"
            details = f"{spec.name}, {value}, {error}"
            return _input_reason(
                "invalid_input_type",
                message,
                details,
                spec,
                received_value=value,
                exception_message=str(error),
            )
        if FILE_INPUTS.get(class_type) == spec.name:
            return None  # checked by the file's existence instead
        low, high = spec.options.get("min"), spec.options.get("max")
        if low is not None and value < low:
            message = f"Value {value} smaller than min of {low}"
            return _input_reason("value_smaller_than_min", message, spec.name, spec, received_value=value)
        if high is not None and value > high:
            message = f"Value {value} bigger than max of {high}"
            return _input_reason("value_bigger_than_max", message, spec.name, spec, received_value=value)
        return self._check_choice(spec, value)

    def _check_choice(self, spec: InputSpec, value: Any) -> dict[str, Any] | None:
        checked = isinstance(spec.kind, list) or self._flavor.new_combos_checked
        if not checked or spec.choices is None or value in spec.choices:
            return None
        long = len(spec.choices) > LONG_LIST
        quoted = f"(list of length {len(spec.choices)})" if long else str(spec.choices)
        extra = {
            "input_name": spec.name,
            "input_config": None if long else spec.config,
            "received_value": value,
        }
        details = f"{spec.name}: '{value}' not in {quoted}"
        return _reason("value_not_in_list", "Value not in list", details, extra)

    def _check_file(self, class_type: str, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        field = FILE_INPUTS.get(class_type)
        if field is None:
            return []
        if field not in inputs:
            missing = f"1 required positional argument: '{field}'"
            raise TypeError(f"{class_type}.VALIDATE_INPUTS() missing {missing}")
        name: Any = None if isinstance(inputs[field], list) else inputs[field]  # a link has no value yet
        if self._folders.input_path(name, confined=self._flavor.inputs_confined) is not None:
            return []
        details = f"{field} - Invalid image file: {name}"
        return [
            _reason(
                "custom_validation_failed",
                "Custom validation failed for node",
                details,
                {"input_name": field},
            )
        ]

    def _note_cycle(self, node_id: str) -> None:
        """0.33.0 names every node of a cycle; 0.3.75 finds it by recursion and names none."""
        if not self._flavor.detailed_graph_errors:
            return
        cycle = self._path[self._path.index(node_id) :]
        names = [f"{member} ({self._prompt[member]['class_type']})" for member in [*cycle, node_id]]
        for member in cycle:
            extra = {"node_id": member, "cycle_nodes": cycle}
            self._cycle_errors[member] = _reason(
                "dependency_cycle", "Dependency cycle detected", " -> ".join(names), extra
            )


def types_match(received: Any, expected: Any) -> bool:
    """Whether an output of type `received` may feed an input of type `expected`."""
    if received == expected:
        return True
    if not isinstance(received, str) or not isinstance(expected, str):
        return False
    given = {kind.strip() for kind in received.split(",")}
    wanted = {kind.strip() for kind in expected.split(",")}
    return "*" in given or "*" in wanted or bool(given & wanted)


def type_name(error: BaseException) -> str:
    """The exception's type as ComfyUI spells it: `re.error`, `KeyError`, `PIL.UnidentifiedImageError`."""
    kind = type(error)
    if kind is re.error:
        return "re.error"  # Python 3.13 calls it PatternError; ComfyUI is measured on an older one
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _class_error(node_id: str, node: Any, catalog: Catalog, flavor: Flavor) -> dict[str, Any] | None:
    """The error of a node without a known class, or None."""
    if "class_type" in node and catalog.classes.get(node["class_type"]) is not None:
        return None
    details = f"Node ID '#{node_id}'"
    if flavor.detailed_graph_errors:
        class_type = node.get("class_type")
        title = node.get("_meta", {}).get("title")
        extra = {"node_id": node_id, "class_type": class_type, "node_title": title}
        if class_type is None:
            message = f"Node '{title or node_id}' has no class_type. The workflow may be corrupted."
        else:
            message = f"Node '{title or class_type}' not found. The custom node may not be installed."
        return _error("missing_node_type", message, details, extra)
    if "class_type" not in node:
        message = "Cannot execute because a node is missing the class_type property."
    else:
        message = f"Cannot execute because node {node['class_type']} does not exist."
    return _error("invalid_prompt", message, details)


def _error(kind: str, message: str, details: str = "", extra: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": kind, "message": message, "details": details, "extra_info": extra or {}}


def _reason(kind: str, message: str, details: str, extra: dict[str, Any]) -> dict[str, Any]:
    return {"type": kind, "message": message, "details": details, "extra_info": extra}


def _input_reason(kind: str, message: str, details: str, spec: InputSpec, **extra: Any) -> dict[str, Any]:
    info = {"input_name": spec.name, "input_config": spec.config, **extra}
    return _reason(kind, message, details, info)
