"""The folder of uploads on the disk: names, times, deletion; never a look into a file.

What blocks is to be run on a thread, by `on_disk`.
"""

import heapq
import os
import re
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from comfyd.clock import Clock
from comfyd.errors import InputNotFound
from comfyd.graphs import UPLOAD_FILE

FILE: Final = re.compile(UPLOAD_FILE)
"""What an upload is called on the disk."""


class Folder:
    """What uploads do on the disk, each verb to be run on a thread. Lives as long as its `Uploads`."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder = folder
        self._rests = folder / ".unfinished"
        self._clock = clock
        # Between the look at a file's age and its deletion nobody may touch it.
        self._lock = threading.Lock()

    def prepare(self) -> None:
        for folder in (self._folder, self._rests):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for rest in self._rests.iterdir():
            rest.unlink(missing_ok=True)

    def unfinished(self) -> Path:
        """A new place, on the same disk, that nobody takes for an upload."""
        return self._rests / secrets.token_hex(16)

    def path(self, file: str) -> Path:
        if not FILE.fullmatch(file):
            raise not_found(file)
        return self._folder / file

    def place(self, unfinished: Path, file: str) -> None:
        """Give the file its name, and sync the folder where that is new."""
        with self._lock:
            self._set_time(unfinished)
            unfinished.replace(self.path(file))
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def used(self, file: str) -> int:
        """Touch it; its size."""
        path = self.path(file)
        with self._lock:
            self._set_time(path)
        return path.stat().st_size

    def touch(self, files: Iterable[str]) -> None:
        for file in files:
            with suppress(FileNotFoundError):
                self._set_time(self.path(file))

    def idle(self, age_ms: int, limit: int) -> tuple[int, list[str]]:
        """When an idle file was touched at the latest, and those that were not touched since."""
        latest = self._clock.now() - age_ms
        oldest = heapq.nsmallest(limit, self._times())
        return latest, [file for touched, file in oldest if touched <= latest]

    def delete(self, files: Iterable[str], latest: int) -> int:
        """Those of them that nobody touched after that moment; how many there were."""
        gone = 0
        for file in files:
            path = self.path(file)
            with self._lock, suppress(FileNotFoundError):
                if _touched_ms(path.stat()) <= latest:
                    path.unlink()
                    gone += 1
        return gone

    def _times(self) -> Iterator[tuple[int, str]]:
        """When each upload was last touched."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if FILE.fullmatch(entry.name):
                    with suppress(FileNotFoundError):  # forgotten meanwhile
                        yield _touched_ms(entry.stat()), entry.name

    def _set_time(self, path: Path) -> None:
        now = self._clock.now() * 1_000_000
        os.utime(path, ns=(now, now))


def not_found(reference: str) -> InputNotFound:
    return InputNotFound(f"there is no upload {reference[:100]!r}; uploads that no task uses are forgotten")


def _touched_ms(status: os.stat_result) -> int:
    return status.st_mtime_ns // 1_000_000


@contextmanager
def there(file: str) -> Iterator[None]:
    """Let a file that is missing be an upload that is not found."""
    try:
        yield
    except FileNotFoundError:
        raise not_found(file) from None
