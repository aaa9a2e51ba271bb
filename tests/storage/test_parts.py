"""A part of a file is a file: it is read, sought and hashed within its bounds."""

import base64
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from comfyd.disk import BLOCK
from comfyd.storage.parts import Part

DATA = os.urandom(3 * BLOCK)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[IO[bytes]]:
    (tmp_path / "source").write_bytes(DATA)
    with (tmp_path / "source").open("rb", buffering=0) as opened:
        yield opened


def test_it_reads_its_own_bytes_only(source: IO[bytes]) -> None:
    part = Part(source, 1_000, 50)
    assert part.readable()
    assert part.seekable()
    assert part.read(20) == DATA[1_000:1_020]
    assert part.tell() == 20
    assert part.read() == DATA[1_020:1_050]
    assert part.read(1) == b""
    assert part.read() == b""


def test_two_parts_of_a_file_do_not_disturb_each_other(source: IO[bytes]) -> None:
    one, two = Part(source, 0, 10), Part(source, 10, 10)
    assert (one.read(5), two.read(5), one.read(5)) == (DATA[:5], DATA[10:15], DATA[5:10])


def test_it_can_be_sought_from_everywhere(source: IO[bytes]) -> None:
    part = Part(source, 1_000, 50)
    assert part.seek(10) == 10
    assert part.seek(5, io.SEEK_CUR) == 15
    assert part.seek(-1, io.SEEK_END) == 49
    assert part.read() == DATA[1_049:1_050]


def test_its_digest_is_taken_from_its_start(source: IO[bytes]) -> None:
    part = Part(source, 7, 2 * BLOCK)
    part.read(100)
    digest = hashlib.md5(DATA[7 : 7 + 2 * BLOCK], usedforsecurity=False).digest()
    for _ in range(2):
        assert part.md5() == base64.b64encode(digest).decode()
    assert part.tell() == 0


def test_a_file_that_became_shorter_is_an_error_and_not_an_end(source: IO[bytes]) -> None:
    part = Part(source, len(DATA) - 10, 20)
    assert part.read(20) == DATA[-10:]
    with pytest.raises(OSError, match="shorter"):
        part.read(10)
