"""Workflow templates: a graph plus named, typed inputs; never reads a file and never asks ComfyUI.

- `templates`: what a template and its inputs are.
- `files`: a template from the text of its `.json` and `.toml`, and back.
- `discovery`: the inputs of a graph that has no `.toml`.
- `values`: values that fit the inputs, and the graph they make.

The shipped templates are data files in the folder `workflows/` beside the package.
"""

from comfyd.workflows.discovery import discover_inputs
from comfyd.workflows.files import parse_template, template_toml
from comfyd.workflows.templates import (
    FILE_TYPES,
    INPUT_TYPES,
    InputType,
    TemplateInput,
    WorkflowTemplate,
)
from comfyd.workflows.values import Rendered, apply_inputs, fit_value, json_schema, render

__all__ = [
    "FILE_TYPES",
    "INPUT_TYPES",
    "InputType",
    "Rendered",
    "TemplateInput",
    "WorkflowTemplate",
    "apply_inputs",
    "discover_inputs",
    "fit_value",
    "json_schema",
    "parse_template",
    "render",
    "template_toml",
]
