"""What each route is, for the OpenAPI document: a row for each row of `routes.ROUTES`; never behaviour."""

from typing import Final

from comfyd.api.operations import comfy_v2, service, tasks, workflows
from comfyd.api.operations.operation import Answer, Operation, Row

__all__ = ["OPERATIONS", "TAGS", "Answer", "Operation", "Row"]

TAGS: Final = {
    "tasks": "Submit workflows, follow them, fetch what they made.",
    "webhooks": "What webhooks were told of tasks, and telling it again.",
    "workflows": "Workflow templates: graphs with named, typed inputs.",
    "Comfy API v2": "The same tasks in the words of the official SDKs; some error codes differ.",
    "comfyui": "ComfyUI itself.",
    "health": "How comfyd is.",
    "documentation": "This.",
}

OPERATIONS: Final[dict[Row, Operation]] = {
    **tasks.OPERATIONS,
    **workflows.OPERATIONS,
    **comfy_v2.OPERATIONS,
    **service.OPERATIONS,
}
