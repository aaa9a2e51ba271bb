"""The values that cross every seam: task, attempt, claim, output file, artefact, outcome, settlement.

Never holds a connection, a clock or a decision. Times are integer UTC milliseconds; all values are frozen.
"""

import uuid
from enum import StrEnum
from typing import Any, Final, Literal

import msgspec

_ASSETS: Final = uuid.UUID("6a1f8b52-3c0d-5e7a-9b64-0d2f7c91e845")
"""The namespace of the ids of artefacts; never changes."""

Graph = dict[str, Any]
"""An API-format graph: `{node_id: {"class_type": str, "inputs": {...}, "_meta": {...}}}`."""

JsonObject = dict[str, Any]


class Status(StrEnum):
    """Where a task is. A task that waits for a retry is `queued` with `available_at` in the future."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def terminal(self) -> bool:
        """Whether the task has ended."""
        return self in TERMINAL


TERMINAL: Final = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELED})


class Step(StrEnum):
    """How far an attempt durably got. Each is entered once and in this order."""

    CLAIMED = "claimed"
    SUBMITTING = "submitting"
    SUBMITTED = "submitted"
    COLLECTED = "collected"
    SETTLED = "settled"


class OutputType(StrEnum):
    """What kind of thing an output is, in the words of the API."""

    IMAGE = "image"
    VIDEO = "video"
    AUDIO = "audio"
    TEXT = "text"
    LATENT = "latent"
    FILE = "file"


class TaskError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a task failed: `code` for programs, `message` for people, `details` such as node id and class."""

    code: str
    message: str
    retryable: bool = False
    details: JsonObject = {}


class OutputFile(msgspec.Struct, frozen=True, kw_only=True):
    """What ComfyUI made, still on the backend; `text` instead of a file where the node gave plain text."""

    node_id: str
    index: int
    """Its place among the outputs of its node: with the node id it is unique within an attempt."""
    kind: str
    """ComfyUI's own key: `images`, `audio`, `latents`, `3d`, `text` ..."""
    type: OutputType
    filename: str
    subfolder: str = ""
    folder: str = "output"
    """ComfyUI's `type`: `output`, `temp` or `input`; `socket` for an image that came over the socket."""
    text: str | None = None


class Artefact(msgspec.Struct, frozen=True, kw_only=True):
    """An output after storing. `key` is the storage's; the url is made from it when somebody asks."""

    node_id: str
    index: int
    name: str
    type: OutputType
    content_type: str
    size_bytes: int
    sha256: str
    key: str
    storage: str = "local"
    location: str | None = None
    """What the storage said of where it put the file, if its url needs that."""
    width: int | None = None
    height: int | None = None
    duration: float | None = None
    text: str | None = None
    data: bytes | None = None
    """The file itself, where it is small and the client asked for that; None in lists."""
    blake3: str | None = None
    """Hexadecimal, like `sha256`; None for what was stored before comfyd knew it."""

    @property
    def id(self) -> str:
        """What the artefact is called as an asset: a UUID that is the same however often it is stored."""
        return str(uuid.uuid5(_ASSETS, self.key))


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How often and how long a task may try; None means the configured default does not limit it."""

    max_attempts: int = 3
    timeout_ms: int | None = None
    """From the first sign of execution to its end."""
    start_timeout_ms: int | None = None
    """From being accepted by ComfyUI to the first sign of execution."""
    stall_timeout_ms: int | None = None
    """Without any sign of life while executing."""


PictureFormat = Literal["png", "jpeg", "webp", "avif"]
"""What pictures can be converted to."""


class OutputOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a client wants done with the outputs."""

    include_temp: bool = False
    storage: str | None = None
    """None is the configured one."""
    prefix: str = ""
    """Folders before the keys of the outputs."""
    format: PictureFormat | None = None
    """None leaves pictures as they are."""
    quality: int | None = None
    """1 to 100; None is the format's own."""
    strip: bool = False
    """Whether prompts and other metadata are taken out of the files."""
    inline: bool = False
    """Whether small outputs are shown in the task itself."""


class EventType(StrEnum):
    """What a webhook can be told of, in the words of the API."""

    STARTED = "task.started"
    OUTPUT = "task.output"
    COMPLETED = "task.completed"
    FAILED = "task.failed"
    CANCELED = "task.canceled"


TERMINAL_EVENTS: Final = {
    Status.SUCCEEDED: EventType.COMPLETED,
    Status.FAILED: EventType.FAILED,
    Status.CANCELED: EventType.CANCELED,
}


class Webhook(msgspec.Struct, frozen=True, kw_only=True):
    """Where a client wants to hear of its task, and of what."""

    url: str
    events: tuple[EventType, ...] = (EventType.COMPLETED, EventType.FAILED, EventType.CANCELED)


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a task on one backend. `id` is ComfyUI's `prompt_id` and the fence of every write."""

    id: str
    task_id: str
    number: int
    step: Step = Step.CLAIMED
    claimed_at: int
    backend: str | None = None
    client_id: str | None = None
    intent_at: int | None = None
    accepted_at: int | None = None
    seen_running_at: int | None = None
    executed_at: int | None = None
    """When ComfyUI had finished the prompt, as comfyd learned it."""
    execution_ms: int | None = None
    """How long ComfyUI executed, by its own clock."""
    collected: tuple[OutputFile, ...] = ()
    ended_at: int | None = None
    outcome: str | None = None
    error: TaskError | None = None


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One request to run a workflow, as it stands now."""

    id: str
    seq: int
    status: Status = Status.QUEUED
    priority: int = 0
    workflow: str | None = None
    """The template's name; None for a raw graph."""
    shape: str
    """What counts as 'the same workflow' when run times are learned."""
    nodes_total: int = 0
    inputs: JsonObject | None = None
    metadata: dict[str, str] = {}
    policy: Policy = Policy()
    output: OutputOptions = OutputOptions()
    key_id: str | None = None
    created_at: int
    available_at: int
    started_at: int | None = None
    completed_at: int | None = None
    cancel_requested_at: int | None = None
    attempt_count: int = 0
    failures: int = 0
    suspects: int = 0
    strays: int = 0
    error: TaskError | None = None
    artefacts: tuple[Artefact, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    webhook: Webhook | None = None
    credentials: bool = False
    """Whether it came with credentials for ComfyUI, which only `comfyd.credentials` has, in memory."""


class NewTask(msgspec.Struct, frozen=True, kw_only=True):
    """A checked submission, about to become a row. `seq` is the store's to give."""

    id: str
    graph: Graph
    extra_data: JsonObject = {}
    priority: int = 0
    workflow: str | None = None
    shape: str
    nodes_total: int = 0
    inputs: JsonObject | None = None
    metadata: dict[str, str] = {}
    policy: Policy = Policy()
    output: OutputOptions = OutputOptions()
    key_id: str | None = None
    uploads: tuple[str, ...] = ()
    """The uploaded files that the graph names: kept as long as the task."""
    webhook: Webhook | None = None
    credentials: bool = False
    """See `Task.credentials`."""


class IdempotencyKey(msgspec.Struct, frozen=True, kw_only=True):
    """A client's key and the digest of the body that it came with."""

    key: str
    body_sha256: str
    key_id: str | None = None


class Added(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a submission: the task, and whether an earlier request had made it."""

    task: Task
    replayed: bool


class CancelResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a cancel has come to: the task, and whether it ended just now and by that."""

    task: Task
    ended: bool


class Ready(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """What the queue in memory knows of a task. Sorts most urgent first, then first in first out."""

    rank: int
    """The negated priority, so that the smallest comes first."""
    seq: int
    task_id: str


class ReadyPage(msgspec.Struct, frozen=True, kw_only=True):
    """The most urgent ready tasks in order, and when the next waiting one becomes ready."""

    entries: tuple[Ready, ...]
    next_due: int | None = None


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A task with the right to work on it: whoever holds it writes under `attempt.id`."""

    task: Task
    attempt: Attempt
    graph: Graph
    extra_data: JsonObject = {}


class TaskFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which tasks to list; None and what is empty do not restrict."""

    statuses: frozenset[Status] = frozenset()
    workflow: str | None = None
    metadata: dict[str, str] = {}
    key_id: str | None = None


class TaskPage(msgspec.Struct, frozen=True, kw_only=True):
    """Tasks, newest first; `next_cursor` is None on the last page."""

    tasks: tuple[Task, ...]
    next_cursor: str | None = None


class RunTimes(msgspec.Struct, frozen=True, kw_only=True):
    """What past runs of one shape took: how many, and their mean execution time in milliseconds."""

    runs: int
    mean_ms: float


class Succeeded(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was wanted is stored."""

    artefacts: tuple[Artefact, ...]


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """The attempt failed by itself; `error.retryable` says whether another one may help."""

    error: TaskError


class Canceled(msgspec.Struct, frozen=True, kw_only=True):
    """The prompt was stopped because somebody asked, or had ended before it could be."""

    message: str


class Interruption(StrEnum):
    """Why an attempt ended without its own fault."""

    LOST = "lost"
    """It never started to execute, or what it made was lost with a connection: free."""
    SUSPECT = "suspect"
    """It was executing when ComfyUI died: it may be what killed it."""
    STRAY = "stray"
    """Somebody else interrupted it."""


class Interrupted(msgspec.Struct, frozen=True, kw_only=True):
    """The attempt ended through no fault of its own."""

    reason: Interruption
    message: str
    details: JsonObject = {}
    """Set where the same may come again at once, or it is not sure that nothing ran: a repeat waits."""


Outcome = Succeeded | Failed | Canceled | Interrupted


class Settlement(msgspec.Struct, frozen=True, kw_only=True):
    """The transition that an outcome leads to. The store applies it as it is, guarded by the attempt's id."""

    status: Status
    available_at: int | None = None
    """When a task that goes back to the queue may be claimed again; None for a terminal status."""
    outcome: str
    """The word kept with the attempt: `succeeded`, `failed`, `canceled`, or an `Interruption`."""
    error: TaskError | None = None
    """Kept with the attempt, and with the task if that has failed."""
    artefacts: tuple[Artefact, ...] = ()
    failures: int = 0
    suspects: int = 0
    strays: int = 0
    """The task's counters after this attempt."""
