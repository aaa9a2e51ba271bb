"""The shapes of the Comfy API v2: what may be sent, and every key of what comes back; never a decision.

Requests ignore unknown fields, but in `extra_data`. A key of an answer that is `UNSET` is left out.
"""

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from comfyd.api.schemas import ExtraDataRequest, Moment, Priority, PriorityWord, WebhookUrl

LABELS: Final = 16
LABEL_KEY: Final = 40
"""Characters at most."""
LABEL_VALUE: Final = 256
"""Bytes at most."""

JobStatusWord = Literal["queued", "running", "succeeded", "canceling", "canceled", "failed", "expired"]
OutputTypeWord = Literal["image", "video", "audio", "text", "file", "latent"]
Hash = Annotated[
    str, Meta(description="`blake3:<hex>`.", examples=["blake3:af1349b9f5f9a1a6a0404dea36dcc949"])
]
TemplateName = Annotated[str, Meta(min_length=1, max_length=100)]
Labels = Annotated[
    dict[
        Annotated[
            str, Meta(min_length=1, max_length=LABEL_KEY, extra_json_schema={"pattern": "^[A-Za-z0-9_.-]+$"})
        ],
        Annotated[
            str, Meta(description=f"At most {LABEL_VALUE} bytes, and nothing that controls a terminal.")
        ],
    ],
    Meta(max_length=LABELS),
]


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A workflow to run: a graph in ComfyUI's API format, or a template's name."""

    workflow: Annotated[
        dict[str, Any] | UnsetType, Meta(description="The graph; what stands for an asset is replaced.")
    ] = UNSET
    template: Annotated[
        TemplateName | UnsetType, Meta(description="The name of a template, instead of `workflow`.")
    ] = UNSET
    inputs: Annotated[
        dict[str, Any],
        Meta(
            description="By the template's input names; for a graph by `node_id.input` or `Node title.input`."
        ),
    ] = {}
    extra_data: ExtraDataRequest = ExtraDataRequest()
    metadata: Labels = {}
    priority: Annotated[
        Priority | PriorityWord, Meta(description="Higher first; low is -10, normal 0, high 10.")
    ] = 0
    webhook_url: Annotated[
        WebhookUrl | None, Meta(description="Where to send signed messages of what becomes of the job.")
    ] = None


class JobProgressView(msgspec.Struct, frozen=True, kw_only=True):
    """How far a job is; each is complete."""

    value: Annotated[float, Meta(ge=0, le=1)]
    nodes_done: int
    nodes_total: int
    current_node: str | None = None
    current_node_class: str | None = None
    step: int | None = None
    steps: int | None = None
    message: str | None = None


class JobErrorView(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job failed, or that it was canceled."""

    code: str
    message: str
    node_id: str | None
    class_type: str | None
    traceback: None = None


class JobOutputView(msgspec.Struct, frozen=True, kw_only=True):
    """One stored result; `id` names it as an asset."""

    node_id: str
    name: str
    type: OutputTypeWord
    content_type: str
    size_bytes: int
    id: str
    hash: Hash | None
    url: Annotated[str, Meta(description="Where to fetch it, for as long as `url_expires_at` says.")]
    url_expires_at: Moment
    job_id: str
    sha256: str
    width: int | UnsetType
    height: int | UnsetType
    duration: Annotated[float | UnsetType, Meta(description="Seconds.")]
    text: Annotated[str | UnsetType, Meta(description="A text output itself, where it is short.")]


class JobMetricsView(msgspec.Struct, frozen=True, kw_only=True):
    """What took how long, in milliseconds; null while it is not known."""

    queue_ms: int | None
    execution_ms: int | None


class JobUrlsView(msgspec.Struct, frozen=True, kw_only=True):
    """Where to go on from a job: below the host that was asked, whatever its name and scheme."""

    self: str
    events: str
    cancel: str


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A task as it stands now."""

    id: str
    status: JobStatusWord
    created_at: Moment
    started_at: Moment | None
    completed_at: Moment | None
    expires_at: Annotated[Moment, Meta(description="Until when it is kept, as things stand.")]
    queue_position: Annotated[int | None, Meta(description="1 is next; null unless it waits.")]
    progress: JobProgressView | None
    outputs: tuple[JobOutputView, ...]
    error: JobErrorView | None
    metrics: JobMetricsView
    metadata: dict[str, str]
    priority: int
    urls: JobUrlsView


class JobItemView(JobView, frozen=True, kw_only=True):
    """A job as it stands in a list, in the words of either kind of client."""

    create_time: Moment
    update_time: Moment
    deployment_id: None = None


class JobListView(msgspec.Struct, frozen=True, kw_only=True):
    """A page of jobs, newest first."""

    jobs: tuple[JobItemView, ...]
    next_cursor: Annotated[str | UnsetType, Meta(description="For the next page; absent on the last.")] = (
        UNSET
    )


class JobWorkflowView(msgspec.Struct, frozen=True, kw_only=True):
    """The graph of a job as it was accepted, with the files that stand for its assets."""

    workflow: dict[str, Any]
    format: Literal["api"] = "api"


class JobStatusView(msgspec.Struct, frozen=True, kw_only=True):
    """What a `status` event says."""

    status: JobStatusWord
    queue_position: int | None


class JobPreviewView(msgspec.Struct, frozen=True, kw_only=True):
    """What a `preview` event says."""

    node_id: str
    content_type: str
    data_base64: str


class AssetView(msgspec.Struct, frozen=True, kw_only=True):
    """A file that graphs can name: an upload, or an output of a job."""

    id: str
    hash: Hash | None
    size_bytes: int
    content_type: str
    file_path: str | None
    created_at: Moment
    url: Annotated[str, Meta(description="Where to fetch it, for as long as `url_expires_at` says.")]
    url_expires_at: Moment
    expires_at: Annotated[Moment | None, Meta(description="When it is forgotten; null for never.")]
    created_new: Annotated[
        bool | UnsetType, Meta(description="Whether its bytes were new here; in answers to uploads only.")
    ] = UNSET
    job_id: Annotated[str | UnsetType, Meta(description="The job that made it; outputs only.")] = UNSET


class HealthView(msgspec.Struct, frozen=True, kw_only=True):
    """comfyd runs; `upstream` says whether a ComfyUI does."""

    status: Literal["healthy"] = "healthy"
    upstream: Literal["ready", "unreachable"]
