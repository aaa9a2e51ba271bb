"""The configuration: one frozen typed tree, read once; never reads a file or the environment itself.

Every key has a default. What a key accepts stands with its type; the loader checks it and says it in errors.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Text = Annotated[str, Meta(min_length=1, description="a text that is not empty")]
Word = Annotated[
    str,
    Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="a word of letters, digits and . _ -"),
]
Port = Annotated[int, Meta(ge=0, le=65535, description="a port from 0 (any free one) to 65535")]
Seconds = Annotated[float, Meta(ge=0, le=1e9, description="seconds from 0 to 1e9")]
Patience = Annotated[float, Meta(gt=0, le=1e9, description="seconds above 0, to 1e9")]
Count = Annotated[int, Meta(ge=1, le=2**53, description="a whole number from 1")]
Workers = Annotated[int, Meta(ge=1, le=1024, description="a whole number from 1 to 1024")]
Prefetch = Annotated[int, Meta(ge=0, le=1024, description="a whole number from 0 to 1024")]
InFlight = Annotated[int, Meta(ge=1, le=64, description="a whole number from 1 to 64")]
Depth = Annotated[int, Meta(ge=4, le=200, description="a whole number from 4 to 200")]
Page = Annotated[int, Meta(ge=1, le=10_000, description="a whole number from 1 to 10000")]


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[server]`: where comfyd listens."""

    host: Text = "127.0.0.1"
    port: Port = 8000
    public_url: str | None = None
    """What clients reach comfyd under, for the urls in answers; None takes the request's own host."""
    grace: Seconds = 10.0
    """Seconds that a stop waits for what is nearly done."""


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[data]`: what comfyd keeps."""

    dir: Text = "./data"


class QueueConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[queue]`: the queue and what a task may take. Times in seconds; 0 is 'no limit'."""

    url: str = "sqlite"
    workers: Workers = 32
    prefetch: Prefetch = 2
    max_attempts: Count = 3
    retry_delay: Seconds = 2.0
    retry_delay_max: Seconds = 300.0
    timeout: Seconds = 0.0
    start_timeout: Seconds = 0.0
    stall_timeout: Seconds = 3600.0
    retention: Seconds = 604800.0


class ComfyUIConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[comfyui]]`: a server to work with."""

    url: str = "http://127.0.0.1:8188"
    name: Word = "comfyui"
    in_flight: InFlight = 2
    client_id: Word = "comfyd"
    """What the socket's client ids begin with; each connection adds its own random part (Q3)."""
    request_timeout: Patience = 30.0


class LocalStorageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[storage.local]`."""

    dir: Text | None = None
    """None is `files` below `data.dir`."""


class StorageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[storage]`: where artefacts go."""

    provider: Literal["local"] = "local"
    local: LocalStorageConfig = LocalStorageConfig()


class WorkflowsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[workflows]`: the templates."""

    dir: Text = "workflows"


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[limits]`: bounds on what a client controls."""

    body_bytes: Count = 33_554_432
    queued_tasks: Count = 1_000_000
    nodes: Count = 5_000
    depth: Depth = 64
    string_length: Count = 1_000_000
    wait: Seconds = 120.0
    """Seconds that `?wait` and `Prefer: wait` may ask for; more is cut to this."""
    list_page: Page = 100


class LogConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[log]`."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"
    file: Text | None = None
    access: bool = False
    """Whether every HTTP request is a line: useful in front of strangers, costly under load."""


class ClientConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[client]`: what `comfyd submit` talks to; None is this configuration's own server."""

    url: str | None = None


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole tree."""

    server: ServerConfig = ServerConfig()
    data: DataConfig = DataConfig()
    queue: QueueConfig = QueueConfig()
    comfyui: tuple[ComfyUIConfig, ...] = (ComfyUIConfig(),)
    storage: StorageConfig = StorageConfig()
    workflows: WorkflowsConfig = WorkflowsConfig()
    limits: LimitsConfig = LimitsConfig()
    log: LogConfig = LogConfig()
    client: ClientConfig = ClientConfig()

    @property
    def database(self) -> Path:
        """The file of the queue."""
        return Path(self.data.dir) / "comfyd.db"

    @property
    def files(self) -> Path:
        """The folder of the local storage."""
        return Path(self.storage.local.dir) if self.storage.local.dir else Path(self.data.dir) / "files"


def masked(url: str) -> str:
    """The url with `***` for a user and password before its host; anything else as it is."""
    scheme, mark, rest = url.partition("://")
    # Everything before the first slash may hold the `@`, whatever comes after it cannot be a password.
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    return f"{scheme}{mark}***{at}{host}{slash}{path}" if mark and user else url


def public(config: Config) -> dict[str, Any]:
    """The tree as JSON for `/api/status`: no secret, and no password that a url carries."""
    return {name: _without_passwords(value) for name, value in msgspec.to_builtins(config).items()}


def _without_passwords(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_passwords(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_passwords(item) for item in value]
    return masked(value) if isinstance(value, str) else value
