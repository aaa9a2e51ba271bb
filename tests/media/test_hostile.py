"""Files made to hurt: nothing hangs, nothing crashes, memory stays small, and each ends in a plain answer."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from comfyd.errors import MediaError
from comfyd.media import Facts, Sniffed, convert, facts, sniff, strip
from comfyd.simulator import containers
from comfyd.simulator.values import Audio
from tests.media import samples

MOST_SECONDS = 10.0  # each file, on a loaded machine; measured: at most 1
MOST_MEGABYTES = 64

LOOK = """
import json, re, sys, time
from pathlib import Path
from comfyd.errors import MediaError
from comfyd.media import facts, sniff, strip

def look(path):
    sniff(path, "a.png")
    facts(path, "video/mp4")
    try:
        return strip(path, path.with_suffix(".out"))
    except MediaError as exc:
        return exc.message

def peak():
    # of this process alone: ru_maxrss starts with what the parent had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

folder = Path(sys.argv[1])
look(folder / "warm.mp4")
idle = peak()
for path in sorted(folder.glob("*.bad")):
    started = time.monotonic()
    said = look(path)
    print(json.dumps([path.stem, time.monotonic() - started, peak() - idle, said]))
"""

LARGE = 256 << 20


def chunk(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def png(*inner: bytes, width: int = 9, height: int = 9) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(10_000)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(inner) + data + chunk(b"IEND", b"")


def box(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(payload), name) + payload


def huge_frame() -> bytes:
    """A video whose only frame claims to be 16,000 pixels wide."""
    data = containers.mp4([Image.new("RGB", (64, 48))], 1.0)
    claim = b"\xff\xc0\0\x11\x08" + struct.pack(">HH", 8000, 16_000)
    return data.replace(b"\xff\xc0\0\x11\x08" + struct.pack(">HH", 48, 64), claim)


def hostile() -> dict[str, bytes]:
    bomb = zlib.compress(bytes(50 << 20))
    nest = 100_000
    laughs = "".join(f'<!ENTITY a{n + 1} "{f"&a{n};" * 10}">' for n in range(12))
    gif = b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0)
    webm = b"\x1a\x45\xdf\xa3\x8b\x42\x82\x84webm\x42\x85\x81\x02"
    ftyp = box(b"ftyp", b"isom\0\0\2\0isommp42")
    ftyp_avif = box(b"ftyp", b"avif\0\0\0\0avifmif1")
    deep = b""
    for _ in range(2000):
        deep = box(b"moov", box(b"trak", box(b"mdia", deep[:4000])))
    return {
        "png-text-bombs": png(chunk(b"zTXt", b"prompt\0\0" + bomb) * 50),
        "png-profile-bomb": png(chunk(b"iCCP", b"a\0\0" + bomb)),
        "png-endless-size": png(width=2**31 - 1, height=2**31 - 1),
        "png-crumbs": png(chunk(b"tIME", b"") * 100_000),
        "png-crumbs-between": png((chunk(b"tIME", b"") + chunk(b"gAMA", b"")) * 110_000),
        "png-frames": png(chunk(b"acTL", bytes(8)), chunk(b"fcTL", b"") * 50_000),
        "riff-lies": b"RIFF\xff\xff\xff\xffWEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff",
        "riff-crumbs": b"RIFF" + struct.pack("<I", 4 + 8 * 110_000) + b"WEBP" + b"VP8X\0\0\0\0" * 110_000,
        "wav-lies": b"RIFF\xff\xff\xff\xffWAVEfmt \xff\xff\xff\x7f\1\0\xff\xff" + bytes(40),
        "gif-endless": gif + b"\x21\xfe" + b"\x01a" * 1_000_000,
        "gif-comments": gif + b"\x21\xfe\x01a\0" * 100_000 + b";",
        "gif-pictures": gif + b"\x2c\0\0\0\0\1\0\1\0\0\2\1a\0\x21\xfe\1a\0" * 50_000 + b";",
        "jpeg-filling": b"\xff\xd8" + b"\xff" * 5_000_000,
        "jpeg-notes": b"\xff\xd8" + b"\xff\xfe\0\2" * 500_000,
        "jpeg-scan": samples.encoded(samples.picture(), "JPEG")[:-2] + b"\xff\x00" * 5_000_000,
        "jpeg-scans": samples.encoded(samples.picture(), "JPEG")[:-2] + b"\xff\xda\0\2x" * 60_000,
        "tiff-directory": b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0" + b"\xff" * 8 + bytes(5_000_000),
        "tiff-loop": b"II*\0\x08\0\0\0\xff\xff" + b"\0\1\4\0\1\0\0\0\x08\0\0\0" * 400_000,
        "mp4-boxes": ftyp + box(b"moov", b"") * 20_000,
        "mp4-large": ftyp + struct.pack(">I4sQ", 1, b"moov", 2**60),
        "mp4-deep": ftyp + deep,
        "mp4-table": ftyp + box(b"moov", box(b"trak", box(b"mdia", box(b"minf", box(b"stbl", box(
            b"stsz", struct.pack(">III", 0, 0, 2**31)) + box(b"stts", struct.pack(">II", 0, 2**31))))))),
        "mp4-huge-frame": huge_frame(),
        "avif-boxes": ftyp_avif
        + box(b"meta", bytes(4) + box(b"iprp", box(b"ipco", box(b"ispe", b"") * 200_000))),
        "webm-large": webm + b"\x18\x53\x80\x67\x01" + b"\xff" * 7
        + b"\x12\x54\xc3\x67\x0f\xff\xff\xff" + bytes(99),
        "webm-nest": webm + b"\x18\x53\x80\x67\xff" * 100_000,
        "flac-block": b"fLaC\x00\x00\x00\x22" + bytes(34) + b"\x84\xff\xff\xff\x08\0\0\0" + b"\xff" * 99,
        "flac-picture": b"fLaC\x00\x00\x00\x22" + bytes(34) + b"\x86\xff\xff\xff" + b"\x7f" * 999,
        "ogg-pages": (b"OggS\0\2" + bytes(20) + b"\x01\x08OpusHead") * 50_000,
        "mp3-tag": b"ID3\x04\0\0\x7f\x7f\x7f\x7fTXXX" + b"\x7f" * 999,
        "tensors-nest": struct.pack("<Q", 2 * nest + 5) + b'{"a":' + b"[" * nest + b"]" * nest,
        "tensors-names": struct.pack("<Q", 4_000_000)
        + (b'{"a":1' + b',"b":[]' * 571_427).ljust(3_999_999) + b"}",
        "glb-nest": b"glTF\2\0\0\0" + struct.pack("<II4s", 20 + 2 * nest, 2 * nest, b"JSON")
        + b'{"a":'.ljust(5) + b"[" * (nest - 3) + b"]" * (nest - 3) + b"}",
        "svg-laughs": f'<!DOCTYPE svg [<!ENTITY a0 "ha">{laughs}]><svg>&a12;</svg>'.encode(),
        "svg-nest": b"<svg>" + b"<metadata>" * 200_000,
        "svg-outside": b'<!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg>&a;</svg>',
    }  # fmt: skip


def test_nothing_hangs_or_grows(tmp_path: Path) -> None:
    samples.mp4(tmp_path / "warm.mp4")
    made = hostile()
    for name, data in made.items():
        (tmp_path / f"{name}.bad").write_bytes(data)
    for name, start in {
        "sparse-png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0))
        + struct.pack(">I4s", LARGE - 100, b"tEXt"),
        "sparse-webp": b"RIFF" + struct.pack("<I4s4sI", LARGE - 8, b"WEBP", b"VP8X", 10) + bytes(10)
        + b"EXIF" + struct.pack("<I", LARGE - 38),
        "sparse-tensors": struct.pack("<Q", LARGE - 8) + b"{",
        "sparse-svg": b"<svg>",
        "sparse-text": b"x",
    }.items():  # fmt: skip
        made[name] = start
        with (tmp_path / f"{name}.bad").open("wb") as file:
            file.write(start)
            file.truncate(LARGE)
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(tmp_path)], capture_output=True, text=True, timeout=55, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {name for name, *_rest in found} == made.keys()
    assert [one for one in found if one[1] > MOST_SECONDS or one[2] > MOST_MEGABYTES] == []


def test_looking_at_a_file_of_a_stranger_loads_no_native_decoder(tmp_path: Path) -> None:
    samples.mp4(tmp_path / "a")
    samples.webp(tmp_path / "b")
    script = (
        "import sys; from pathlib import Path; from comfyd.media import sniff; folder = Path(sys.argv[1])\n"
        "print([sniff(folder / name).kind for name in 'ab'], [m for m in ('av', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "['video', 'image'] []"


SHORT = Audio(seconds=0.1, sample_rate=44_100, channels=1, notes=(440,))

MAKERS: dict[str, Callable[[Path], Path]] = {
    "png": samples.png,
    "apng": samples.apng,
    "webp": samples.webp,
    "jpeg": lambda path: samples.jpeg(path, orientation=3),
    "gif": samples.gif,
    "avif": lambda path: written(path, samples.encoded(samples.picture(), "AVIF", exif=samples.exif())),
    "tiff": lambda path: written(path, samples.encoded(samples.picture(), "TIFF")),
    "mp4": lambda path: samples.mp4(path, frames=3),
    "webm": lambda path: samples.webm(path, frames=3),
    "flac": lambda path: written(path, containers.flac(SHORT, samples.TAGS)),
    "mp3": lambda path: written(path, containers.mp3(SHORT)),
    "opus": lambda path: samples.sound(path, "opus", "libopus", 0.05),
    "wav": lambda path: samples.sound(path, "wav", "pcm_s16le", 0.05),
    "latent": samples.latent,
    "glb": samples.glb,
    "svg": samples.svg,
}


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@cache
def whole(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return MAKERS[name](Path(folder) / "a").read_bytes()


def answered(path: Path, converts: bool) -> None:
    """Every function ends with what it promises to end with."""
    found = sniff(path, "a.png")
    assert isinstance(found, Sniffed)
    assert (found.kind == "image") == (found.width is not None)
    assert found.extension.isalnum()
    assert isinstance(facts(path, found.content_type), Facts)
    target = path.with_name("target")
    tries: list[Callable[[], bool]] = [lambda: strip(path, target)]
    if converts and (found.width or 0) * (found.height or 0) < 1_000_000:
        tries.append(lambda: convert(path, target, "webp", 50))
    for attempt in tries:
        target.unlink(missing_ok=True)
        try:
            assert attempt() == target.exists()
        except MediaError:
            assert not target.exists()


@pytest.mark.parametrize("name", MAKERS)
def test_damage_ends_in_an_answer(tmp_path: Path, name: str) -> None:
    """Bytes turned over, taken out, repeated: always the same damage in every run."""
    source = random.Random(name)
    data = whole(name)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(source.randint(1, 6)):
            at = source.randrange(len(damaged))
            kind = source.randrange(4)
            if kind == 0:
                damaged[at] = source.randrange(256)
            elif kind == 1:
                damaged[at : at + 4] = source.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"))
            elif kind == 2:
                del damaged[at : at + source.randrange(40)]
            else:
                damaged[at:at] = damaged[at : at + source.randrange(60)]
            damaged = damaged or bytearray(b"x")
        answered(written(tmp_path / "a", bytes(damaged)), converts=True)
    for end in range(0, len(data), max(1, len(data) // 25)):
        answered(written(tmp_path / "a", data[:end]), converts=True)


STARTS = [
    whole("gif")[:6],
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"RIFF",
    b"II*\0",
    b"OggS",
    b"fLaC",
    b"ID3",
]
STARTS += [b"\0\0\0\x14ftypavif", b"\0\0\0\x14ftypisom", b"\x1a\x45\xdf\xa3", b"glTF", b"<svg>", b""]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=400))
def test_any_bytes_end_in_an_answer(tmp_path: Path, start: bytes, rest: bytes) -> None:
    answered(written(tmp_path / "a", start + rest), converts=True)
