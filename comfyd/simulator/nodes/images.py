"""Nodes that make, load and change pictures. All of them really work on the pixels."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageFilter, ImageOps

from comfyd.simulator.nodes.base import Inputs, NodeContext, Result, changes, node
from comfyd.simulator.values import Images, Mask

if TYPE_CHECKING:
    from pathlib import Path

    from comfyd.simulator.folders import Folders

MEMORY_BYTES = 64 * 2**30  # a tensor beyond this cannot be allocated
CHANNELS = {"alpha": "A", "red": "R", "green": "G", "blue": "B"}


@node("EmptyImage")
async def empty_image(context: NodeContext, inputs: Inputs) -> Result:
    """A batch in one colour; all frames are the same picture."""
    width, height, batch = inputs["width"], inputs["height"], inputs["batch_size"]
    size = width * height * batch * 4  # ComfyUI allocates one channel at a time
    if size * 3 > MEMORY_BYTES:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
            f"you tried to allocate {size} bytes. Error code 12 (Cannot allocate memory)"
        )
    color = inputs["color"]
    rgb = (color >> 16 & 255, color >> 8 & 255, color & 255)
    picture = await context.work(width * height, Image.new, "RGB", (width, height), rgb)
    return Result((Images((picture,) * batch),))


@node("ImageAddNoise")
async def add_noise(context: NodeContext, inputs: Inputs) -> Result:
    """Seeded noise over every frame."""
    images: Images = inputs["image"]
    frames = await context.work(
        images.pixels, noisy, images.frames, inputs["seed"], min(1.0, inputs["strength"])
    )
    return Result((Images(frames),))


def noisy(frames: tuple[Image.Image, ...], seed: int, strength: float) -> tuple[Image.Image, ...]:
    """Each frame blended with its own seeded noise; strength 0 leaves it as it is."""
    source = random.Random(seed)  # noqa: S311  # noise of a picture
    return tuple(
        Image.blend(
            frame,
            Image.frombytes("RGB", frame.size, source.randbytes(frame.width * frame.height * 3)),
            strength / 2,
        )
        for frame in frames
    )


@node("ImageBlur")
async def blur(context: NodeContext, inputs: Inputs) -> Result:
    """Gaussian blur, not wider than the radius."""
    images: Images = inputs["image"]
    blurring = ImageFilter.GaussianBlur(min(float(inputs["blur_radius"]), inputs["sigma"]))
    frames = await context.work(
        images.pixels * 8, lambda: tuple(frame.filter(blurring) for frame in images.frames)
    )
    return Result((Images(frames),))


@node("ImageInvert")
async def invert(context: NodeContext, inputs: Inputs) -> Result:
    """The negative."""
    images: Images = inputs["image"]
    frames = await context.work(images.pixels, lambda: tuple(map(ImageOps.invert, images.frames)))
    return Result((Images(frames),))


@node("ImageScale")
async def scale(context: NodeContext, inputs: Inputs) -> Result:
    """To a given size; a zero side follows the other, two zeros leave the picture as it is."""
    images: Images = inputs["image"]
    width, height = inputs["width"], inputs["height"]
    if not width and not height:
        return Result((images,))
    old_width, old_height = images.size
    width = width or max(1, round(old_width * height / old_height))
    height = height or max(1, round(old_height * width / old_width))
    return await _resized(context, images, (width, height), inputs["upscale_method"], inputs["crop"])


@node("ImageScaleBy")
async def scale_by(context: NodeContext, inputs: Inputs) -> Result:
    """By a factor."""
    images: Images = inputs["image"]
    width, height = images.size
    size = (max(1, round(width * inputs["scale_by"])), max(1, round(height * inputs["scale_by"])))
    return await _resized(context, images, size, inputs["upscale_method"], "disabled")


async def _resized(
    context: NodeContext, images: Images, size: tuple[int, int], method: str, crop: str
) -> Result:
    pixels = images.pixels + size[0] * size[1] * len(images.frames)
    frames = await context.work(pixels, resize, images.frames, size, method, crop)
    return Result((Images(frames),))


def resize(
    frames: tuple[Image.Image, ...], size: tuple[int, int], method: str, crop: str
) -> tuple[Image.Image, ...]:
    """Every frame in a new size; `crop` "center" keeps the proportions and cuts what stands over."""
    filters = {
        "nearest-exact": Image.Resampling.NEAREST,
        "bilinear": Image.Resampling.BILINEAR,
        "area": Image.Resampling.BOX,
        "bicubic": Image.Resampling.BICUBIC,
        "lanczos": Image.Resampling.LANCZOS,
    }
    done: dict[int, Image.Image] = {}  # frames are often one and the same picture
    for frame in frames:
        if id(frame) not in done:
            fitted = crop == "center"
            done[id(frame)] = (
                ImageOps.fit(frame, size, filters[method]) if fitted else frame.resize(size, filters[method])
            )
    return tuple(done[id(frame)] for frame in frames)


@node("LoadImage")
async def load_image(context: NodeContext, inputs: Inputs) -> Result:
    """A file of the input folder as IMAGE, and the inverse of its alpha as MASK."""
    path = _input_path(context.folders, inputs)

    def load() -> tuple[Images, Mask]:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if "A" in picture.getbands():
                mask = ImageOps.invert(picture.getchannel("A"))
            else:
                mask = Image.new("L", (64, 64))
            return Images((picture.convert("RGB"),)), Mask(mask)

    return Result(await context.work(path.stat().st_size, load))


@node("LoadImageMask")
async def load_image_mask(context: NodeContext, inputs: Inputs) -> Result:
    """One channel of a file as MASK."""
    with Image.open(_input_path(context.folders, inputs)) as file:
        picture = file.convert("RGBA")
    channel = picture.getchannel(CHANNELS[inputs["channel"]])
    return Result((Mask(ImageOps.invert(channel) if inputs["channel"] == "alpha" else channel),))


@changes("LoadImage", "LoadImageMask")
def file_changed(folders: Folders, inputs: Inputs) -> str | None:
    """The content of the file; a missing one is never the same."""
    if not isinstance(inputs.get("image"), str):
        return None
    try:
        return hashlib.sha256(_input_path(folders, inputs).read_bytes()).hexdigest()
    except OSError:
        return random.randbytes(8).hex()  # noqa: S311  # only has to differ


def _input_path(folders: Folders, inputs: Inputs) -> Path:
    path = folders.input_path(inputs["image"], confined=False)
    if path is None:
        raise FileNotFoundError(2, "No such file or directory", inputs["image"])
    return path


@node("SolidMask")
async def solid_mask(_context: NodeContext, inputs: Inputs) -> Result:
    """A mask of one value."""
    return Result((Mask(Image.new("L", (inputs["width"], inputs["height"]), round(inputs["value"] * 255))),))


def as_rgb(value: Any) -> Images:
    """A mask as a grey picture."""
    return Images((value.picture.convert("RGB"),))
