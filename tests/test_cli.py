"""The command line: what is dispatched with what, and how errors leave."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from comfyd import __version__
from comfyd.cli import main, parser
from comfyd.commands.exits import (
    CannotCreate,
    DamagedDownload,
    Exit,
    ServerRefused,
    ServerUnreachable,
    UnreadableFile,
    exit_for,
)
from comfyd.errors import (
    BackendRejected,
    BackendUnreachable,
    ComfydError,
    ConfigError,
    InsufficientStorage,
    InvalidInputs,
    StorageError,
    StoreUnavailable,
    TemplateError,
)

COMMANDS = ("serve", "demo", "submit", "check", "init", "simulate")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(
    *arguments: str, folder: Path, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`comfyd` as a process of its own, with nothing in its environment that could be meant for it."""
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path])
    return subprocess.run(
        [sys.executable, "-m", "comfyd", *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": path, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"], {}) == 0
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"], {}) == 0
    assert "usage: comfyd " + command in capsys.readouterr().out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"], {}) == 0
    assert capsys.readouterr().out == f"comfyd {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["srve"],
        ["serve", "--prot", "1"],
        ["serve", "--port", "x"],
        ["submit"],
        ["check", "--conf", "x"],
        ["init", "x"],
    ],
)
def test_a_wrong_usage_is_one_line_and_64(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments, {}) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("comfyd")
    assert "--help)" in line


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(""), 78),
        (CannotCreate(""), 73),
        (InsufficientStorage(""), 73),
        (UnreadableFile(""), 65),
        (InvalidInputs(""), 65),
        (TemplateError(""), 65),
        (BackendRejected(""), 65),
        (BackendUnreachable(""), 69),
        (StoreUnavailable(""), 69),
        (StorageError(""), 69),
        (ServerUnreachable(""), 69),
        (DamagedDownload(""), 69),
        (ServerRefused("", details={"status": 404}), 65),
        (ServerRefused("", details={"status": 429}), 69),
        (ServerRefused("", details={"status": 503}), 69),
        (ComfydError(""), 70),
    ],
)
def test_every_error_has_its_exit_code(error: ComfydError, code: int) -> None:
    assert exit_for(error) == code


def test_each_configuration_problem_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "comfyd.toml").write_text("[server]\nprot = 1\nport = -1\n")
    (tmp_path / ".env").write_text("LOG_LEVEL=loud\n")
    for command in (["serve"], ["check"], ["submit", "x"], ["demo"]):
        assert main(command, {"COMFYD__X": "1"}) == 78
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 4
        assert all(line.startswith("comfyd: ") for line in lines)


def test_a_file_that_is_named_and_missing_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--config", "missing.toml"], {}) == 78
    assert (
        capsys.readouterr().err
        == "comfyd: missing.toml cannot be read: No such file or directory (--config)\n"
    )


def test_a_log_level_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--log-level", "loud"], {}) == 78
    assert "log.level = 'loud' (command line)" in capsys.readouterr().err


def test_listening_for_strangers_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", "192.168.0.7"], {}) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert "no API keys" in line
    assert "--insecure" in line


def test_a_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])], {}) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert "server.port" in line


def test_serve_answers_and_ends_when_it_is_told_to(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    arguments = ["serve", "--port", str(port), "--comfyui", "http://127.0.0.1:1", "--data-dir", "kept"]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "comfyd", *arguments]
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 20
            while not answers(f"http://127.0.0.1:{port}/api/health"):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert all(json.loads(line)["level"] in {"info", "warning"} for line in err.splitlines())
    assert (tmp_path / "kept" / "comfyd.db").is_file()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_serve_takes_what_its_options_say() -> None:
    arguments = [
        "serve",
        "--config",
        "a",
        "--host",
        "b",
        "--port",
        "1",
        "--data-dir",
        "c",
        "--comfyui",
        "d",
        "--insecure",
    ]
    chosen = parser().parse_args(arguments)
    assert (chosen.config, chosen.host, chosen.port) == (Path("a"), "b", 1)
    assert (chosen.data_dir, chosen.comfyui, chosen.insecure) == ("c", "d", True)


def test_help_says_how_files_are_sent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--help"], {}) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "@FILE uploads a file of this machine, @@ begins a text that begins with @" in words
    assert all(f"--{name} " in words for name in ("format", "quality", "strip", "storage", "prefix"))


def test_each_command_runs_as_a_process(tmp_path: Path) -> None:
    assert run("--version", folder=tmp_path).stdout == f"comfyd {__version__}\n"
    assert run("init", folder=tmp_path).returncode == Exit.OK
    unused = {"COMFYUI_URL": "http://127.0.0.1:1", "COMFYD__CLIENT__URL": "http://127.0.0.1:1"}
    checked = run("check", folder=tmp_path, environ=unused)
    assert checked.returncode == Exit.FAILED
    assert checked.stdout.startswith("BAD comfyui")
    assert run("submit", "x", folder=tmp_path, environ=unused).returncode == Exit.UNAVAILABLE
    assert run("serve", "--host", "203.0.113.1", folder=tmp_path).returncode == Exit.CONFIG


def test_help_loads_neither_the_server_nor_its_libraries(tmp_path: Path) -> None:
    code = (
        "import sys; from comfyd.cli import main; main(['--help'], {}); "
        "sys.exit(' '.join({'aiohttp', 'structlog', 'starlette', 'uvicorn', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stderr.strip() == ""


def test_a_reader_that_has_gone_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "comfyd", "init"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
            stdout=gone,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
        )
    assert (done.returncode, done.stderr) == (Exit.PIPE, "")
