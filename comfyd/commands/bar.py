"""Shows how far a task is: a moving line on a terminal, plain lines elsewhere; never asks a server."""

import os
from collections.abc import Mapping
from typing import Any, Final, TextIO

BAR: Final = 30
"""Characters of the bar itself."""


class ProgressBar:
    """The line of one task. Lives while somebody waits for it; `close` leaves the cursor on a fresh line."""

    def __init__(self, stream: TextIO, *, columns: int | None = None) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._columns = columns or _columns(stream)
        self._shown = ""

    def show(self, task: Mapping[str, Any]) -> None:
        """Show a task as the API describes it (`status progress queue_position eta_seconds`)."""
        text = printable(describe(task, bar=self._terminal))
        if text == self._shown:
            return
        self._shown = text
        if self._terminal:
            # One column stays free: a line that fills the last one wraps on many terminals.
            self._stream.write(f"\r{text[: self._columns - 1]}\x1b[K")
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line, if there is one."""
        if self._terminal and self._shown:
            self._stream.write("\n")
            self._stream.flush()
        self._shown = ""


def describe(task: Mapping[str, Any], *, bar: bool) -> str:
    """One line about a task. Without `bar` whole tenths and no steps, so that few lines differ."""
    progress = task.get("progress") or {}
    status = str(task.get("status") or "")
    position = task.get("queue_position")
    if status == "PENDING":
        eta = task.get("eta_seconds")
        return (
            "waiting"
            + (f", position {position}" if position is not None else "")
            + (f", about {eta:.0f} s" if isinstance(eta, int | float) and bar else "")
        )
    value = progress.get("value")
    value = 1.0 if status == "COMPLETED" else float(value) if isinstance(value, int | float) else 0.0
    value = min(max(value, 0.0), 1.0)
    node = progress.get("current_node_class") or progress.get("message") or status.lower()
    if not bar:
        return f"{int(value * 10) * 10} % {node}"
    filled = int(value * BAR)
    step, steps = progress.get("step"), progress.get("steps")
    count = f" {step}/{steps}" if step is not None and steps else ""
    return f"[{'#' * filled}{'-' * (BAR - filled)}] {value * 100:3.0f} %  {node}{count}"


def printable(text: str) -> str:
    """The text without characters that would steer a terminal: node names come from other people's graphs."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
