"""The routes of comfyd itself and of ComfyUI, as the OpenAPI document describes them; never behaviour."""

from typing import Final

from comfyd import errors
from comfyd.api import schemas
from comfyd.api.operations.operation import JSON, STORE, Answer, Operation, Row
from comfyd.api.parameters import BACKEND, REST, STRING, Parameter

_COMFYUI: Final = (errors.NotFound, errors.BackendUnreachable, errors.BackendUnclear)


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
    ("GET", "/api/comfyui-queue-status"): Operation(
        id="comfyui_queue_status",
        tag="comfyui",
        summary="ComfyUI's own queue",
        parameters=(BACKEND,),
        answers=(Answer(status=200, description="As ComfyUI answers.", media_type=JSON),),
        errors=_COMFYUI,
    ),
    ("GET", "/api/comfyui-system-stats"): Operation(
        id="comfyui_system_stats",
        tag="comfyui",
        summary="ComfyUI's version, memory and devices",
        parameters=(BACKEND,),
        answers=(Answer(status=200, description="As ComfyUI answers.", media_type=JSON),),
        errors=_COMFYUI,
    ),
    ("POST", "/api/comfyui-interrupt"): Operation(
        id="comfyui_interrupt",
        tag="comfyui",
        summary="End what ComfyUI runs now",
        description="A run of a task is ended by canceling the task.",
        parameters=(BACKEND,),
        answers=(Answer(status=200, description="What was ended.", kind=schemas.InterruptView),),
        errors=(*_COMFYUI, *STORE),
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
        errors=STORE,
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
        answers=(Answer(status=200, description="OpenAPI 3.1.", media_type=JSON),),
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
