"""What is counted and timed, in a registry of its own; never decides and never asks the database."""

from collections.abc import Mapping
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from comfyd.tasks import Status

LATENESS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)
SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600)


class Metrics:
    """The figures of one process. Lives as long as it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._tasks = Gauge("comfyd_tasks", "Tasks by status.", ["status"], registry=self.registry)
        self._depth = Gauge("comfyd_queue_depth", "Tasks waiting to be claimed.", registry=self.registry)
        self._backends = Gauge(
            "comfyd_backend_ready", "Whether a ComfyUI can work.", ["backend"], registry=self.registry
        )
        self._sick = Gauge(
            "comfyd_backend_sick",
            "Whether a ComfyUI answers and does not work.",
            ["backend"],
            registry=self.registry,
        )
        self._restarts = Counter(
            "comfyd_backend_restarts",
            "Runs of the command that starts a sick ComfyUI anew, by backend and result.",
            ["backend", "result"],
            registry=self.registry,
        )
        self._watchers = Gauge("comfyd_event_watchers", "Readers of event streams.", registry=self.registry)
        self.submitted = Counter("comfyd_tasks_submitted", "Tasks accepted.", registry=self.registry)
        self._finished = Counter(
            "comfyd_tasks_finished", "Tasks that ended, by status.", ["status"], registry=self.registry
        )
        self._retries = Counter(
            "comfyd_task_retries",
            "Attempts that were repeated, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self._orphans = Counter(
            "comfyd_orphaned_prompts",
            "Prompts that counted as lost, came all the same, and were taken back, by backend.",
            ["backend"],
            registry=self.registry,
        )
        self._waiting = self._histogram(
            "comfyd_task_waiting_seconds", "From submit to the start of the first execution."
        )
        self._executing = self._histogram("comfyd_task_executing_seconds", "ComfyUI's execution of a prompt.")
        self._total = self._histogram("comfyd_task_total_seconds", "From submit to the end.")
        self._stored = Counter(
            "comfyd_stored_bytes", "Bytes of artefacts put into the storage.", registry=self.registry
        )
        self._storage_failures = Counter(
            "comfyd_storage_failures",
            "Failed tries to store an artefact, by storage.",
            ["storage"],
            registry=self.registry,
        )
        self._fetched = Counter(
            "comfyd_fetched_bytes", "Bytes of inputs fetched from urls.", registry=self.registry
        )

        self._lag = Histogram(
            "comfyd_event_loop_lag_seconds",
            "By how much a step of the event loop comes too late.",
            buckets=LATENESS,
            registry=self.registry,
        )

        self._webhook_tries = Counter(
            "comfyd_webhook_tries",
            "Tries to deliver a webhook, by outcome.",
            ["outcome"],
            registry=self.registry,
        )

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=SECONDS, registry=self.registry)

    def counted(self, counts: Mapping[Status, int]) -> None:
        """How many tasks have each status now."""
        for status, count in counts.items():
            self._tasks.labels(status).set(count)
        self._depth.set(counts.get(Status.QUEUED, 0))

    def backend_ready(self, name: str, ready: bool) -> None:
        """Whether this ComfyUI can work now."""
        self._backends.labels(name).set(ready)

    def backend_sick(self, name: str, sick: bool) -> None:
        """Whether this ComfyUI answers and does not work now."""
        self._sick.labels(name).set(sick)

    def restarted(self, name: str, result: str) -> None:
        """The command that starts this ComfyUI anew was run."""
        self._restarts.labels(name, result).inc()

    def watching(self, readers: int) -> None:
        """How many readers of event streams there are now."""
        self._watchers.set(readers)

    def waited(self, waited_ms: int) -> None:
        """A task was executed for the first time, so long after it came."""
        self._waiting.observe(max(waited_ms, 0) / 1000)

    def executed(self, execution_ms: int) -> None:
        """A prompt was executed."""
        self._executing.observe(execution_ms / 1000)

    def repeated(self, reason: str) -> None:
        """An attempt ended and its task went back to the queue."""
        self._retries.labels(reason).inc()

    def orphaned(self, backend: str) -> None:
        """A prompt of an ended attempt was found in this ComfyUI."""
        self._orphans.labels(backend).inc()

    def finished(self, status: Status, total_ms: int) -> None:
        """A task ended."""
        self._finished.labels(status).inc()
        self._total.observe(total_ms / 1000)

    def stored(self, size_bytes: int) -> None:
        """An artefact was stored."""
        self._stored.inc(size_bytes)

    def storage_failed(self, storage: str) -> None:
        """A storage did not take an artefact; it is tried again."""
        self._storage_failures.labels(storage).inc()

    def fetched(self, size_bytes: int) -> None:
        """An input was fetched."""
        self._fetched.inc(size_bytes)

    def loop_late(self, late_ms: int) -> None:
        """A step of the event loop came so much too late."""
        self._lag.observe(late_ms / 1000)

    def webhook_tried(self, outcome: str) -> None:
        """A webhook was tried: `delivered`, `failed` for good, `gone`, or to be `retried`."""
        self._webhook_tries.labels(outcome).inc()

    def render(self) -> tuple[bytes, str]:
        """The text that Prometheus reads, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
