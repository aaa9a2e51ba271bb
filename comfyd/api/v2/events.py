"""What happens to a job, as it happens, in the words of the Comfy API v2; never the machinery of streams.

The official clients stop listening at the final status: every output is told before it, and once.
"""

from collections.abc import Sequence
from typing import Final

import msgspec
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from comfyd.api.events import EventStream, artefact_of
from comfyd.api.responses import base_url, encoded
from comfyd.api.sights import Sight
from comfyd.api.state import state_of
from comfyd.api.v2.jobs import job_id
from comfyd.api.v2.schemas import JobPreviewView, JobStatusView
from comfyd.api.v2.views import job_output_view, kept_until, word
from comfyd.progress import Event, Preview, Progress
from comfyd.tasks import Artefact, Status, Task

LOOK_SECONDS: Final = 5.0
"""How often a job that waits is asked for its place in the queue."""

_PROGRESS: Final = msgspec.json.Decoder(Progress)


async def events(request: Request) -> Response:
    """`GET /api/v2/jobs/{job_id}/events`."""
    wanted = job_id(request)
    return EventStream(request, wanted, JobTelling(request, wanted))


class JobTelling:
    """The words of the Comfy API v2. See `comfyd.api.events.Telling`."""

    caching = "no-cache"

    def __init__(self, connection: HTTPConnection, task_id: str, quiet: float = LOOK_SECONDS) -> None:
        self.quiet = quiet
        self._state = state_of(connection)
        self._base = base_url(connection)
        self._task_id = task_id
        self._told: set[str] = set()
        self._standing: tuple[str, int | None] | None = None
        """What was last told of its status."""
        self._highest = 0.0

    def standing(self, task: Task) -> object:
        """See `Telling`."""
        return word(task)

    async def task(self, sight: Sight) -> Sequence[Event]:
        """See `Telling`: its status, what it has made so far, and how far it is."""
        status = await self.waiting(sight.task)
        outputs = [event for artefact in sight.artefacts for event in await self._output(artefact)]
        if sight.task.status.terminal:
            return [*outputs, *status]
        if sight.task.status is Status.RUNNING and sight.progress is not None:
            return [*status, *outputs, self._progress(sight.progress)]
        return [*status, *outputs]

    async def waiting(self, task: Task) -> Sequence[Event]:
        """See `Telling`: its status and its place in the queue, unless they are what was told last."""
        position = await self._state.estimator.position(task)
        if (word(task), position) == self._standing:
            return ()
        self._standing = (word(task), position)
        body = JobStatusView(status=word(task), queue_position=position)
        return [Event(name="status", data=encoded(body), final=task.status.terminal)]

    async def happened(self, event: Event) -> Sequence[Event]:
        """See `Telling`."""
        if event.picture is not None:
            return [self.preview(event.picture)]
        if event.name == "output":
            return await self._output(artefact_of(event))
        if event.name == "progress":
            return [self._progress(_PROGRESS.decode(event.data))]
        return ()  # the contract has no other event that is told yet

    def preview(self, preview: Preview) -> Event:
        """See `Telling`."""
        body = JobPreviewView(
            node_id=preview.node_id or "", content_type=preview.image_type, data_base64=preview.base64
        )
        return Event(name="preview", data=encoded(body))

    async def _output(self, artefact: Artefact) -> Sequence[Event]:
        """Once for each: what was told may come again with the next look at the task."""
        if artefact.id in self._told:
            return ()
        self._told.add(artefact.id)
        link = await self._state.links.link(artefact, self._base)
        body = job_output_view(self._task_id, artefact, link, kept_until(self._state, None))
        return [Event(name="output", data=encoded(body))]

    def _progress(self, progress: Progress) -> Event:
        """Clients take no step back: another attempt says the same until it is as far as the one before."""
        self._highest = max(self._highest, progress.value)
        said = msgspec.structs.replace(progress, value=self._highest)
        return Event(name="progress", data=encoded(said))
