"""Files that leave: whole, unchanged, and looked at before."""

import errno
import io
import os
from pathlib import Path

import pytest

from comfyd.commands.exits import UnreadableFile
from comfyd.commands.uploads import BLOCK, OutgoingFile, outgoing

DATA = os.urandom(BLOCK) * 2 + b"the end"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(DATA)
    return path


async def test_a_file_is_read_in_blocks(file: Path) -> None:
    with outgoing(file) as opened:
        blocks = [block async for block in opened.blocks()]
    assert b"".join(blocks) == DATA
    assert max(map(len, blocks)) == BLOCK
    assert opened.size_bytes == len(DATA)


async def test_an_empty_file_has_no_blocks(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with outgoing(tmp_path / "empty") as opened:
        assert [block async for block in opened.blocks()] == []


def test_a_file_is_the_same_under_each_of_its_names(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "hard").hardlink_to(file)
    (tmp_path / "copy").write_bytes(DATA)
    identities = []
    for name in ("photo.png", "link", "hard", "copy"):
        with outgoing(tmp_path / name) as opened:
            identities.append(opened.identity)
    assert len(set(identities[:3])) == 1
    assert identities[3] != identities[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.png", "missing.png cannot be read: No such file or directory"),
        ("photo.png/below", "below cannot be read: Not a directory"),
        ("folder", "folder is not a regular file"),
        ("pipe", "pipe is not a regular file"),
    ],
)
def test_what_cannot_be_sent_is_named(file: Path, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnreadableFile, match=words), outgoing(file.parent / name):
        pass


@pytest.mark.parametrize("change", [-1, 1])
async def test_the_last_block_of_a_file_that_changes_does_not_leave(file: Path, change: int) -> None:
    left: list[bytes] = []

    async def send(opened: OutgoingFile) -> None:
        async for block in opened.blocks():
            left.append(block)
            os.truncate(file, len(DATA) + change)

    with outgoing(file) as opened, pytest.raises(UnreadableFile, match=r"photo\.png changed while"):
        await send(opened)
    assert left[:2] == [DATA[:BLOCK], DATA[BLOCK : 2 * BLOCK]]
    assert len(b"".join(left)) < len(DATA)


async def test_a_disk_that_fails_meanwhile_is_told(file: Path) -> None:
    class Failing(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:  # noqa: ARG002 - the base has it
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Failing(file) as failing, pytest.raises(UnreadableFile, match="cannot be read: Input/output error"):
        await anext(OutgoingFile(file, failing).blocks())
