"""comfyd as a process of its own, for tests that kill it and start it again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any, Self

import aiohttp

from tests.support.comfyui import free_port

START_SECONDS = 20.0
STOP_SECONDS = 20.0


class ComfydProcess:
    """One `comfyd serve` on loopback, living from `start` to `stop`; its data directory outlives kills."""

    def __init__(self, folder: Path, comfyui: str, **settings: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "comfyd.log"
        self._settings = {
            "COMFYD__SERVER__PORT": str(self.port),
            "COMFYD__SERVER__GRACE": "1",
            "COMFYD__DATA__DIR": str(folder / "data"),
            "COMFYUI_URL": comfyui,
            **settings,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it and return when it answers."""
        self.spawn()
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.exit_code() is not None or time.monotonic() > deadline:
                raise AssertionError(f"comfyd did not start:\n{self.log_text()}")
            time.sleep(0.02)

    def spawn(self) -> None:
        """Start it and return at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        measured = {name: value for name, value in os.environ.items() if name.startswith("COV")}
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), **measured, **self._settings}
        with self.log.open("ab") as log:
            self._process = self._launch(environment, log)

    def _launch(self, environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        """The new process."""
        return subprocess.Popen(
            [sys.executable, "-m", "comfyd", "serve"],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def kill(self) -> None:
        """SIGKILL: nothing of it has a chance to tidy up."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(STOP_SECONDS)

    def terminate(self) -> int:
        """SIGTERM, and the exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(STOP_SECONDS)

    def send_signal(self, number: signal.Signals) -> None:
        """Any signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll() if self._process is not None else None

    def wait(self) -> int:
        """The exit code of one that ends by itself."""
        assert self._process is not None
        return self._process.wait(STOP_SECONDS)

    def log_text(self) -> str:
        """What it wrote."""
        return self.log.read_text(errors="replace")[-8_000:]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/api/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


class Client:
    """What tests ask of a comfyd over HTTP. Lives within one `aiohttp` session."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def submit(self, workflow: Any, **facts: Any) -> dict[str, Any]:
        """POST a task that is accepted."""
        body = {"workflow": workflow, **facts}
        async with self._session.post(f"{self._url}/api/tasks", json=body) as answer:
            assert answer.status == 202, await answer.text()
            return await _object(answer)

    async def task(self, task_id: str, wait: float | None = None) -> dict[str, Any]:
        """GET a task."""
        params = {"wait": str(wait)} if wait is not None else {}
        async with self._session.get(f"{self._url}/api/tasks/{task_id}", params=params) as answer:
            assert answer.status == 200, await answer.text()
            return await _object(answer)

    async def ended(self, task_id: str, patience: float = 60.0) -> dict[str, Any]:
        """The task when it has ended."""
        deadline = time.monotonic() + patience
        while (task := await self.task(task_id, wait=5))["status"] in {"PENDING", "PROCESSING"}:
            assert time.monotonic() < deadline, task
        return task

    async def read(self, url: str) -> bytes:
        """The bytes behind a url of ours."""
        async with self._session.get(url) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.read()

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """Any request: status and JSON body."""
        async with self._session.request(method, f"{self._url}{path}", **options) as answer:
            text = await answer.text()
            return answer.status, await answer.json() if text else None


async def _object(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    body = await answer.json()
    assert isinstance(body, dict)
    return body
