"""What the official SDK is run against: comfyd as a process in front of a ComfyUI as a process.

It knows comfyd by its command and its url alone, and makes SDK clients as their users do.
"""

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from comfy_sdk import AsyncComfy, AsyncJob, Comfy, Event, Job, Workflow

from tests.conformance import graphs
from tests.support.comfyd import ComfydProcess
from tests.support.comfyui import ComfyUIProcess, ServerKind
from tests.support.service import sampled

PATIENCE: Final = 50.0
"""Seconds that a job may take on a loaded machine."""
FILLED: Final = 4
"""Jobs that comfyd takes up at once for one ComfyUI: `in_flight` and `prefetch`."""
REAL_ONLY: Final = pytest.mark.parametrize(
    "kind", [pytest.param("real", marks=pytest.mark.comfyui)], indirect=True
)
"""For what the simulator has not, or what would be waiting twice."""
SIMULATOR_OPTIONS: Final = ("--step-seconds", "0.02")
NODES: Final = Path(__file__).parent / "comfyui_nodes.py"


class EquippedComfyUI(ComfyUIProcess):
    """A ComfyUI with what a usual one has: sound, previews while it samples, and a node that wants a key.

    The real one samples nothing here, as it has no checkpoint, so a node of these tests sends the previews in
    the same way. Its audio nodes import torchaudio, which is not in the recipe and is not used by them here.
    """

    def __init__(self, kind: ServerKind, folder: Path) -> None:
        """Keep everything it has in this folder."""
        options = SIMULATOR_OPTIONS
        if kind == "real":
            nodes = folder / "nodes"
            nodes.mkdir(parents=True)
            shutil.copy(NODES, nodes)
            (folder / "nodes.yaml").write_text(f"tests:\n  custom_nodes: {nodes}\n")
            (folder / "modules").mkdir()
            (folder / "modules" / "torchaudio.py").touch()
            options = ("--extra-model-paths-config", str(folder / "nodes.yaml"))
        super().__init__(kind, folder=folder, options=options)

    def _environment(self) -> dict[str, str]:
        return {**super()._environment(), "PYTHONPATH": str(self.folder / "modules")}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A comfyd and the ComfyUI behind it, both running."""

    comfyui: ComfyUIProcess
    comfyd: ComfydProcess

    @property
    def real(self) -> bool:
        """Whether it is no simulator."""
        return self.comfyui.kind == "real"

    def sketching(self, steps: int = 12, seconds: float = 0.05) -> dict[str, Any]:
        """A graph whose node `3` sends a preview with each step, and whose node `9` saves a picture."""
        if not self.real:
            return sampled(graphs.color(), steps)
        return {
            "1": graphs.empty_image(64),
            "3": graphs.node("SketchingSteps", image=["1", 0], steps=steps, seconds=seconds),
            "9": graphs.node("SaveImage", images=["3", 0], filename_prefix=graphs.prefix()),
        }


@contextmanager
def pointed_at(url: str) -> Iterator[None]:
    """Let clients that are made in the block talk to this server; the SDK takes no argument for it."""
    ours = {"COMFY_BASE_URL": url, "NO_PROXY": "127.0.0.1"}
    before = {name: os.environ.get(name) for name in (*ours, "COMFY_API_KEY")}
    os.environ.update(ours)
    os.environ.pop("COMFY_API_KEY", None)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def new_client(url: str) -> Comfy:
    """The SDK's client; whoever takes it closes it."""
    with pointed_at(url):
        return Comfy()


def new_async_client(url: str) -> AsyncComfy:
    """The SDK's asynchronous client; whoever takes it closes it."""
    with pointed_at(url):
        return AsyncComfy()


def finished(job: Job) -> Job:
    """The job after the end of its events, which come sooner than the SDK's next look."""
    for _ in job.events():
        pass
    return job.wait(PATIENCE)


async def async_finished(job: AsyncJob) -> AsyncJob:
    """The same of an asynchronous job."""
    async for _ in job.events():
        pass
    return await job.wait(PATIENCE)


@contextmanager
def listening(job: Job) -> Iterator[Iterator[Event]]:
    """Its events, for who does not hear them to the end."""
    events = job.events()
    assert isinstance(events, Generator)
    with closing(events):
        yield events


def seen(job: Job, condition: Callable[[Job], bool]) -> Job:
    """The job as soon as a look at it fulfils the condition; its events tell when to look."""
    with listening(job) as events:
        for _ in events:
            if condition(job.refresh()):
                break
    assert condition(job), job
    return job


@contextmanager
def busy(client: Comfy) -> Iterator[list[Job]]:
    """Every place in ComfyUI is taken for seconds, the first by a job that runs; canceled at the end."""
    jobs = [client.submit(Workflow(graphs.blocker())) for _ in range(FILLED)]
    try:
        seen(jobs[0], lambda job: job.status == "running")
        yield jobs
    finally:
        for job in reversed(jobs):
            job.cancel()
        for job in jobs:
            job.wait(PATIENCE)
