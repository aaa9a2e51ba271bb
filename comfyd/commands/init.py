"""`comfyd init`: writes a commented configuration and the example workflows; never overwrites a file."""

from pathlib import Path
from typing import TextIO

from comfyd.commands import shipped
from comfyd.commands.exits import CannotCreate, Exit


def run(directory: Path, out: TextIO, err: TextIO) -> int:
    """Write what is missing in `directory`; a file that exists is named and kept. Ends with 0.

    Raises `CannotCreate` where the disk refuses.
    """
    wanted = [(directory / "comfyd.toml", shipped.configuration())]
    wanted += [(directory / "workflows" / file.name, file) for file in shipped.workflows()]
    for path, source in wanted:
        if _write(path, source.read_bytes()):
            print(f"wrote {path}", file=out)
        else:
            print(f"kept {path}: it exists already", file=err)
    return Exit.OK


def _write(path: Path, data: bytes) -> bool:
    """Whether the file was not there and is now."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError as error:
        if path.is_file():
            return False
        raise CannotCreate(f"{error.filename} is in the way of {path}") from error
    except OSError as error:
        raise CannotCreate(f"{path} cannot be written: {error.strerror}") from error
    return True
