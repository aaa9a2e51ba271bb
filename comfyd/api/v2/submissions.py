"""What a client wants of a job, out of what it sent; never decides whether ComfyUI could run it.

Where the contract has a code for a mistake, this finds it before the general check of types does.
"""

import re
from typing import Any, Final

from msgspec import UNSET

from comfyd.api import requests, tasks
from comfyd.api.schemas import PRIORITIES
from comfyd.api.v2.errors import InvalidField, InvalidLabels
from comfyd.api.v2.schemas import LABEL_KEY, LABEL_VALUE, LABELS, JobRequest
from comfyd.errors import InvalidWorkflow, MalformedRequest
from comfyd.submission import SubmitRequest
from comfyd.tasks import Webhook

_EXTRA_DATA: Final = "$.extra_data"
_SOURCES: Final = ("workflow", "template")
_LABEL: Final = re.compile(r"[A-Za-z0-9_.-]+", re.ASCII)
_UNSEEN: Final = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069]")
"""Control characters, and those that turn the direction of writing."""


def submission(body: Any) -> SubmitRequest:
    """What the body asks for.

    Raises `MalformedRequest`, `InvalidField`, `InvalidLabels` and `InvalidWorkflow`.
    """
    if not isinstance(body, dict):
        raise MalformedRequest("the body must be a JSON object")
    wanted = _checked(body)
    workflow, priority = wanted.template or wanted.workflow, wanted.priority
    assert workflow is not UNSET  # noqa: S101 - one of them was asked for
    return SubmitRequest(
        workflow=workflow,
        inputs=wanted.inputs,
        priority=PRIORITIES[priority] if isinstance(priority, str) else priority,
        metadata=wanted.metadata,
        webhook=None if wanted.webhook_url is None else Webhook(url=wanted.webhook_url),
        credentials=tasks.credentials(wanted.extra_data),
    )


def _checked(body: dict[str, Any]) -> JobRequest:
    body = {name: value for name, value in body.items() if name not in _SOURCES or value is not None}
    if "template" not in body:
        _check_workflow(body.get("workflow"))
    elif "workflow" in body:
        raise InvalidField("$: name a `workflow` or a `template`, not both", details={"path": "$"})
    check_labels(body.get("metadata", {}))
    try:
        wanted = requests.converted(body, JobRequest)
    except MalformedRequest as exc:
        if str(exc.details["path"]).startswith(_EXTRA_DATA):
            raise
        raise InvalidField(exc.message, details=exc.details) from exc
    if None in body.get("extra_data", {}).values():
        raise MalformedRequest(f"{_EXTRA_DATA}: its fields are texts", details={"path": _EXTRA_DATA})
    return wanted


def _check_workflow(workflow: Any) -> None:
    if not isinstance(workflow, dict) or not workflow:
        message = "workflow: must be a graph in ComfyUI's API format, with at least one node"
        raise InvalidWorkflow(message)


def check_labels(labels: Any) -> None:
    """Raises `InvalidLabels`, which names the key or the count."""
    if not isinstance(labels, dict):
        raise InvalidLabels("metadata: must be an object of texts")
    if len(labels) > LABELS:
        message = f"metadata: {len(labels)} labels are more than {LABELS}"
        raise InvalidLabels(message, details={"count": len(labels)})
    for key, value in labels.items():
        problem = label_problem(key, value)
        if problem is not None:
            shown = key[:LABEL_KEY]
            raise InvalidLabels(f"metadata: {shown!r}: {problem}", details={"key": shown})


def label_problem(key: str, value: Any) -> str | None:
    """What is wrong with a label; None if nothing is."""
    if len(key) > LABEL_KEY or not _LABEL.fullmatch(key):
        return f"a key has 1 to {LABEL_KEY} characters of A-Z a-z 0-9 _ . -"
    if not isinstance(value, str):
        return "a value is a text"
    if len(value.encode()) > LABEL_VALUE:
        return f"a value has at most {LABEL_VALUE} bytes"
    if _UNSEEN.search(value):
        return "a value has no control characters"
    return None
