"""The command line of the simulator: `python -m comfyd.simulator`, and what `comfyd simulate` calls.

Prints one line when it is ready and nothing else; ends with 0 on SIGTERM or SIGINT, with 1 after a crash.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from comfyd.simulator.options import FLAVORS, SimulatorOptions
from comfyd.simulator.simulator import Simulator

if TYPE_CHECKING:
    from collections.abc import Sequence

DEMO_STEP_SECONDS = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a simulator until it is told to stop; returns the exit code."""
    return asyncio.run(run(parse(arguments)))


def parse(arguments: Sequence[str] | None) -> SimulatorOptions:
    """The command line as options; a wrong one ends the process with 2, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="comfyd simulate",
        description="A ComfyUI that needs no GPU: it speaks its protocol and draws its own pictures.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8188, help="port, 0 for a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--directory", type=Path, help="keeps input, output and temp (default: a temporary one)"
    )
    parser.add_argument(
        "--flavor", choices=list(FLAVORS), default="0.3.75", help="ComfyUI to play (default: %(default)s)"
    )
    parser.add_argument(
        "--node-seconds", type=float, default=0.0, help="least time of each node (default: %(default)s)"
    )
    parser.add_argument(
        "--step-seconds",
        type=float,
        default=DEMO_STEP_SECONDS,
        help="time of one sampler or tile step (default: %(default)s)",
    )
    parser.add_argument("--log", type=Path, help="execution log, JSON lines, appended to")
    parser.add_argument("--output-bytes", type=int, help="pad saved PNGs to at least this size")
    parser.add_argument("--no-previews", action="store_true", help="send no pictures while sampling")
    given = parser.parse_args(arguments)
    return SimulatorOptions(
        host=given.host,
        port=given.port,
        directory=given.directory,
        flavor=given.flavor,
        node_seconds=given.node_seconds,
        step_seconds=given.step_seconds,
        execution_log=given.log,
        output_bytes=given.output_bytes,
        previews=not given.no_previews,
    )


async def run(options: SimulatorOptions) -> int:
    """Serve until a signal (0) or a crash (1)."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    async with Simulator(options) as simulator:
        sys.stdout.write(f"ComfyUI simulator ({options.flavor}) at {simulator.url}\n")
        sys.stdout.flush()
        waits = [asyncio.ensure_future(event.wait()) for event in (stopped, simulator.crashed)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return 1 if simulator.crashed.is_set() else 0
