"""The routes of tasks and of their files, as the OpenAPI document describes them; never behaviour."""

from typing import Final, get_args

from comfyd import errors
from comfyd.api import schemas
from comfyd.api.inputs import FILES, UploadListView
from comfyd.api.operations.operation import ACCEPTED, BODY, DONE, QUEUED, STORE, Answer, Operation, Row
from comfyd.api.parameters import BOOLEAN, CURSOR, KEY, LIMIT, METADATA, PREFER, STRING, TASK, WAIT, Parameter

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

_TASK_NOW: Final = Answer(status=200, description="The task.", kind=schemas.TaskView)


def _submit(name: str) -> Operation:
    return Operation(
        id=name,
        tag="tasks",
        summary="Submit a workflow",
        description="Answers when the task is on disk. What is wrong with it is found before that.",
        parameters=(WAIT, PREFER, KEY),
        body=schemas.TaskRequest,
        examples=_EXAMPLES,
        answers=(DONE, QUEUED),
        errors=ACCEPTED,
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
        errors=(errors.MalformedRequest, *STORE),
    ),
    ("GET", "/api/tasks/{task_id}"): Operation(
        id="read_task",
        tag="tasks",
        summary="Read a task and its results",
        parameters=(TASK, WAIT, PREFER),
        answers=(_TASK_NOW,),
        errors=(errors.MalformedRequest, errors.TaskNotFound, *STORE),
    ),
    ("DELETE", "/api/tasks/{task_id}"): Operation(
        id="delete_task",
        tag="tasks",
        summary="Forget a task that has ended, and its files",
        parameters=(TASK,),
        answers=(Answer(status=204, description="It is forgotten."),),
        errors=(errors.TaskNotFound, errors.Conflict, *STORE),
    ),
    ("POST", "/api/tasks/{task_id}/cancel"): Operation(
        id="cancel_task",
        tag="tasks",
        summary="Cancel exactly this task",
        description="A waiting task ends at once, a running one as soon as ComfyUI lets go of it. "
        "Canceling a task that has ended changes nothing.",
        parameters=(TASK,),
        answers=(_TASK_NOW,),
        errors=(errors.TaskNotFound, *STORE),
    ),
    ("POST", "/api/tasks/{task_id}/retry"): Operation(
        id="retry_task",
        tag="tasks",
        summary="Run a task that has ended again",
        description="The same graph and inputs under the same id; its earlier outputs are forgotten.",
        parameters=(TASK,),
        answers=(QUEUED,),
        errors=(errors.TaskNotFound, errors.Conflict, *STORE, errors.InsufficientStorage),
    ),
    ("GET", "/api/tasks/{task_id}/events"): Operation(
        id="follow_task",
        tag="tasks",
        summary="Follow a task by Server-Sent Events",
        description="Events `status` (the whole task, at first and on each change), `progress`, `preview` "
        " (`node_id`, `image_type`, `data` in base64), `output` and `log`. Ends after the final status.",
        parameters=(TASK,),
        answers=(Answer(status=200, description="The events.", media_type="text/event-stream"),),
        errors=(errors.TaskNotFound, *STORE),
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
        errors=(errors.MalformedRequest, errors.TaskNotFound, *STORE),
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
            *BODY,
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
            Answer(status=416, description="The range lies outside it.", kind=schemas.ErrorView),
        ),
        errors=(errors.InvalidSignature, errors.FileNotFound, errors.StorageError, *STORE),
    ),
}
