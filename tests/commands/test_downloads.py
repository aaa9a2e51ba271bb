"""Files that arrive: their names, their bytes, and what was there before."""

import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.commands.downloads import NAME_BYTES, Announced, announcement, safe_name, save
from comfyd.commands.exits import CannotCreate, DamagedDownload


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def announced(data: bytes, name: str = "picture.png") -> Announced:
    return Announced(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


async def test_a_file_is_saved_under_its_own_name(tmp_path: Path) -> None:
    path = await save(chunks(b"one", b"", b"two"), announced(b"onetwo"), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "picture.png"
    assert path.read_bytes() == b"onetwo"
    assert names(path.parent) == ["picture.png"]


async def test_a_file_that_is_there_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"mine")
    (tmp_path / "picture-2.png").mkdir()
    path = await save(chunks(b"new"), announced(b"new"), tmp_path)
    assert path.name == "picture-3.png"
    assert (tmp_path / "picture.png").read_bytes() == b"mine"


async def test_a_file_system_without_hard_links_is_served_too(tmp_path: Path) -> None:
    def refused(_source: Path, _target: Path) -> None:
        raise PermissionError

    for number in ("", "-2", "-3"):
        path = await save(chunks(b"new"), announced(b"new"), tmp_path, refused)
        assert path.name == f"picture{number}.png"
        assert path.read_bytes() == b"new"
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize("arrived", [b"shor", b"longer", b"other"])
async def test_a_damaged_file_gets_no_name(tmp_path: Path, arrived: bytes) -> None:
    with pytest.raises(DamagedDownload, match=r"picture\.png arrived damaged"):
        await save(chunks(arrived), announced(b"short"), tmp_path)
    assert names(tmp_path) == []


def test_only_what_is_delivered_as_it_was_stored_has_a_digest() -> None:
    output = {"name": "a.png", "size_bytes": 3, "sha256": "abc", "url": "https://x/a.png"}
    exact = Announced(name="a.png", size_bytes=3, sha256="abc")
    assert [announcement({**output, "storage": name}) for name in ("local", "s3", "r2", "gcs")] == [exact] * 4
    assert announcement({**output, "storage": "cf_images"}) == Announced(name="a.png")


async def test_a_file_of_unknown_size_is_saved_unless_it_is_empty(tmp_path: Path) -> None:
    path = await save(chunks(b"any", b"thing"), Announced(name="a.png"), tmp_path)
    assert path.read_bytes() == b"anything"
    with pytest.raises(DamagedDownload, match=r"b\.png arrived empty"):
        await save(chunks(), Announced(name="b.png"), tmp_path)
    assert names(tmp_path) == ["a.png"]


async def test_a_broken_stream_leaves_nothing(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"some"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await save(broken(), announced(b"something"), tmp_path)
    assert names(tmp_path) == []


async def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotCreate, match="cannot write into"):
        await save(chunks(b""), announced(b""), tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("picture.png", "picture.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\windows\\a.png", "a.png"),
        (".bashrc", "bashrc"),
        ("-rf", "rf"),
        ("..", "output"),
        ("", "output"),
        ("a/", "output"),
        ("a\x1b[2J\nb.png", "a[2Jb.png"),
        ('a<b>:"|?*.png', "a_b______.png"),
        ("Bild ü 画.png", "Bild ü 画.png"),
        ("a.tar.gz", "a.tar.gz"),
        ("x" * 300, "x" * NAME_BYTES),
        ("x" * 300 + ".png", "x" * (NAME_BYTES - 4) + ".png"),
    ],
)
def test_a_name_becomes_a_safe_one(name: str, safe: str) -> None:
    assert safe_name(name) == safe


@given(st.text())
def test_no_name_leaves_its_folder(name: str) -> None:
    safe = safe_name(name)
    assert safe not in {"", ".", ".."}
    assert not safe.startswith((".", "-"))
    assert not set(safe) & {"/", "\\", "\0"}
    assert len(os.fsencode(safe)) <= NAME_BYTES
    assert Path(safe).name == safe
