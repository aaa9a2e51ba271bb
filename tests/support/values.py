"""Values of the domain for tests, with what a test does not care about filled in."""

from typing import Any

from comfyd.tasks import Artefact, Attempt, NewTask, OutputType, Task

GRAPH: dict[str, Any] = {
    "1": {
        "class_type": "EmptyImage",
        "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 1},
        "_meta": {},
    },
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "t"}, "_meta": {}},
}


def task(**facts: Any) -> Task:
    """A task as a store would return it."""
    defaults: dict[str, Any] = {
        "id": "5e1f6c1e-0000-4000-8000-000000000001",
        "seq": 1,
        "shape": "s",
        "created_at": 1_000,
        "available_at": 1_000,
    }
    return Task(**{**defaults, **facts})


def new_task(task_id: str, **facts: Any) -> NewTask:
    """A submission that was checked."""
    return NewTask(**{"id": task_id, "graph": GRAPH, "shape": "s", "nodes_total": 2, **facts})


def attempt(**facts: Any) -> Attempt:
    """An attempt that was claimed."""
    defaults: dict[str, Any] = {"id": "a", "task_id": "t", "number": 1, "claimed_at": 1_000}
    return Attempt(**{**defaults, **facts})


def artefact(**facts: Any) -> Artefact:
    """A stored picture."""
    defaults: dict[str, Any] = {
        "node_id": "2",
        "index": 0,
        "name": "t_00001_.png",
        "type": OutputType.IMAGE,
        "content_type": "image/png",
        "size_bytes": 3,
        "sha256": "0" * 64,
        "key": "t/1/2_0_t_00001_.png",
    }
    return Artefact(**{**defaults, **facts})
