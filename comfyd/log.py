"""Logging for the whole process: structlog and the standard library in one chain; never decides what to log.

`configure` is called once, by the command that runs. Whoever works on a request, task or attempt binds its id
once with `structlog.contextvars.bound_contextvars`, and every line below carries it.
"""

import json
import logging
import logging.handlers
from pathlib import Path
from typing import Any, Final, TextIO

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from comfyd.config import LogConfig
from comfyd.errors import ConfigError

FILE_BYTES: Final = 10 * 1024 * 1024
FILE_COUNT: Final = 5
"""At most 60 MB of log files, with the current one."""


def configure(config: LogConfig, stream: TextIO, *, colours: bool = True) -> None:
    """Send every line to `stream`, and as JSON to `config.file` if there is one.

    `auto` is readable where `stream` is a terminal and JSON elsewhere. Called again, it replaces what it did
    before. Raises `ConfigError` if the file cannot be opened.
    """
    terminal = stream.isatty()
    readable = config.format == "console" or (config.format == "auto" and terminal)
    output = logging.StreamHandler(stream)
    output.setFormatter(_console(colours=colours and terminal) if readable else _json())
    handlers: list[logging.Handler] = [output]
    if config.file is not None:
        handlers.append(_file_handler(Path(config.file)))
    level = logging.getLevelNamesMapping()[config.level.upper()]
    release()
    root = logging.getLogger()
    root.setLevel(level)
    for handler in handlers:
        root.addHandler(handler)
    _quieten(level, access=config.access)
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        # Lines below the level cost one call of an empty method.
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )


def release() -> None:
    """Take back and close what `configure` opened; what is logged later goes where Python sends it."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler.formatter, structlog.stdlib.ProcessorFormatter):
            root.removeHandler(handler)
            handler.close()


def _file_handler(path: Path) -> logging.Handler:
    """A file that comfyd rotates itself: one process writes it, and nobody has to set up logrotate for a disk
    that does not fill. (`WatchedFileHandler` would need a rotating program beside comfyd.)
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(
            path, maxBytes=FILE_BYTES, backupCount=FILE_COUNT, encoding="utf-8"
        )
    except OSError as error:
        raise ConfigError(
            f"log.file = {str(path)!r} cannot be opened: {error.strerror}", details={"key": "log.file"}
        ) from error
    handler.setFormatter(_json())
    return handler


def _quieten(level: int, *, access: bool) -> None:
    """What libraries say on a level that they think fit and we do not."""
    # aiosqlite logs every call twice at debug, asyncio its own insides, drivers of storages what they
    # sign and send.
    for name in ("aiosqlite", "asyncio", "aiobotocore", "aioboto3", "boto3", "botocore"):
        logging.getLogger(name).setLevel(max(level, logging.INFO))
    # A broken form is the client's to hear of, a broken picture the task's.
    for name in ("python_multipart", "PIL"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("uvicorn.access").setLevel(level if access else logging.WARNING)
    # uvicorn configures these when nobody tells it not to; here they only pass their records on.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


_SHARED: Final[list[Processor]] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.StackInfoRenderer(),
]
"""What every line gets, whether it comes from structlog or from the standard library."""


def _json() -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_dumps),
        ],
        foreign_pre_chain=_SHARED,
    )


def _console(*, colours: bool) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _printable,
            structlog.dev.ConsoleRenderer(
                # Plain: the fancy ones print local variables, and those may be somebody's secrets.
                colors=colours,
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ],
        foreign_pre_chain=_SHARED,
    )


def _printable(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Escape control characters: a value from a client must not forge a line or steer a terminal."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable() and key not in {"exception", "stack"}:
            event[key] = "".join(c if c.isprintable() else repr(c)[1:-1] for c in value)
    return event


def _dumps(event: EventDict, **_options: Any) -> str:
    try:
        return orjson.dumps(event, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:
        # Whole numbers past 64 bits and lone surrogates, both of which a client's JSON may hold.
        return json.dumps(event, default=repr, skipkeys=True)
