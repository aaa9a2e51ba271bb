"""Whether a file is all there, as far as it says so itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from comfyd.media import is_whole
from comfyd.simulator import containers


def picture(extension: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        Image.effect_noise((64, 48), 50).convert("RGB").save(path, extension)

    return write


def clip(path: Path) -> None:
    frames = [Image.new("RGB", (64, 48), color) for color in ("red", "blue")]
    path.write_bytes(containers.mp4(frames, 5.0))


def sound(path: Path) -> None:
    body = b"WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data" + (800).to_bytes(4, "little")
    path.write_bytes(b"RIFF" + (len(body) + 800).to_bytes(4, "little") + body + bytes(800))


KINDS = {
    "png": picture("PNG"),
    "jpeg": picture("JPEG"),
    "webp": picture("WEBP"),
    "gif": picture("GIF"),
    "mp4": clip,
    "wav": sound,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_whole_and_every_shorter_one_is_not(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    KINDS[kind](path)
    data = path.read_bytes()
    assert is_whole(path)
    for left in (len(data) // 2, len(data) * 9 // 10, len(data) - 20):
        path.write_bytes(data[:left])
        assert not is_whole(path), left


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_the_end_does_no_harm(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    KINDS[kind](path)
    more = bytes(8) if kind != "mp4" else b"\0\0\0\x08free"
    path.write_bytes(path.read_bytes() + more)
    assert is_whole(path)


def test_a_second_picture_behind_the_first_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    picture("JPEG")(path)
    path.write_bytes(path.read_bytes() * 2 + bytes(1_000))
    assert is_whole(path)


def test_a_sound_that_does_not_know_its_length_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    sound(path)
    data = bytearray(path.read_bytes())
    for unknown in (0, 0xFFFFFFFF):
        data[4:8] = unknown.to_bytes(4, "little")
        path.write_bytes(data[:500])
        assert is_whole(path)


def test_what_does_not_say_where_it_ends_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for data in (b"", b"a text", b"fLaC" + bytes(100)):
        path.write_bytes(data)
        assert is_whole(path)
