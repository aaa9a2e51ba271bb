"""The OpenAPI 3.1 document, made from `operations`, the structs of `schemas` and the templates at hand."""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any, Final

import msgspec

from comfyd.api import schemas
from comfyd.api.errors import COMFY_V2, FRAMEWORK_CODES, OWN, Face, status_of
from comfyd.api.notices import OutputMessage, TaskMessage
from comfyd.api.operations import OPERATIONS, TAGS, Answer, Operation
from comfyd.api.operations.comfy_v2 import TAG as COMFY_V2_TAG
from comfyd.api.parameters import SIGNED, Parameter
from comfyd.api.v2.schemas import JobPreviewView, JobStatusView
from comfyd.errors import ComfydError, ForeignOrigin
from comfyd.tasks import EventType
from comfyd.workflows import FILE_TYPES, TemplateInput, WorkflowTemplate, json_schema

_JSON: Final = "application/json"
_RUN: Final = ("POST", "/api/workflows/{name}/run")
_UPLOADS: Final[dict[str, Any]] = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "properties": {"file": {"type": "string", "format": "binary"}},
            "additionalProperties": {"type": "string", "format": "binary"},
        }
    },
    "application/octet-stream": {},
}
"""What files may be sent as; a single one as any type."""
_TOLD: Final = {
    EventType.STARTED: "A task is worked on",
    EventType.OUTPUT: "A task has ended, and this is one of its outputs",
    EventType.COMPLETED: "A task has ended well",
    EventType.FAILED: "A task has failed for good",
    EventType.CANCELED: "A task was canceled",
}
_SENT: Final = (
    "Sent to the `webhook_url` of a task whose `webhook_events` name it, as Standard Webhooks 1.0 describes: "
    "at least once, so that a receiver keeps the `webhook-id`s that it has seen."
)
_ABOUT: Final = (
    "A durable REST service in front of ComfyUI: submit a workflow, get an id at once, receive stored "
    "results. "
    'Every error is `{"error": {"code", "message", "details"}}`, and every answer carries `X-Request-Id`.'
)


def document(version: str, base: str, templates: Iterable[WorkflowTemplate]) -> dict[str, Any]:
    """The whole document; each template has its own typed operation."""
    references, components = _components()
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in OPERATIONS.items():
        plain = re.sub(r"\{(\w+):\w+\}", r"{\1}", path)
        paths.setdefault(plain, {})[method.lower()] = _operation(operation, references)
    taken = {operation.id for operation in OPERATIONS.values()}
    for template in templates:
        path = _RUN[1].replace("{name}", template.name)
        paths[path] = {"post": _run_operation(template, references, taken)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "comfyd",
            "version": version,
            "description": _ABOUT,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": base}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "webhooks": {str(event): {"post": _webhook(event, references)} for event in EventType},
        "components": {"schemas": components},
    }


@cache
def _components() -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    """How each struct is referred to, and all of their schemas."""
    kinds: list[Any] = [schemas.ErrorView, TaskMessage, OutputMessage, JobStatusView, JobPreviewView]
    for operation in OPERATIONS.values():
        kinds += [kind for kind in (operation.body, *(answer.kind for answer in operation.answers)) if kind]
    unique = list(dict.fromkeys(kinds))
    references, components = msgspec.json.schema_components(
        unique, ref_template="#/components/schemas/{name}"
    )
    return dict(zip(unique, references, strict=True)), components


def _operation(operation: Operation, references: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": _responses(operation, references),
    }
    if operation.description:
        made["description"] = operation.description
    if operation.parameters:
        made["parameters"] = [_parameter(parameter) for parameter in operation.parameters]
    if operation.body is not None:
        content: dict[str, Any] = {"schema": references[operation.body]}
        if operation.examples:
            content["examples"] = {name: {"value": value} for name, value in operation.examples.items()}
        made["requestBody"] = {"required": True, "content": {_JSON: content}}
    elif operation.form is not None:
        content = {"multipart/form-data": {"schema": operation.form}}
        made["requestBody"] = {"required": True, "content": content}
    elif operation.uploads:
        made["requestBody"] = {"required": True, "content": _UPLOADS}
    elif operation.body_description is not None:
        made["requestBody"] = {"content": {"*/*": {}}}
    if operation.body_description is not None:
        made["requestBody"]["description"] = operation.body_description
    return made


def _webhook(event: EventType, references: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    """A message that comfyd sends."""
    kind = OutputMessage if event is EventType.OUTPUT else TaskMessage
    return {
        "tags": ["webhooks"],
        "summary": _TOLD[event],
        "description": _SENT,
        "parameters": [_parameter(parameter) for parameter in SIGNED],
        "requestBody": {"required": True, "content": {_JSON: {"schema": references[kind]}}},
        "responses": {
            "2XX": {"description": "It has arrived."},
            "410": {"description": "The receiver wants nothing any more: this message is given up."},
            "default": {"description": "It is sent again later."},
        },
    }


def _parameter(parameter: Parameter) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": parameter.name,
        "in": parameter.place,
        "description": parameter.description,
        "required": parameter.required,
        "schema": parameter.schema,
    }
    if parameter.deep:
        made |= {"style": "deepObject", "explode": True}
    if parameter.listed:
        made |= {"style": "form", "explode": False}
    return made


def _responses(operation: Operation, references: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    made = {str(answer.status): _response(answer, references) for answer in operation.answers}
    face: Face = COMFY_V2 if operation.tag == COMFY_V2_TAG else OWN
    codes: dict[int, list[str]] = {}
    kinds: tuple[type[ComfydError], ...] = (ForeignOrigin, *operation.errors, ComfydError)
    for kind in kinds:
        codes.setdefault(face.status_of(kind), []).append(face.code_of(kind))
    for status, named in sorted(codes.items()):
        made.setdefault(str(status), _error_response(status, named, references))
    return made


def _response(answer: Answer, references: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {"description": answer.description}
    if answer.kind is not None:
        made["content"] = {_JSON: {"schema": references[answer.kind]}}
    elif answer.media_type is not None:
        made["content"] = {answer.media_type: {}}
    return made


def _error_response(status: int, codes: Sequence[str], references: dict[Any, Any]) -> dict[str, Any]:
    unique = list(dict.fromkeys(codes))
    words = ", ".join(f"`{code}`" for code in unique)
    example = {"error": {"code": unique[0], "message": "What is wrong, in words.", "details": {}}}
    return {
        "description": f"{HTTPStatus(status).phrase}: {words}.",
        "content": {_JSON: {"schema": references[schemas.ErrorView], "example": example}},
    }


def _run_operation(
    template: WorkflowTemplate, references: dict[Any, dict[str, Any]], taken: set[str]
) -> dict[str, Any]:
    general = OPERATIONS[_RUN]
    made = _operation(general, references)
    made["operationId"] = _fresh(f"run_{re.sub(r'[^A-Za-z0-9]+', '_', template.name)}", taken)
    made["summary"] = f"Run {template.title}"
    if template.description:
        made["description"] = template.description
    made["parameters"] = [_parameter(each) for each in general.parameters if each.place != "path"]
    schema = json_schema(template)
    del schema["$schema"]  # the document's own dialect is the same
    examples = {
        spec.name: _example(spec) for spec in template.inputs if spec.default is not None or spec.required
    }
    required = bool(schema["required"])
    made["requestBody"] = {
        "required": required,
        "description": general.body_description,
        "content": {_JSON: {"schema": schema, "example": examples}},
    }
    return made


def _example(spec: TemplateInput) -> str | int | float | bool:
    """A value that fits: the default where there is one."""
    if spec.default is not None:
        return spec.default
    if spec.choices:
        return spec.choices[0]
    if spec.type == "boolean":
        return True
    if spec.type in {"integer", "number"}:
        bounds = (spec.minimum, spec.maximum)
        return next((bound for bound in bounds if bound is not None), 1)
    return "example.png" if spec.type in FILE_TYPES else "a lighthouse at dusk"


def _fresh(name: str, taken: set[str]) -> str:
    """The name, with a number behind it where two templates' names come out the same."""
    number, fresh = 1, name
    while fresh in taken:
        number += 1
        fresh = f"{name}_{number}"
    taken.add(fresh)
    return fresh


def error_codes() -> dict[str, int]:
    """Every error code that an answer may carry, and its status."""
    codes = {code: status for status, code in FRAMEWORK_CODES.items()}
    for kind in _tree(ComfydError):
        codes.setdefault(kind.code, status_of(kind))  # what a request raises stands before what ComfyUI does
    return codes


def _tree(kind: type[ComfydError]) -> Iterator[type[ComfydError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _tree(below)
