"""Small but whole media files, written by hand: WebM, MP4, FLAC, MP3 and GLB.

Enough of each format to be opened by ordinary players and probes; no encoder of its own beyond that.
"""

from __future__ import annotations

import functools
import io
import json
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from comfyd.simulator.values import Audio

CLUSTER_MILLISECONDS = 5000
TIMESCALE = 90_000  # units per second in an MP4
SILENCE_BLOCK = 16_384  # samples
AMPLITUDE = 4000  # of 32767: a square wave is loud enough


def webm(frames: Sequence[Image], frames_per_second: float) -> bytes:
    """A WebM with VP8 key frames only: a lossy WEBP holds exactly one."""
    width, height = frames[0].size
    header = b"".join(
        (
            _element(0x4286, b"\x01"),
            _element(0x42F7, b"\x01"),
            _element(0x42F2, b"\x04"),
            _element(0x42F3, b"\x08"),
            _element(0x4282, b"webm"),
            _element(0x4287, b"\x02"),
            _element(0x4285, b"\x02"),
        )
    )
    duration = len(frames) * 1000 / frames_per_second
    info = b"".join(
        (
            _element(0x2AD7B1, struct.pack(">I", 1_000_000)),
            _element(0x4489, struct.pack(">d", duration)),
            _element(0x4D80, b"simulator"),
            _element(0x5741, b"simulator"),
        )
    )
    video = _element(0xB0, struct.pack(">H", width)) + _element(0xBA, struct.pack(">H", height))
    track = b"".join(
        (
            _element(0xD7, b"\x01"),
            _element(0x73C5, b"\x01"),
            _element(0x83, b"\x01"),
            _element(0x86, b"V_VP8"),
            _element(0xE0, video),
        )
    )
    body = _element(0x1549A966, info) + _element(0x1654AE6B, _element(0xAE, track))
    body += _clusters([_vp8(frame) for frame in frames], frames_per_second)
    return _element(0x1A45DFA3, header) + _element(0x18538067, body)


def _clusters(payloads: list[bytes], frames_per_second: float) -> bytes:
    clusters: dict[int, bytes] = {}
    for index, payload in enumerate(payloads):
        at = round(index * 1000 / frames_per_second)
        start = at - at % CLUSTER_MILLISECONDS
        block = _element(0xA3, struct.pack(">BhB", 0x81, at - start, 0x80) + payload)
        clusters[start] = clusters.get(start, b"") + block
    return b"".join(
        _element(0x1F43B675, _element(0xE7, struct.pack(">I", start)) + blocks)
        for start, blocks in clusters.items()
    )


def _vp8(frame: Image) -> bytes:
    """The VP8 key frame inside a lossy WEBP file."""
    buffer = io.BytesIO()
    frame.convert("RGB").save(buffer, "WEBP", quality=70, method=0)
    data = buffer.getvalue()
    at = data.index(b"VP8 ")
    (size,) = struct.unpack_from("<I", data, at + 4)
    return data[at + 8 : at + 8 + size]


def _element(name: int, payload: bytes) -> bytes:
    """An EBML element with an eight byte size."""
    return (
        name.to_bytes((name.bit_length() + 7) // 8, "big")
        + (1 << 56 | len(payload)).to_bytes(8, "big")
        + payload
    )


def mp4(frames: Sequence[Image], frames_per_second: float) -> bytes:
    """An MP4 with one track of JPEG pictures."""
    samples = [_jpeg(frame) for frame in frames]
    first = _box(b"ftyp", b"isom\0\0\2\0isomiso2mp41")
    data = _box(b"mdat", b"".join(samples))
    step = round(TIMESCALE / frames_per_second)
    moov = _movie(frames[0].size, step, [len(sample) for sample in samples], len(first) + 8)
    return first + data + moov


def _movie(size: tuple[int, int], step: int, sizes: list[int], data_at: int) -> bytes:
    matrix = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    duration = step * len(sizes)
    width, height = size
    movie_header = _full_box(
        b"mvhd",
        struct.pack(">IIIIIH10x", 0, 0, TIMESCALE, duration, 0x10000, 0x100)
        + matrix
        + bytes(24)
        + struct.pack(">I", 2),
    )
    track_header = _full_box(
        b"tkhd",
        struct.pack(">IIIII8xhhhH", 0, 0, 1, 0, duration, 0, 0, 0, 0)
        + matrix
        + struct.pack(">II", width << 16, height << 16),
        flags=3,
    )
    media_header = _full_box(b"mdhd", struct.pack(">IIIIHH", 0, 0, TIMESCALE, duration, 0x55C4, 0))
    handler = _full_box(b"hdlr", struct.pack(">I4s12x", 0, b"vide") + b"video\0")
    location = _box(b"dinf", _full_box(b"dref", struct.pack(">I", 1) + _full_box(b"url ", b"", flags=1)))
    table = _box(b"stbl", _sample_tables(size, step, sizes, data_at))
    information = _box(b"minf", _full_box(b"vmhd", bytes(8), flags=1) + location + table)
    media = _box(b"mdia", media_header + handler + information)
    return _box(b"moov", movie_header + _box(b"trak", track_header + media))


def _sample_tables(size: tuple[int, int], step: int, sizes: list[int], data_at: int) -> bytes:
    width, height = size
    decoder = bytes((0x04, 13, 0x6C, 0x11)) + bytes(11)  # object type 0x6C: JPEG
    stream = bytes((0x03, 3 + len(decoder) + 3, 0, 1, 0)) + decoder + bytes((0x06, 1, 2))
    entry = _box(
        b"mp4v",
        struct.pack(">6xH16xHHIIIH32sHh", 1, width, height, 0x480000, 0x480000, 0, 1, b"", 24, -1)
        + _full_box(b"esds", stream),
    )
    return b"".join(
        (
            _full_box(b"stsd", struct.pack(">I", 1) + entry),
            _full_box(b"stts", struct.pack(">III", 1, len(sizes), step)),
            _full_box(b"stsc", struct.pack(">IIII", 1, 1, len(sizes), 1)),
            _full_box(b"stsz", struct.pack(f">II{len(sizes)}I", 0, len(sizes), *sizes)),
            _full_box(b"stco", struct.pack(">II", 1, data_at)),
        )
    )


def _jpeg(frame: Image) -> bytes:
    buffer = io.BytesIO()
    frame.convert("RGB").save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _box(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(payload), name) + payload


def _full_box(name: bytes, payload: bytes, flags: int = 0) -> bytes:
    return _box(name, struct.pack(">I", flags) + payload)


def flac(audio: Audio, comments: dict[str, str]) -> bytes:
    """A FLAC of square waves: every half wave is one block of a constant value."""
    samples = round(audio.seconds * audio.sample_rate)
    packed = audio.sample_rate << 44 | (audio.channels - 1) << 41 | 15 << 36 | samples
    # With blocks of different sizes the smallest may be given as 16; frame sizes and MD5 are unknown (0).
    information = struct.pack(">HH6xQ16x", 16, SILENCE_BLOCK, packed)
    written = struct.pack("<I", 9) + b"simulator" + struct.pack("<I", len(comments))
    for name, text in comments.items():
        entry = f"{name}={text}".encode()
        written += struct.pack("<I", len(entry)) + entry
    parts = [b"fLaC", struct.pack(">I", len(information)), information]
    parts += [struct.pack(">I", 0x84 << 24 | len(written)), written]
    at = 0
    for size, value in _half_waves(audio, samples):
        parts.append(_flac_frame(at, size, value, audio.channels))
        at += size
    return b"".join(parts)


def _half_waves(audio: Audio, samples: int) -> list[tuple[int, int]]:
    """(number of samples, value) of each block; together exactly `samples`."""
    waves: list[tuple[int, int]] = []
    done = 0
    for index, note in enumerate(audio.notes):
        end = samples * (index + 1) // len(audio.notes)
        size = max(16, audio.sample_rate // (2 * note)) if note else SILENCE_BLOCK
        value = AMPLITUDE if note else 0
        while done < end:
            taken = min(size, end - done)
            waves.append((taken, value))
            done += taken
            value = -value
    return waves


def _flac_frame(at: int, size: int, value: int, channels: int) -> bytes:
    header = bytes((0xFF, 0xF9, 0x70, (channels - 1) << 4)) + _coded(at) + struct.pack(">H", size - 1)
    header += bytes((_crc(header, 0x07, 8),))
    body = header + struct.pack(">Bh", 0, value) * channels
    return body + struct.pack(">H", _crc(body, 0x8005, 16))


def _coded(number: int) -> bytes:
    """A number in the UTF-8-like code of FLAC, up to 36 bits."""
    if number < 0x80:
        return bytes((number,))
    rest = []
    lead_room = 0x20
    while number >= lead_room:
        rest.append(0x80 | number & 0x3F)
        number >>= 6
        if rest[1:]:
            lead_room >>= 1
    lead = (0xFF00 >> (len(rest) + 1)) & 0xFF | number
    return bytes((lead, *reversed(rest)))


@functools.cache
def _crc_table(polynomial: int, width: int) -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte << (width - 8)
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> (width - 1) else 0)
            value &= (1 << width) - 1
        table.append(value)
    return tuple(table)


def _crc(data: bytes, polynomial: int, width: int) -> int:
    table = _crc_table(polynomial, width)
    value = 0
    for byte in data:
        value = table[value >> (width - 8) ^ byte] ^ (value << 8 & (1 << width) - 1)
    return value


def mp3(audio: Audio) -> bytes:
    """A silent MP3 of the right length: MPEG-1 layer 3 frames without any spectral data."""
    mode = 0xC0 if audio.channels == 1 else 0x00
    frame = bytes((0xFF, 0xFB, 0x10, mode)) + bytes(100)  # 32 kbit/s at 44.1 kHz: 104 bytes
    return frame * max(1, round(audio.seconds * 44100 / 1152))


def glb(size: float) -> bytes:
    """A binary glTF with one cube."""
    half = size / 2
    corners = [(x, y, z) for x in (-half, half) for y in (-half, half) for z in (-half, half)]
    faces = ((0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3))
    indices = [corner for a, b, c, d in faces for corner in (a, b, c, a, c, d)]
    points = b"".join(struct.pack("<3f", *corner) for corner in corners)
    data = points + struct.pack(f"<{len(indices)}H", *indices)
    document = {
        "asset": {"version": "2.0", "generator": "simulator"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "buffers": [{"byteLength": len(data)}],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": len(points), "target": 34962},
            {"buffer": 0, "byteOffset": len(points), "byteLength": len(data) - len(points), "target": 34963},
        ],
        "accessors": [
            {
                "bufferView": 0,
                "componentType": 5126,
                "count": len(corners),
                "type": "VEC3",
                "min": [-half] * 3,
                "max": [half] * 3,
            },
            {"bufferView": 1, "componentType": 5123, "count": len(indices), "type": "SCALAR"},
        ],
    }
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    data += bytes(-len(data) % 4)
    total = 12 + 8 + len(text) + 8 + len(data)
    return (
        struct.pack("<4sII", b"glTF", 2, total)
        + struct.pack("<I4s", len(text), b"JSON")
        + text
        + struct.pack("<I4s", len(data), b"BIN\0")
        + data
    )
