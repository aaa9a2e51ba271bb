"""What each route is, for the OpenAPI document: a row for each row of `routes.ROUTES`; never behaviour."""

from typing import Any, Final, get_args

import msgspec

from comfyd import errors
from comfyd.api import schemas
from comfyd.api.inputs import FILES, UploadListView
from comfyd.api.parameters import (
    BACKEND,
    BOOLEAN,
    CURSOR,
    DELIVERY,
    KEY,
    LIMIT,
    METADATA,
    NAME,
    PREFER,
    REST,
    RUN,
    STRING,
    TASK,
    WAIT,
    Parameter,
)
from comfyd.deliveries import DeliveryStatus
from comfyd.errors import ComfydError

Row = tuple[str, str]
"""Method and path, as in `routes.ROUTES`."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of a route that is no error: of a struct, or of a media type, or without a body."""

    status: int
    description: str
    kind: type | None = None
    media_type: str | None = None


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One route."""

    id: str
    tag: str
    summary: str
    description: str = ""
    parameters: tuple[Parameter, ...] = ()
    body: type | None = None
    body_description: str | None = None
    uploads: bool = False
    """Whether the body is files: a form, or the bytes of one."""
    examples: dict[str, Any] = {}
    answers: tuple[Answer, ...]
    errors: tuple[type[ComfydError], ...] = ()


TAGS: Final = {
    "tasks": "Submit workflows, follow them, fetch what they made.",
    "webhooks": "What webhooks were told of tasks, and telling it again.",
    "workflows": "Workflow templates: graphs with named, typed inputs.",
    "comfyui": "ComfyUI itself.",
    "health": "How comfyd is.",
    "documentation": "This.",
}

_GRAPH: Final = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "blue"}},
}
_EXAMPLES: Final = {
    "template": {
        "workflow": "text-to-image",
        "inputs": {"prompt": "a lighthouse at dusk"},
        "priority": "high",
    },
    "graph": {"workflow": _GRAPH, "inputs": {"1.width": 128}, "metadata": {"customer": "42"}},
}

_BODY: Final = (errors.MalformedRequest, errors.BodyTooLarge, errors.UnsupportedMediaType)
_STORE: Final = (errors.StoreUnavailable,)
_FILES: Final = (
    errors.InputError,
    errors.BlockedAddress,
    errors.InvalidUrl,
    errors.InputTooLarge,
    errors.UnsupportedContent,
    errors.InvalidDataUri,
    errors.InputNotFound,
)
"""What may be wrong with the files that a request names or brings."""
_ACCEPTED: Final = (
    *_BODY,
    errors.UnknownWorkflow,
    errors.InvalidWorkflow,
    errors.WorkflowFormatUi,
    errors.InvalidInputs,
    *_FILES,
    errors.StorageNotConfigured,
    errors.IdempotencyKeyReuse,
    errors.QueueFull,
    *_STORE,
    errors.InsufficientStorage,
)
_COMFYUI: Final = (errors.NotFound, errors.BackendUnreachable, errors.BackendUnclear)

_DONE: Final = Answer(
    status=200, description="The task, ended while the client waited.", kind=schemas.TaskView
)
_QUEUED: Final = Answer(status=202, description="The task: durable, and to be run.", kind=schemas.TaskView)
_TASK_NOW: Final = Answer(status=200, description="The task.", kind=schemas.TaskView)
_JSON: Final = "application/json"


def _submit(name: str) -> Operation:
    return Operation(
        id=name,
        tag="tasks",
        summary="Submit a workflow",
        description="Answers when the task is on disk. What is wrong with it is found before that.",
        parameters=(WAIT, PREFER, KEY),
        body=schemas.TaskRequest,
        examples=_EXAMPLES,
        answers=(_DONE, _QUEUED),
        errors=_ACCEPTED,
    )


def _passed(method: str) -> Operation:
    return Operation(
        id=f"comfyui_{method.lower()}",
        tag="comfyui",
        summary="The rest of ComfyUI's own API",
        description="Passed through as it is, and so is the answer. WebSockets are not: follow a task.",
        parameters=(REST, BACKEND),
        body_description=None if method == "GET" else "Whatever ComfyUI takes there.",
        answers=(Answer(status=200, description="ComfyUI's answer.", media_type="*/*"),),
        errors=(errors.MalformedRequest, errors.BodyTooLarge, *_COMFYUI),
    )


OPERATIONS: Final[dict[Row, Operation]] = {
    ("POST", "/api/tasks"): _submit("submit_task"),
    ("POST", "/api/tasks/create"): _submit("create_task"),
    ("GET", "/api/tasks"): Operation(
        id="list_tasks",
        tag="tasks",
        summary="List tasks, newest first",
        parameters=(
            Parameter(
                name="status",
                description="Only these.",
                schema={"enum": list(get_args(schemas.StatusWord))},
            ),
            Parameter(name="workflow", description="Only of this template.", schema=STRING),
            METADATA,
            CURSOR,
            LIMIT,
        ),
        answers=(Answer(status=200, description="A page.", kind=schemas.TaskListView),),
        errors=(errors.MalformedRequest, *_STORE),
    ),
    ("GET", "/api/tasks/{task_id}"): Operation(
        id="read_task",
        tag="tasks",
        summary="Read a task and its results",
        parameters=(TASK, WAIT, PREFER),
        answers=(_TASK_NOW,),
        errors=(errors.MalformedRequest, errors.TaskNotFound, *_STORE),
    ),
    ("DELETE", "/api/tasks/{task_id}"): Operation(
        id="delete_task",
        tag="tasks",
        summary="Forget a task that has ended, and its files",
        parameters=(TASK,),
        answers=(Answer(status=204, description="It is forgotten."),),
        errors=(errors.TaskNotFound, errors.Conflict, *_STORE),
    ),
    ("POST", "/api/tasks/{task_id}/cancel"): Operation(
        id="cancel_task",
        tag="tasks",
        summary="Cancel exactly this task",
        description="A waiting task ends at once, a running one as soon as ComfyUI lets go of it. "
        "Canceling a task that has ended changes nothing.",
        parameters=(TASK,),
        answers=(_TASK_NOW,),
        errors=(errors.TaskNotFound, *_STORE),
    ),
    ("POST", "/api/tasks/{task_id}/retry"): Operation(
        id="retry_task",
        tag="tasks",
        summary="Run a task that has ended again",
        description="The same graph and inputs under the same id; its earlier outputs are forgotten.",
        parameters=(TASK,),
        answers=(_QUEUED,),
        errors=(errors.TaskNotFound, errors.Conflict, *_STORE, errors.InsufficientStorage),
    ),
    ("GET", "/api/tasks/{task_id}/events"): Operation(
        id="follow_task",
        tag="tasks",
        summary="Follow a task by Server-Sent Events",
        description="Events `status` (the whole task, at first and on each change), `progress`, `preview` "
        " (`node_id`, `image_type`, `data` in base64), `output` and `log`. Ends after the final status.",
        parameters=(TASK,),
        answers=(Answer(status=200, description="The events.", media_type="text/event-stream"),),
        errors=(errors.TaskNotFound, *_STORE),
    ),
    ("GET", "/api/tasks/{task_id}/ws"): Operation(
        id="follow_task_websocket",
        tag="tasks",
        summary="Follow a task by WebSocket",
        description='The same events as text frames `{"event", "data"}`.',
        parameters=(
            TASK,
            Parameter(
                name="binary_previews",
                description="Send each preview as a binary frame that is the picture.",
                schema=BOOLEAN,
            ),
        ),
        answers=(Answer(status=101, description="The WebSocket is open."),),
        errors=(errors.MalformedRequest, errors.TaskNotFound, *_STORE),
    ),
    ("POST", "/api/inputs"): Operation(
        id="upload_inputs",
        tag="tasks",
        summary="Upload files to be used as inputs",
        description=f"A form with up to {FILES} files, or the bytes of one. The same content is one upload. "
        "One that no task uses is forgotten after `inputs.keep` seconds, the others with their last task.",
        parameters=(
            Parameter(name="name", description="What a file that is no form is called.", schema=STRING),
        ),
        uploads=True,
        answers=(
            Answer(status=201, description="The references, in the order of the files.", kind=UploadListView),
        ),
        errors=(
            *_BODY,
            errors.InputTooLarge,
            errors.UnsupportedContent,
            errors.StorageError,
            errors.InsufficientStorage,
        ),
    ),
    ("GET", "/api/files/{key:path}"): Operation(
        id="read_file",
        tag="tasks",
        summary="Fetch an output",
        description="Takes `Range` (one range of bytes), `If-Range` and `If-None-Match`; tags are sha256.",
        parameters=(
            Parameter(
                name="key",
                place="path",
                description="As in the output's `url`.",
                schema=STRING,
                required=True,
            ),
            Parameter(name="expires", description="As in the output's `url`, if at all.", schema=STRING),
            Parameter(name="signature", description="As in the output's `url`, if at all.", schema=STRING),
        ),
        answers=(
            Answer(status=200, description="The file.", media_type="*/*"),
            Answer(status=206, description="A part of it.", media_type="*/*"),
            Answer(status=304, description="The client has it."),
            Answer(status=416, description="The range lies outside it."),
        ),
        errors=(errors.InvalidSignature, errors.FileNotFound, errors.StorageError, *_STORE),
    ),
    ("GET", "/api/deliveries"): Operation(
        id="list_deliveries",
        tag="webhooks",
        summary="List the messages owed to webhooks, newest first",
        parameters=(
            Parameter(name="task_id", description="Only of this task.", schema={**STRING, "format": "uuid"}),
            Parameter(
                name="status",
                description="Only these.",
                schema={"enum": [str(word) for word in DeliveryStatus]},
            ),
            CURSOR,
            LIMIT,
        ),
        answers=(Answer(status=200, description="A page.", kind=schemas.DeliveryListView),),
        errors=(errors.MalformedRequest, *_STORE),
    ),
    ("GET", "/api/deliveries/{delivery_id}"): Operation(
        id="read_delivery",
        tag="webhooks",
        summary="Read a delivery and its tries",
        parameters=(DELIVERY,),
        answers=(Answer(status=200, description="The delivery.", kind=schemas.DeliveryView),),
        errors=(errors.DeliveryNotFound, *_STORE),
    ),
    ("POST", "/api/deliveries/{delivery_id}/redeliver"): Operation(
        id="redeliver",
        tag="webhooks",
        summary="Deliver a message once more, whatever became of it",
        description="At once, and then by the schedule of retries from its start. The `webhook-id` stays.",
        parameters=(DELIVERY,),
        answers=(Answer(status=202, description="The delivery: it is due.", kind=schemas.DeliveryView),),
        errors=(errors.DeliveryNotFound, *_STORE),
    ),
    ("GET", "/api/workflows"): Operation(
        id="list_workflows",
        tag="workflows",
        summary="List the workflow templates",
        answers=(Answer(status=200, description="All of them.", kind=schemas.WorkflowListView),),
    ),
    ("GET", "/api/workflows/{name}"): Operation(
        id="read_workflow",
        tag="workflows",
        summary="Read a workflow template and the JSON Schema of its inputs",
        parameters=(NAME,),
        answers=(Answer(status=200, description="The template.", kind=schemas.WorkflowView),),
        errors=(errors.UnknownWorkflow,),
    ),
    ("POST", "/api/workflows/{name}/run"): Operation(
        id="run_workflow",
        tag="workflows",
        summary="Run a workflow template",
        description="The body is the inputs; everything else is a query parameter.",
        parameters=(NAME, *RUN),
        body=dict[str, Any],
        body_description="The inputs by name.",
        answers=(_DONE, _QUEUED),
        errors=_ACCEPTED,
    ),
    ("GET", "/api/comfyui-queue-status"): Operation(
        id="comfyui_queue_status",
        tag="comfyui",
        summary="ComfyUI's own queue",
        parameters=(BACKEND,),
        answers=(Answer(status=200, description="As ComfyUI answers.", media_type=_JSON),),
        errors=_COMFYUI,
    ),
    ("GET", "/api/comfyui-system-stats"): Operation(
        id="comfyui_system_stats",
        tag="comfyui",
        summary="ComfyUI's version, memory and devices",
        parameters=(BACKEND,),
        answers=(Answer(status=200, description="As ComfyUI answers.", media_type=_JSON),),
        errors=_COMFYUI,
    ),
    ("POST", "/api/comfyui-interrupt"): Operation(
        id="comfyui_interrupt",
        tag="comfyui",
        summary="End what ComfyUI runs now",
        description="A run of a task is ended by canceling the task.",
        parameters=(BACKEND,),
        answers=(Answer(status=200, description="What was ended.", kind=schemas.InterruptView),),
        errors=(*_COMFYUI, *_STORE),
    ),
    **{
        (method, "/api/comfyui/{path:path}"): _passed(method)
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
    },
    ("GET", "/api/health"): Operation(
        id="health",
        tag="health",
        summary="Whether comfyd is alive",
        answers=(Answer(status=200, description="It is.", kind=schemas.AliveView),),
    ),
    ("GET", "/api/ready"): Operation(
        id="ready",
        tag="health",
        summary="Whether comfyd can work, and why not",
        answers=(
            Answer(status=200, description="It can.", kind=schemas.ReadyView),
            Answer(status=503, description="It cannot; tasks are accepted and wait.", kind=schemas.ReadyView),
        ),
    ),
    ("GET", "/api/status"): Operation(
        id="status",
        tag="health",
        summary="comfyd in detail",
        answers=(Answer(status=200, description="Figures and configuration.", kind=schemas.StatusView),),
        errors=_STORE,
    ),
    ("GET", "/metrics"): Operation(
        id="metrics",
        tag="health",
        summary="Figures for Prometheus",
        answers=(Answer(status=200, description="The figures.", media_type="text/plain"),),
    ),
    ("GET", "/openapi.json"): Operation(
        id="openapi",
        tag="documentation",
        summary="This document",
        answers=(Answer(status=200, description="OpenAPI 3.1.", media_type=_JSON),),
    ),
    ("GET", "/docs"): Operation(
        id="docs",
        tag="documentation",
        summary="This document to try out",
        answers=(Answer(status=200, description="A page.", media_type="text/html"),),
    ),
    ("GET", "/docs/{file}"): Operation(
        id="docs_file",
        tag="documentation",
        summary="The files of that page",
        parameters=(
            Parameter(name="file", place="path", description="Its name.", schema=STRING, required=True),
        ),
        answers=(Answer(status=200, description="The file.", media_type="*/*"),),
        errors=(errors.FileNotFound,),
    ),
    ("GET", "/"): Operation(
        id="home",
        tag="documentation",
        summary="Leads to the documentation",
        answers=(Answer(status=307, description="To /docs."),),
    ),
}
