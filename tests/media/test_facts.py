"""Size and duration of what ComfyUI made; what cannot be read has none."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
from PIL import Image

from comfyd.media import Facts, facts
from comfyd.media.tracks import measure
from comfyd.simulator import containers
from comfyd.simulator.values import Audio
from tests.media import samples

SOUND = Audio(seconds=1.5, sample_rate=44_100, channels=2, notes=(440, 0, 880))


@pytest.mark.parametrize("wanted", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_still_picture_has_a_size_and_no_duration(tmp_path: Path, wanted: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(samples.encoded(samples.picture(), wanted))
    assert facts(path, "image/png") == Facts(width=48, height=32)


def test_an_animation_lasts_as_long_as_its_frames(tmp_path: Path) -> None:
    made = (
        samples.apng(tmp_path / "a", 4, 250),
        samples.webp(tmp_path / "b", 4, 250),
        samples.gif(tmp_path / "c", 4, 250),
    )
    for path in made:
        assert facts(path, "image/webp") == Facts(width=48, height=32, duration=1.0)


def test_an_avif_sequence_has_a_duration(tmp_path: Path) -> None:
    path = tmp_path / "a"
    shown = [samples.picture(shade=index * 20) for index in range(4)]
    shown[0].save(path, "AVIF", save_all=True, append_images=shown[1:], duration=250)
    assert facts(path, "image/avif") == Facts(width=48, height=32, duration=1.0)


def test_videos_have_size_and_duration(tmp_path: Path) -> None:
    for path in (
        samples.mp4(tmp_path / "a"),
        samples.mp4(tmp_path / "b", format="mov"),
        samples.webm(tmp_path / "c"),
        samples.webm(tmp_path / "d", format="matroska"),
    ):
        found = facts(path, "video/mp4")
        assert (found.width, found.height) == (64, 48)
        assert found.duration == pytest.approx(1.0, abs=0.07)


def test_a_video_whose_header_tells_no_duration_is_counted(tmp_path: Path) -> None:
    path = samples.webm(tmp_path / "a", live=True)
    data = path.read_bytes()
    at = data.find(b"\x44\x89\x88")  # the duration in the header
    written = data.replace(b"DURATION", b"XURATION")
    path.write_bytes(written if at < 0 else written[:at] + b"\xec\x89" + written[at + 2 :])
    assert facts(path, "video/webm").duration == pytest.approx(1.0, abs=0.1)


def test_sounds_have_a_duration_and_no_size(tmp_path: Path) -> None:
    for wanted, codec in (
        ("flac", "flac"),
        ("mp3", "libmp3lame"),
        ("opus", "libopus"),
        ("ogg", "flac"),
        ("wav", "pcm_s16le"),
        ("adts", "aac"),
        ("ipod", "aac"),
        ("aiff", "pcm_s16be"),
    ):
        found = facts(samples.sound(tmp_path / wanted, wanted, codec, seconds=1.0), "audio/flac")
        assert (found.width, found.height) == (None, None)
        assert found.duration == pytest.approx(1.0, abs=0.07)


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with samples.container(path, format="mp3") as out:
        sound = out.add_stream("libmp3lame", rate=48_000)
        shown = out.add_stream("png", rate=1)
        shown.width, shown.height, shown.pix_fmt = 48, 32, "rgb24"
        shown.disposition = av.stream.Disposition.attached_pic
        out.mux(shown.encode(samples.video_frame(samples.picture())))
        out.mux(sound.encode(samples.tone(48_000, 1.0)))
        out.mux(sound.encode(None))
    found = facts(path, "audio/mpeg")
    assert (found.width, found.height) == (None, None)
    assert found.duration == pytest.approx(1.0, abs=0.07)


def test_what_the_simulator_makes_can_be_measured(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 48), (index * 20, 0, 0)) for index in range(10)]
    path = tmp_path / "a"
    for data in (containers.webm(frames, 5.0), containers.mp4(frames, 5.0)):
        path.write_bytes(data)
        assert facts(path, "video/webm") == Facts(width=64, height=48, duration=2.0)
    path.write_bytes(containers.flac(SOUND, samples.TAGS))
    assert facts(path, "audio/flac").duration == pytest.approx(1.5)
    path.write_bytes(containers.mp3(SOUND))
    assert facts(path, "audio/mpeg").duration == pytest.approx(1.5, abs=0.03)


def test_texts_meshes_and_tensors_have_none(tmp_path: Path) -> None:
    assert facts(samples.svg(tmp_path / "a"), "image/svg+xml") == Facts()
    assert facts(samples.svg(tmp_path / "a"), "application/octet-stream") == Facts()
    assert facts(samples.glb(tmp_path / "b"), "model/gltf-binary") == Facts()
    assert facts(samples.latent(tmp_path / "c"), "application/octet-stream") == Facts()
    assert facts(samples.png(tmp_path / "d"), "text/plain; charset=utf-8") == Facts()


def test_what_is_broken_has_only_what_its_header_says(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for make in (samples.apng, samples.webp, samples.gif):
        whole = make(tmp_path / "whole").read_bytes()
        path.write_bytes(whole[:-40])
        assert facts(path, "image/png") == Facts(width=48, height=32)
    for start in (b"\x1a\x45\xdf\xa3\x8b\x42\x82\x84webm", b"fLaC", b"\0\0\0\x10ftypisom\0\0\0\0"):
        path.write_bytes(start + bytes(200))
        assert facts(path, "video/webm") == Facts()


def test_what_is_not_there_has_none(tmp_path: Path) -> None:
    assert facts(tmp_path / "none", "image/png") == Facts()
    assert measure(tmp_path / "none", "mp4") == Facts()
    assert measure(samples.png(tmp_path / "a"), "png") == Facts()


def test_a_playlist_opens_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text(f"#EXTM3U\n#EXTINF:1,\n{samples.mp4(tmp_path / 'secret.mp4')}\n")
    assert facts(path, "video/mp4") == Facts()
    assert measure(path, "mp4") == Facts()
