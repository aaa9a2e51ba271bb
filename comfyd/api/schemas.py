"""The shapes of requests and answers: what may be sent, and every key of what comes back; never a decision.

Requests refuse unknown fields. Answers always have every key, null where a value is not known. The OpenAPI
document is made from these structs.
"""

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from comfyd.config import Prefix, StorageName
from comfyd.credentials import LONGEST
from comfyd.deliveries import DeliveryStatus
from comfyd.tasks import EventType, PictureFormat

METADATA_PAIRS: Final = 16
METADATA_KEY: Final = 64
METADATA_VALUE: Final = 512
WEBHOOK_URL: Final = 2048
"""Characters at most."""

StatusWord = Literal["PENDING", "PROCESSING", "COMPLETED", "FAILED", "CANCELED"]
Moment = Annotated[
    str, Meta(extra_json_schema={"format": "date-time"}, examples=["2025-11-23T11:41:07.250Z"])
]
PriorityWord = Literal["low", "normal", "high"]
Priority = Annotated[int, Meta(ge=-1000, le=1000)]
Attempts = Annotated[int, Meta(ge=1, le=100)]
Patience = Annotated[float, Meta(gt=0, le=1e9, description="Seconds.")]
Quality = Annotated[int, Meta(ge=1, le=100)]
Metadata = Annotated[
    dict[
        Annotated[str, Meta(min_length=1, max_length=METADATA_KEY)],
        Annotated[str, Meta(max_length=METADATA_VALUE)],
    ],
    Meta(max_length=METADATA_PAIRS),
]
WebhookUrl = Annotated[str, Meta(min_length=1, max_length=WEBHOOK_URL)]
WebhookEvents = Annotated[
    tuple[EventType, ...], Meta(min_length=1, max_length=5, extra_json_schema={"uniqueItems": True})
]

PRIORITIES: dict[str, int] = {"low": -10, "normal": 0, "high": 10}


class OutputRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is wanted of the outputs."""

    include_temp: Annotated[bool, Meta(description="Also keep ComfyUI's temporary previews.")] = False
    storage: Annotated[
        StorageName | None, Meta(description="Where they go; one that is configured. Null is the default.")
    ] = None
    prefix: Annotated[Prefix, Meta(description="Folders before their names in the storage.")] = ""
    format: Annotated[
        PictureFormat | None, Meta(description="Convert pictures to this; what moves only where it can.")
    ] = None
    quality: Annotated[
        Quality | None, Meta(description="Of jpeg, webp and avif, 1 to 100; with `format`.")
    ] = None
    metadata: Annotated[
        Literal["keep", "strip"],
        Meta(description="`strip` takes prompts, workflows and other metadata out of the files."),
    ] = "keep"
    inline: Annotated[bool, Meta(description="Show small outputs in the task itself, in base64.")] = False


class ExtraDataRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is for ComfyUI besides the graph. It is kept in memory only, until the task ends."""

    api_key_comfy_org: Annotated[
        Annotated[str, Meta(min_length=1, max_length=LONGEST)] | None,
        Meta(description="The key of a Comfy account, for nodes that call paid services; printable."),
    ] = None

    def __repr__(self) -> str:
        return "ExtraDataRequest(...)"


class TaskRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A workflow to run: a template's name, or a graph in ComfyUI's API format."""

    workflow: Annotated[str, Meta(min_length=1, max_length=100)] | dict[str, Any]
    inputs: Annotated[
        dict[str, Any],
        Meta(
            description="By the template's input names; for a graph by `node_id.input` or `Node title.input`."
        ),
    ] = {}
    priority: Annotated[
        Priority | PriorityWord, Meta(description="Higher first; low is -10, normal 0, high 10.")
    ] = 0
    max_attempts: Attempts | None = None
    timeout: Annotated[Patience | None, Meta(description="Seconds that ComfyUI may execute the prompt.")] = (
        None
    )
    start_timeout: Annotated[
        Patience | None, Meta(description="Seconds that the prompt may wait inside ComfyUI.")
    ] = None
    metadata: Metadata = {}
    output: OutputRequest = OutputRequest()
    webhook_url: Annotated[
        WebhookUrl | None, Meta(description="Where to send signed messages of what becomes of the task.")
    ] = None
    callback_url: Annotated[WebhookUrl | None, Meta(description="Another name of `webhook_url`.")] = (
        msgspec.field(name="callbackUrl", default=None)
    )
    webhook_events: Annotated[
        WebhookEvents | None, Meta(description="What to tell of; null is how the task ends, in any way.")
    ] = None
    extra_data: ExtraDataRequest | None = None


class ProgressView(msgspec.Struct, frozen=True, kw_only=True):
    """How far a task is; null where not known, as in a task that failed."""

    value: Annotated[float, Meta(ge=0, le=1)] | None
    nodes_done: int | None
    nodes_total: int
    current_node: str | None
    current_node_class: str | None
    step: int | None
    steps: int | None
    message: str | None


class StoredView(msgspec.Struct, frozen=True, kw_only=True):
    """One stored result, but not itself."""

    node_id: str
    name: str
    type: Literal["image", "video", "audio", "text", "latent", "file"]
    content_type: str
    size_bytes: int
    sha256: str
    width: int | None
    height: int | None
    duration: Annotated[float | None, Meta(description="Seconds.")]
    url: Annotated[str, Meta(description="Where to fetch it; it may expire: the task then has a new one.")]
    storage: Annotated[str, Meta(description="The storage that has it.")]
    text: Annotated[str | None, Meta(description="A text output itself, where it is short.")]


class OutputView(StoredView, frozen=True, kw_only=True):
    """One stored result."""

    data: Annotated[
        str | None, Meta(description="The file in base64, where `output.inline` was asked and it is small.")
    ]


class TaskErrorView(msgspec.Struct, frozen=True, kw_only=True):
    """Why a task or an attempt failed."""

    code: str
    message: str
    details: dict[str, Any]
    retryable: bool


class AttemptView(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a task; its id is ComfyUI's `prompt_id`."""

    number: int
    id: str
    backend: str | None
    started_at: Moment
    ended_at: Moment | None
    outcome: Annotated[
        str | None,
        Meta(
            description="`succeeded failed canceled`, or `lost suspect stray` where it was not its own fault."
        ),
    ]
    error: TaskErrorView | None


class UrlsView(msgspec.Struct, frozen=True, kw_only=True):
    """Where to go on from a task."""

    self: str
    events: str
    ws: str
    cancel: str
    retry: str
    deliveries: str


class TaskView(msgspec.Struct, frozen=True, kw_only=True):
    """A task as it stands now."""

    task_id: str
    status: StatusWord
    workflow: Annotated[str | None, Meta(description="The template's name; null for a graph.")]
    inputs: Annotated[
        dict[str, Any] | None, Meta(description="The values used, with defaults and drawn seeds.")
    ]
    priority: int
    created_at: Moment
    started_at: Moment | None
    completed_at: Moment | None
    cancel_requested: bool
    queue_position: Annotated[int | None, Meta(description="1 is next; null unless it waits.")]
    eta_seconds: Annotated[
        float | None, Meta(description="Until the task ends, learned from past runs of the same workflow.")
    ]
    progress: ProgressView
    outputs: tuple[OutputView, ...]
    error: TaskErrorView | None
    attempts: tuple[AttemptView, ...]
    metadata: dict[str, str]
    urls: UrlsView


class TaskListView(msgspec.Struct, frozen=True, kw_only=True):
    """A page of tasks, newest first."""

    tasks: tuple[TaskView, ...]
    next_cursor: Annotated[str | None, Meta(description="For the next page; null on the last.")]


class DeliveryTryView(msgspec.Struct, frozen=True, kw_only=True):
    """One try to deliver."""

    number: int
    at: Moment
    duration_ms: int
    status: Annotated[int | None, Meta(description="The receiver's HTTP status; null where it gave none.")]
    error: Annotated[str | None, Meta(description="Why it does not count; null for a 2xx.")]


class DeliveryView(msgspec.Struct, frozen=True, kw_only=True):
    """One message owed to a webhook; `id` is its `webhook-id`, the same on every try."""

    id: str
    task_id: str
    type: EventType
    url: Annotated[str, Meta(description="Without what its query says, and without a password.")]
    status: Annotated[
        DeliveryStatus,
        Meta(description="`failed` when all tries are used up, `gone` when the receiver answered 410."),
    ]
    created_at: Moment
    next_at: Annotated[Moment | None, Meta(description="When it is tried next; null unless it is pending.")]
    ended_at: Moment | None
    tries: Annotated[tuple[DeliveryTryView, ...], Meta(description="Oldest first.")]


class DeliveryListView(msgspec.Struct, frozen=True, kw_only=True):
    """A page of deliveries, newest first."""

    deliveries: tuple[DeliveryView, ...]
    next_cursor: Annotated[str | None, Meta(description="For the next page; null on the last.")]


class TemplateInputView(msgspec.Struct, frozen=True, kw_only=True):
    """One input of a workflow template."""

    name: str
    title: str
    description: str
    type: str
    default: str | int | float | bool | None
    minimum: int | float | None
    maximum: int | float | None
    step: int | float | None
    choices: tuple[str | int | float | bool, ...] | None
    required: bool
    random: bool


class WorkflowView(msgspec.Struct, frozen=True, kw_only=True):
    """A workflow template."""

    name: str
    title: str
    description: str
    inputs: tuple[TemplateInputView, ...]
    input_schema: Annotated[dict[str, Any], Meta(description="JSON Schema of the inputs object.")]
    problem: Annotated[
        str | None, Meta(description="What is wrong with its files now; the last good version stays in use.")
    ]
    version: str
    run: Annotated[str, Meta(description="Where to POST the inputs.")]


class TemplateProblemView(msgspec.Struct, frozen=True, kw_only=True):
    """A workflow file that cannot be read."""

    name: str
    file: str
    line: int | None
    message: str


class WorkflowListView(msgspec.Struct, frozen=True, kw_only=True):
    """All workflow templates, and what is wrong with their files."""

    workflows: tuple[WorkflowView, ...]
    problems: tuple[TemplateProblemView, ...]


class InterruptView(msgspec.Struct, frozen=True, kw_only=True):
    """What was interrupted; nulls where nothing ran."""

    backend: str
    prompt_id: str | None
    task_id: Annotated[
        str | None,
        Meta(description="The task that this was a run of: it is canceled. Null for a foreign prompt."),
    ]


class AliveView(msgspec.Struct, frozen=True, kw_only=True):
    """comfyd runs."""

    status: Literal["ok"]
    version: str


class CheckView(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a part can work, and why not."""

    ok: bool
    reason: str | None


class BackendView(msgspec.Struct, frozen=True, kw_only=True):
    """How one ComfyUI stands."""

    name: str
    url: str
    ready: bool
    reason: str | None
    version: str | None
    socket: Annotated[
        bool, Meta(description="Whether the shared WebSocket is open; without it comfyd polls.")
    ]
    since: Moment


class LoopView(msgspec.Struct, frozen=True, kw_only=True):
    """A background loop whose last step failed; it is tried again."""

    name: str
    reason: str


class StorageView(msgspec.Struct, frozen=True, kw_only=True):
    """A storage that fails: results wait for it, and tasks are worked on meanwhile."""

    name: str
    reason: str


class ChecksView(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at."""

    store: CheckView
    disk: Annotated[CheckView, Meta(description="Whether `data.dir` has room for new work.")]
    comfyui: tuple[BackendView, ...]
    storages: tuple[StorageView, ...]
    loops: tuple[LoopView, ...]


class ReadyView(msgspec.Struct, frozen=True, kw_only=True):
    """Whether comfyd can work now: the database answers, the disk has room, a ComfyUI is ready."""

    ready: bool
    checks: ChecksView


class QueueView(msgspec.Struct, frozen=True, kw_only=True):
    """The queue in figures."""

    waiting: int
    running: int
    limit: int


class StatusView(msgspec.Struct, frozen=True, kw_only=True):
    """comfyd in detail; no secrets."""

    version: str
    started_at: Moment
    uptime_seconds: float
    tasks: dict[StatusWord, int]
    queue: QueueView
    backends: tuple[BackendView, ...]
    watchers: Annotated[int, Meta(description="Readers of event streams and waiting requests.")]
    loops: tuple[LoopView, ...]
    storage: str
    workflows: int
    configuration: dict[str, Any]


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong: `code` for programs, `message` for people."""

    code: str
    message: str
    details: dict[str, Any]


class ErrorView(msgspec.Struct, frozen=True, kw_only=True):
    """The envelope of every error."""

    error: ErrorBody
