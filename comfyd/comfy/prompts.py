"""Sending a prompt, looking where it is, taking it back; never waits for its end, never sends it twice.

ComfyUI is asked for its queue before its history: the other order misses prompts (Q1). A request that was
answered proves what it says and no more; whoever calls looks again.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import quote

import msgspec
import structlog

from comfyd.clock import Clock
from comfyd.comfy.client import Answer, Client, read_object, unexpected, unreadable
from comfyd.comfy.health import Health
from comfyd.comfy.rejections import cleaned_node_errors, rejection, summary
from comfyd.comfy.sightings import (
    Absent,
    Ended,
    HistoryEntry,
    Pending,
    QueueView,
    Running,
    Sighting,
    read_history,
    read_queue,
)
from comfyd.comfy.wire import Undecodable
from comfyd.credentials import Secrets
from comfyd.errors import (
    BackendError,
    BackendRejected,
    BackendUnclear,
    BackendUnreachable,
    PartlyRejected,
)
from comfyd.tasks import Graph, JsonObject

_TAKE_BACK_PAUSES_MS: Final = (20, 50, 100, 200, 400, 800, 1600, 3200, 6400)

_log = structlog.get_logger(__name__)


class HistoryUnclear(BackendUnclear):
    """The queue does not have the prompt, and what history says of it cannot be read."""


class Prompts:
    """The prompts of one ComfyUI. Lives as long as the backend.

    `secrets_of` says what must not be shown of what ComfyUI says about a prompt.
    """

    def __init__(
        self, client: Client, health: Health, clock: Clock, secrets_of: Callable[[str], Secrets]
    ) -> None:
        self._client = client
        self._health = health
        self._clock = clock
        self._secrets_of = secrets_of
        self._job_cancel: bool | None = None
        """Whether this server has `POST /api/jobs/{id}/cancel`; None while that is not known."""
        self._life = health.life

    async def submit(self, prompt_id: str, client_id: str, graph: Graph, extra_data: JsonObject) -> None:
        """See `Backend.submit`."""
        secrets = self._secrets_of(prompt_id)
        body = _body(prompt_id, client_id, graph, extra_data)
        answer = await self._client.call("POST", "/prompt", body)
        if answer.status in {400, 413}:
            raise rejection(answer.status, answer.body, graph, secrets)
        accepted = read_object(answer, "POST /prompt")
        if accepted.get("prompt_id") != prompt_id:
            raise BackendUnclear("ComfyUI answered POST /prompt without naming this prompt")
        node_errors = cleaned_node_errors(accepted.get("node_errors"), graph, secrets)
        if node_errors:
            taken_back = await self._take_back(prompt_id)
            raise PartlyRejected(
                f"ComfyUI would run only a part of the workflow: {summary(node_errors)}",
                details={"node_errors": node_errors, "taken_back": taken_back},
            )

    async def _take_back(self, prompt_id: str) -> bool:
        """Cancel until it is gone; False if it would not go."""
        for pause in _TAKE_BACK_PAUSES_MS:
            try:
                await self.cancel(prompt_id)
                sighting = await self.look(prompt_id)
            except BackendUnreachable:
                return True  # ComfyUI is down, and its queue with it
            except BackendError:
                sighting = None  # no answer: look again
            if isinstance(sighting, Absent | Ended):
                return True
            await self._clock.sleep(pause)
        _log.warning("prompt.kept", prompt_id=prompt_id)
        return False

    async def look(self, prompt_id: str, ended: bool = False) -> Sighting:
        """See `Backend.look`."""
        if ended:
            with contextlib.suppress(HistoryUnclear):  # what the queue says comes first then
                entry = await self._history(prompt_id)
                if entry is not None:
                    return Ended(entry=entry)
        view = await self.view()
        if prompt_id in view.running:
            return Running()
        if prompt_id in view.pending:
            return Pending(position=view.pending.index(prompt_id) + 1)
        entry = await self._history(prompt_id)
        return Absent() if entry is None else Ended(entry=entry)

    async def view(self) -> QueueView:
        """What is in ComfyUI's queue, anybody's."""
        answer = await self._client.call("GET", "/queue")
        if answer.status != 200:
            raise unexpected(answer.status, "GET /queue")
        try:
            return read_queue(answer.body)
        except Undecodable as error:
            raise unreadable("GET /queue", error) from error

    async def _history(self, prompt_id: str) -> HistoryEntry | None:
        answer = await self._client.call("GET", f"/history/{_quoted(prompt_id)}")
        if answer.status != 200:
            said = unexpected(answer.status, "GET /history")
            raise HistoryUnclear(said.message, details=said.details)
        try:
            return read_history(answer.body, prompt_id, self._secrets_of(prompt_id))
        except Undecodable as error:
            said = unreadable("GET /history", error)
            raise HistoryUnclear(said.message, details=said.details) from error

    async def cancel(self, prompt_id: str) -> None:
        """See `Backend.cancel`."""
        if not prompt_id:
            raise ValueError("an empty prompt id would interrupt whatever runs (Q8)")
        if await self.has_job_cancel():
            _expect_200(
                await self._client.call("POST", f"/api/jobs/{_quoted(prompt_id)}/cancel"), "a job cancel"
            )
            return
        _expect_200(await self._client.call("POST", "/queue", {"delete": [prompt_id]}), "POST /queue")
        # a ComfyUI from before 2025-09 interrupts whatever runs, whichever id it is given (Q8)
        if prompt_id in (await self.view()).running:
            await self._interrupt(prompt_id)

    async def has_job_cancel(self) -> bool:
        """Whether this server has the atomic cancel; found out once per life, on an id that is not there."""
        if self._job_cancel is None or self._life != self._health.life:
            life = self._health.life
            answer = await self._client.call("POST", f"/api/jobs/{self._clock.new_id()}/cancel")
            self._job_cancel, self._life = answer.status == 200, life
        return self._job_cancel

    async def interrupt_running(self) -> str | None:
        """See `Backend.interrupt_running`."""
        running = (await self.view()).running
        if not running or not running[0]:
            return None
        await self._interrupt(running[0])
        return running[0]

    async def _interrupt(self, prompt_id: str) -> None:
        _expect_200(
            await self._client.call("POST", "/interrupt", {"prompt_id": prompt_id}), "POST /interrupt"
        )


def _quoted(prompt_id: str) -> str:
    """As one part of a path, whatever it is: ComfyUI 0.3.75 takes any text for an id."""
    return quote(prompt_id, safe="")


def _body(prompt_id: str, client_id: str, graph: Graph, extra_data: JsonObject) -> bytes:
    """The body of POST /prompt, of what is known to be harmless (Q9, Q10, Q16): no `number`, no `front`."""
    document = {
        "prompt": {node_id: _node(node) for node_id, node in graph.items()},
        "prompt_id": prompt_id,
        "client_id": client_id,
        "extra_data": extra_data,
    }
    try:
        return msgspec.json.encode(document)
    except (TypeError, ValueError, RecursionError) as error:
        raise BackendRejected(
            f"The workflow cannot be written as JSON: {error}", details={"node_errors": {}}
        ) from error


def _node(node: Any) -> Any:
    """A node with an object `_meta`: without one 0.33 cannot replace a renamed class and answers 500."""
    if isinstance(node, Mapping) and not isinstance(node.get("_meta"), Mapping):
        return {**node, "_meta": {}}
    return node


def _expect_200(answer: Answer, what: str) -> None:
    if answer.status != 200:
        raise unexpected(answer.status, what)
