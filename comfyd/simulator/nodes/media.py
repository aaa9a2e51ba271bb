"""Nodes that make and save video and sound."""

from __future__ import annotations

import random

from comfyd.simulator import containers, png
from comfyd.simulator.nodes.base import Inputs, NodeContext, Result, node
from comfyd.simulator.nodes.savers import TEMP_LETTERS, save_one
from comfyd.simulator.values import Audio, Images, Latent, Video

LATENT_RATE = 44100 / 2048  # latent cells per second of sound
SCALE = (262, 294, 330, 392, 440, 523, 587, 659)  # Hz; any of these after any other sounds friendly
LONGEST_SECONDS = 24 * 3600


@node("CreateVideo")
async def create_video(_context: NodeContext, inputs: Inputs) -> Result:
    """Pictures with a frame rate; a sound track is accepted and not kept."""
    return Result((Video(inputs["images"], inputs["fps"]),))


@node("SaveVideo")
async def save_video(context: NodeContext, inputs: Inputs) -> Result:
    """An MP4. On 0.33.0 a format that is none of its choices only fails here."""
    if context.options.behaviour.jobs_api and inputs.get("format") not in {"auto", "mp4"}:
        raise TypeError("SaveVideo.execute() missing 1 required positional argument: 'format'")
    if inputs["format"] not in {"auto", "mp4"}:
        raise ValueError(f"{inputs['format']!r} is not a valid VideoContainer")
    if inputs.get("codec", "auto") not in {"auto", "h264"} and not context.options.behaviour.jobs_api:
        raise ValueError("Only H264 codec is supported for now")
    video: Video = inputs["video"]
    return await _film(context, video.images, inputs["filename_prefix"], ".mp4", video.frames_per_second)


@node("SaveWEBM")
async def save_webm(context: NodeContext, inputs: Inputs) -> Result:
    """A WebM."""
    if inputs["codec"] not in {"vp9", "av1"}:
        raise KeyError(inputs["codec"])  # 0.3.75 does not validate new-style combos
    return await _film(context, inputs["images"], inputs["filename_prefix"], ".webm", inputs["fps"])


async def _film(
    context: NodeContext, images: Images, prefix: str, extension: str, frames_per_second: float
) -> Result:
    place = context.folders.save_place(prefix, "output", *images.size)
    write = containers.webm if extension == ".webm" else containers.mp4
    data = await context.work(images.pixels * 4, write, images.frames, frames_per_second)
    return Result((), {"images": [save_one(context, place, extension, data)], "animated": [True]})


@node("EmptyLatentAudio")
async def empty_latent_audio(_context: NodeContext, inputs: Inputs) -> Result:
    """An empty latent of sound."""
    cells = round(inputs["seconds"] * LATENT_RATE / 2) * 2
    return Result((Latent(cells, 1, inputs["batch_size"], channels=64, cell=1),))


@node("VAEDecodeAudio")
async def decode_audio(_context: NodeContext, inputs: Inputs) -> Result:
    """A seeded melody, or silence when nothing was sampled."""
    latent: Latent = inputs["samples"]
    seconds = latent.width / LATENT_RATE
    if latent.painting is None:
        return Result((Audio((0,), seconds),))
    tune = random.Random(latent.painting.seed)  # noqa: S311  # a melody
    return Result((Audio(tuple(tune.choices(SCALE, k=max(1, round(seconds * 4)))), seconds),))


@node("EmptyAudio")
async def empty_audio(_context: NodeContext, inputs: Inputs) -> Result:
    """Silence."""
    if inputs["duration"] > LONGEST_SECONDS:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory"
        )
    return Result((Audio((0,), inputs["duration"], inputs["sample_rate"], inputs["channels"]),))


@node("SaveAudio")
async def save_audio(context: NodeContext, inputs: Inputs) -> Result:
    """A FLAC file."""
    return _sound(context, inputs["audio"], inputs["filename_prefix"], "output", ".flac")


@node("SaveAudioMP3")
async def save_mp3(context: NodeContext, inputs: Inputs) -> Result:
    """An MP3 file; it has the length of the sound and is silent."""
    return _sound(context, inputs["audio"], inputs["filename_prefix"], "output", ".mp3")


@node("PreviewAudio")
async def preview_audio(context: NodeContext, inputs: Inputs) -> Result:
    """A FLAC file in the temp folder."""
    letters = "".join(random.choices(TEMP_LETTERS, k=5))  # noqa: S311  # a file name
    return _sound(context, inputs["audio"], f"ComfyUI_temp_{letters}", "temp", ".flac")


def _sound(context: NodeContext, audio: Audio, prefix: str, kind: str, extension: str) -> Result:
    place = context.folders.save_place(prefix, kind)
    if extension == ".mp3":
        data = containers.mp3(audio)
    else:
        data = containers.flac(audio, png.texts(context.prompt, context.extra_pnginfo))
    return Result((), {"audio": [save_one(context, place, extension, data)]})
