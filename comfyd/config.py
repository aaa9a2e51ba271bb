"""The configuration: one frozen typed tree, read once; never reads a file or the environment itself.

Every key has a default. What a key accepts stands with its type; the loader checks it and says it in errors.
"""

from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

Text = Annotated[str, Meta(min_length=1, description="a text that is not empty")]
Word = Annotated[
    str,
    Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z", description="a word of letters, digits and . _ -"),
]
Port = Annotated[int, Meta(ge=0, le=65535, description="a port from 0 (any free one) to 65535")]
Seconds = Annotated[float, Meta(ge=0, le=1e9, description="seconds from 0 to 1e9")]
Patience = Annotated[float, Meta(gt=0, le=1e9, description="seconds above 0, to 1e9")]
Count = Annotated[int, Meta(ge=1, le=2**53, description="a whole number from 1")]
Workers = Annotated[int, Meta(ge=1, le=1024, description="a whole number from 1 to 1024")]
Prefetch = Annotated[int, Meta(ge=0, le=1024, description="a whole number from 0 to 1024")]
Depth = Annotated[int, Meta(ge=4, le=200, description="a whole number from 4 to 200")]
StorageName = Literal["local", "s3", "r2", "gcs", "cf_images"]
AtOnce = Annotated[int, Meta(ge=1, le=64, description="a whole number from 1 to 64")]
Tries = Annotated[int, Meta(ge=1, le=20, description="a whole number from 1 to 20")]
Bytes = Annotated[int, Meta(ge=0, le=2**53, description="a whole number from 0")]
Inline = Annotated[int, Meta(ge=0, le=67_108_864, description="a whole number from 0 to 67108864")]
Bucket = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{1,254}\Z",
        description="a bucket's name alone: letters, digits and . _ -, without s3:// or a folder",
    ),
]
Secret = Annotated[
    str, Meta(pattern=r"^[\x21-\x7e]+\Z", description="a text of ASCII characters without blanks")
]
WHSEC: Final = (
    r"^whsec_(?:[A-Za-z0-9+/]{4}){8,20}"
    r"(?:[A-Za-z0-9+/]{3}=|(?:[A-Za-z0-9+/]{4})?(?:[A-Za-z0-9+/]{2}==)?)\Z"
)
"""What `WebhookSecret` has to look like: 24 to 64 bytes in base64, as Standard Webhooks 1.0 has it."""
WebhookSecret = Annotated[str, Meta(pattern=WHSEC, description="`whsec_` and 24 to 64 bytes in base64")]
Answering = Annotated[float, Meta(gt=0, le=30, description="seconds above 0, to 30")]
Expiry = Annotated[float, Meta(ge=1, le=604_800, description="seconds from 1 to 604800, a week")]
Prefix = Annotated[
    str,
    Meta(
        pattern=r"^(?:[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}(?:/[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}){0,7})?(?![\s\S])",
        description="folders of letters, digits and . _ - with / between them, not at an end",
    ),
]
Argument = Annotated[
    str, Meta(min_length=1, description="a list of texts that are not empty, the program first")
]
Page = Annotated[int, Meta(ge=1, le=10_000, description="a whole number from 1 to 10000")]


SECRET_FIELDS: Final = frozenset(
    {"access_key", "secret_key", "api_token", "credentials", "restart", "secret", "old_secrets"}
)
"""Keys of any section whose value is never shown: not in errors, not in `/api/status`, not in a repr.

`credentials` is the path of a file, but what is wrongly written there is often what the file holds. `restart`
is a command, which may hold a token.
"""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every section is: its repr, which ends up in tracebacks and logs, shows no secret."""

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({fields})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, shown_field(name, getattr(self, name))) for name in self.__struct_fields__]


class ServerConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[server]`: where comfyd listens."""

    host: Text = "127.0.0.1"
    port: Port = 8000
    public_url: str | None = None
    """What clients reach comfyd under, for the urls in answers; None takes the request's own host."""
    grace: Seconds = 10.0
    """Seconds that a stop waits for what is nearly done."""

    @property
    def local_url(self) -> str:
        """What this machine itself reaches comfyd under."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 - read, not bound
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


class DataConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[data]`: what comfyd keeps."""

    dir: Text = "./data"


class QueueConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    retention_bytes: Bytes = 0
    """Bytes of outputs in all that are kept, the oldest tasks going first; 0 is 'no limit'."""


class ComfyUIConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[comfyui]]`: a server to work with."""

    url: str = "http://127.0.0.1:8188"
    name: Word = "comfyui"
    in_flight: AtOnce = 2
    client_id: Word = "comfyd"
    """What the socket's client ids begin with; each connection adds its own random part (Q3)."""
    request_timeout: Patience = 30.0
    stuck_after: Seconds = 30.0
    """Seconds that prompts may wait there while nothing runs; then it is sick. 0 does not look."""
    stop_timeout: Seconds = 60.0
    """Seconds that a prompt may go on which was asked to stop; then its server is sick. 0 does not look."""
    restart: tuple[Argument, ...] = ()
    """The program, and its arguments, that starts a sick server anew; none: somebody else does."""


class LocalStorageConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[storage.local]`."""

    dir: Text | None = None
    """None is `files` below `data.dir`."""
    url_expires: Seconds = 0.0
    """Seconds that a file's url is good for; 0 gives plain urls, which are good for ever."""


class S3StorageConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[storage.s3]`: Amazon S3 or any server that speaks its protocol."""

    bucket: Bucket | None = None
    region: Word = "us-east-1"
    endpoint: str | None = None
    """The server's own url; None is Amazon's."""
    access_key: Secret | None = None
    secret_key: Secret | None = None
    """None, with `access_key`, takes the credentials of the machine (environment, profile, instance role)."""
    prefix: Prefix = ""
    public_url: str | None = None
    """What the bucket is publicly served under; None gives presigned urls."""
    url_expires: Expiry = 86_400.0


class R2StorageConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[storage.r2]`: Cloudflare R2."""

    bucket: Bucket | None = None
    account_id: Word | None = None
    access_key: Secret | None = None
    secret_key: Secret | None = None
    endpoint: str | None = None
    """None is `https://{account_id}.r2.cloudflarestorage.com`; buckets of a jurisdiction have another."""
    prefix: Prefix = ""
    public_domain: str | None = None
    """The custom or r2.dev domain, as a url; None gives presigned urls."""
    url_expires: Expiry = 86_400.0


class GcsStorageConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[storage.gcs]`: Google Cloud Storage."""

    bucket: Bucket | None = None
    region: Word | None = None
    """Where the bucket should be; only `comfyd check` looks at it."""
    credentials: Text | None = None
    """A service account's JSON file; None takes the credentials of the machine."""
    endpoint: str | None = None
    """None is Google's."""
    prefix: Prefix = ""
    public_url: str | None = None
    """What the bucket is publicly served under; None gives signed urls."""
    url_expires: Expiry = 86_400.0


class CfImagesStorageConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[storage.cf_images]`: Cloudflare Images."""

    account_id: Word | None = None
    api_token: Secret | None = None
    delivery_domain: str | None = None
    """The domain, as a url, that images are delivered under; None is Cloudflare's own."""
    variant: Word = "public"
    """Which of the account's variants an output's url names."""
    endpoint: str = "https://api.cloudflare.com/client/v4"


class StorageConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[storage]`: where artefacts go."""

    provider: StorageName = "local"
    fallback: StorageName = "local"
    """Takes what `provider` never will, such as a video for Cloudflare Images."""
    retry_for: Seconds = 86_400.0
    """Seconds that a result waits for a storage that fails; 0 is 'no limit'."""
    local: LocalStorageConfig = LocalStorageConfig()
    s3: S3StorageConfig = S3StorageConfig()
    r2: R2StorageConfig = R2StorageConfig()
    gcs: GcsStorageConfig = GcsStorageConfig()
    cf_images: CfImagesStorageConfig = CfImagesStorageConfig()

    def missing(self, name: StorageName) -> tuple[str, ...]:
        """The keys that this storage needs and that are not set; none for one that can be used."""
        table = getattr(self, name)
        return tuple(key for key in _NEEDED[name] if getattr(table, key) is None)

    @property
    def usable(self) -> tuple[StorageName, ...]:
        """The storages that a request may name."""
        return tuple(name for name in _NEEDED if not self.missing(name))


_NEEDED: dict[StorageName, tuple[str, ...]] = {
    "local": (),
    "s3": ("bucket",),
    "r2": ("bucket", "account_id", "access_key", "secret_key"),
    "gcs": ("bucket",),
    "cf_images": ("account_id", "api_token"),
}


class InputsConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[inputs]`: files that a request brings or names by url."""

    max_bytes: Count = 268_435_456
    """The largest single file."""
    pixels: Count = 100_000_000
    """The largest picture."""
    at_once: AtOnce = 10
    """Files of one task that are fetched at the same time."""
    attempts: Tries = 4
    timeout: Patience = 300.0
    """Seconds that one url may take, all its tries together."""
    min_rate: Bytes = 1024
    """Bytes per second, over ten seconds, below which a server is too slow; 0 does not look."""
    keep: Patience = 86_400.0
    """Seconds that an upload which no task uses is kept."""


class OutboundConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[outbound]`: where the urls that clients give may lead."""

    allow: tuple[str, ...] = ()
    """Networks (`10.0.0.0/8`), addresses and host names that may be reached beside the public internet."""


class WebhooksConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[webhooks]`: how clients are told of their tasks."""

    timeout: Answering = 15.0
    """Seconds that a receiver has to answer."""
    secret: WebhookSecret | None = None
    """What messages are signed with; None is `webhook.secret` in `data.dir`, made at the first start."""
    old_secrets: tuple[WebhookSecret, ...] = ()
    """Secrets that were replaced: messages are signed with these too, until receivers know the new one."""


class WorkflowsConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[workflows]`: the templates."""

    dir: Text = "workflows"


class LimitsConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[limits]`: bounds on what a client controls."""

    body_bytes: Count = 33_554_432
    queued_tasks: Count = 1_000_000
    nodes: Count = 5_000
    depth: Depth = 64
    string_length: Count = 1_000_000
    wait: Seconds = 120.0
    """Seconds that `?wait` and `Prefer: wait` may ask for; more is cut to this."""
    list_page: Page = 100
    upload_bytes: Count = 1_073_741_824
    """The longest request with uploads."""
    inline_bytes: Inline = 1_048_576
    """Bytes of one task's outputs that `output.inline` shows in the task itself."""
    free_bytes: Bytes = 268_435_456
    """Bytes that new work leaves free on the disk of `data.dir`, for what was accepted; 0 does not look."""


class LogConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[log]`."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"
    file: Text | None = None
    access: bool = False
    """Whether every HTTP request is a line: useful in front of strangers, costly under load."""


class ClientConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[client]`: what `comfyd submit` talks to; None is this configuration's own server."""

    url: str | None = None


class Config(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole tree."""

    server: ServerConfig = ServerConfig()
    data: DataConfig = DataConfig()
    queue: QueueConfig = QueueConfig()
    comfyui: tuple[ComfyUIConfig, ...] = (ComfyUIConfig(),)
    storage: StorageConfig = StorageConfig()
    inputs: InputsConfig = InputsConfig()
    outbound: OutboundConfig = OutboundConfig()
    webhooks: WebhooksConfig = WebhooksConfig()
    workflows: WorkflowsConfig = WorkflowsConfig()
    limits: LimitsConfig = LimitsConfig()
    log: LogConfig = LogConfig()
    client: ClientConfig = ClientConfig()

    @property
    def database(self) -> Path:
        """The file of the queue."""
        return Path(self.data.dir) / "comfyd.db"

    @property
    def temporary(self) -> Path:
        """The folder of what is on its way; emptied at each start."""
        return Path(self.data.dir) / "tmp"

    @property
    def url_key(self) -> Path:
        """The key that signs the urls of files."""
        return Path(self.data.dir) / "url.key"

    @property
    def webhook_secret(self) -> Path:
        """What webhooks are signed with, unless `webhooks.secret` is set."""
        return Path(self.data.dir) / "webhook.secret"

    @property
    def uploads(self) -> Path:
        """The folder of inputs that were uploaded or came as data URIs."""
        return Path(self.data.dir) / "inputs"

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


def shown_field(name: str, value: Any) -> Any:
    """What may be shown of one field: `***` for a secret that is set, and no password that a url carries."""
    if name in SECRET_FIELDS and value not in {None, ()}:
        return "***"
    return masked(value) if isinstance(value, str) else value


def public(config: Config) -> dict[str, Any]:
    """The tree as JSON for `/api/status`: no secret, and no password that a url carries."""
    return {name: _public(name, getattr(config, name)) for name in config.__struct_fields__}


def _public(name: str, value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return {field: _public(field, getattr(value, field)) for field in value.__struct_fields__}
    if isinstance(value, tuple):
        return [_public(name, item) for item in value]
    return shown_field(name, value)
