"""`comfyd demo`: the whole way once, on a simulated ComfyUI; never touches a configured one."""

import asyncio
import json
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any, Final, TextIO

from comfyd.clock import SystemClock
from comfyd.commands import shipped
from comfyd.commands.bar import ProgressBar
from comfyd.commands.exits import Exit
from comfyd.commands.rest import RestClient, connect
from comfyd.config import ComfyUIConfig, Config, DataConfig, ServerConfig, WorkflowsConfig
from comfyd.serving import listen, serve
from comfyd.simulator import Simulator, SimulatorOptions

WORKFLOW: Final = "text-to-image"
INPUTS: Final[dict[str, Any]] = {
    "prompt": "a lighthouse on a cliff at dusk, warm light in the window",
    "seed": 7,
    "steps": 24,
}
STEP_SECONDS: Final = 0.06
"""A sampler step of the simulated ComfyUI: slow enough to watch, quick enough to wait for."""


def run(config: Config, directory: Path, *, keep: bool, out: TextIO, err: TextIO) -> int:
    """Make one picture and say where it is; with `keep` go on serving on `server.port` until Ctrl-C."""
    return asyncio.run(_demo(directory, keep=keep, port=config.server.port, out=out, err=err))


async def _demo(directory: Path, *, keep: bool, port: int, out: TextIO, err: TextIO) -> int:
    options = SimulatorOptions(step_seconds=STEP_SECONDS)
    with (
        tempfile.TemporaryDirectory(prefix="comfyd-demo-") as data,
        resources.as_file(shipped.shipped()) as top,
    ):
        async with Simulator(options) as simulator:
            print(f"simulated ComfyUI  {simulator.url}", file=out)
            config = Config(
                server=ServerConfig(port=port if keep else 0, grace=1.0),
                data=DataConfig(dir=data),
                comfyui=(ComfyUIConfig(url=simulator.url, name="simulator"),),
                workflows=WorkflowsConfig(dir=str(top / "workflows")),
            )
            with listen(config) as listening:
                url = f"http://127.0.0.1:{listening.getsockname()[1]}"
                print(f"comfyd             {url}", file=out)
                serving = asyncio.ensure_future(serve(config, listening))
                try:
                    code = await _submit(url, directory, out, err)
                    if keep and code == Exit.OK:
                        print(f"still serving: {url}/docs (Ctrl-C ends it)", file=out, flush=True)
                        await serving
                finally:
                    serving.cancel()
                    await asyncio.gather(serving, return_exceptions=True)
    return code


async def _submit(url: str, directory: Path, out: TextIO, err: TextIO) -> Exit:
    body = {"workflow": WORKFLOW, "inputs": INPUTS}
    async with connect(url, SystemClock()) as client:
        print(f"submit             POST {url}/api/tasks {json.dumps(body)}", file=out, flush=True)
        task = await client.submit(body)
        print(f"task               {task['task_id']}", file=out, flush=True)
        bar = ProgressBar(err)
        try:
            task = await client.watch(task["task_id"], bar.show)
        finally:
            bar.close()
        if task["status"] != "COMPLETED":
            print(f"the task ended {task['status']}: {task['error']}", file=err)
            return Exit.FAILED
        return await _save(client, task, directory, out)


async def _save(client: RestClient, task: dict[str, Any], directory: Path, out: TextIO) -> Exit:
    for output in task["outputs"]:
        path = await client.download(task["task_id"], output, directory)
        print(f"picture            {path.resolve()}", file=out)
    return Exit.OK
