"""The command that starts a ComfyUI anew: real programs, real processes."""

import asyncio
import errno
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from comfyd.comfy.restarting import RestartCommand
from tests.support.logs import captured_logs
from tests.support.service import until

PATH = os.environ["PATH"]


def script(text: str, *arguments: str) -> list[str]:
    return ["sh", "-c", text, *arguments]


async def test_a_command_has_its_arguments_as_they_are_and_no_more_environment_than_it_needs(
    tmp_path: Path,
) -> None:
    environ = {"PATH": PATH, "HOME": "/h", "LANG": "C", "COMFYD__STORAGE__S3__SECRET_KEY": "hidden"}
    command = script('env > "$1"; echo "$2" >> "$1"', "sh", str(tmp_path / "said"), "$(x) 'y'")
    assert await RestartCommand("c", command, environ).run() == "ok"
    said = (tmp_path / "said").read_text()
    assert {"HOME=/h", "LANG=C", f"PATH={PATH}", "$(x) 'y'"} <= set(said.splitlines())
    assert "hidden" not in said


async def test_the_last_lines_of_what_it_wrote_are_in_the_log_and_its_arguments_are_not() -> None:
    text = "for n in $(seq 1 900); do echo line $n; done; echo oh >&2; exit 3"
    with captured_logs() as lines:
        assert await RestartCommand("c", script(text, "hidden"), {"PATH": PATH}).run() == "failed"
    (line,) = lines
    assert (line["event"], line["log_level"], line["result"]) == ("backend.restarted", "warning", "failed")
    assert (line["backend"], line["program"]) == ("c", "sh")
    assert line["output"] == "line 897\nline 898\nline 899\nline 900\noh"
    assert "hidden" not in str(line)


@pytest.mark.parametrize("command", [["no-such-program-anywhere"], ["/"], ["sh", "a\0b"]])
async def test_a_program_that_cannot_be_run_is_a_result(command: list[str]) -> None:
    assert await RestartCommand("c", command, {"PATH": PATH}).run() == "not_found"


async def test_what_takes_too_long_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    text = f"sleep 100 & echo $! > {pid}; wait"
    assert await RestartCommand("c", script(text), {"PATH": PATH}, time_limit=0.3).run() == "timeout"
    await until(lambda: gone(int(pid.read_text())))


async def test_what_is_broken_off_is_killed_as_well(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    text = f"sleep 100 & echo $! > {pid}.new; mv {pid}.new {pid}; wait"
    running = asyncio.ensure_future(RestartCommand("c", script(text), {"PATH": PATH}).run())
    await until(pid.exists)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: gone(int(pid.read_text())))


async def test_what_it_leaves_running_lives_and_can_go_on_writing(tmp_path: Path) -> None:
    pid, done = tmp_path / "pid", tmp_path / "done"
    text = f"(sleep 0.3; echo on && touch {done}; exec sleep 100) & echo $! > {pid}"
    assert await RestartCommand("c", script(text), {"PATH": PATH}).run() == "ok"
    try:
        await until(done.exists)
        assert not gone(int(pid.read_text()))
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)


class Forbidden:
    """Who may not kill, as of what `sudo` began. Ends with what it was asked to kill; `left` are those."""

    def __init__(self) -> None:
        self.left: list[int] = []

    def kill(self, group: int, _: int) -> None:
        """See `os.killpg`."""
        self.left.append(group)
        raise PermissionError(errno.EPERM, "Operation not permitted")


@asynccontextmanager
async def unkillable(
    folder: Path, time_limit: float
) -> AsyncIterator[tuple[RestartCommand, Forbidden, Path]]:
    """A command that may not be killed and the first time takes long; where it notes its beginnings."""
    forbidden, begun = Forbidden(), folder / "begun"
    text = f"echo x >> {begun}; test $(wc -l < {begun}) -gt 1 || exec sleep 100"
    command = RestartCommand("c", script(text), {"PATH": PATH}, time_limit, forbidden.kill)
    try:
        yield command, forbidden, begun
    finally:
        for group in forbidden.left:
            os.killpg(group, signal.SIGKILL)
    async with asyncio.timeout(20):
        while await command.run() == "timeout":  # until the loop has heard of the end
            await asyncio.sleep(0.01)


def noted(path: Path) -> bool:
    """Whether something was written there."""
    return path.exists() and path.read_text() != ""


async def test_what_may_not_be_killed_is_a_result_and_not_begun_again_before_it_ended(tmp_path: Path) -> None:
    async with unkillable(tmp_path, 0.3) as (command, forbidden, begun):
        async with asyncio.timeout(10):
            assert await command.run() == "timeout"
        await until(lambda: noted(begun))
        assert len(forbidden.left) == 1
        with captured_logs() as lines:
            assert await command.run() == "timeout"
        assert [line["event"] for line in lines] == ["backend.restart_goes_on"]
        assert begun.read_text() == "x\n"
    assert begun.read_text() == "x\nx\n"


async def test_what_may_not_be_killed_does_not_hold_up_who_breaks_it_off(tmp_path: Path) -> None:
    async with unkillable(tmp_path, 60) as (command, forbidden, begun):
        running = asyncio.ensure_future(command.run())
        await until(lambda: noted(begun))
        running.cancel()
        async with asyncio.timeout(10):
            with pytest.raises(asyncio.CancelledError):
                await running
        assert len(forbidden.left) == 1


@contextmanager
def no_temporary_folder(folder: Path) -> Iterator[None]:
    """Within this block there is no place for temporary files."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder / "gone")
    try:
        yield
    finally:
        tempfile.tempdir = before


async def test_a_command_whose_output_has_no_place_is_run_all_the_same(tmp_path: Path) -> None:
    text = f"echo lost; touch {tmp_path / 'done'}"
    with captured_logs() as lines, no_temporary_folder(tmp_path):
        assert await RestartCommand("c", script(text), {"PATH": PATH}).run() == "ok"
    assert (tmp_path / "done").exists()
    assert [(line["event"], line.get("output")) for line in lines] == [
        ("backend.restart_unheard", None),
        ("backend.restarted", ""),
    ]


def gone(pid: int) -> bool:
    """Whether this process has ended; one that nobody has reaped yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
