"""The routes of jobs, which are tasks: submit, read, list, cancel; never what a request means."""

import asyncio
import re
from typing import Final
from urllib.parse import unquote_to_bytes

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from comfyd.api import requests, tasks
from comfyd.api.responses import JsonResponse, base_url
from comfyd.api.sights import Sight, look, sight_of
from comfyd.api.state import State, state_of
from comfyd.api.v2.errors import InvalidLabelFilter
from comfyd.api.v2.schemas import JobItemView, JobListView, JobView, JobWorkflowView
from comfyd.api.v2.submissions import label_problem, submission
from comfyd.api.v2.views import STATUSES, item_view, job_view, kept_until, outputs_of, word
from comfyd.api.waiting import until_ended
from comfyd.errors import IdempotencyKeyReuse, MalformedRequest, TaskNotFound
from comfyd.tasks import IdempotencyKey, Status, Task, TaskFilter

PAGE: Final = 50
"""Jobs on a page where the client names no `limit`."""
PAGE_MOST: Final = 100
FILTERS: Final = 3
"""Labels that a list can be asked for at once."""

YOUNG_MS: Final = 500
"""How old a job is at most for whose end a look at it waits."""
HELD_SECONDS: Final = 0.25

_NO_STORE: Final = {"Cache-Control": "no-store"}
_FILTER: Final = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")


async def submit(request: Request) -> Response:
    """`POST /api/v2/jobs`: an idempotency key is good for one job, and no answer is repeated."""
    state = state_of(request)
    # Not of the body: no two requests are the same here, and it may hold what must be stored nowhere.
    key = requests.idempotency_key(request, b"/api/v2/jobs")
    await _check_unused(state, key)
    requests.check_json_type(request)
    body = requests.parse_json(await requests.read_body(request))
    added = await tasks.queued(state, submission(body), key)
    if added.replayed:  # another request with this key was quicker
        raise _used()
    view = await _viewed(request, added.task)
    return JsonResponse(view, 201, {"Location": view.urls.self})


async def _check_unused(state: State, key: IdempotencyKey | None) -> None:
    """Raises `IdempotencyKeyReuse`, as the store itself does where the other body was another."""
    if key is not None and await state.store.replay(key) is not None:
        raise _used()


def _used() -> IdempotencyKeyReuse:
    return IdempotencyKeyReuse("this Idempotency-Key was used before; look for its job in the list of jobs")


async def read(request: Request) -> Response:
    """`GET /api/v2/jobs/{job_id}`.

    The official clients look as soon as they have submitted, and then only after half a second: that first
    look waits for a job that may end at once.
    """
    state, wanted = state_of(request), job_id(request)
    sight = await look(state, wanted)
    if is_new(sight.task, state.clock.now()) and await has_its_turn(state, sight.task):
        await until_ended(state, wanted, HELD_SECONDS, request.receive)
        sight = await look(state, wanted)
    return JsonResponse(await _shown(request, sight), headers=_NO_STORE)


def is_new(task: Task, now: int) -> bool:
    """Whether this may be the first look at the job. A clock that was set back makes no job new."""
    return 0 <= now - task.created_at < YOUNG_MS


async def has_its_turn(state: State, task: Task) -> bool:
    """Whether the job runs, or is the next one."""
    return task.status is Status.RUNNING or await state.estimator.position(task) == 1


async def workflow(request: Request) -> Response:
    """`GET /api/v2/jobs/{job_id}/workflow`."""
    wanted = job_id(request)
    graph = await state_of(request).store.graph(wanted)
    if graph is None:
        raise TaskNotFound(f"there is no job {wanted}")
    return JsonResponse(JobWorkflowView(workflow=graph), headers=_NO_STORE)


async def cancel(request: Request) -> Response:
    """`POST /api/v2/jobs/{job_id}/cancel`."""
    task = await state_of(request).control.cancel(job_id(request))
    return JsonResponse(await _viewed(request, task))


async def list_jobs(request: Request) -> Response:
    """`GET /api/v2/jobs`. A page may be short: only here are running and canceling two words."""
    state, query = state_of(request), request.query_params
    most = min(PAGE_MOST, state.config.limits.list_page)
    limit = min(requests.integer(query, "limit", 1, PAGE_MOST) or PAGE, most)
    words = _words(query.get("status"))
    statuses = frozenset(status for name in words if (status := STATUSES[name]) is not None)
    labels = _label_filters(request.scope["query_string"])
    if words and not statuses:
        return JsonResponse(JobListView(jobs=()), headers=_NO_STORE)
    wanted = TaskFilter(statuses=statuses, metadata=labels)
    page = await state.store.list_tasks(wanted, query.get("cursor"), limit)
    found = [task for task in page.tasks if not words or word(task) in words]
    jobs = tuple(await asyncio.gather(*(_item(request, task) for task in found)))
    if page.next_cursor is None:
        return JsonResponse(JobListView(jobs=jobs), headers=_NO_STORE)
    return JsonResponse(JobListView(jobs=jobs, next_cursor=page.next_cursor), headers=_NO_STORE)


def _words(given: str | None) -> frozenset[str]:
    """The statuses that are asked for; none for all."""
    if given is None:
        return frozenset()
    words = frozenset(given.split(","))
    for name in words - STATUSES.keys():
        message = f"?status= must be some of {', '.join(STATUSES)}, not {name[:50]!r}"
        raise MalformedRequest(message, details={"parameter": "status"})
    return words


def _label_filters(query: bytes) -> dict[str, str]:
    """The pairs given as `metadata[key]=value`. Raises `InvalidLabelFilter` for whatever else begins so."""
    filters: dict[str, str] = {}
    for part in query.split(b"&"):
        written, _, written_value = part.partition(b"=")
        name = unquote_to_bytes(written.replace(b"+", b" ")).decode(errors="replace")
        if name.partition("[")[0] != "metadata":
            continue
        key, value = _FILTER.fullmatch(name), _unescaped(written_value)
        if key is None or _ESCAPE.search(written):
            raise _not_a_filter("labels are asked for as metadata[key]=value")
        problem = label_problem(key[1], value)
        if problem is not None:
            raise _not_a_filter(f"metadata[{key[1][:40]}]: {problem}")
        if key[1] in filters:
            raise _not_a_filter(f"metadata[{key[1]}] is given twice")
        filters[key[1]] = value
    if len(filters) > FILTERS:
        raise _not_a_filter(f"at most {FILTERS} labels can be asked for at once")
    return filters


def _unescaped(written: bytes) -> str:
    """A value of the query. Raises `InvalidLabelFilter` where that cannot be read."""
    try:
        value = unquote_to_bytes(written.replace(b"+", b" ")).decode()
    except UnicodeDecodeError as exc:
        raise _not_a_filter("a label's value is UTF-8") from exc
    if _ESCAPE.search(written):
        raise _not_a_filter("a % in a label's value is written %25")
    return value


def _not_a_filter(message: str) -> InvalidLabelFilter:
    return InvalidLabelFilter(message, details={"parameter": "metadata"})


def job_id(connection: HTTPConnection) -> str:
    """The task that the path names. Raises `TaskNotFound` for what can be no task's id."""
    given: str = connection.path_params["job_id"]
    if not requests.is_task_id(given.lower()):
        raise TaskNotFound(f"there is no job {given[:100]!r}: an id is a UUID")
    return given.lower()


async def _item(request: Request, task: Task) -> JobItemView:
    return item_view(task, await _viewed(request, task))


async def _viewed(request: Request, task: Task) -> JobView:
    return await _shown(request, sight_of(state_of(request), task))


async def _shown(request: Request, sight: Sight) -> JobView:
    """What was seen, in the words of this API."""
    state, base = state_of(request), base_url(request)
    kept = kept_until(state, sight.task.completed_at)
    position = await state.estimator.position(sight.task)
    links = await asyncio.gather(*(state.links.link(artefact, base) for artefact in sight.artefacts))
    return job_view(request, sight, position, outputs_of(sight, links, kept), kept)
