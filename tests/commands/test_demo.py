"""`comfyd demo` does the whole way once, and leaves a picture."""

import io
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from comfyd.cli import main


def test_the_demo_makes_a_picture_that_holds_the_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "-o", str(tmp_path)], {}) == 0
    said = capsys.readouterr()
    (picture,) = tmp_path.glob("*.png")
    assert str(picture) in said.out
    assert "100 %" in said.err
    with Image.open(io.BytesIO(picture.read_bytes())) as image:
        assert image.size == (512, 512)
        assert "lighthouse" in image.info["prompt"]


def test_the_demo_may_go_on_serving(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "comfyd", "demo", "--keep", "-o", str(tmp_path)]
    environment = {"COMFYD__SERVER__PORT": str(port), "PATH": "/usr/bin", "HOME": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True, cwd=tmp_path) as demo:
        killer = threading.Timer(40, demo.kill)
        killer.start()
        try:
            assert demo.stdout is not None
            lines = iter(demo.stdout.readline, "")
            url = next(found[0] for line in lines if (found := re.search(r"http://\S+(?=/docs)", line)))
            with urllib.request.urlopen(f"{url}/api/ready", timeout=5) as answer:
                assert answer.status == 200
            demo.terminate()
            began = time.monotonic()
            assert demo.wait(20) == 0
            assert time.monotonic() - began < 15
        finally:
            killer.cancel()


def test_a_demo_whose_task_fails_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "-o", str(tmp_path / "file" / "folder")], {}) == 73
    assert "Traceback" not in capsys.readouterr().err
