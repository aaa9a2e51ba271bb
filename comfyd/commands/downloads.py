"""Files that arrive get safe names of their own; never replaces a file, never leaves half of one."""

import asyncio
import contextlib
import os
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from comfyd.commands.exits import CannotCreate, DamagedDownload
from comfyd.disk import Digest, write_stream
from comfyd.errors import StorageError

Link = Callable[[Path, Path], None]

NAME_BYTES: Final = 150
"""The longest name that is kept, in bytes of UTF-8: file systems stop at 255, and a number may follow."""
ENCODING_ANEW: Final = frozenset({"cf_images"})
"""Storages that deliver a picture as they see fit: what arrives has its own size and digest."""


class Announced(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a file before it is sent."""

    name: str
    size_bytes: int | None = None
    sha256: str | None = None
    """Both None where whoever sends it encodes it anew, so that only its arrival can be checked."""


def announcement(output: Mapping[str, Any]) -> Announced:
    """What a task says of one of its outputs."""
    if output.get("storage") in ENCODING_ANEW:
        return Announced(name=output["name"])
    return Announced(name=output["name"], size_bytes=output["size_bytes"], sha256=output["sha256"])


async def save(
    chunks: AsyncIterator[bytes], announced: Announced, directory: Path, link: Link = os.link
) -> Path:
    """Write a file into `directory`, made if needed, under its own or the next numbered name.

    It gets that name only when size and digest are what was announced; where neither is, when it is not
    empty. Raises `DamagedDownload` and `CannotCreate`; whatever fails, nothing is left behind. `link` gives
    a file a name that must be free.
    """
    part = directory / f".{secrets.token_hex(8)}.part"
    try:
        with _translated(directory):
            await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
        try:
            digest = await write_stream(f"cannot write into {directory}", part, chunks)
        except StorageError as error:
            raise CannotCreate(f"{error.message} (-o)") from error
        _check(announced, digest)
        with _translated(directory):
            return await asyncio.to_thread(_give_name, part, safe_name(announced.name), link)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _check(announced: Announced, found: Digest) -> None:
    name = safe_name(announced.name)
    if announced.sha256 is None:
        if found.size_bytes == 0:
            raise DamagedDownload(f"{name} arrived empty")
    elif (found.size_bytes, found.sha256) != (announced.size_bytes, announced.sha256):
        raise DamagedDownload(
            f"{name} arrived damaged: {found.size_bytes} bytes, announced {announced.size_bytes}"
        )


def safe_name(name: str) -> str:
    """The last part of a name, without anything that is special to a shell, a terminal or a file system."""
    last = re.split(r"[/\\]", name)[-1]
    kept = "".join("_" if letter in '<>:"|?*' else letter for letter in last if letter.isprintable())
    kept = kept.strip(" .-")
    stem, dot, suffix = kept.rpartition(".")
    if not dot or len(suffix) > 16:
        stem, dot, suffix = kept, "", ""
    room = NAME_BYTES - len((dot + suffix).encode())
    stem = stem.encode()[:room].decode(errors="ignore")
    return f"{stem}{dot}{suffix}" or "output"


def _give_name(part: Path, name: str, link: Link) -> Path:
    """Link the file to the first free name; the caller removes `part`."""
    for candidate in _candidates(part.with_name(name)):
        try:
            link(part, candidate)
        except FileExistsError:
            continue
        except OSError:
            # A file system without hard links: reserve the name, then move over the reservation.
            try:
                candidate.open("xb").close()
            except FileExistsError:
                continue
            part.replace(candidate)
        return candidate
    raise AssertionError("unreachable: the candidates do not end")


def _candidates(path: Path) -> Iterator[Path]:
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1


@contextmanager
def _translated(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CannotCreate(f"cannot write into {directory}: {error.strerror or error} (-o)") from error
