"""Files as ComfyUI's savers make them, each with the canary in its metadata where it says so.

After ComfyUI 0.3.75: nodes.py, comfy_api/latest/_ui.py, _input_impl/video_types.py and comfy_extras.
"""

from __future__ import annotations

import io
import json
import math
import struct
from array import array
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.container import OutputContainer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

CANARY = "canary of the prompt"
PROMPT: dict[str, Any] = {"6": {"class_type": "CLIPTextEncode", "inputs": {"text": CANARY}}}
WORKFLOW: dict[str, Any] = {"nodes": [{"id": 6, "widgets_values": [CANARY]}], "version": 0.4}
TAGS = {"prompt": json.dumps(PROMPT), "workflow": json.dumps(WORKFLOW)}
PLAIN_TAGS = {"title": CANARY, "comment": CANARY, "artist": CANARY}
SIZE = (48, 32)


def picture(mode: str = "RGB", shade: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture whose four quarters differ."""
    red = Image.linear_gradient("L").resize(size)
    green = red.transpose(Image.Transpose.FLIP_LEFT_RIGHT).point(lambda value: value // 2 + shade)
    bands = [red, green, Image.new("L", size, 40 + shade), Image.radial_gradient("L").resize(size)]
    return Image.merge("RGBA", bands).convert(mode) if mode != "RGBA" else Image.merge("RGBA", bands)


def png(path: Path, shown: Image.Image | None = None, **options: Any) -> Path:
    """SaveImage: text chunks `prompt` and `workflow`."""
    info = PngInfo()
    for name, text in TAGS.items():
        info.add_text(name, text)
    (shown or picture()).save(path, "PNG", pnginfo=info, compress_level=4, **options)
    return path


def apng(path: Path, frames: int = 3, milliseconds: int = 125) -> Path:
    """SaveAnimatedPNG: chunks `comf` after the first picture."""
    info = PngInfo()
    for name, text in TAGS.items():
        info.add(b"comf", name.encode("latin-1") + b"\0" + text.encode("latin-1"), after_idat=True)
    shown = [picture(shade=20 * index) for index in range(frames)]
    shown[0].save(path, "PNG", pnginfo=info, save_all=True, duration=milliseconds, append_images=shown[1:])
    return path


def exif() -> Image.Exif:
    """SaveAnimatedWEBP: the prompt as the camera's model, the workflow as its make."""
    found = Image.Exif()
    found[0x0110] = "prompt:" + TAGS["prompt"]
    found[0x010F] = "workflow:" + TAGS["workflow"]
    return found


def webp(path: Path, frames: int = 3, milliseconds: int = 125, lossless: bool = True) -> Path:
    shown = [picture(shade=20 * index) for index in range(frames)]
    shown[0].save(
        path,
        "WEBP",
        save_all=True,
        duration=milliseconds,
        append_images=shown[1:],
        exif=exif(),
        xmp=f"<x>{CANARY}</x>".encode(),
        lossless=lossless,
    )
    return path


def jpeg(path: Path, orientation: int | None = None, **options: Any) -> Path:
    """As custom savers do: EXIF, a comment and XMP."""
    notes = exif()
    if orientation is not None:
        notes[0x0112] = orientation
    picture().save(path, "JPEG", exif=notes, comment=CANARY, xmp=f"<x>{CANARY}</x>".encode(), **options)
    return path


def gif(path: Path, frames: int = 3, milliseconds: int = 120, loop: int | None = 0) -> Path:
    shown = [picture("P", shade=20 * index) for index in range(frames)]
    options: dict[str, Any] = {} if loop is None else {"loop": loop}
    shown[0].save(
        path, "GIF", save_all=True, duration=milliseconds, append_images=shown[1:], comment=CANARY, **options
    )
    return path


def container(path: Path, **options: Any) -> OutputContainer:
    out: OutputContainer = av.open(str(path), "w", **options)
    out.metadata.update({**TAGS, **PLAIN_TAGS})
    return out


def mp4(path: Path, frames: int = 24, sound: bool = True, format: str = "mp4") -> Path:  # noqa: A002
    """SaveVideo: H.264 and AAC, the tags kept by `use_metadata_tags`."""
    with container(path, options={"movflags": "use_metadata_tags"}, format=format) as out:
        video = out.add_stream("h264", rate=Fraction(24))
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = out.add_stream("aac", rate=16_000) if sound else None
        for frame in video_frames(frames):
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if audio is not None:
            out.mux(audio.encode(tone(16_000, frames / 24)))
            out.mux(audio.encode(None))
    return path


def webm(path: Path, frames: int = 12, live: bool = False, format: str = "webm") -> Path:  # noqa: A002
    """SaveWEBM: VP9, the tags of the container. `live`: as a muxer that cannot go back writes it."""
    options = {"live": "1"} if live else {}
    with container(path, options=options, format=format) as out:
        video = out.add_stream(
            "libvpx-vp9", rate=Fraction(12), options={"cpu-used": "8", "deadline": "realtime"}
        )
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for frame in video_frames(frames):
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    return path


def sound(path: Path, format: str, codec: str, seconds: float = 0.5) -> Path:  # noqa: A002 - libav's word
    """SaveAudio, SaveAudioMP3 and SaveAudioOpus."""
    rate = 48_000
    with container(path, format=format) as out:
        stream = out.add_stream(codec, rate=rate)
        assert isinstance(stream, av.AudioStream)
        out.mux(stream.encode(tone(rate, seconds)))
        out.mux(stream.encode(None))
    return path


def video_frames(count: int) -> Iterator[av.VideoFrame]:
    for index in range(count):
        yield video_frame(picture(shade=index, size=(64, 48)))


def video_frame(shown: Image.Image) -> av.VideoFrame:
    frame = av.VideoFrame.from_image(shown)  # type: ignore[no-untyped-call]  # PyAV has no type for it
    assert isinstance(frame, av.VideoFrame)
    return frame


def tone(rate: int, seconds: float) -> av.AudioFrame:
    samples = round(rate * seconds)
    data = array("h", (round(9000 * math.sin(index * 440 * math.tau / rate)) for index in range(samples)))
    frame = av.AudioFrame(format="s16", layout="mono", samples=samples)
    frame.planes[0].update(data.tobytes().ljust(frame.planes[0].buffer_size, b"\0"))
    frame.sample_rate = rate
    frame.pts = 0
    return frame


def latent(path: Path) -> Path:
    """SaveLatent: safetensors with `__metadata__`."""
    values = struct.pack("<16f", *range(16))
    header = {
        "__metadata__": TAGS,
        "latent_format_version_0": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
        "latent_tensor": {"dtype": "F32", "shape": [1, 4, 2, 2], "data_offsets": [0, 64]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)
    return path


def glb(path: Path, document: dict[str, Any] | None = None, extra: bytes = b"") -> Path:
    """SaveGLB: the tags as `asset.extras`."""
    values = struct.pack("<9f", *range(9))
    shown = document or {"asset": {"version": "2.0", "generator": "ComfyUI", "extras": TAGS}}
    shown = {**shown, "buffers": [{"byteLength": len(values)}]}
    text = json.dumps(shown).encode()
    text += b" " * (-len(text) % 4)
    body = struct.pack("<I4s", len(text), b"JSON") + text
    body += struct.pack("<I4s", len(values), b"BIN\0") + values + extra
    path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body)
    return path


def svg(path: Path) -> Path:
    """SaveSVGNode: a `metadata` element with CDATA after every `<svg>`."""
    note = f"<metadata>\n<![CDATA[\n{json.dumps({'prompt': PROMPT, 'tag': '</metadata>'})}\n]]>\n</metadata>"
    path.write_text(
        f'<?xml version="1.0" encoding="UTF-8"?>\n<!-- {CANARY} -->\n'
        f'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4">{note}'
        f'<svg>{note}<rect width="4" height="4" fill="é"/></svg></svg>\n'
    )
    return path


def encoded(shown: Image.Image, format: str, **options: Any) -> bytes:  # noqa: A002 - Pillow's word
    buffer = io.BytesIO()
    shown.save(buffer, format, **options)
    return buffer.getvalue()
