"""What comes out of the log, on a terminal, elsewhere and in a file."""

import io
import json
import logging
import os
import pty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from comfyd import log
from comfyd.config import LogConfig
from comfyd.errors import ConfigError


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Leave the process's logging as it was."""
    root = logging.getLogger()
    level = root.level
    yield
    log.release()
    root.setLevel(level)
    for name in ("aiosqlite", "asyncio", "PIL", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def configured(**settings: Any) -> io.StringIO:
    stream = io.StringIO()
    log.configure(LogConfig(**settings), stream)
    return stream


def test_a_line_is_json_where_no_terminal_is() -> None:
    stream = configured()
    structlog.get_logger("comfyd.test").info("task.done", seconds=1.5, path=Path("x"))
    (line,) = lines(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "task.done",
        "level": "info",
        "logger": "comfyd.test",
        "seconds": 1.5,
        "path": "PosixPath('x')",
    }


def test_a_line_is_readable_and_coloured_on_a_terminal() -> None:
    stream = Terminal()
    log.configure(LogConfig(), stream)
    structlog.get_logger("comfyd.test").info("task.done", seconds=1.5)
    text = stream.getvalue()
    assert "\x1b[" in text
    assert "task.done" in text
    assert "seconds" in text
    assert not text.startswith("{")


def test_colours_are_left_out_on_request_and_off_a_terminal() -> None:
    stream = Terminal()
    log.configure(LogConfig(), stream, colours=False)
    structlog.get_logger("comfyd.test").info("plain")
    assert "plain" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    other = configured(format="console")
    structlog.get_logger("comfyd.test").info("readable")
    assert "[info" in other.getvalue()
    assert "\x1b" not in other.getvalue()


def test_json_can_be_had_on_a_terminal() -> None:
    stream = Terminal()
    log.configure(LogConfig(format="json"), stream)
    structlog.get_logger("comfyd.test").info("x")
    assert lines(stream)[0]["event"] == "x"


def test_a_real_terminal_is_seen() -> None:
    reader, writer = pty.openpty()
    with os.fdopen(reader, "rb", buffering=0) as back, os.fdopen(writer, "w") as terminal:
        log.configure(LogConfig(), terminal)
        structlog.get_logger("comfyd.test").warning("hello")
        terminal.flush()
        assert b"hello" in back.read(1000)
        log.release()


def test_the_standard_library_goes_the_same_way() -> None:
    stream = configured()
    logging.getLogger("uvicorn.error").warning("started %s", "here")
    (line,) = lines(stream)
    assert (line["event"], line["level"], line["logger"]) == ("started here", "warning", "uvicorn.error")
    assert line["timestamp"].endswith("Z")


def test_ids_that_are_bound_once_are_in_every_line() -> None:
    stream = configured()
    with structlog.contextvars.bound_contextvars(task_id="t1", attempt_id="a1"):
        structlog.get_logger("comfyd.test").info("ours")
        logging.getLogger("aiohttp").error("theirs")
    structlog.get_logger("comfyd.test").info("after")
    ours, theirs, after = lines(stream)
    assert (ours["task_id"], ours["attempt_id"]) == ("t1", "a1")
    assert (theirs["task_id"], theirs["attempt_id"]) == ("t1", "a1")
    assert "task_id" not in after


def test_lines_below_the_level_do_not_come_out() -> None:
    stream = configured(level="warning")
    structlog.get_logger("comfyd.test").info("no")
    logging.getLogger("somebody").info("no")
    structlog.get_logger("comfyd.test").warning("yes")
    assert [line["event"] for line in lines(stream)] == ["yes"]


def test_chatter_stays_off_at_debug() -> None:
    stream = configured(level="debug")
    for name in ("aiosqlite", "asyncio", "PIL"):
        logging.getLogger(name).debug("chatter")
    logging.getLogger("uvicorn.access").info("GET /")
    structlog.get_logger("comfyd.test").debug("ours")
    assert [line["event"] for line in lines(stream)] == ["ours"]


def test_requests_are_lines_where_that_is_wanted() -> None:
    stream = configured(access=True)
    logging.getLogger("uvicorn.access").info("GET /")
    assert [line["event"] for line in lines(stream)] == ["GET /"]


def test_an_exception_comes_with_its_traceback_and_without_local_variables() -> None:
    secret = "hidden" + str(len("value"))

    def fail() -> None:
        try:
            raise ValueError(len(secret))
        except ValueError:
            structlog.get_logger("comfyd.test").exception("failed")

    stream, readable = configured(), Terminal()
    fail()
    log.configure(LogConfig(), readable)
    fail()
    assert "ValueError: 7" in lines(stream)[0]["exception"]
    assert "ValueError: 7" in readable.getvalue()
    assert "hidden5" not in stream.getvalue() + readable.getvalue()


def test_values_cannot_forge_a_line_or_steer_a_terminal() -> None:
    stream = configured(format="console")
    structlog.get_logger("comfyd.test").info("a\nforged", name="\x1b[2J", good="ü")
    text = stream.getvalue()
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text
    assert "ü" in text


def test_json_takes_what_clients_may_send() -> None:
    stream = configured()
    structlog.get_logger("comfyd.test").info("odd", seed=2**70, text="\ud800", nested={1: float("nan")})
    structlog.get_logger("comfyd.test").info("odd", seed=2**64 - 1)
    first, second = lines(stream)
    assert first["seed"] == 2**70
    assert first["text"] == "\ud800"
    assert second["seed"] == 2**64 - 1


def test_a_file_gets_every_line_as_json(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "app.log"
    stream = configured(format="console", file=str(path))
    structlog.get_logger("comfyd.test").info("both", task_id="t1")
    log.release()
    assert json.loads(path.read_text())["task_id"] == "t1"
    assert "both" in stream.getvalue()


def test_a_file_does_not_fill_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "app.log"
    path.write_bytes(b"x" * log.FILE_BYTES)
    configured(file=str(path))
    structlog.get_logger("comfyd.test").info("new")
    log.release()
    assert path.stat().st_size < 1000
    assert (tmp_path / "app.log.1").stat().st_size == log.FILE_BYTES


def test_a_file_that_cannot_be_opened_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be opened") as caught:
        configured(file=str(tmp_path / "file" / "app.log"))
    assert caught.value.details == {"key": "log.file"}


def test_configuring_again_replaces_and_closes_what_was_there(tmp_path: Path) -> None:
    first = configured(file=str(tmp_path / "app.log"))
    second = configured()
    structlog.get_logger("comfyd.test").info("once")
    assert first.getvalue() == ""
    assert len(lines(second)) == 1
    assert (tmp_path / "app.log").read_text() == ""
