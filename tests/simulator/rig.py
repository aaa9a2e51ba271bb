"""A simulator in the test's own event loop, with the bare client of the conformance suite in front of it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import aiohttp

from comfyd.simulator import Simulator, SimulatorOptions
from tests.conformance.raw_client import Facts, Graph, Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

PATIENCE: Final = 20.0  # seconds
MODERN: Final = "0.33"


@dataclass(frozen=True, kw_only=True)
class Rig:
    """A running simulator and a client of it."""

    simulator: Simulator
    server: Server

    async def image_item(self) -> dict[str, Any]:
        """Save one picture; gives its file item."""
        run = await self.server.run(picture())
        item: dict[str, Any] = run.outputs["9"]["images"][0]
        return item


@asynccontextmanager
async def rig(**options: Any) -> AsyncIterator[Rig]:
    """A fresh simulator with these options."""
    chosen = SimulatorOptions(**options)
    async with (
        Simulator(chosen) as simulator,
        aiohttp.ClientSession(simulator.url) as http,
    ):
        server = Server(http, Facts(modern=chosen.flavor == MODERN))
        yield Rig(simulator=simulator, server=server)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something the simulator does by itself."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)  # waits for another actor, bounded


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node; a link is `["node id", slot]`."""
    return {"class_type": class_type, "inputs": inputs}


def picture(*, size: int = 8, batch: int = 1, color: int = 1, prefix: str = "test/image") -> Graph:
    """The smallest prompt that saves pictures: nodes `1` and `9`."""
    return {
        "1": node("EmptyImage", width=size, height=size, batch_size=batch, color=color),
        "9": node("SaveImage", images=["1", 0], filename_prefix=prefix),
    }


def painting(*, steps: int = 4, size: int = 64, text: str = "a lighthouse", seed: int = 7) -> Graph:
    """The classic text-to-image prompt: the sampler is `5`, the saver `9`."""
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors"),
        "2": node("CLIPTextEncode", text=text, clip=["1", 1]),
        "3": node("CLIPTextEncode", text="blurry", clip=["1", 1]),
        "4": node("EmptyLatentImage", width=size, height=size, batch_size=1),
        "5": node(
            "KSampler",
            model=["1", 0],
            seed=seed,
            steps=steps,
            cfg=7,
            sampler_name="euler",
            scheduler="normal",
            positive=["2", 0],
            negative=["3", 0],
            latent_image=["4", 0],
            denoise=1,
        ),
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "9": node("SaveImage", images=["6", 0], filename_prefix="test/painting"),
    }


def tiles(*, size: int = 128, tile: int = 64) -> Graph:
    """A prompt whose node `4` takes a step per tile."""
    sizes = {"tile_size": tile, "overlap": 0, "temporal_size": 64, "temporal_overlap": 8}
    return {
        "1": node("EmptyImage", width=size, height=size, batch_size=1, color=3),
        "2": node("VAELoader", vae_name="pixel_space"),
        "3": node("VAEEncode", pixels=["1", 0], vae=["2", 0]),
        "4": node("VAEDecodeTiled", samples=["3", 0], vae=["2", 0], **sizes),
        "9": node("SaveImage", images=["4", 0], filename_prefix="test/tiles"),
    }
