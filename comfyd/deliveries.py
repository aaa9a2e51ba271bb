"""The values of the outbox: what is owed to webhooks, and what came of it. Times are UTC milliseconds."""

from enum import StrEnum

import msgspec

from comfyd.tasks import EventType, Task


class DeliveryStatus(StrEnum):
    """Where a delivery is."""

    PENDING = "pending"
    DELIVERED = "delivered"
    """The receiver answered 2xx."""
    FAILED = "failed"
    """All tries are used up, or the url can never be reached."""
    GONE = "gone"
    """The receiver answered 410: it wants nothing any more."""


class DeliveryTry(msgspec.Struct, frozen=True, kw_only=True):
    """One try to deliver. Times in UTC milliseconds."""

    number: int
    at: int
    duration_ms: int
    status: int | None = None
    """The receiver's HTTP status; None where it gave none."""
    error: str | None = None
    """Why there is none, or why it does not count, in one line; None for a 2xx."""


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """One message owed to a webhook. `id` is its `webhook-id`, the same on every try."""

    id: str
    task_id: str
    type: EventType
    url: str
    endpoint: str
    """Scheme, host and port of the url: what is slow or down together."""
    created_at: int
    subject: Task
    """The task as it was at that moment, without its attempts, its inputs and the bytes of its artefacts."""
    output: int | None = None
    """For `task.output`: which of the subject's artefacts."""
    status: DeliveryStatus = DeliveryStatus.PENDING
    next_at: int | None = None
    """When it is tried next; None unless it is pending."""
    round: int = 0
    """Tries since it became pending: where it is in the schedule of retries. A redelivery begins anew."""
    ended_at: int | None = None
    tries: tuple[DeliveryTry, ...] = ()


class DueDeliveries(msgspec.Struct, frozen=True, kw_only=True):
    """Deliveries that are due, the longest waiting first, and when the next one becomes due."""

    entries: tuple[Delivery, ...]
    next_due: int | None = None


class DeliveryFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which deliveries to list; None does not restrict."""

    task_id: str | None = None
    status: DeliveryStatus | None = None
    key_id: str | None = None


class DeliveryPage(msgspec.Struct, frozen=True, kw_only=True):
    """Deliveries, newest first; `next_cursor` is None on the last page."""

    deliveries: tuple[Delivery, ...]
    next_cursor: str | None = None
