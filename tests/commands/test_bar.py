"""What is shown of a task that is waited for."""

import io
import os
import pty
from typing import Any

import pytest

from comfyd.commands.bar import ProgressBar, describe


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def running(value: float | None, **progress: Any) -> dict[str, Any]:
    return {"status": "PROCESSING", "progress": {"value": value, **progress}}


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ({"status": "PENDING"}, "waiting"),
        ({"status": "PENDING", "queue_position": 3, "eta_seconds": 12.4}, "waiting, position 3, about 12 s"),
        ({"status": "PENDING", "queue_position": 0, "eta_seconds": None}, "waiting, position 0"),
        (
            running(0.5, current_node_class="KSampler", step=12, steps=20),
            f"[{'#' * 15}{'-' * 15}]  50 %  KSampler 12/20",
        ),
        (running(0.0, message="loading"), f"[{'-' * 30}]   0 %  loading"),
        (running(None), f"[{'-' * 30}]   0 %  processing"),
        (running(7), f"[{'#' * 30}] 100 %  processing"),
        ({"status": "COMPLETED", "progress": None}, f"[{'#' * 30}] 100 %  completed"),
        ({"status": "FAILED", "progress": {"value": None}}, f"[{'-' * 30}]   0 %  failed"),
    ],
)
def test_a_task_is_one_line(task: dict[str, Any], line: str) -> None:
    assert describe(task, bar=True) == line


def test_a_terminal_sees_one_moving_line() -> None:
    stream = Terminal()
    bar = ProgressBar(stream, columns=40)
    bar.show(running(0.25, current_node_class="KSampler"))
    bar.show(running(0.25, current_node_class="KSampler"))
    bar.show(running(0.5, current_node_class="a very long class name that does not fit"))
    bar.close()
    bar.close()
    text = stream.getvalue()
    assert text.count("\r") == 2
    assert text.count("\n") == 1
    assert all(len(part) < 40 for part in text.replace("\x1b[K", "").strip().split("\r"))


def test_elsewhere_a_long_run_is_a_few_plain_lines() -> None:
    stream = io.StringIO()
    bar = ProgressBar(stream)
    bar.show({"status": "PENDING", "queue_position": 1, "eta_seconds": 3.0})
    for step in range(101):
        bar.show(running(step / 100, current_node_class="KSampler", step=step, steps=100))
    bar.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "waiting, position 1"
    assert lines[1:] == [f"{tenth * 10} % KSampler" for tenth in range(11)]


def test_a_node_name_cannot_steer_the_terminal() -> None:
    stream = Terminal()
    ProgressBar(stream).show(running(0.1, current_node_class="evil\x1b[2J\nname"))
    assert "\x1b[2J" not in stream.getvalue()
    assert "\n" not in stream.getvalue()


def test_the_width_of_a_real_terminal_is_asked() -> None:
    reader, writer = pty.openpty()
    with os.fdopen(reader, "rb", buffering=0) as back, os.fdopen(writer, "w") as terminal:
        bar = ProgressBar(terminal)
        bar.show(running(1.0, current_node_class="x" * 200))
        assert len(back.read(4096)) < 100
