"""What the suites of the SDK need and Python's lock files do not have: the npm SDK and the official proxy.

Each is installed in a cache folder of its own, outside of the checkout, once for each recipe.
By hand: `python -m tests.sdk.installed`.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.support.comfyui import cache_folder

NPM: Final = Path(__file__).parent / "npm"
PROXY: Final = "comfy-api-proxy==0.1.6"
SETUP_SECONDS: Final = 600.0


def npm_sdk() -> Path:
    """The folder with the npm SDK and the scripts that use it. `CalledProcessError` when npm fails."""
    files = sorted(file for file in NPM.iterdir() if file.suffix in {".json", ".mjs"})

    def install(folder: Path) -> None:
        for file in files:
            shutil.copy(file, folder)
        quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error"]
        subprocess.run([npm(), "ci", *quiet], cwd=folder, check=True, timeout=SETUP_SECONDS)

    return _ready("npm-sdk", "".join(file.read_text() for file in files), install)


def npm() -> str:
    """The command. `FileNotFoundError` where it is not installed."""
    found = shutil.which("npm")
    if found is None or shutil.which("node") is None:
        raise FileNotFoundError("the npm SDK needs node and npm, which are not on the path")
    return found


def proxy() -> Path:
    """The command of the official proxy. `CalledProcessError` when pip fails."""

    def install(folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=SETUP_SECONDS)
        pip = [str(folder / "venv" / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", PROXY], check=True, timeout=SETUP_SECONDS)

    return _ready("proxy", f"{PROXY} {sys.version}", install) / "venv" / "bin" / "comfy-api-proxy"


def _ready(name: str, recipe: str, install: Callable[[Path], None]) -> Path:
    """The folder in which this was installed, now or before; a stamp is written last."""
    folder = cache_folder() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    stamp, wanted = folder / "ready", hashlib.sha256(recipe.encode()).hexdigest()
    with (folder.parent / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # closing the file gives it back
        if not (stamp.is_file() and stamp.read_text() == wanted):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            install(folder)
            stamp.write_text(wanted)
    return folder


if __name__ == "__main__":
    sys.stdout.write(f"{npm_sdk()}\n{proxy()}\n")
