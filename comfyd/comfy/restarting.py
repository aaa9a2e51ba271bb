"""Runs the command that starts a ComfyUI anew; never through a shell, never decides when.

It is given a time and no secret of comfyd's, and its output goes to a file: what it leaves running, such as
ComfyUI itself, does not lose its output when the command ends.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Final, Literal

import structlog

TIME_LIMIT_SECONDS: Final = 60.0
REAPED_SECONDS: Final = 1.0
"""How long is waited for the end of what was killed."""
HANDED_DOWN: Final = ("PATH", "HOME", "LANG")
_TOLD_LINES: Final = 5
_TOLD_BYTES: Final = 2_000

Result = Literal["ok", "failed", "timeout", "not_found"]

_log = structlog.get_logger(__name__)


class RestartCommand:
    """One backend's command. Lives as long as the process; it is not run twice at the same time."""

    def __init__(
        self,
        backend: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        time_limit: float = TIME_LIMIT_SECONDS,
        kill: Callable[[int, int], None] = os.killpg,
    ) -> None:
        self._backend = backend
        self._command = tuple(command)
        self._environ = {name: environ[name] for name in HANDED_DOWN if name in environ}
        self._time_limit = time_limit
        self._kill_group = kill
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> Result:
        """Run it to its end, or kill it and all that it started. Raises nothing but a cancellation.

        What another user runs (`sudo`) may not be killed: it is left, and nothing is run before it has ended.
        """
        if self._process is not None and self._process.returncode is None:
            _log.warning("backend.restart_goes_on", backend=self._backend, program=self._command[0])
            return "timeout"
        with _place_for_output() as output:
            result = await self._run(output)
            say = _log.info if result == "ok" else _log.warning
            # the arguments may hold a token
            say(
                "backend.restarted",
                backend=self._backend,
                program=self._command[0],
                result=result,
                output=_tail(output),
            )
        return result

    async def _run(self, output: IO[bytes] | None) -> Result:
        write_to = subprocess.DEVNULL if output is None else output
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=subprocess.DEVNULL,
                stdout=write_to,
                stderr=write_to,
                env=self._environ,
                start_new_session=True,
            )
        except (OSError, ValueError):  # no such program, not executable, a zero byte in an argument
            return "not_found"
        try:
            async with asyncio.timeout(self._time_limit):
                return "ok" if await process.wait() == 0 else "failed"
        except TimeoutError:
            return "timeout"
        finally:
            if process.returncode is None:
                await self._kill(process)

    async def _kill(self, process: asyncio.subprocess.Process) -> None:
        """The whole group: it began a session of its own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            self._kill_group(process.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REAPED_SECONDS):
                await process.wait()


@contextlib.contextmanager
def _place_for_output() -> Iterator[IO[bytes] | None]:
    """A file without a name; None where none can be made: the command matters more than what it says."""
    try:
        output = tempfile.TemporaryFile()  # noqa: SIM115 - closed below; an error of the block is not this one's
    except OSError as exc:
        _log.warning("backend.restart_unheard", reason=exc.strerror or str(exc))
        yield None
        return
    with output:
        yield output


def _tail(output: IO[bytes] | None) -> str:
    """The last lines of what it wrote."""
    if output is None:
        return ""
    try:
        size = output.seek(0, os.SEEK_END)
        output.seek(max(size - _TOLD_BYTES, 0))
        text = output.read().decode(errors="replace")
    except OSError as exc:  # the disk does not give it back
        return f"({exc.strerror or exc})"
    return "\n".join(text.splitlines()[-_TOLD_LINES:])
