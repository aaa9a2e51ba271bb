"""Output nodes for pictures and latents: files in the output or temp folder, or frames on the WebSocket."""

from __future__ import annotations

import io
import json
import random
import struct
from typing import TYPE_CHECKING, Any

from comfyd.simulator import png
from comfyd.simulator.nodes.base import Inputs, NodeContext, Result, changes, node
from comfyd.simulator.nodes.images import as_rgb
from comfyd.simulator.values import Images, Latent

if TYPE_CHECKING:
    from PIL.Image import Image

    from comfyd.simulator.folders import Folders, SavePlace

TEMP_LETTERS = "abcdefghijklmnopqrstupvxyz"  # ComfyUI's own spelling of the alphabet
SAVE_LEVEL, PREVIEW_LEVEL = 4, 1


@node("SaveImage")
async def save_image(context: NodeContext, inputs: Inputs) -> Result:
    """One PNG per picture of the batch."""
    images: Images = inputs["images"]
    prefix = inputs.get("filename_prefix", "ComfyUI")
    return Result((), {"images": await save_pngs(context, images, prefix, "output", SAVE_LEVEL)})


@node("PreviewImage")
async def preview_image(context: NodeContext, inputs: Inputs) -> Result:
    """The same in the temp folder, under a random name."""
    items = await save_pngs(context, inputs["images"], temp_prefix(), "temp", PREVIEW_LEVEL)
    return Result((), {"images": items})


@node("MaskPreview")
async def preview_mask(context: NodeContext, inputs: Inputs) -> Result:
    """A mask as a grey picture in the temp folder."""
    items = await save_pngs(context, as_rgb(inputs["mask"]), temp_prefix(), "temp", SAVE_LEVEL)
    ui: dict[str, Any] = {"images": items}
    if context.options.behaviour.jobs_api:
        ui["animated"] = [False]
    return Result((), ui)


def temp_prefix() -> str:
    """A file name prefix with the five random letters of temp files."""
    return "ComfyUI_temp_" + "".join(random.choices(TEMP_LETTERS, k=5))  # noqa: S311  # a file name


async def save_pngs(
    context: NodeContext, images: Images, prefix: str, kind: str, level: int
) -> list[dict[str, str]]:
    """Write a batch as PNG files; returns their UI items."""
    place = context.folders.save_place(prefix, kind, *images.size)
    info = png.metadata(context.prompt, context.extra_pnginfo)
    at_least = context.options.output_bytes if kind == "output" else None

    def write() -> list[dict[str, str]]:
        items = []
        for index, frame in enumerate(images.frames):
            name = place.name(".png", index)
            (place.folder / name).write_bytes(png.encode(frame, info, level, at_least))
            items.append(place.item(name))
        return items

    items = await context.work(images.pixels, write)
    remember(context.folders, place, items)
    return items


def remember(folders: Folders, place: SavePlace, items: list[dict[str, str]]) -> None:
    """Tell the folders the last number used."""
    folders.saved(place, place.number + len(items) - 1, place.folder / items[-1]["filename"])


def save_one(context: NodeContext, place: SavePlace, extension: str, data: bytes) -> dict[str, str]:
    """Write a single file; returns its UI item."""
    name = place.name(extension)
    (place.folder / name).write_bytes(data)
    items = [place.item(name)]
    remember(context.folders, place, items)
    return items[0]


@node("SaveImageWebsocket")
async def save_websocket(context: NodeContext, inputs: Inputs) -> Result:
    """Each picture as a PNG frame on the WebSocket, with a progress step; no file, no UI output."""
    images: Images = inputs["images"]
    for index, frame in enumerate(images.frames):
        data = await context.work(images.pixels, png.encode, frame, None, PREVIEW_LEVEL, None)
        context.step(index, len(images.frames), ("PNG", data))
    return Result()


@changes("SaveImageWebsocket")
def never_same(_folders: Folders, _inputs: Inputs) -> str:
    """It is executed every time."""
    return random.randbytes(8).hex()  # noqa: S311  # only has to differ


@node("SaveAnimatedWEBP")
async def save_webp(context: NodeContext, inputs: Inputs) -> Result:
    """All pictures as one animated WEBP."""
    images: Images = inputs["images"]
    place = context.folders.save_place(inputs["filename_prefix"], "output", *images.size)
    options = {
        "duration": int(1000 / inputs["fps"]),
        "lossless": inputs["lossless"],
        "quality": inputs["quality"],
        "method": {"default": 4, "fastest": 0, "slowest": 6}[inputs["method"]],
        "exif": exif(images.frames[0], context),
    }
    data = await context.work(images.pixels * 4, animation, images.frames, "WEBP", options)
    return _animated(context, place, ".webp", data, many=len(images.frames) != 1)


@node("SaveAnimatedPNG")
async def save_apng(context: NodeContext, inputs: Inputs) -> Result:
    """All pictures as one animated PNG."""
    images: Images = inputs["images"]
    place = context.folders.save_place(inputs["filename_prefix"], "output", *images.size)
    options = {
        "duration": int(1000 / inputs["fps"]),
        "compress_level": inputs["compress_level"],
        "pnginfo": png.metadata(context.prompt, context.extra_pnginfo),
    }
    data = await context.work(images.pixels, animation, images.frames, "PNG", options)
    return _animated(context, place, ".png", data, many=True)


def animation(frames: tuple[Image, ...], kind: str, options: dict[str, Any]) -> bytes:
    """Frames as one animated file."""
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], **options)
    return buffer.getvalue()


def exif(picture: Image, context: NodeContext) -> Any:
    """The prompt and the workflow as ComfyUI puts them into the EXIF of a WEBP."""
    tags = picture.getexif()
    found = png.texts(context.prompt, context.extra_pnginfo)
    for offset, (name, text) in enumerate(found.items()):
        tags[0x0110 - offset] = f"{name}:{text}"
    return tags


def _animated(context: NodeContext, place: SavePlace, extension: str, data: bytes, *, many: bool) -> Result:
    return Result((), {"images": [save_one(context, place, extension, data)], "animated": [many]})


@node("SaveLatent")
async def save_latent(context: NodeContext, inputs: Inputs) -> Result:
    """A latent as a safetensors file full of zeros."""
    latent: Latent = inputs["samples"]
    place = context.folders.save_place(inputs["filename_prefix"], "output")
    data = safetensors(latent, png.texts(context.prompt, context.extra_pnginfo))
    return Result((), {"latents": [save_one(context, place, ".latent", data)]})


def safetensors(latent: Latent, texts: dict[str, str]) -> bytes:
    """The file format: header length, JSON header, tensor data."""
    shape = [latent.batch, latent.channels, latent.height, latent.width]
    size = latent.batch * latent.channels * latent.height * latent.width * 4
    header = {
        "__metadata__": texts,
        "latent_format_version_0": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
        "latent_tensor": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]},
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + bytes(size)


@node("MaskToImage")
async def mask_to_image(_context: NodeContext, inputs: Inputs) -> Result:
    """A mask as a grey picture."""
    return Result((as_rgb(inputs["mask"]),))
