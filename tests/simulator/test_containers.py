"""Hand-written media files are whole."""

from __future__ import annotations

import io
import json
import struct

import pytest
from PIL import Image

from comfyd.simulator import containers
from comfyd.simulator.values import Audio

FRAMES = [Image.new("RGB", (32, 16), (index * 20, 0, 0)) for index in range(10)]
MASTERS = {0x1A45DFA3, 0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675}
BOXES = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"dinf"}


def elements(data: bytes, at: int = 0, end: int | None = None) -> list[tuple[int, bytes]]:
    """The leaves of an EBML file in order."""
    found = []
    end = len(data) if end is None else end
    while at < end:
        length = 9 - data[at].bit_length()
        name = int.from_bytes(data[at : at + length], "big")
        at += length
        size = int.from_bytes(data[at : at + 8], "big") & ((1 << 56) - 1)
        at += 8
        if name in MASTERS:
            found += elements(data, at, at + size)
        else:
            found.append((name, data[at : at + size]))
        at += size
    assert at == end
    return found


def boxes(data: bytes) -> dict[bytes, bytes]:
    """The leaf boxes of an MP4 by type."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + size]
        found |= boxes(body) if name in BOXES else {name: body}
        at += size
    assert at == len(data)
    return found


def test_a_webm_holds_every_frame_as_a_vp8_key_frame() -> None:
    leaves = elements(containers.webm(FRAMES, 1.0))
    assert dict(leaves)[0x86] == b"V_VP8"
    assert struct.unpack(">d", dict(leaves)[0x4489]) == (10_000.0,)
    blocks = [body for name, body in leaves if name == 0xA3]
    starts = [int.from_bytes(body, "big") for name, body in leaves if name == 0xE7]
    assert (len(blocks), starts) == (10, [0, 5000])
    assert all(block[7:10] == b"\x9d\x01\x2a" for block in blocks)  # the start code of a VP8 key frame


def test_an_mp4_leads_to_each_of_its_pictures() -> None:
    data = containers.mp4(FRAMES, 12.0)
    leaves = boxes(data)
    sizes = struct.unpack(">10I", leaves[b"stsz"][12:])
    (at,) = struct.unpack(">I", leaves[b"stco"][8:12])
    for size in sizes:
        with Image.open(io.BytesIO(data[at : at + size])) as frame:
            assert (frame.format, frame.size) == ("JPEG", (32, 16))
        at += size
    assert struct.unpack(">III", leaves[b"stts"][4:16]) == (1, 10, 7500)


def flac_blocks(data: bytes) -> tuple[bytes, list[str], int]:
    """Stream information, comments, and where the frames begin."""
    assert data[:4] == b"fLaC"
    information = data[8:42]
    at = 42
    assert data[at] == 0x84
    end = at + 4 + int.from_bytes(data[at + 1 : at + 4], "big")
    at += 4
    (length,) = struct.unpack_from("<I", data, at)
    at += 4 + length
    (count,) = struct.unpack_from("<I", data, at)
    at += 4
    comments = []
    for _ in range(count):
        (length,) = struct.unpack_from("<I", data, at)
        comments.append(data[at + 4 : at + 4 + length].decode())
        at += 4 + length
    assert at == end
    return information, comments, end


@pytest.mark.parametrize(("notes", "channels"), [((0,), 1), ((440, 0, 262), 2)])
def test_a_flac_has_as_many_samples_as_it_says(notes: tuple[int, ...], channels: int) -> None:
    data = containers.flac(Audio(notes, 2.5, 44100, channels), {"prompt": "{}"})
    information, comments, at = flac_blocks(data)
    packed = int.from_bytes(information[10:18], "big")
    assert (packed >> 44, packed >> 41 & 7, packed & (1 << 36) - 1) == (44100, channels - 1, 110_250)
    assert comments == ["prompt={}"]
    samples = 0
    while at < len(data):
        number, length = coded(data, at + 4)
        assert number == samples
        (size,) = struct.unpack_from(">H", data, at + 4 + length)
        header = 4 + length + 3
        frame = data[at : at + header + 3 * channels + 2]
        assert crc(frame[:header], 0x07, 8) == 0  # a checksum over data and checksum is zero
        assert crc(frame, 0x8005, 16) == 0
        samples += size + 1
        at += len(frame)
    assert samples == 110_250


def coded(data: bytes, at: int) -> tuple[int, int]:
    """A number in the code of UTF-8, and its length."""
    first = data[at]
    if first < 0x80:
        return first, 1
    length = 8 - (first ^ 0xFF).bit_length()
    value = first & (0x7F >> length)
    for byte in data[at + 1 : at + length]:
        value = value << 6 | byte & 0x3F
    return value, length


def crc(data: bytes, polynomial: int, width: int) -> int:
    """A checksum bit by bit: written another way than in the code under test."""
    value = 0
    for byte in data:
        for bit in range(7, -1, -1):
            top = value >> (width - 1) & 1
            value = (value << 1 | byte >> bit & 1) & ((1 << width) - 1)
            if top:
                value ^= polynomial
    for _ in range(width):
        top = value >> (width - 1) & 1
        value = value << 1 & ((1 << width) - 1)
        if top:
            value ^= polynomial
    return value


def test_an_mp3_is_a_row_of_equal_frames() -> None:
    for channels, mode in ((1, 0xC0), (2, 0x00)):
        data = containers.mp3(Audio((0,), 1.0, channels=channels))
        frames = [data[at : at + 104] for at in range(0, len(data), 104)]
        assert (len(frames), set(frames)) == (38, {bytes((0xFF, 0xFB, 0x10, mode)) + bytes(100)})


def test_a_glb_describes_all_of_its_data() -> None:
    data = containers.glb(2.0)
    magic, version, total = struct.unpack_from("<4sII", data)
    assert (magic, version, total) == (b"glTF", 2, len(data))
    (length,) = struct.unpack_from("<I", data, 12)
    document = json.loads(data[20 : 20 + length])
    (binary,) = struct.unpack_from("<I", data, 20 + length)
    assert 28 + length + binary == len(data)
    assert sum(view["byteLength"] for view in document["bufferViews"]) == document["buffers"][0]["byteLength"]
    assert document["accessors"][0]["max"] == [1.0, 1.0, 1.0]
