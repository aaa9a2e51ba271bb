"""The command serves until it is told to stop."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest

from comfyd.simulator import read_log
from comfyd.simulator.command import parse
from tests.simulator.rig import picture

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def started(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """`python -m comfyd.simulator`, and its url from the line it prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "comfyd.simulator", "--port", "0", *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            line = (await process.stdout.readline()).decode()
        found = re.search(r"http://\S+", line)
        assert found is not None
        yield process, found[0]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_with_zero(number: signal.Signals) -> None:
    async with started() as (process, url), aiohttp.ClientSession(url) as http:
        async with http.get("/system_stats") as answer:
            assert answer.status == 200
        process.send_signal(number)
        async with asyncio.timeout(20):
            assert await process.wait() == 0


async def test_a_crash_ends_it_with_one_and_leaves_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with started("--log", str(log)) as (process, url), aiohttp.ClientSession(url) as http:
        async with http.post("/prompt", json={"prompt": picture(), "client_id": []}) as answer:
            assert answer.status == 200
        async with asyncio.timeout(20):
            assert await process.wait() == 1
    assert [entry.event for entry in read_log(log)] == ["start"]


def test_every_option_is_heard() -> None:
    words = "--host ::1 --port 1 --directory d --flavor 0.33 --node-seconds 1 --step-seconds 2 --log l"
    options = parse([*words.split(), "--output-bytes", "3", "--no-previews"])
    assert (options.host, options.port, options.directory) == ("::1", 1, Path("d"))
    assert (options.flavor, options.node_seconds, options.step_seconds) == ("0.33", 1.0, 2.0)
    assert (options.execution_log, options.output_bytes, options.previews) == (Path("l"), 3, False)


def test_the_defaults_make_a_pleasant_demo() -> None:
    options = parse([])
    assert (options.port, options.step_seconds, options.directory) == (8188, 0.05, None)


def test_an_unknown_flavor_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--flavor", "9"])
    assert "invalid choice" in capsys.readouterr().err
