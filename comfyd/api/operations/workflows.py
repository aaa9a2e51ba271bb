"""The routes of templates and of webhooks, as the OpenAPI document describes them; never behaviour."""

from typing import Any, Final

from comfyd import errors
from comfyd.api import schemas
from comfyd.api.operations.operation import ACCEPTED, DONE, QUEUED, STORE, Answer, Operation, Row
from comfyd.api.parameters import CURSOR, DELIVERY, LIMIT, NAME, RUN, STRING, Parameter
from comfyd.deliveries import DeliveryStatus

OPERATIONS: Final[dict[Row, Operation]] = {
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
        errors=(errors.MalformedRequest, *STORE),
    ),
    ("GET", "/api/deliveries/{delivery_id}"): Operation(
        id="read_delivery",
        tag="webhooks",
        summary="Read a delivery and its tries",
        parameters=(DELIVERY,),
        answers=(Answer(status=200, description="The delivery.", kind=schemas.DeliveryView),),
        errors=(errors.DeliveryNotFound, *STORE),
    ),
    ("POST", "/api/deliveries/{delivery_id}/redeliver"): Operation(
        id="redeliver",
        tag="webhooks",
        summary="Deliver a message once more, whatever became of it",
        description="At once, and then by the schedule of retries from its start. The `webhook-id` stays.",
        parameters=(DELIVERY,),
        answers=(Answer(status=202, description="The delivery: it is due.", kind=schemas.DeliveryView),),
        errors=(errors.DeliveryNotFound, *STORE),
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
        answers=(DONE, QUEUED),
        errors=ACCEPTED,
    ),
}
