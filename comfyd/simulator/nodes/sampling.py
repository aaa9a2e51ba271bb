"""Nodes around a diffusion model: loaders, text encoding, samplers and the way between pixels and latents.

Nothing is generated: a sampler notes what it was asked to paint, and decoding draws it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from comfyd.simulator import pictures
from comfyd.simulator.nodes.base import Inputs, NodeContext, Result, node
from comfyd.simulator.values import Conditioning, Images, Latent, Model, Painting, Vae

if TYPE_CHECKING:
    from PIL.Image import Image

PIXEL_SPACE = "pixel_space"  # ComfyUI's built-in VAE that changes nothing


@node("CheckpointLoaderSimple")
async def load_checkpoint(_context: NodeContext, inputs: Inputs) -> Result:
    """Model, CLIP and VAE of a checkpoint name."""
    name = inputs["ckpt_name"]
    return Result((Model(name), Model(name), Vae(name)))


@node("LoraLoader")
async def load_lora(_context: NodeContext, inputs: Inputs) -> Result:
    """Model and CLIP as they were."""
    return Result((inputs["model"], inputs["clip"]))


@node("CLIPSetLastLayer")
async def set_last_layer(_context: NodeContext, inputs: Inputs) -> Result:
    """The CLIP as it was."""
    return Result((inputs["clip"],))


@node("VAELoader")
async def load_vae(_context: NodeContext, inputs: Inputs) -> Result:
    """A VAE; `pixel_space` has latents as large as the picture."""
    name = inputs["vae_name"]
    return Result((Vae(name, 1 if name == PIXEL_SPACE else 8),))


@node("CLIPTextEncode")
async def encode_text(_context: NodeContext, inputs: Inputs) -> Result:
    """The text itself."""
    return Result((Conditioning(inputs["text"]),))


@node("EmptyLatentImage", "EmptySD3LatentImage")
async def empty_latent(_context: NodeContext, inputs: Inputs) -> Result:
    """An empty latent of a size given in pixels."""
    return Result((Latent(inputs["width"] // 8, inputs["height"] // 8, inputs["batch_size"]),))


@node("KSampler")
async def sample(context: NodeContext, inputs: Inputs) -> Result:
    """Take the steps, with previews that get sharper if anyone watches."""
    latent: Latent = inputs["latent_image"]
    steps = inputs["steps"]
    painting = Painting(
        text=inputs["positive"].text,
        seed=inputs["seed"],
        steps=steps,
        width=latent.width * latent.cell,
        height=latent.height * latent.cell,
        strength=inputs["denoise"],
        source=latent.frames,
    )
    sketch: Image | None = None
    for step in range(1, steps + 1):
        await context.tick()
        preview = None
        if context.options.previews and context.watched():
            if sketch is None:
                sketch = await context.work(pictures.PREVIEW_SIDE**2, pictures.sketch, painting)
            preview = (
                "JPEG",
                await context.work(pictures.PREVIEW_SIDE**2, pictures.preview, sketch, step / steps),
            )
        context.step(step, steps, preview)
    sampled = Latent(
        latent.width, latent.height, latent.batch, latent.channels, latent.cell, painting=painting
    )
    return Result((sampled,))


@node("VAEDecode")
async def decode(context: NodeContext, inputs: Inputs) -> Result:
    """The pictures of a latent."""
    return Result((await _decoded(context, inputs["samples"]),))


@node("VAEEncode")
async def encode(_context: NodeContext, inputs: Inputs) -> Result:
    """A latent that remembers its pictures."""
    return Result((_encoded(inputs["pixels"], inputs["vae"]),))


@node("VAEDecodeTiled")
async def decode_tiled(context: NodeContext, inputs: Inputs) -> Result:
    """The pictures of a latent, with one progress step per tile."""
    latent: Latent = inputs["samples"]
    tile, overlap = inputs["tile_size"], inputs["overlap"]
    if tile < overlap * 4:
        overlap = tile // 4
    cell = inputs["vae"].cell
    size = (latent.width, latent.height)
    await _tiles(context, latent.batch * tile_steps(size, tile // cell, overlap // cell))
    return Result((await _decoded(context, latent),))


@node("VAEEncodeTiled")
async def encode_tiled(context: NodeContext, inputs: Inputs) -> Result:
    """A latent of pictures, with one progress step per tile."""
    images: Images = inputs["pixels"]
    steps = len(images.frames) * tile_steps(images.size, inputs["tile_size"], inputs["overlap"])
    await _tiles(context, steps)
    return Result((_encoded(images, inputs["vae"]),))


def tile_steps(size: tuple[int, int], tile: int, overlap: int) -> int:
    """How many tiles ComfyUI works on for one picture: three passes with square, tall and wide tiles."""
    return sum(
        _tiles_along(size[0], width, overlap) * _tiles_along(size[1], height, overlap)
        for width, height in ((tile // 2, tile * 2), (tile * 2, tile // 2), (tile, tile))
    )


def _tiles_along(length: int, tile: int, overlap: int) -> int:
    return 1 if length <= tile else math.ceil((length - overlap) / (tile - overlap))


async def _tiles(context: NodeContext, steps: int) -> None:
    for step in range(1, steps + 1):
        await context.tick()
        context.step(step, steps, None)


def _encoded(images: Images, vae: Vae) -> Latent:
    width, height = images.size
    channels = 3 if vae.cell == 1 else 4
    return Latent(
        width // vae.cell, height // vae.cell, len(images.frames), channels, vae.cell, images.frames
    )


async def _decoded(context: NodeContext, latent: Latent) -> Images:
    if latent.painting is None and latent.frames:
        return Images(latent.frames)
    painting = latent.painting or Painting("", 0, 0, latent.width * latent.cell, latent.height * latent.cell)
    pixels = painting.width * painting.height * latent.batch
    return Images(await context.work(pixels, pictures.paint_batch, painting, latent.batch))
