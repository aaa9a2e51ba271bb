"""The routes of the Comfy API v2, as the OpenAPI document describes them; never behaviour."""

from typing import Any, Final, get_args

from comfyd import errors
from comfyd.api.operations.operation import ACCEPTED, BODY, STORE, Answer, Operation, Row
from comfyd.api.parameters import CURSOR, KEY_ONCE, STRING, Parameter
from comfyd.api.schemas import ErrorView
from comfyd.api.v2 import assets, schemas
from comfyd.api.v2.errors import InvalidField, InvalidLabelFilter, InvalidLabels
from comfyd.api.v2.jobs import FILTERS, PAGE, PAGE_MOST

TAG: Final = "Comfy API v2"

_JOB: Final = Parameter(
    name="job_id",
    place="path",
    description="The job: a task's id.",
    schema={"type": "string", "format": "uuid"},
    required=True,
)
_ASSET: Final = Parameter(
    name="asset_id",
    place="path",
    description="An upload, or an output of a job.",
    schema=STRING,
    required=True,
)
_HASH: Final = Parameter(
    name="hash",
    place="path",
    description="Of the bytes, as `blake3:<hex>`.",
    schema=STRING,
    required=True,
)
_RANGE: Final = Parameter(
    name="Range", place="header", description="One range of bytes, as `bytes=0-1048575`.", schema=STRING
)
_EXAMPLES: Final = {
    "graph": {
        "workflow": {
            "1": {
                "class_type": "EmptyImage",
                "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255},
            },
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "blue"}},
        },
        "metadata": {"customer": "42"},
    },
    "template": {"template": "text-to-image", "inputs": {"prompt": "a lighthouse at dusk"}},
}
_FORM: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["file", "content_type", "file_path"],
    "properties": {
        "content_type": {"type": "string", "examples": ["image/png"]},
        "file_path": {"type": "string", "examples": ["photo.png"]},
        "expected_hash": {"type": "string", "description": "`blake3:<hex>`; other bytes are refused."},
        "tags": {"type": "array", "items": {"type": "string"}, "description": "Nothing is made of them."},
        "expires_in": {"type": "integer", "minimum": 60, "maximum": 604_800, "description": "Seconds."},
        "file": {"type": "string", "format": "binary"},
    },
}
_NOW: Final = Answer(status=200, description="The job.", kind=schemas.JobView)
_MINTED: Final = (
    Answer(status=201, description="The asset.", kind=schemas.AssetView),
    Answer(status=200, description="The asset; its bytes were here.", kind=schemas.AssetView),
)


OPERATIONS: Final[dict[Row, Operation]] = {
    ("POST", "/api/v2/jobs"): Operation(
        id="submit_job",
        tag=TAG,
        summary="Submit a workflow",
        description="Answers when the job is on disk. What is wrong with it is found before that.",
        parameters=(KEY_ONCE,),
        body=schemas.JobRequest,
        examples=_EXAMPLES,
        answers=(Answer(status=201, description="The job: durable, and to be run.", kind=schemas.JobView),),
        errors=(InvalidField, InvalidLabels, *ACCEPTED),
    ),
    ("GET", "/api/v2/jobs"): Operation(
        id="list_jobs",
        tag=TAG,
        summary="List jobs, newest first",
        parameters=(
            Parameter(
                name="status",
                description="Only these.",
                schema={
                    "type": "array",
                    "items": {"enum": list(get_args(schemas.JobStatusWord))},
                    "minItems": 1,
                },
                listed=True,
            ),
            Parameter(
                name="metadata",
                description="Labels that all have to be there, as `metadata[key]=value`.",
                schema={"type": "object", "additionalProperties": STRING, "maxProperties": FILTERS},
                deep=True,
            ),
            CURSOR,
            Parameter(
                name="limit",
                description="How many on a page, at most.",
                schema={"type": "integer", "minimum": 1, "maximum": PAGE_MOST, "default": PAGE},
            ),
        ),
        answers=(Answer(status=200, description="A page.", kind=schemas.JobListView),),
        errors=(errors.MalformedRequest, errors.InvalidCursor, InvalidLabelFilter, *STORE),
    ),
    ("GET", "/api/v2/jobs/{job_id}"): Operation(
        id="read_job",
        tag=TAG,
        summary="Read a job and its outputs",
        parameters=(_JOB,),
        answers=(_NOW,),
        errors=(errors.TaskNotFound, *STORE),
    ),
    ("GET", "/api/v2/jobs/{job_id}/workflow"): Operation(
        id="read_job_workflow",
        tag=TAG,
        summary="Read the graph of a job",
        parameters=(_JOB,),
        answers=(Answer(status=200, description="The graph.", kind=schemas.JobWorkflowView),),
        errors=(errors.TaskNotFound, *STORE),
    ),
    ("GET", "/api/v2/jobs/{job_id}/events"): Operation(
        id="follow_job",
        tag=TAG,
        summary="Follow a job by Server-Sent Events",
        description="Events `status` (`JobStatusView`), `progress` (`JobProgressView`), `preview` "
        "(`JobPreviewView`) and `output` (`JobOutputView`, each once). Ends after the final status.",
        parameters=(_JOB,),
        answers=(Answer(status=200, description="The events.", media_type="text/event-stream"),),
        errors=(errors.TaskNotFound, *STORE),
    ),
    ("POST", "/api/v2/jobs/{job_id}/cancel"): Operation(
        id="cancel_job",
        tag=TAG,
        summary="Cancel exactly this job",
        description="A waiting job ends at once, a running one is `canceling` until ComfyUI lets go of it. "
        "Canceling a job that has ended changes nothing.",
        parameters=(_JOB,),
        answers=(_NOW,),
        errors=(errors.TaskNotFound, *STORE),
    ),
    ("POST", "/api/v2/assets"): Operation(
        id="upload_asset",
        tag=TAG,
        summary="Upload a file that graphs can name",
        form=_FORM,
        answers=_MINTED,
        errors=(
            *BODY,
            InvalidField,
            errors.InputTooLarge,
            errors.UnsupportedContent,
            errors.HashMismatch,
            errors.StorageError,
            *STORE,
            errors.InsufficientStorage,
        ),
    ),
    ("POST", "/api/v2/assets/from-hash"): Operation(
        id="mint_asset",
        tag=TAG,
        summary="Make an asset of bytes that are here",
        body=assets.HashRequest,
        answers=_MINTED,
        errors=(*BODY, InvalidField, errors.BlobNotFound, *STORE, errors.InsufficientStorage),
    ),
    ("HEAD", "/api/v2/assets/by-hash/{hash}"): Operation(
        id="head_asset_by_hash",
        tag=TAG,
        summary="Whether an asset can be made of these bytes without sending them",
        parameters=(_HASH,),
        answers=(
            Answer(status=200, description="It can."),
            Answer(status=404, description="It cannot."),
        ),
        errors=STORE,
    ),
    ("GET", "/api/v2/assets/{asset_id}"): Operation(
        id="read_asset",
        tag=TAG,
        summary="Read what is known of an asset, with a fresh url",
        parameters=(_ASSET,),
        answers=(Answer(status=200, description="The asset.", kind=schemas.AssetView),),
        errors=(errors.AssetNotFound, *STORE),
    ),
    ("DELETE", "/api/v2/assets/{asset_id}"): Operation(
        id="delete_asset",
        tag=TAG,
        summary="Forget an upload",
        description="Its bytes stay as long as another asset or a task names them. An output goes with its "
        "job.",
        parameters=(_ASSET,),
        answers=(Answer(status=204, description="It is forgotten."),),
        errors=(errors.AssetNotFound, errors.AssetInUse, *STORE),
    ),
    ("GET", "/api/v2/assets/{asset_id}/content"): Operation(
        id="read_asset_content",
        tag=TAG,
        summary="Fetch the bytes of an asset",
        description="Takes `Range` (one range of bytes), `If-Range` and `If-None-Match`.",
        parameters=(_ASSET, _RANGE),
        answers=(
            Answer(status=200, description="The bytes.", media_type="*/*"),
            Answer(status=206, description="A part of them.", media_type="*/*"),
            Answer(status=302, description="They are in a storage that gives them to anybody with this url."),
            Answer(status=304, description="The client has them."),
            Answer(status=416, description="The range lies outside them.", kind=ErrorView),
        ),
        errors=(
            errors.AssetNotFound,
            errors.FileNotFound,
            errors.InvalidSignature,
            errors.StorageError,
            *STORE,
        ),
    ),
    ("GET", "/api/v2/health"): Operation(
        id="comfy_health",
        tag=TAG,
        summary="Whether comfyd runs, and a ComfyUI behind it",
        answers=(Answer(status=200, description="It does.", kind=schemas.HealthView),),
    ),
}
