"""Artefacts over HTTP, whichever storage has them; never a file that no task names.

A path is the task's id, the attempt and the file, so the row says what the file is.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from comfyd.api.content import Content, answer
from comfyd.api.links import served_path
from comfyd.api.requests import is_task_id
from comfyd.api.state import State, state_of
from comfyd.errors import FileNotFound
from comfyd.storage.base import StoredFile
from comfyd.storage.opening import Storages
from comfyd.tasks import Artefact


async def read_file(request: Request) -> Response:
    """`GET /api/files/{key}`."""
    state = state_of(request)
    path, query = request.path_params["key"], request.query_params
    state.links.check(path, query.get("expires"), query.get("signature"))
    return served(request, await _artefact(state, path))


def served(request: Request, artefact: Artefact) -> Response:
    """What the request asks for of this artefact, read from its storage."""
    content = Content(
        name=artefact.name,
        content_type=artefact.content_type,
        size_bytes=artefact.size_bytes,
        digest=artefact.sha256,
    )
    return answer(request, content, partial(_opened, state_of(request).storages, artefact))


@asynccontextmanager
async def _opened(
    storages: Storages, artefact: Artefact, start: int, length: int
) -> AsyncIterator[StoredFile]:
    """Entering it raises `FileNotFound`, or `StorageError`."""
    storage = await storages.get(artefact.storage)
    async with storage.open(artefact.key, start, length) as file:
        yield file


async def _artefact(state: State, path: str) -> Artefact:
    """The row's own word about a file, or that of the running task. Raises `FileNotFound`."""
    task_id = path.partition("/")[0]
    # Looked at first: a task that ends between the two looks is read as running and has none here any more.
    early = state.board.artefacts(task_id)
    task = await state.store.get(task_id) if is_task_id(task_id) else None
    if task is not None:
        for artefact in task.artefacts or state.board.artefacts(task_id) or early:
            if served_path(artefact) == path:
                return artefact
    raise FileNotFound(f"there is no file {path[:200]!r}")
