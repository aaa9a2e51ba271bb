"""Audio and video by PyAV: what they are like, and the same streams in a new container; never re-encodes.

The demuxer is always named by what the content was seen to be: libav's own guess could take a playlist for
a video and open what it names. Importing this module loads libav (some 50 ms, 20 MB).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Final

import av
import av.error
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.codeccontext import VideoCodecContext

from comfyd.errors import MediaError
from comfyd.media.facts import Facts
from comfyd.media.failures import failure

MOST_PACKETS: Final = 200_000
"""Looked at for a duration that no header gives: at least half an hour of video with sound."""
PATIENCE: Final = (20.0, 20.0)
"""Seconds to open a file, and to read one packet of it."""
MOST_PIXELS: Final = 8192 * 4320
"""Of a frame that libav decodes to learn what a stream is like."""

_FORMATS: Final[dict[str, tuple[str, str | None]]] = {
    "3gp": ("mov", "3gp"),
    "aac": ("aac", "adts"),
    "aiff": ("aiff", "aiff"),
    "avi": ("avi", None),
    "avif": ("mov", None),
    "flac": ("flac", "flac"),
    "flv": ("flv", None),
    "m4a": ("mov", "ipod"),
    "mka": ("matroska", "matroska"),
    "mkv": ("matroska", "matroska"),
    "mov": ("mov", "mov"),
    "mp3": ("mp3", "mp3"),
    "mp4": ("mov", "mp4"),
    "mpg": ("mpeg", None),
    "ogg": ("ogg", "ogg"),
    "ogv": ("ogg", "ogg"),
    "opus": ("ogg", "ogg"),
    "wav": ("wav", "wav"),
    "webm": ("matroska", "webm"),
    "wmv": ("asf", None),
}
"""By the extension that `sniff` gives: libav's names of the demuxer, and of the muxer that strips."""
_KEPT_TAGS: Final = frozenset({"alpha_mode", "stereo_mode"})
"""Stream tags that say how to show pixels."""
_COPIED: Final = frozenset({"video", "audio", "subtitle"})
_FAILURES: Final = (
    av.error.FFmpegError,
    AttributeError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Whatever PyAV raises for a broken file, and for streams that libav has no decoder for."""


def is_stripped_here(extension: str) -> bool:
    """Whether `copy_streams` knows this kind of file."""
    return _FORMATS.get(extension, ("", None))[1] is not None


def measure(path: Path, extension: str) -> Facts:
    """Pixels of the first video stream, and seconds; nothing is known of a file that libav cannot read."""
    if extension not in _FORMATS:
        return Facts()
    try:
        with _reading(path, extension) as container:
            return _facts(container)
    except _FAILURES:
        return Facts()


def copy_streams(source: Path, target: Path, extension: str) -> None:
    """Write the file's pictures, sounds and subtitles anew, and nothing else: no tags, chapters, covers.

    Raises `MediaError` where that cannot be done; a half-written target may be left then.
    """
    muxer = _FORMATS[extension][1]
    try:
        with _reading(source, extension) as container, _writing(target, muxer) as out:
            if not _copy(container, out):
                raise MediaError(f"the {extension} file is broken: no stream of it can be read")
    except _FAILURES as exc:
        what = f"the {extension} file cannot be stripped of its metadata"
        raise failure(exc, what, "it is broken or of an unusual kind") from exc


@contextmanager
def _reading(path: Path, extension: str) -> Iterator[InputContainer]:
    options = {"protocol_whitelist": "file", "max_pixels": str(MOST_PIXELS)}
    demuxer = _FORMATS[extension][0]
    with av.open(
        str(path.absolute()),
        "r",
        format=demuxer,
        options=options,
        metadata_errors="replace",
        timeout=PATIENCE,
    ) as container:
        yield container


@contextmanager
def _writing(path: Path, muxer: str | None) -> Iterator[OutputContainer]:
    # bitexact: libav's version is no part of the picture, and the same file comes out each time
    with av.open(str(path.absolute()), "w", format=muxer, options={"fflags": "+bitexact"}) as container:
        yield container


def _copy(source: InputContainer, out: OutputContainer) -> int:
    """The number of packets copied."""
    streams: dict[int, Stream] = {}
    for stream in source.streams:
        if stream.type in _COPIED and not stream.disposition & Disposition.attached_pic:
            copied = out.add_stream_from_template(stream, opaque=True)
            copied.metadata.clear()
            copied.metadata.update({tag: stream.metadata[tag] for tag in _KEPT_TAGS & stream.metadata.keys()})
            codec = copied.codec_context
            if isinstance(codec, VideoCodecContext) and stream.average_rate:
                codec.framerate = stream.average_rate  # Matroska says it once, and without it players guess
            streams[stream.index] = copied
    count = 0
    for packet in source.demux(*(source.streams[index] for index in streams)) if streams else ():
        if packet.dts is None and packet.size == 0:  # the demuxer's sign that a stream ended
            continue
        packet.stream = streams[packet.stream.index]
        out.mux_one(packet)
        count += 1
    return count


def _facts(container: InputContainer) -> Facts:
    video = next((stream for stream in container.streams.video if not _is_cover(stream)), None)
    duration = _announced(container)
    if duration is None:
        duration = _counted(container)
    if video is None:
        return Facts(duration=duration)
    # a stream that libav has no decoder for has no such attributes
    width, height = getattr(video, "width", 0) or None, getattr(video, "height", 0) or None
    return Facts(width=width, height=height, duration=duration)


def _is_cover(stream: Stream) -> bool:
    return bool(stream.disposition & Disposition.attached_pic)


def _announced(container: InputContainer) -> float | None:
    """Seconds by the container's header, or by its longest stream's."""
    if container.duration is not None and container.duration > 0:
        return container.duration / av.time_base
    told = [
        float(stream.duration * stream.time_base)
        for stream in container.streams
        if stream.duration is not None and stream.duration > 0 and stream.time_base is not None
    ]
    return max(told, default=None)


def _counted(container: InputContainer) -> float | None:
    """Seconds from the first packet's start to the last one's end; None if there are too many packets."""
    first: Fraction | None = None
    last = Fraction(0)
    for number, packet in enumerate(container.demux()):
        if number == MOST_PACKETS:
            return None
        span = _span(packet)
        if span is not None:
            first = span[0] if first is None else min(first, span[0])
            last = max(last, span[1])
    return float(last - first) if first is not None and last > first else None


def _span(packet: "Packet[Stream]") -> tuple[Fraction, Fraction] | None:
    at = packet.dts if packet.pts is None else packet.pts
    if at is None or packet.size == 0:
        return None
    return at * packet.time_base, (at + (packet.duration or 0)) * packet.time_base
