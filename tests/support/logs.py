"""What comfyd logs, as tests see it, whatever configured logging earlier in the same process."""

import logging
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import structlog
from structlog.testing import capture_logs
from structlog.typing import Processor


@contextmanager
def captured_logs(*processors: Processor) -> Iterator[list[MutableMapping[str, Any]]]:
    """`capture_logs` of every level, also of loggers that were first used under another configuration.

    Such a logger keeps that configuration (`cache_logger_on_first_use`), so it is made to forget it.
    """
    before = structlog.get_config()
    structlog.configure(
        processors=[],
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
        cache_logger_on_first_use=False,
    )
    _forget()
    try:
        with capture_logs(processors) as lines:
            yield lines
    finally:
        structlog.configure(**before)


def _forget() -> None:
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "comfyd":
            for logger in list(vars(module).values()):
                if type(logger).__name__ == "BoundLoggerLazyProxy":
                    vars(logger).pop("bind", None)
