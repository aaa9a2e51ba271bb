"""The seam between comfyd and its database: one protocol of whole transitions; never a row or a query."""

from collections.abc import Sequence
from typing import Final, Protocol

from comfyd.assets import Asset, OutputAsset
from comfyd.deliveries import (
    Delivery,
    DeliveryFilter,
    DeliveryPage,
    DeliveryStatus,
    DeliveryTry,
    DueDeliveries,
)
from comfyd.tasks import (
    Added,
    Attempt,
    CancelResult,
    Claim,
    Graph,
    IdempotencyKey,
    NewTask,
    ReadyPage,
    RunTimes,
    Settlement,
    Status,
    Task,
    TaskFilter,
    TaskPage,
)

AHEAD_MOST: Final = 10_000
"""Where counting the tasks ahead of another one ends: further back the number tells nobody anything."""


class Store(Protocol):
    """Tasks and attempts, durably. Lives as long as the process; an object in hand is open.

    Every verb is one atomic transition. `now` is an argument in UTC milliseconds, ids are arguments too. A
    verb that writes returns only after the write is synced to disk, unless its docstring says otherwise. A
    read sees every write that was answered before it began. A caller that is canceled while it waits for a
    write does not know whether that was applied.
    Raises `StoreUnavailable` or `InsufficientStorage` where the database fails.
    """

    async def add(self, new: NewTask, key: IdempotencyKey | None, now: int) -> Added:
        """Queue a task and keep its idempotency key in the same transaction.

        With a key that is known the first task is returned again, `replayed`; with one that is known for
        another body `IdempotencyKeyReuse` is raised and nothing is stored.
        """

    async def ping(self) -> None:
        """Ask the database itself. Raises `StoreUnavailable` if it does not answer or is broken."""

    async def replay(self, key: IdempotencyKey) -> Task | None:
        """The task that was made under this key; None if there is none. Raises `IdempotencyKeyReuse`."""

    async def get(self, task_id: str) -> Task | None:
        """The task with its artefacts and attempts (oldest first)."""

    async def graph(self, task_id: str) -> Graph | None:
        """The graph as it was accepted."""

    async def list_tasks(self, wanted: TaskFilter, cursor: str | None, limit: int) -> TaskPage:
        """Tasks newest first, their artefacts without `data`. `InvalidCursor` for a foreign cursor."""

    async def ready(self, now: int, limit: int) -> ReadyPage:
        """The `limit` most urgent queued tasks with `available_at <= now`, in order."""

    async def make_due(self, after: int, now: int, limit: int) -> int:
        """Let queued tasks with `available_at > after` be due at `now`; how many, `limit` at most."""

    async def claim(self, task_id: str, attempt_id: str, now: int) -> Claim | None:
        """Take the task if it is queued, due, and not canceled: {queued -> running, attempt claimed}.

        None if somebody else was first. Need not be synced: a claim lost in a crash is a task still queued.
        The first claim of a task owes `task.started` to its webhook.
        """

    async def record(self, attempt: Attempt) -> None:
        """Keep how far the attempt got. Raises `StaleClaim` unless it is the live one of its task.

        Steps may be skipped but never go back; from `submitting` on the intent (`intent_at`, `backend`,
        `client_id`) is set. How the attempt ends is for `settle` to write.
        """

    async def settle(self, attempt_id: str, settlement: Settlement, now: int) -> Task:
        """Apply the transition, end the attempt, keep the artefacts, learn the run time; one transaction.

        A task that goes back to the queue keeps its `seq`, so it is first among its equals. If a cancel came
        since the decision, it becomes canceled instead, and keeps no artefacts. Raises `StaleClaim` unless
        the attempt is the live one of its task. A task that ends owes its webhook what that wants to hear,
        in the same transaction: `task.output` for each artefact, then the terminal event.
        """

    async def cancel(self, task_id: str, now: int) -> CancelResult | None:
        """A queued task becomes canceled, a running one gets `cancel_requested_at`, an ended one stays.

        One that becomes canceled owes its webhook `task.canceled`, in the same transaction.
        """

    async def retry(self, task_id: str, now: int) -> Task | None:
        """Queue an ended task again, behind its equals, with fresh counters. `Conflict` if it has not ended.

        Its attempts stay on record; its artefacts are forgotten (their files are the caller's to delete).
        """

    async def delete(self, task_id: str, *, ended_before: int | None = None) -> Task | None:
        """Forget an ended task wholly, with what it still owes, and return what it was.

        Raises `Conflict` if it has not ended; with `ended_before` also if that was not before this moment, or
        if it owes its webhook something.
        """

    async def live(self) -> tuple[Claim, ...]:
        """Every running task with its live attempt, most urgent first: what a new process has to take up."""

    async def counts(self) -> dict[Status, int]:
        """How many tasks have each status; every status is a key."""

    async def ahead(self, task: Task, now: int) -> int:
        """How many queued and due tasks will be claimed before this queued one; `AHEAD_MOST` at most."""

    async def ended_before(self, moment: int, limit: int) -> tuple[str, ...]:
        """Ids of ended tasks with `completed_at < moment` that owe their webhook nothing, oldest first."""

    async def ended_attempts(self, attempt_ids: Sequence[str]) -> tuple[str, ...]:
        """Those of these ids that are attempts of ours and have ended."""

    async def due_deliveries(self, now: int, limit: int, busy: Sequence[str]) -> DueDeliveries:
        """Pending deliveries with `next_at <= now` whose endpoint is none of these, longest waiting first."""

    async def record_try(
        self, taken: Delivery, made: DeliveryTry, status: DeliveryStatus, next_at: int | None, now: int
    ) -> None:
        """Keep one try and what follows from it; nothing for a delivery that is gone with its task.

        `taken` is the delivery as it was when the try began: if it has ended or was asked for anew since, the
        try alone is kept. `made.number` is the store's to give. `next_at` is set when and only when it stays
        pending.
        """

    async def make_deliveries_due(self, after: int, now: int, limit: int) -> int:
        """Let pending deliveries with `next_at > after` be due at `now`; how many, `limit` at most."""

    async def delivery(self, delivery_id: str) -> Delivery | None:
        """One delivery with its tries, oldest first."""

    async def list_deliveries(self, wanted: DeliveryFilter, cursor: str | None, limit: int) -> DeliveryPage:
        """Deliveries newest first, with their tries. `InvalidCursor` for a foreign cursor."""

    async def redeliver(self, delivery_id: str, now: int) -> Delivery | None:
        """Make a delivery pending and due again, whatever became of it; its tries stay on record."""

    async def add_asset(self, asset: Asset) -> bool:
        """Keep a record; whether its owner (`key_id`) had none over the same bytes that had not expired."""

    async def asset(self, asset_id: str, now: int) -> Asset | None:
        """The record; None if there is none, or it has expired."""

    async def asset_of_bytes(
        self, blake3: str, key_id: str | None, now: int, file_path: str | None = None
    ) -> Asset | None:
        """The owner's newest record over these bytes (with `file_path`: called that) that has not expired."""

    async def output_asset(self, asset_id: str) -> OutputAsset | None:
        """The artefact of an ended task with this id."""

    async def extend_asset(self, asset_id: str, expires_at: int) -> Asset | None:
        """Let it expire then, but not earlier than it would have; None if there is no such record."""

    async def delete_asset(self, asset_id: str, now: int) -> Asset | None:
        """Forget the record, and return what it was; None if there is none, or it has expired."""

    async def expire_assets(self, now: int, limit: int) -> tuple[Asset, ...]:
        """Forget records that have expired, and return them; `limit` at most."""

    async def uploads(self, task_id: str) -> tuple[str, ...]:
        """The uploaded files that the task's graph names; none if there is no such task."""

    async def unused_uploads(self, files: Sequence[str]) -> tuple[str, ...]:
        """Those of these files that no task and no asset names."""

    async def artefact_bytes(self) -> int:
        """The bytes of all artefacts of all tasks."""

    async def unwanted_files(self, limit: int) -> tuple[tuple[str, str], ...]:
        """Some files (storage, key) whose artefact is gone and that may still be there, in no order."""

    async def files_gone(self, files: Sequence[tuple[str, str]]) -> None:
        """These files have been deleted from their storage."""

    async def run_times(self, shape: str) -> RunTimes | None:
        """What past runs of this shape took; None before the first success."""

    async def mean_run_time(self) -> RunTimes | None:
        """The same over all shapes, weighted by how often each ran."""
