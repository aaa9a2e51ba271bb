"""One ComfyUI server as the rest of comfyd sees it; never shows aiohttp, never decides what to do next."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Self
from weakref import WeakSet

import msgspec
import structlog

from comfyd.clock import Clock
from comfyd.comfy.catalogue import Catalogue
from comfyd.comfy.client import Client, open_session, server_url
from comfyd.comfy.files import Files, OutputStream
from comfyd.comfy.forwarding import ForwardedRequest, ForwardedResponse, forward
from comfyd.comfy.health import BackendState, Health
from comfyd.comfy.messages import Message
from comfyd.comfy.prompts import Prompts
from comfyd.comfy.sickness import Look, Sickness
from comfyd.comfy.sightings import Ended, QueueView, Sighting
from comfyd.comfy.socket import Socket, Watch
from comfyd.config import ComfyUIConfig
from comfyd.credentials import NO_SECRETS, Secrets
from comfyd.errors import BackendError, BackendUnclear, BackendUnreachable
from comfyd.tasks import Graph, JsonObject, OutputFile

_log = structlog.get_logger(__name__)


class Backend:
    """One ComfyUI server. Made by `open`, lives as long as the process; an object in hand is open.

    Every verb that asks ComfyUI raises `BackendUnreachable` where nothing was sent and `BackendUnclear` where
    no usable answer came. A refused connection makes the backend not ready at once; only `probe` makes it
    ready again.
    """

    def __init__(self, config: ComfyUIConfig, client: Client, health: Health, clock: Clock) -> None:
        self.name = config.name
        self.url = client.place
        self.in_flight = config.in_flight
        """How many prompts it may have; one, while a ComfyUI that was sick is on probation."""
        self._in_flight = config.in_flight
        self._sickness = Sickness(round(config.stuck_after * 1000), round(config.stop_timeout * 1000))
        self._watches: WeakSet[Watch] = WeakSet()
        self._clock = clock
        self._client_prefix = config.client_id
        self._client = client
        self._health = health
        self._catalogue = Catalogue(client, health)
        self._files = Files(client)
        self._socket = Socket(client, config.client_id, clock, health.renewed)
        self._prompts = Prompts(client, health, clock, self._socket.secrets_of)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, config: ComfyUIConfig, clock: Clock, on_change: Callable[[], None] = lambda: None
    ) -> AsyncIterator[Self]:
        """A backend; ComfyUI is not asked yet. `on_change` tells that `state.ready`, `state.sick` or
        `in_flight` changed. Raises `ConfigError` for a url that is none.
        """
        url = server_url(config.url)
        health = Health(clock, on_change)
        async with open_session() as session:
            yield cls(config, Client(session, url, config.request_timeout, health), health, clock)

    # how it stands

    @property
    def state(self) -> BackendState:
        """How it stands now."""
        health = self._health
        return BackendState(
            ready=health.ready,
            reason=health.reason,
            sick=health.sick,
            version=health.version,
            socket=self._socket.client_id is not None,
            since=health.since,
            timeouts=health.timeouts,
        )

    @property
    def life(self) -> int:
        """Counts up whenever ComfyUI may have been started anew."""
        return self._health.life

    @property
    def client_id(self) -> str | None:
        """That of the open WebSocket; None while none is open."""
        return self._socket.client_id

    @property
    def connections(self) -> int:
        """How many WebSockets were ever open; never two at a time."""
        return self._socket.connections

    @property
    def malformed_messages(self) -> int:
        """How many messages of the WebSocket made no sense."""
        return self._socket.malformed

    @property
    def probe_every_ms(self) -> int | None:
        """How often `probe` has to be called for a sick ComfyUI to be found in time; None if it need not."""
        return self._sickness.look_every_ms

    async def probe(self) -> None:
        """One look at ComfyUI's health; once per life of the server also at what it can do. Raises nothing.

        A refused connection is 'not ready' at once, a time-out only when it repeats (`health.SILENT_PROBES`),
        one that answers without working after several looks (`Sickness`).
        """
        try:
            version = _version(await self.system_stats())
            await self._prompts.has_job_cancel()
        except (BackendUnreachable, BackendUnclear) as error:
            self._sickness.unanswered()
            if "status" in error.details:
                self._health.failed(error.message)
            else:
                self._health.silent(error.message)  # where it was refused, that is known already
        else:
            if self._sickness.look_every_ms is not None:
                await self._examine()  # first: one that has been started anew is not what it was
            self._health.passed(version)

    async def _examine(self) -> None:
        """Look whether it works. No answer says nothing: whether it is up is known already."""
        life, falls, sickness = self._health.life, self._health.falls, self._sickness
        ended = frozenset(watch.prompt_id for watch in self._watches if watch.ended)
        try:
            view = await self._prompts.view()
            at = self._clock.monotonic()
            sickness.looked(Look(view=view, ended=ended, life=life, falls=falls, at=at))
        except BackendError:
            sickness.unanswered()
        self._diagnose()

    def _diagnose(self) -> None:
        """Tell those who give out work what the looks add up to."""
        before, ready, reason = self._health.sick, self._health.ready, self._sickness.reason
        in_flight, self.in_flight = self.in_flight, 1 if self._sickness.on_probation else self._in_flight
        self._health.diagnosed(reason)
        if self._health.sick and not before:
            _log.warning("backend.sick", backend=self.name, reason=reason)
        elif before and reason is None:
            _log.info("backend.well", backend=self.name, on_probation=self._sickness.on_probation)
        if in_flight != self.in_flight and ready == self._health.ready:
            self._health.changed()

    async def run_socket(self) -> None:
        """One life of the WebSocket: connects under a fresh client id and reads until it ends. Never returns.

        Raises `BackendUnreachable` where it was refused, `BackendUnclear` where it did not come about or was
        lost; a loop above repeats it with back-off. Only one may run at a time.
        """
        await self._socket.run()

    def reset_socket(self) -> None:
        """Give the open WebSocket up as deaf: `run_socket` then ends. Without one nothing happens."""
        self._socket.reset()

    # prompts

    def watch(
        self,
        prompt_id: str,
        listener: Callable[[Message], None],
        client_id: str | msgspec.UnsetType | None = msgspec.UNSET,
        secrets: Secrets = NO_SECRETS,
    ) -> Watch:
        """Hear of one prompt: enter it before the prompt is sent, and send that under `watch.client_id`.

        `listener` is called in the reader for each message of this prompt: it may neither wait nor raise.
        `client_id` is given for a prompt that was sent earlier, None if that was under no connection: then
        `watch.connected` says whether its connection is still the open one (after a restart it never is).
        While the watch is entered no verb here shows `secrets` in what ComfyUI says of the prompt.
        """

        def hear(message: Message) -> None:
            self._sickness.stirred()
            listener(message)

        watch = self._socket.watch(prompt_id, hear, client_id, secrets)
        self._watches.add(watch)
        return watch

    async def submit(
        self, prompt_id: str, client_id: str | None, graph: Graph, extra_data: JsonObject
    ) -> None:
        """Send a prompt. For a `client_id` of None one is sent that nobody has: without one, all hear it.

        Raises `BackendRejected` (invalid; nothing is queued), `PartlyRejected` (it would have run in part and
        was taken back; `details["taken_back"]` is False if ComfyUI would not let go of it),
        `BackendUnreachable` (nothing was sent) and `BackendUnclear` (it may be queued, now or later: look,
        and do not send it again).
        """
        await self._prompts.submit(prompt_id, client_id or f"{self._client_prefix}-none", graph, extra_data)

    async def look(self, prompt_id: str, ended: bool = False) -> Sighting:
        """Where a prompt is: the queue first, then history, which is asked only if the queue has it not.

        `ended` says that its end was announced: history is then asked first, which saves a request.
        """
        sighting = await self._prompts.look(prompt_id, ended)
        if isinstance(sighting, Ended):
            self._sickness.stirred()
        return sighting

    async def queue(self) -> QueueView:
        """The ids of all prompts in ComfyUI's queue, anybody's."""
        return await self._prompts.view()

    async def cancel(self, prompt_id: str) -> None:
        """One pass of taking back exactly this prompt. It proves nothing: look, and repeat until gone (Q7).

        Uses the server's atomic cancel where it has one. `ValueError` for an empty id.
        """
        await self._prompts.cancel(prompt_id)
        self._sickness.asked_to_stop(prompt_id)

    async def interrupt_running(self) -> str | None:
        """Interrupt whatever runs now, by its id; that id, or None when nothing runs."""
        return await self._prompts.interrupt_running()

    # files

    def open_output(self, file: OutputFile) -> AbstractAsyncContextManager[OutputStream]:
        """`async with backend.open_output(file) as stream`: a file as ComfyUI made it.

        Raises `OutputUnavailable` where it is gone, not served, or (from `chunks`) shorter than announced.
        """
        return self._files.open_output(file)

    async def upload_input(self, filename: str, chunks: AsyncIterator[bytes]) -> str:
        """Store an input; the name that a graph uses for it. Safe to repeat with the same bytes (Q18).

        `filename` is a safe ASCII name made from the content's hash, else `ValueError`. Raises
        `BackendRejected` for one that is too large; errors of `chunks` come out as they are.
        """
        return await self._files.upload_input(filename, chunks)

    # what it can do and says

    async def object_info(self, refresh: bool = False) -> Mapping[str, Any]:
        """The node classes, as `GET /object_info` has them; remembered until ComfyUI may be a new one."""
        return await self._catalogue.classes.get(refresh)

    async def replaceable_classes(self) -> frozenset[str]:
        """Classes that this server runs as others although it does not list them; remembered likewise."""
        return await self._catalogue.replaceable.get()

    async def queue_status(self) -> dict[str, Any]:
        """The answer of `GET /queue` as it is."""
        return await self._client.get_object("/queue")

    async def system_stats(self) -> dict[str, Any]:
        """The answer of `GET /system_stats` as it is."""
        return await self._client.get_object("/system_stats")

    def forward(self, request: ForwardedRequest) -> AbstractAsyncContextManager[ForwardedResponse]:
        """`async with backend.forward(request) as response`: somebody's request as it is, streamed both ways.

        Raises `MalformedRequest` for a method, path or query that is not passed on.
        """
        return forward(self._client, request)


def _version(stats: Mapping[str, Any]) -> str | None:
    system = stats.get("system")
    version = system.get("comfyui_version") if isinstance(system, dict) else None
    return version if isinstance(version, str) else None
