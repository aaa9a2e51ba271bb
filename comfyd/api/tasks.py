"""The routes of tasks: submit, read, list, cancel, run again, forget; never what a request means."""

import asyncio
import math
from typing import Any

import orjson
from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from comfyd.api import requests
from comfyd.api.parameters import RUN_QUERY
from comfyd.api.responses import JsonResponse, base_url
from comfyd.api.schemas import (
    PRIORITIES,
    ExtraDataRequest,
    OutputRequest,
    TaskListView,
    TaskRequest,
    TaskView,
)
from comfyd.api.sights import Sight, look, sight_of
from comfyd.api.state import State, state_of
from comfyd.api.views import STATUSES, task_view
from comfyd.api.waiting import until_ended
from comfyd.errors import MalformedRequest
from comfyd.submission import SubmitRequest
from comfyd.tasks import (
    Added,
    IdempotencyKey,
    OutputOptions,
    Status,
    Task,
    TaskFilter,
    Webhook,
)


async def submit(request: Request) -> Response:
    """`POST /api/tasks` and `POST /api/tasks/create`."""
    requests.check_json_type(request)
    body = await requests.read_body(request)
    sent = requests.parse_json(body)
    key = requests.idempotency_key(request, _compared(body, sent))
    added = await _replayed(state_of(request), key)
    if added is None:
        wanted = requests.converted(sent, TaskRequest)
        added = await accept(request, wanted, key)
    return await accepted(request, added)


def _compared(body: bytes, sent: Any) -> bytes:
    """What a repeat has to repeat: the body, but never credentials, of which its stored digest would tell."""
    if not isinstance(sent, dict) or "extra_data" not in sent:
        return body
    rest = {name: value for name, value in sent.items() if name != "extra_data"}
    try:
        return orjson.dumps(rest, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError as exc:
        raise MalformedRequest("the body is nested too deeply") from exc


async def run(request: Request) -> Response:
    """`POST /api/workflows/{name}/run`: the body is the inputs, everything else comes as query parameters."""
    name: str = request.path_params["name"]
    requests.check_json_type(request)
    body = await requests.read_body(request)
    # The same inputs for another template, or with other options, are another request.
    options = sorted(item for item in request.query_params.multi_items() if item[0] != "wait")
    key = requests.idempotency_key(request, orjson.dumps([name, options]), b"\n", body)
    added = await _replayed(state_of(request), key)
    if added is None:
        inputs = requests.parse_json(body) if body else {}
        described: dict[str, Any] = {"workflow": name, "inputs": inputs, **_options(request)}
        wanted = requests.converted(described, TaskRequest)
        added = await accept(request, wanted, key)
    return await accepted(request, added)


def _options(request: Request) -> dict[str, Any]:
    """The query parameters that stand for fields of the submit body, as that body would hold them."""
    query = request.query_params
    requests.known(query, *RUN_QUERY)
    options: dict[str, Any] = {}
    if "priority" in query:
        word = query["priority"].lower()
        options["priority"] = word if word in PRIORITIES else requests.integer(query, "priority", -1000, 1000)
    if "max_attempts" in query:
        options["max_attempts"] = requests.integer(query, "max_attempts", 1, 100)
    for name in ("timeout", "start_timeout"):
        if name in query:
            options[name] = requests.number(query, name)
    if "webhook_url" in query:
        options["webhook_url"] = query["webhook_url"]
    if "webhook_events" in query:
        options["webhook_events"] = query["webhook_events"].split(",")
    options["metadata"] = requests.metadata(query)
    options["output"] = _output(query)
    return options


def _output(query: QueryParams) -> dict[str, Any]:
    """The query parameters `output.FIELD`, and `include_temp`."""
    given: dict[str, Any] = {"include_temp": requests.truth(query, "include_temp")}
    for name in query:
        field = name.removeprefix("output.")
        if field == name:
            continue
        if field == "quality":
            given[field] = requests.integer(query, name, 1, 100)
        elif field == "inline":
            given[field] = requests.truth(query, name)
        else:
            given[field] = query[name]
    return given


async def _replayed(state: State, key: IdempotencyKey | None) -> Added | None:
    """The task that this key made before, whatever the limits and templates have become since."""
    task = await state.store.replay(key) if key is not None else None
    return None if task is None else Added(task=task, replayed=True)


async def accept(request: Request, wanted: TaskRequest, key: IdempotencyKey | None) -> Added:
    """Hand the request on; it is a durable task when this returns."""
    priority = wanted.priority
    submitted = SubmitRequest(
        workflow=wanted.workflow,
        inputs=wanted.inputs,
        priority=PRIORITIES[priority] if isinstance(priority, str) else priority,
        max_attempts=wanted.max_attempts,
        timeout=wanted.timeout,
        start_timeout=wanted.start_timeout,
        metadata=wanted.metadata,
        output=output_options(wanted.output),
        webhook=webhook(wanted),
        credentials=credentials(wanted.extra_data),
    )
    return await queued(state_of(request), submitted, key)


async def queued(state: State, wanted: SubmitRequest, key: IdempotencyKey | None) -> Added:
    """Make it a durable task, and count it."""
    added = await state.submission.submit(wanted, key)
    if not added.replayed:
        state.metrics.submitted.inc()
    return added


def output_options(wanted: OutputRequest) -> OutputOptions:
    """What is wanted of the outputs. Raises `MalformedRequest` for a quality of nothing."""
    if wanted.quality is not None and wanted.format in {None, "png"}:
        raise _contradicting("$.output.quality", "needs `format` jpeg, webp or avif")
    if any(requests.is_task_id(folder) for folder in wanted.prefix.split("/")):
        # where it would meet the files of a task
        raise _contradicting("$.output.prefix", "a folder may not be called like a task's id")
    return OutputOptions(
        include_temp=wanted.include_temp,
        storage=wanted.storage,
        prefix=wanted.prefix,
        format=wanted.format,
        quality=wanted.quality,
        strip=wanted.metadata == "strip",
        inline=wanted.inline,
    )


def webhook(wanted: TaskRequest) -> Webhook | None:
    """Whom to tell of what. Raises `MalformedRequest` where the fields contradict each other."""
    url, events = wanted.webhook_url, wanted.webhook_events
    if wanted.callback_url is not None:
        if url not in {None, wanted.callback_url}:
            raise _contradicting("$.callbackUrl", "is another name of `webhook_url`, and says something else")
        url = wanted.callback_url
    if events is not None and len(set(events)) < len(events):
        raise _contradicting("$.webhook_events", "names an event twice")
    if url is None:
        if events is not None:
            raise _contradicting("$.webhook_events", "needs `webhook_url`")
        return None
    return Webhook(url=url) if events is None else Webhook(url=url, events=events)


def credentials(wanted: ExtraDataRequest | None) -> dict[str, str]:
    """What is for ComfyUI alone, in its words. Raises `MalformedRequest`."""
    key = wanted.api_key_comfy_org if wanted is not None else None
    if key is None:
        return {}
    if not key.isprintable():
        raise _contradicting("$.extra_data.api_key_comfy_org", "must be printable characters")
    return {"api_key_comfy_org": key}


def _contradicting(path: str, message: str) -> MalformedRequest:
    return MalformedRequest(f"{path}: {message}", details={"path": path})


async def accepted(request: Request, added: Added) -> Response:
    """202 with the task; 200 if the client waited and it has ended."""
    seconds = requests.wait_seconds(request)
    task = added.task
    if seconds is not None:
        task = await until_ended(state_of(request), task.id, seconds, request.receive)
    view = await viewed(request, task)
    headers = {"Location": view.urls.self}
    if added.replayed:
        headers["Idempotent-Replayed"] = "true"
    if seconds is not None and "prefer" in request.headers:
        headers["Preference-Applied"] = f"wait={math.floor(seconds)}"
    done = seconds is not None and task.status.terminal
    return JsonResponse(view, 200 if done else 202, headers)


async def read(request: Request) -> Response:
    """`GET /api/tasks/{task_id}`."""
    task_id = requests.task_id(request)
    seconds = requests.wait_seconds(request) or 0.0
    state = state_of(request)
    if seconds:
        await until_ended(state, task_id, seconds, request.receive)
    view = await looked_up(request, task_id)
    return JsonResponse(view, headers={"Cache-Control": "no-store"})


async def list_tasks(request: Request) -> Response:
    """`GET /api/tasks`."""
    query = request.query_params
    requests.known(query, "status", "workflow", "metadata[key]", "cursor", "limit")
    cursor, limit = requests.page(request)
    wanted = TaskFilter(
        statuses=_statuses(query.get("status")),
        workflow=query.get("workflow"),
        metadata=requests.metadata(query),
    )
    page = await state_of(request).store.list_tasks(wanted, cursor, limit)
    views = await asyncio.gather(*(viewed(request, task, data=False) for task in page.tasks))
    answer = TaskListView(tasks=tuple(views), next_cursor=page.next_cursor)
    return JsonResponse(answer, headers={"Cache-Control": "no-store"})


def _statuses(word: str | None) -> frozenset[Status]:
    if word is None:
        return frozenset()
    status = STATUSES.get(word.upper())
    if status is None:
        raise MalformedRequest(
            f"?status= must be one of {', '.join(STATUSES)}, not {word[:50]!r}",
            details={"parameter": "status"},
        )
    return frozenset({status})


async def cancel(request: Request) -> Response:
    """`POST /api/tasks/{task_id}/cancel`."""
    task = await state_of(request).control.cancel(requests.task_id(request))
    return JsonResponse(await viewed(request, task))


async def retry(request: Request) -> Response:
    """`POST /api/tasks/{task_id}/retry`."""
    state = state_of(request)
    state.room.check()
    task = await state.control.retry(requests.task_id(request))
    view = await viewed(request, task)
    return JsonResponse(view, 202, {"Location": view.urls.self})


async def delete(request: Request) -> Response:
    """`DELETE /api/tasks/{task_id}`."""
    await state_of(request).control.delete(requests.task_id(request))
    return Response(status_code=204)


async def looked_up(connection: HTTPConnection, task_id: str) -> TaskView:
    """The task as clients see it. Raises `TaskNotFound`."""
    return await shown(connection, await look(state_of(connection), task_id))


async def viewed(connection: HTTPConnection, task: Task, *, data: bool = True) -> TaskView:
    """The same of a row that was read already; `data` says whether small files are shown whole."""
    return await shown(connection, sight_of(state_of(connection), task), data=data)


async def shown(connection: HTTPConnection, sight: Sight, *, data: bool = True) -> TaskView:
    """What was seen, in the words of this API."""
    state, base = state_of(connection), base_url(connection)
    estimate = await state.estimator.of(sight.task)
    outputs = await state.links.outputs(sight.artefacts, base, data=data)
    return task_view(sight.task, estimate, sight.progress, outputs, base)
