"""`comfyd simulate` hands its arguments on and ends as every command does."""

import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from comfyd.cli import main


def test_it_serves_until_it_is_told_to_stop() -> None:
    command = [sys.executable, "-m", "comfyd", "simulate", "--port", "0", "--flavor", "0.33"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "(0.33)" in line
        with urllib.request.urlopen(f"{line.split()[-1]}/system_stats", timeout=10) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


def test_a_wrong_argument_ends_with_64(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--flavor", "x"], {}) == 64
    assert "--flavor" in capsys.readouterr().err


def test_its_own_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--help"], {}) == 0
    assert "--node-seconds" in capsys.readouterr().out


def test_a_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["simulate", "--port", str(taken.getsockname()[1])], {}) == 69
    (line,) = capsys.readouterr().err.splitlines()
    assert "--port" in line
