"""Small values for the tests of the store, and the way of a task through its verbs."""

import uuid
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec

from comfyd.assets import Asset
from comfyd.deliveries import Delivery, DeliveryFilter, DeliveryTry
from comfyd.store.base import Store
from comfyd.tasks import (
    Artefact,
    Attempt,
    Claim,
    EventType,
    NewTask,
    OutputFile,
    OutputType,
    Settlement,
    Status,
    Step,
    Task,
    TaskError,
    Webhook,
)

Opener = Callable[[], AbstractAsyncContextManager[Store]]
"""Opens the same store again and again."""

NOW = 1_700_000_000_000
GRAPH = {"1": {"class_type": "EmptyImage", "inputs": {"width": 64, "seed": 2**64 - 1, "text": "Grüße 🎨"}}}
BOOM = TaskError(code="node_failed", message="boom", retryable=True, details={"node_id": "7"})

HOOK = Webhook(url="https://example.com/hook", events=tuple(EventType))
"""A webhook that wants to hear everything."""


def new_id() -> str:
    """A fresh id, for tasks and attempts alike."""
    return str(uuid.uuid4())


def new_task(**changes: Any) -> NewTask:
    """A small submission."""
    return msgspec.structs.replace(
        NewTask(id=new_id(), graph=GRAPH, shape="shape-1", nodes_total=1), **changes
    )


def artefact(index: int = 0, node_id: str = "9") -> Artefact:
    """A stored picture."""
    return Artefact(
        node_id=node_id,
        index=index,
        name=f"picture-{index}.png",
        type=OutputType.IMAGE,
        content_type="image/png",
        size_bytes=123,
        sha256="ab" * 32,
        key=f"tasks/x/{node_id}/{index}.png",
        width=64,
        height=32,
        duration=None,
    )


def asset(**changes: Any) -> Asset:
    """A record over an uploaded picture."""
    record = Asset(
        id=new_id(),
        file="5a.png",
        blake3="5a" * 32,
        size_bytes=123,
        content_type="image/png",
        file_path="picture.png",
        created_at=NOW,
        expires_at=NOW + 1000,
    )
    return msgspec.structs.replace(record, **changes)


OUTPUT_FILE = OutputFile(node_id="9", index=0, kind="images", type=OutputType.IMAGE, filename="a_00001_.png")


def succeeded(*artefacts: Artefact) -> Settlement:
    """The transition of a good end."""
    return Settlement(status=Status.SUCCEEDED, outcome="succeeded", artefacts=artefacts)


def failed(**changes: Any) -> Settlement:
    """The transition of a last failure."""
    settlement = Settlement(status=Status.FAILED, outcome="failed", error=BOOM, failures=1)
    return msgspec.structs.replace(settlement, **changes)


def again(available_at: int | None, **changes: Any) -> Settlement:
    """The transition back into the queue."""
    settlement = Settlement(
        status=Status.QUEUED, available_at=available_at, outcome="failed", error=BOOM, failures=1
    )
    return msgspec.structs.replace(settlement, **changes)


async def added(store: Store, now: int = NOW, **changes: Any) -> Task:
    """A queued task."""
    return (await store.add(new_task(**changes), None, now)).task


async def claimed(store: Store, now: int = NOW, **changes: Any) -> Claim:
    """A running task."""
    task = await added(store, now, **changes)
    return await claim(store, task.id, now)


async def claim(store: Store, task_id: str, now: int = NOW) -> Claim:
    """Claim a task that can be claimed."""
    taken = await store.claim(task_id, new_id(), now)
    assert taken is not None
    return taken


async def ended(store: Store, now: int = NOW, *, key: str | None = None, **changes: Any) -> Task:
    """A succeeded task with one artefact, under a key of its own or under this one."""
    taken = await claimed(store, now, **changes)
    stored = artefact()
    own = msgspec.structs.replace(stored, key=key or f"{taken.task.id}/{stored.key}")
    return await store.settle(taken.attempt.id, succeeded(own), now)


async def found(store: Store, task_id: str) -> Task:
    """A task that is there."""
    task = await store.get(task_id)
    assert task is not None
    return task


def submitting(attempt: Attempt) -> Attempt:
    """The attempt with its intent."""
    return msgspec.structs.replace(
        attempt, step=Step.SUBMITTING, backend="gpu-1", client_id="comfyd-1", intent_at=NOW + 1
    )


def made(status: int | None = 200, error: str | None = None, at: int = NOW) -> DeliveryTry:
    """One try to deliver, as its sender hands it over."""
    return DeliveryTry(number=0, at=at, duration_ms=5, status=status, error=error)


async def owed(store: Store, task_id: str | None = None) -> list[Delivery]:
    """Every delivery (of this task), in the order in which they became owed."""
    page = await store.list_deliveries(DeliveryFilter(task_id=task_id), None, 10_000)
    return list(reversed(page.deliveries))


async def found_delivery(store: Store, delivery_id: str) -> Delivery:
    """A delivery that is there."""
    delivery = await store.delivery(delivery_id)
    assert delivery is not None
    return delivery
