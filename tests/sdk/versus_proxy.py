"""comfyd and the official comfy-api-proxy side by side: the same jobs through the same SDK, in one run.

Each stands in front of a simulated ComfyUI of its own whose prompts take 50 ms.
`python -m tests.sdk.versus_proxy [--jobs 200] [--watchers 200]` prints one table; its exit status is 1 if
comfyd lost anything or served somebody not to the end.
"""

import argparse
import asyncio
import io
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Final

import httpx
from comfy_sdk import AsyncComfy, Comfy, ComfyError, Job, JobFailed, OutputReady, StatusChange, Workflow
from PIL import Image

from tests.conformance import graphs
from tests.sdk.installed import proxy
from tests.sdk.stage import finished, new_async_client, new_client
from tests.support.comfyd import ComfydProcess
from tests.support.comfyui import ComfyUIProcess
from tests.support.service import sampled

NODE_SECONDS: Final = 0.025
"""Of each of a job's two nodes."""
WATCHED_STEPS: Final = 80
"""Of the job that is watched; each takes 50 ms."""
CLIENT_STREAMS: Final = 50
"""Watchers of one client: it opens no more than 100 connections."""


class ProxyProcess(ComfydProcess):
    """The official proxy as a process, living from `start` to `stop`."""

    def _launch(self, environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        command = [str(proxy()), "run", "--port", str(self.port)]
        command += ["--comfyui", environment["COMFYUI_URL"], "--state-dir", str(self.folder / "state")]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/api/v2/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@dataclass(kw_only=True)
class Tally:
    """What became of the jobs, and how long each took in seconds, from submit to the last byte."""

    ends: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    @property
    def good(self) -> int:
        """Jobs that gave the right bytes."""
        return self.ends["right"]

    @property
    def middle(self) -> float:
        """The median, in milliseconds."""
        return 1000 * median(self.seconds)

    @property
    def slow(self) -> float:
        """What one in twenty exceeds, in milliseconds."""
        return 1000 * quantiles(self.seconds, n=20)[-1]


@dataclass(kw_only=True)
class Found:
    """Everything about one server."""

    polled: Tally
    heard: Tally
    watchers: Counter[str]


def one_job(client: Comfy, color: int, end: Callable[[Job], object]) -> str:
    """Submit, wait in one of the SDK's two ways, download; what became of it."""
    graph = graphs.picture()
    graph["1"]["inputs"]["color"] = color
    try:
        job = client.submit(Workflow(graph))
        end(job)
        outputs = job.result().outputs
        data = outputs[0].to_bytes() if outputs else None
    except JobFailed as failure:
        return "expired" if "expired" in failure.message else "failed"
    except (ComfyError, httpx.HTTPError):
        return "error"
    if data is None:
        return "output lost"
    with Image.open(io.BytesIO(data)) as image:
        painted = image.convert("RGB").getpixel((0, 0))
    return "right" if painted == (color >> 16 & 255, color >> 8 & 255, color & 255) else "wrong bytes"


def jobs(url: str, count: int, end: Callable[[Job], object]) -> Tally:
    """So many jobs, one after the other."""
    tally = Tally()
    with new_client(url) as client:
        for color in range(count):
            began = time.perf_counter()
            tally.ends[one_job(client, color, end)] += 1
            tally.seconds.append(time.perf_counter() - began)
    return tally


def polling(_: Job) -> None:
    """What `result` does by itself: look again after 0.5, 0.75, 1.1 ... seconds."""


async def watchers(url: str, count: int) -> Counter[str]:
    """What became of so many who listened to the events of one job."""
    clients = [new_async_client(url) for _ in range(-(-count // CLIENT_STREAMS))]
    try:
        job = await clients[0].submit(Workflow(sampled(graphs.color(), WATCHED_STEPS)))
        places = [clients[number // CLIENT_STREAMS] for number in range(count)]
        return Counter(await asyncio.gather(*(watch(client, job.id) for client in places)))
    finally:
        for client in clients:
            await client.aclose()


async def watch(client: AsyncComfy, job_id: str) -> str:
    """Listen to the end."""
    outputs, status = 0, ""
    try:
        async for event in (await client.jobs.get(job_id)).events():
            outputs += isinstance(event, OutputReady)
            status = event.status if isinstance(event, StatusChange) else status
    except (ComfyError, httpx.HTTPError) as error:
        return f"refused: {getattr(error, 'code', type(error).__name__)}"
    if status != "succeeded":
        return f"ended {status}"
    return "served" if outputs else "served without its output"


def measured(url: str, jobs_each: int, watched_by: int) -> Found:
    """All of it."""
    return Found(
        polled=jobs(url, jobs_each, polling),
        heard=jobs(url, jobs_each, finished),
        watchers=asyncio.run(watchers(url, watched_by)),
    )


@contextmanager
def both(folder: Path) -> Iterator[dict[str, str]]:
    """The urls of comfyd and the proxy, each in front of its own simulator."""
    options = ("--node-seconds", str(NODE_SECONDS))
    with ExitStack() as stack:
        urls = {}
        for name, kind in (("comfyd", ComfydProcess), ("comfy-api-proxy", ProxyProcess)):
            comfyui = stack.enter_context(ComfyUIProcess("simulator-0.3.75", options=options))
            urls[name] = stack.enter_context(kind(folder / name, comfyui.url)).url
        yield urls


def table(found: dict[str, Found]) -> str:
    """Both in one table."""
    lines: list[tuple[str, Callable[[Found], str]]] = [
        ("jobs, one after the other, by result()", lambda one: str(one.polled.ends.total())),
        ("  right", lambda one: str(one.polled.good)),
        ("  expired", lambda one: str(one.polled.ends["expired"])),
        ("  failed, or an error", lambda one: str(one.polled.ends["failed"] + one.polled.ends["error"])),
        ("  output lost", lambda one: str(one.polled.ends["output lost"])),
        ("  wrong bytes", lambda one: str(one.polled.ends["wrong bytes"])),
        ("  median", lambda one: f"{one.polled.middle:.1f} ms"),
        ("  p95", lambda one: f"{one.polled.slow:.1f} ms"),
        ("jobs, one after the other, by events()", lambda one: str(one.heard.ends.total())),
        ("  right", lambda one: str(one.heard.good)),
        ("  otherwise", lambda one: said(one.heard.ends, "right")),
        ("  median", lambda one: f"{one.heard.middle:.1f} ms"),
        ("  p95", lambda one: f"{one.heard.slow:.1f} ms"),
        ("watchers of one job", lambda one: str(one.watchers.total())),
        ("  served to the end, with its output", lambda one: str(one.watchers["served"])),
        ("  otherwise", lambda one: said(one.watchers, "served")),
    ]
    rows = [("", *found), *((name, *(value(one) for one in found.values())) for name, value in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    )


def said(ends: Counter[str], apart_from: str) -> str:
    """The other ends."""
    return ", ".join(f"{count} {end}" for end, count in ends.items() if end != apart_from) or "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.sdk.versus_proxy", description=__doc__)
    parser.add_argument("--jobs", type=int, default=200, help="one after the other, twice (default: 200)")
    parser.add_argument("--watchers", type=int, default=200, help="of one job (default: 200)")
    chosen = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as folder,
        both(Path(folder)) as urls,
        ThreadPoolExecutor(2) as threads,
    ):
        waiting = {
            name: threads.submit(measured, url, chosen.jobs, chosen.watchers) for name, url in urls.items()
        }
        found = {name: one.result() for name, one in waiting.items()}
    sys.stdout.write(table(found) + "\n")
    ours, theirs = found.values()
    whole = ours.polled.good == ours.heard.good == chosen.jobs
    quicker = ours.polled.middle < theirs.polled.middle
    return 0 if whole and quicker and ours.watchers["served"] == chosen.watchers else 1


if __name__ == "__main__":
    sys.exit(main())
