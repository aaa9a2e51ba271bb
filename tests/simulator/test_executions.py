"""The execution log survives what it reports on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfyd.simulator.executions import Execution, ExecutionLog, read_log

if TYPE_CHECKING:
    from pathlib import Path

ENTRY = Execution(event="end", prompt_id="p", client_id=None, number=1, at=5, outcome="success")


def test_lines_are_on_disk_before_the_log_is_closed(tmp_path: Path) -> None:
    with ExecutionLog(tmp_path / "log") as log:
        log.add(ENTRY)
        assert read_log(tmp_path / "log") == [ENTRY]


def test_a_log_goes_on_after_a_restart_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with ExecutionLog(path) as log:
        log.add(ENTRY)
    with path.open("ab") as file:
        file.write(b'{"event": "sta')
    with ExecutionLog(path) as log:
        log.add(ENTRY)
        assert len(log.entries) == 2
    assert read_log(path) == [ENTRY, ENTRY]


def test_without_a_path_the_log_is_in_memory_only(tmp_path: Path) -> None:
    with ExecutionLog(None) as log:
        log.add(ENTRY)
        assert log.document()[0]["prompt_id"] == "p"
    assert read_log(tmp_path / "none") == []
