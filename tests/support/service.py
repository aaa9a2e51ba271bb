"""A wired comfyd without HTTP, in front of a simulated ComfyUI, for tests of what happens between rows."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from comfyd.app import Ground, Service, open_ground, wire, working
from comfyd.clock import Clock, SystemClock
from comfyd.config import ComfyUIConfig, Config, DataConfig, QueueConfig, WorkflowsConfig
from comfyd.disk import free_bytes
from comfyd.progress import Event
from comfyd.simulator import Simulator
from comfyd.submission import SubmitRequest
from comfyd.tasks import Status, Task
from tests.support.values import GRAPH

PATIENCE = 30.0


class Bench:
    """The parts of a running comfyd, and what tests do with them. Lives as long as the test's block."""

    def __init__(self, ground: Ground, service: Service) -> None:
        self.ground = ground
        self.service = service
        self.state = service.state
        self.store = ground.store

    async def submit(self, workflow: Any = None, **facts: Any) -> Task:
        """Queue a task; a tiny picture unless told otherwise."""
        request = SubmitRequest(workflow=GRAPH if workflow is None else workflow, **facts)
        return (await self.state.submission.submit(request)).task

    async def task(self, task_id: str) -> Task:
        """The row as it stands."""
        found = await self.store.get(task_id)
        assert found is not None
        return found

    async def until(self, condition: Callable[[Task], bool], task_id: str) -> Task:
        """The row as soon as it fulfils the condition."""
        async with asyncio.timeout(PATIENCE):
            while not condition(found := await self.task(task_id)):
                await asyncio.sleep(0.01)
        return found

    async def ended(self, task_id: str) -> Task:
        """The row when the task has ended."""
        async with asyncio.timeout(PATIENCE):
            with self.state.board.watch(task_id) as watcher:
                while not (found := await self.task(task_id)).status.terminal:
                    await watcher.next(timeout=0.5)
        return found

    async def all_ended(self, count: int) -> None:
        """Until so many tasks have ended."""
        async with asyncio.timeout(PATIENCE):
            while True:
                counts = await self.store.counts()
                if counts[Status.SUCCEEDED] + counts[Status.FAILED] + counts[Status.CANCELED] >= count:
                    return
                await asyncio.sleep(0.02)

    async def events(self, task_id: str) -> list[Event]:
        """Everything that watchers of the task hear until it ends."""
        heard = []
        async with asyncio.timeout(PATIENCE):
            with self.state.board.watch(task_id) as watcher:
                while True:
                    event = await watcher.next()
                    assert event is not None
                    heard.append(event)
                    if event.final:
                        return heard


def configuration(data: Path, *urls: str, **queue: Any) -> Config:
    """A configuration for tests: quick retries, no template of its own."""
    quick = {"retry_delay": 0.01, "retry_delay_max": 0.05, "workers": 8}
    servers = tuple(
        ComfyUIConfig(url=url, name=f"comfyui-{number}", request_timeout=5.0)
        for number, url in enumerate(urls)
    )
    return Config(
        data=DataConfig(dir=str(data)),
        comfyui=servers,
        queue=QueueConfig(**{**quick, **queue}),
        workflows=WorkflowsConfig(dir=str(Path(__file__).parents[2] / "workflows")),
    )


@asynccontextmanager
async def bench(
    config: Config,
    *,
    works: bool = True,
    grace_ms: int = 200,
    clock: Clock | None = None,
    measure: Callable[[Path], int] = free_bytes,
) -> AsyncIterator[Bench]:
    """A comfyd that works; with `works=False` one that only accepts. `measure` says what a disk has free."""
    async with open_ground(config, clock or SystemClock(), measure) as ground:
        service = wire(ground)
        made = Bench(ground, service)
        if not works:
            yield made
            return
        async with working(service, grace_ms, asyncio.Event()):
            yield made


async def until(condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Wait for something that no event announces."""
    async with asyncio.timeout(patience):
        while not condition():
            await asyncio.sleep(0.005)


def colored(color: int, **facts: Any) -> dict[str, Any]:
    """A tiny graph that no cache has seen."""
    graph = msgspec.json.decode(msgspec.json.encode(GRAPH))
    graph["1"]["inputs"].update({"color": color, **facts})
    assert isinstance(graph, dict)
    return graph


def sampled(seed: int, steps: int = 20) -> dict[str, Any]:
    """The classic graph with a sampler: takes `steps` times the simulator's step."""
    return {
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": seed,
                "steps": steps,
                "cfg": 7.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
                "model": ["4", 0],
                "positive": ["6", 0],
                "negative": ["7", 0],
                "latent_image": ["5", 0],
            },
        },
        "4": {
            "class_type": "CheckpointLoaderSimple",
            "inputs": {"ckpt_name": "v1-5-pruned-emaonly-fp16.safetensors"},
        },
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "s"}},
    }


def simulator_of(made: Simulator) -> list[str]:
    """The prompt ids that a simulator ran, in order."""
    return [execution.prompt_id for execution in made.executions]
