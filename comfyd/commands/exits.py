"""How commands end: the exit codes, and the errors that only a command can meet; never prints anything."""

from enum import IntEnum

from comfyd.errors import (
    BackendError,
    BackendRejected,
    ComfydError,
    ConfigError,
    InsufficientStorage,
    RequestError,
    StorageError,
    StoreError,
    TemplateError,
)


class Exit(IntEnum):
    """Exit codes, after sysexits.h where it has a word for it."""

    OK = 0
    FAILED = 1
    """The task failed, or `check` found something bad."""
    USAGE = 64
    DATA = 65
    """A file that cannot be used, or a request that comfyd refuses."""
    UNAVAILABLE = 69
    """A server does not answer or cannot work."""
    SOFTWARE = 70
    """A mistake in comfyd itself."""
    CANNOT_CREATE = 73
    CONFIG = 78
    INTERRUPTED = 130
    """Ctrl-C; shells say 128 + SIGINT."""
    PIPE = 141
    """Whoever read the output has gone; shells say 128 + SIGPIPE."""


class ServerUnreachable(ComfydError):
    """No comfyd answers there, or not to the end."""

    code = "server_unreachable"


class ServerRefused(ComfydError):
    """comfyd answered with an error; `details` holds `status`, `code` and the answer's own `details`."""

    code = "server_refused"


class CannotCreate(ComfydError):
    """A file or folder of the user's cannot be written."""

    code = "cannot_create"


class DamagedDownload(ComfydError):
    """What arrived has another size or digest than comfyd announced; it was thrown away."""

    code = "damaged_download"


class UnreadableFile(ComfydError):
    """A file that the user named cannot be read or is not what it should be."""

    code = "unreadable_file"


_EXITS: tuple[tuple[type[ComfydError], Exit], ...] = (
    (ConfigError, Exit.CONFIG),
    (CannotCreate, Exit.CANNOT_CREATE),
    (InsufficientStorage, Exit.CANNOT_CREATE),
    (UnreadableFile, Exit.DATA),
    (RequestError, Exit.DATA),
    (TemplateError, Exit.DATA),
    (BackendRejected, Exit.DATA),
    (BackendError, Exit.UNAVAILABLE),
    (StoreError, Exit.UNAVAILABLE),
    (StorageError, Exit.UNAVAILABLE),
    (ServerUnreachable, Exit.UNAVAILABLE),
    (DamagedDownload, Exit.UNAVAILABLE),
)


def exit_for(error: ComfydError) -> Exit:
    """The exit code that an error ends a command with."""
    if isinstance(error, ServerRefused):
        status = error.details.get("status", 500)
        return Exit.UNAVAILABLE if status == 429 or status >= 500 else Exit.DATA
    return next((code for kind, code in _EXITS if isinstance(error, kind)), Exit.SOFTWARE)
