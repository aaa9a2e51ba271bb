"""The jobs API of 0.33.0: queue and history once more, as a list of jobs with one status each.

Reads and cancels; it keeps nothing of its own.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from aiohttp import web

from comfyd.simulator.sockets import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from comfyd.simulator.prompt_queue import PromptQueue, QueueItem

STATUSES = ("pending", "in_progress", "completed", "failed", "cancelled")
MEDIA = {"images", "video", "audio"}
SOLIDS = (".obj", ".fbx", ".gltf", ".glb")
TEXTS = (".txt", ".json", ".md", ".csv", ".xml")
ENDS = {"execution_success", "execution_error", "execution_interrupted"}


class BadQueryError(Exception):
    """A query value that is answered with 400."""


class Jobs:
    """The handlers of one server. Lives as long as the server process."""

    def __init__(self, queue: PromptQueue, interrupt: Callable[[], None]) -> None:
        self._queue = queue
        self._interrupt = interrupt

    async def page(self, request: web.Request) -> web.Response:
        """GET /api/jobs."""
        try:
            wanted = parse_query(request.query)
        except BadQueryError as error:
            return answer({"error": str(error)}, 400)
        jobs = self._all(wanted["statuses"])
        if request.query.get("workflow_id"):
            jobs = [job for job in jobs if job.get("workflow_id") == request.query["workflow_id"]]
        jobs.sort(key=SORT_KEYS[wanted["sort_by"]], reverse=wanted["sort_order"] == "desc")
        offset, limit = wanted["offset"], wanted["limit"]
        page = jobs[offset:] if limit is None else jobs[offset : offset + limit]
        pagination = {
            "offset": offset,
            "limit": limit,
            "total": len(jobs),
            "has_more": offset + len(page) < len(jobs),
        }
        return answer({"jobs": page, "pagination": pagination})

    async def one(self, request: web.Request) -> web.Response:
        """GET /api/jobs/{id}: the history wins over the queue."""
        prompt_id = request.match_info["job_id"]
        entry = self._queue.history.get(prompt_id)
        if entry is not None:
            job = finished_job(prompt_id, entry)
            _, _, prompt, extra_data, _ = entry["prompt"]
            job["outputs"] = entry["outputs"]
            job["execution_status"] = entry["status"]
            job["workflow"] = {"prompt": prompt, "extra_data": extra_data}
            return answer(job)
        for status, items in (("in_progress", self._queue.running), ("pending", self._queue.pending)):
            for item in items:
                if item.prompt_id == prompt_id:
                    return answer(waiting_job(item, status))
        return answer({"error": "Job not found"}, 404)

    async def cancel(self, request: web.Request) -> web.Response:
        """POST /api/jobs/{id}/cancel."""
        return answer({"cancelled": self._cancel(request.match_info["job_id"])})

    async def cancel_many(self, request: web.Request) -> web.Response:
        """POST /api/jobs/cancel."""
        try:
            document = await request.json()
        except ValueError:
            return answer({"error": "Invalid JSON body"}, 400)
        ids = document.get("job_ids") if isinstance(document, dict) else None
        if not isinstance(ids, list):
            return answer({"error": "job_ids must be a list"}, 400)
        invalid = [str(prompt_id) for prompt_id in ids if not is_canonical(prompt_id)]
        if invalid:
            return answer({"error": "job_ids contains invalid id(s)", "invalid_ids": invalid}, 400)
        cancelled = [self._cancel(prompt_id) for prompt_id in ids]
        return answer({"cancelled": any(cancelled)})

    def _cancel(self, prompt_id: str) -> bool:
        if any(item.prompt_id == prompt_id for item in self._queue.running):
            self._interrupt()
            return True
        return self._queue.delete(prompt_id)

    def _all(self, statuses: set[str]) -> list[dict[str, Any]]:
        jobs = []
        if "in_progress" in statuses:
            jobs += [waiting_job(item, "in_progress") for item in self._queue.running]
        if "pending" in statuses:
            jobs += [waiting_job(item, "pending") for item in self._queue.pending]
        for prompt_id, entry in self._queue.history.items():
            if finished_status(entry) in statuses:
                jobs.append(finished_job(prompt_id, entry))
        return jobs


SORT_KEYS: dict[str, Callable[[dict[str, Any]], int]] = {
    "created_at": lambda job: job.get("create_time", 0),
    "execution_duration": lambda job: (
        job.get("execution_end_time", 0) - job.get("execution_start_time", 0)
        if job.get("execution_end_time") and job.get("execution_start_time")
        else 0
    ),
}


def parse_query(query: Mapping[str, str]) -> dict[str, Any]:
    """The checked query of the list. Raises `BadQueryError`."""
    statuses = [part.strip().lower() for part in query.get("status", "").split(",") if part.strip()]
    unknown = [status for status in statuses if status not in STATUSES]
    if unknown:
        raise BadQueryError(
            f"Invalid status value(s): {', '.join(unknown)}. Valid values: {', '.join(STATUSES)}"
        )
    sort_by, sort_order = query.get("sort_by", "created_at").lower(), query.get("sort_order", "desc").lower()
    if sort_by not in SORT_KEYS:
        raise BadQueryError("sort_by must be 'created_at' or 'execution_duration'")
    if sort_order not in {"asc", "desc"}:
        raise BadQueryError("sort_order must be 'asc' or 'desc'")
    limit = _integer(query, "limit")
    if limit is not None and limit <= 0:
        raise BadQueryError("limit must be a positive integer")
    return {
        "statuses": set(statuses or STATUSES),
        "sort_by": sort_by,
        "sort_order": sort_order,
        "limit": limit,
        "offset": max(0, _integer(query, "offset") or 0),
    }


def _integer(query: Mapping[str, str], name: str) -> int | None:
    if name not in query:
        return None
    try:
        return int(query[name])
    except ValueError:
        raise BadQueryError(f"{name} must be an integer") from None


def waiting_job(item: QueueItem, status: str) -> dict[str, Any]:
    """A pending or running prompt as a job."""
    job = {
        "id": item.prompt_id,
        "status": status,
        "priority": item.number,
        "create_time": item.extra_data.get("create_time"),
        "outputs_count": 0,
        "previewable_outputs_count": 0,
        "workflow_id": workflow_id(item.extra_data),
    }
    return _without_nulls(job)


def finished_job(prompt_id: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A history entry as a job."""
    number, _, _, extra_data, _ = entry["prompt"]
    times: dict[str, int] = {}
    failure = None
    for event, data in entry["status"]["messages"]:
        if event == "execution_start":
            times["start"] = data["timestamp"]
        elif event in ENDS:
            times["end"] = data["timestamp"]
            failure = data if event == "execution_error" else None
    count, previewable, preview = outputs_summary(entry["outputs"])
    return _without_nulls(
        {
            "id": prompt_id,
            "status": finished_status(entry),
            "priority": number,
            "create_time": extra_data.get("create_time"),
            "execution_start_time": times.get("start"),
            "execution_end_time": times.get("end"),
            "execution_error": failure,
            "outputs_count": count,
            "previewable_outputs_count": previewable,
            "preview_output": preview,
            "workflow_id": workflow_id(extra_data),
        }
    )


def finished_status(entry: dict[str, Any]) -> str:
    """`completed`, `failed` or `cancelled`; like ComfyUI it trusts `status_str`."""
    status = entry["status"]
    if status["status_str"] == "success":
        return "completed"
    interrupted = any(event == "execution_interrupted" for event, _ in status["messages"])
    return "cancelled" if interrupted else "failed"


def outputs_summary(outputs: dict[str, Any]) -> tuple[int, int, dict[str, Any] | None]:
    """File items, how many of them can be previewed, and the one to show: an `output` before any other."""
    count = previewable = 0
    best: dict[str, Any] | None = None
    for node_id, kinds in outputs.items():
        for kind, items in kinds.items():
            for item in items if kind != "animated" and isinstance(items, list) else []:
                if not isinstance(item, dict):
                    continue
                count += 1
                if not is_previewable(kind, item):
                    continue
                previewable += 1
                shown = {**item, "nodeId": node_id, "mediaType": kind}
                if best is None or (best["type"] != "output" and item["type"] == "output"):
                    best = shown
    return count, previewable, best


def is_previewable(kind: str, item: dict[str, Any]) -> bool:
    """Whether the frontend could show this file."""
    name = str(item.get("filename", "")).lower()
    return kind in MEDIA or name.endswith(SOLIDS) or name.endswith(TEXTS)


def workflow_id(extra_data: dict[str, Any]) -> Any:
    """`extra_pnginfo.workflow.id`. Anything but objects on the way raises: a 500 (section 15)."""
    return extra_data.get("extra_pnginfo", {}).get("workflow", {}).get("id")


def is_canonical(prompt_id: Any) -> bool:
    """Whether it is a UUID in its lowercase hyphenated form."""
    if not isinstance(prompt_id, str):
        return False
    try:
        return str(uuid.UUID(prompt_id)) == prompt_id
    except ValueError:
        return False


def _without_nulls(job: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in job.items() if value is not None}


def answer(document: Any, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(
        body=encode(document), status=status, content_type="application/json", charset="utf-8"
    )
