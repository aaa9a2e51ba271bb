"""Prompts of ours in ComfyUI that nobody waits for: taken back, and never anybody else's.

An attempt that counted as lost may still come: ComfyUI can read a request long after its sender gave up (Q6).
Its task has another attempt by then, or has ended.
"""

import structlog

from comfyd.comfy.backend import Backend
from comfyd.errors import BackendError
from comfyd.metrics import Metrics
from comfyd.store.base import Store

log = structlog.get_logger("comfyd.orphans")

LOOK_EVERY_MS = 3_000


class Orphans:
    """Looks for them in one ComfyUI. Lives as long as the process."""

    def __init__(self, backend: Backend, store: Store, metrics: Metrics) -> None:
        self._backend = backend
        self._store = store
        self._metrics = metrics
        self._known: set[str] = set()

    async def step(self) -> int:
        """Look once, and ask each one to go. What has not gone is asked again the next time (Q7).

        Also of a sick ComfyUI: an orphan that will not stop may be what it is sick of.
        """
        state = self._backend.state
        if not (state.ready or state.sick):
            return LOOK_EVERY_MS
        try:
            await self._look()
        except BackendError as exc:  # it proves nothing (Q20); whether ComfyUI is well is for others to tell
            log.debug("orphans.unclear", reason=exc.message)
        return LOOK_EVERY_MS

    async def _look(self) -> None:
        view = await self._backend.queue()
        ended = await self._store.ended_attempts((*view.running, *view.pending))
        if ended:  # one that left the queue and was settled since that look is none
            view = await self._backend.queue()
        queued = {*view.running, *view.pending}
        orphans = [prompt_id for prompt_id in ended if prompt_id in queued]
        for prompt_id in orphans:
            if prompt_id not in self._known:
                log.warning("prompt.orphaned", attempt_id=prompt_id, backend=self._backend.name)
                self._metrics.orphaned(self._backend.name)
                self._known.add(prompt_id)
            await self._backend.cancel(prompt_id)
        self._known.intersection_update(orphans)
