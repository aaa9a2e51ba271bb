"""Files that differ in what they show, and what somebody sees who opens one; never by comfyd's own readers.

Pictures are opened with Pillow, sound and video with PyAV.
"""

import io
import json
import wave
from array import array
from fractions import Fraction
from pathlib import Path
from typing import Final, NamedTuple

import av
from PIL import Image

RATE: Final = 48_000
"""Samples per second that Opus takes as they are."""
FRAMES: Final = 10
FPS: Final = 8
STILL: Final = {
    "png": "PNG",
    "jpeg": "JPEG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tiff": "TIFF",
    "avif": "AVIF",
}

Color = tuple[int, int, int]


def halves(left: Color, right: Color, kind: str = "PNG", size: tuple[int, int] = (96, 64)) -> bytes:
    """A picture of two colours."""
    picture = Image.new("RGB", size, left)
    picture.paste(right, (size[0] // 2, 0, *size))
    return encoded(picture, kind)


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 95} if kind in {"JPEG", "WEBP", "AVIF"} else {}))
    return file.getvalue()


def wav(seconds: float, channels: int = 2) -> bytes:
    """A tone that falls off."""
    count = round(RATE * seconds)
    samples = array(
        "h", (round(9000 * (1 - index / count)) * (1 if index % 96 < 48 else -1) for index in range(count))
    )
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes(array("h", (value for value in samples for _ in range(channels))).tobytes())
    return file.getvalue()


def film(path: Path, color: Color, seconds_of_sound: float) -> bytes:
    """An mp4 of `FRAMES` frames of one colour, at `FPS`, with sound."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("h264", rate=Fraction(FPS), options={"crf": "5"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = out.add_stream("aac", rate=RATE)
        frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), color))  # type: ignore[no-untyped-call]  # PyAV has no type for it
        for number in range(FRAMES):
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        sound = av.AudioFrame(format="s16", layout="mono", samples=round(RATE * seconds_of_sound))
        sound.planes[0].update(b"\1\2" * (sound.planes[0].buffer_size // 2))
        sound.sample_rate, sound.pts = RATE, 0
        out.mux(audio.encode(sound))
        out.mux(audio.encode(None))
    return path.read_bytes()


def shows(data: bytes, left: Color, right: Color, slack: int = 2) -> None:
    """The picture's halves have these colours."""
    with Image.open(io.BytesIO(data)) as picture:
        shown = picture.convert("RGB")
        for place, color in ((shown.width // 4, left), (shown.width * 3 // 4, right)):
            found = shown.getpixel((place, shown.height // 2))
            assert isinstance(found, tuple)
            assert all(abs(a - b) <= slack for a, b in zip(found, color, strict=True)), (found, color)


def inverted(color: Color) -> Color:
    red, green, blue = color
    return 255 - red, 255 - green, 255 - blue


class Seen(NamedTuple):
    """What somebody sees and hears who opens a file: pixels, samples and seconds."""

    pictures: list[bytes]
    sound: bytes = b""
    seconds: float = 0.0


def pictures(data: bytes) -> Seen:
    """Every picture of a picture file."""
    found, milliseconds = [], 0.0
    with Image.open(io.BytesIO(data)) as picture:
        for number in range(getattr(picture, "n_frames", 1)):
            picture.seek(number)
            picture.load()
            milliseconds += picture.info.get("duration", 0)
            found.append(picture.convert("RGBA").tobytes())
    return Seen(found, seconds=milliseconds / 1000)


def decoded(data: bytes) -> Seen:
    """All of a video or a sound; seconds by its frames, or by its samples where there are no frames."""
    with av.open(io.BytesIO(data), "r") as container:
        rate = next((stream.average_rate for stream in container.streams.video), None)
        frames: list[object] = [*container.decode()]
    shown = [frame.to_image().tobytes() for frame in frames if isinstance(frame, av.VideoFrame)]  # type: ignore[no-untyped-call]  # PyAV has no type for it
    heard = [frame for frame in frames if isinstance(frame, av.AudioFrame)]
    seconds = sum(frame.samples / frame.sample_rate for frame in heard)
    if shown:
        assert rate is not None
        seconds = len(shown) / float(rate)
    return Seen(shown, b"".join(map(samples, heard)), seconds)


def samples(frame: av.AudioFrame) -> bytes:
    """Without what fills up the planes."""
    channels = 1 if frame.format.is_planar else frame.layout.nb_channels
    size = frame.samples * frame.format.bytes * channels
    return b"".join(bytes(plane)[:size] for plane in frame.planes)


def tensors(data: bytes) -> Seen:
    """The values of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    places = {name: tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"}
    return Seen([data[8 + length + begin : 8 + length + end] for _, (begin, end) in sorted(places.items())])
