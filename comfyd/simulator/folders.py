"""The input, output and temp folders of a simulated ComfyUI and the naming rules of files in them.

Paths given by clients are resolved here and nowhere else. It never deletes anything but the temp folder.
"""

from __future__ import annotations

import mimetypes
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from comfyd.simulator import timing

if TYPE_CHECKING:
    from collections.abc import Iterator

REMEMBERED = 10_000  # prefixes whose last number is known without listing their folder
SUFFIXES = {"[output]": "output", "[input]": "input", "[temp]": "temp"}


@dataclass(frozen=True, slots=True)
class SavePlace:
    """Where a saver writes: `folder`, the file names' stem, the next number, and the subfolder to report."""

    folder: Path
    stem: str
    number: int
    subfolder: str
    kind: str

    def name(self, extension: str, index: int = 0) -> str:
        """The name of the `index`th file of this save, e.g. `ComfyUI_00007_.png`."""
        stem = self.stem.replace("%batch_num%", str(index))
        return f"{stem}_{self.number + index:05}_{extension}"

    def item(self, name: str) -> dict[str, str]:
        """The file as an entry of a node's UI output."""
        return {"filename": name, "subfolder": self.subfolder, "type": self.kind}


class Folders:
    """The three folders below one directory. Lives across crash and restart."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.roots = {kind: self.directory / kind for kind in ("input", "output", "temp")}
        for root in self.roots.values():
            root.mkdir(parents=True, exist_ok=True)
        self._last_saved: dict[tuple[Path, str], tuple[int, Path]] = {}

    def wipe_temp(self) -> None:
        """Empty the temp folder, as ComfyUI does when it starts."""
        shutil.rmtree(self.roots["temp"], ignore_errors=True)
        self.roots["temp"].mkdir()

    def input_files(self, *, pictures_only: bool) -> list[str]:
        """Names of the files directly in the input folder, sorted; pictures are told by their extension."""
        names = sorted(entry.name for entry in os.scandir(self.roots["input"]) if entry.is_file())
        if not pictures_only:
            return names
        return [name for name in names if (mimetypes.guess_type(name)[0] or "").startswith("image/")]

    def split_annotated(self, name: str) -> tuple[str, Path | None]:
        """`a.png [temp]` is `a.png` in the temp folder; without a suffix the folder is None.

        As in ComfyUI one character before the bracket is dropped, whatever it is.
        """
        for suffix, kind in SUFFIXES.items():
            if name.endswith(suffix):
                return name[: -len(suffix) - 1], self.roots[kind]
        return name, None

    def input_path(self, name: str, *, confined: bool) -> Path | None:
        """The existing file a LoadImage input names; None if there is none, or none inside if `confined`."""
        plain, root = self.split_annotated(name)
        root = root or self.roots["input"]
        path = root / plain
        if confined and not path.resolve().is_relative_to(root):
            return None
        return path if path.exists() else None

    def inside(self, root: Path, subfolder: str) -> Path | None:
        """A folder below `root`, by text alone; None if it is outside."""
        folder = Path(os.path.normpath(root / subfolder))
        return folder if folder.is_relative_to(root) else None

    def save_place(self, prefix: str, kind: str, width: int = 0, height: int = 0) -> SavePlace:
        """Where files with this prefix go. Raises `Exception`, as ComfyUI does, outside the output folder."""
        prefix = os.path.normpath(expand_variables(prefix, width, height))
        subfolder, stem = os.path.split(prefix)
        root = self.roots[kind]
        folder = self.inside(root, subfolder)
        if folder is None:
            outside = os.path.normpath(root / subfolder)
            raise OutsideFolderError(
                "**** ERROR: Saving image outside the output folder is not allowed."
                f"\n full_output_folder: {outside}\n         output_dir: {root}"
                f"\n         commonpath: {os.path.commonpath((root, outside))}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        return SavePlace(folder, stem, self._next_number(folder, stem), subfolder, kind)

    def saved(self, place: SavePlace, number: int, path: Path) -> None:
        """Remember the last file of a prefix, so that the next save need not list the folder."""
        if len(self._last_saved) >= REMEMBERED:
            self._last_saved.clear()
        self._last_saved[place.folder, place.stem] = (number, path)

    def _next_number(self, folder: Path, stem: str) -> int:
        number, path = self._last_saved.get((folder, stem), (0, None))
        if path is not None and path.exists():
            following = path.with_name(path.name.replace(f"_{number:05}_", f"_{number + 1:05}_"))
            if not following.exists():
                return number + 1
        return max(_numbers(folder, stem), default=0) + 1


class OutsideFolderError(Exception):
    """A file name prefix leaves the output folder; ComfyUI raises a bare `Exception` for it."""


OutsideFolderError.__name__ = OutsideFolderError.__qualname__ = "Exception"
OutsideFolderError.__module__ = "builtins"


def expand_variables(prefix: str, width: int, height: int) -> str:
    """Replace `%width%`, `%height%`, `%year%` .. `%second%` in a file name prefix."""
    if "%" not in prefix:
        return prefix
    now = timing.local_time()
    values = {
        "width": width,
        "height": height,
        "year": now.tm_year,
        "month": f"{now.tm_mon:02}",
        "day": f"{now.tm_mday:02}",
        "hour": f"{now.tm_hour:02}",
        "minute": f"{now.tm_min:02}",
        "second": f"{now.tm_sec:02}",
    }
    for name, value in values.items():
        prefix = prefix.replace(f"%{name}%", str(value))
    return prefix


def _numbers(folder: Path, stem: str) -> Iterator[int]:
    """The numbers of files `<stem>_<number>_...` in a folder; a name without a number counts as 0."""
    for entry in os.scandir(folder):
        if not entry.name.startswith(f"{stem}_"):
            continue
        digits = entry.name[len(stem) + 1 :].split("_")[0]
        try:
            yield int(digits)
        except ValueError:
            yield 0
