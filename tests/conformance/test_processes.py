"""Servers as processes of a test: they say why they fail, live again in the same place, never outlive it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.comfyui import CHECKOUT, ComfyUIProcess, ServerFailed

ORPHAN = """
import os, sys
from tests.support.comfyui import ComfyUIProcess
server = ComfyUIProcess("simulator-0.3.75")
server.start()
sys.stdout.write(str(server.pid))
sys.stdout.flush()
os._exit(1)
"""


def is_alive(pid: int) -> bool:
    """True while a process with that id runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process with its parent")
def test_a_server_dies_with_the_process_that_started_it() -> None:
    command = [sys.executable, "-c", ORPHAN]
    ended = subprocess.run(command, cwd=CHECKOUT, capture_output=True, timeout=40, check=False)
    assert ended.returncode == 1, ended.stderr
    pid = int(ended.stdout)
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_that_cannot_start_shows_its_log() -> None:
    server = ComfyUIProcess("simulator-0.3.75", options=["--no-such-option"])
    with pytest.raises(ServerFailed, match="unrecognized arguments: --no-such-option"), server:
        pass
    assert not server.folder.exists()


def test_a_killed_server_starts_again_at_the_same_place() -> None:
    with ComfyUIProcess("simulator-0.3.75") as server:
        url, first = server.url, server.pid
        kept = server.output_dir / "kept.txt"
        kept.write_text("kept")
        server.restart()
        assert (server.url, kept.read_text()) == (url, "kept")
        assert server.pid != first
        with pytest.raises(ServerFailed, match="runs already"):
            server.start()
        last = server.pid
        assert last is not None
    assert server.pid is None
    assert not server.folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


def test_a_given_folder_is_kept(tmp_path: Path) -> None:
    with ComfyUIProcess("simulator-0.33", folder=tmp_path) as server:
        assert server.log_file.parent == tmp_path
        with pytest.raises(ServerFailed, match="still runs after"):
            server.wait_for_exit(0.01)
    assert (tmp_path / "output").is_dir()
