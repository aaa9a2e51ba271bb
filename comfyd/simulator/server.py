"""One process of a simulated ComfyUI: its parts, its route table and its background tasks.

Everything here dies with `crash`; the folders, the switches and the execution log belong to the simulator.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from aiohttp import web

from comfyd.simulator import control, timing
from comfyd.simulator.engine import Engine, Parts
from comfyd.simulator.jobs import Jobs, answer
from comfyd.simulator.origin import refused
from comfyd.simulator.prompt_queue import PromptQueue
from comfyd.simulator.prompts import Prompts
from comfyd.simulator.sockets import Sockets
from comfyd.simulator.uploads import Uploads
from comfyd.simulator.views import Views

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from comfyd.simulator.catalog import Catalog
    from comfyd.simulator.executions import ExecutionLog
    from comfyd.simulator.faults import Faults
    from comfyd.simulator.folders import Folders
    from comfyd.simulator.options import SimulatorOptions

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MODEL_FOLDERS = [
    *("checkpoints", "configs", "loras", "vae", "text_encoders", "diffusion_models", "clip_vision"),
    *("style_models", "embeddings", "diffusers", "vae_approx", "controlnet", "gligen", "upscale_models"),
    *("latent_upscale_models", "custom_nodes", "hypernetworks", "photomaker", "classifiers", "model_patches"),
    "audio_encoders",
]
MEMORY = 24 * 2**30
PAGE = "<!doctype html><title>ComfyUI simulator</title><h1>ComfyUI simulator</h1><p>No GPU was harmed.</p>"


class Process:
    """One server process: from `start` until `stop` or until the simulator crashes it."""

    def __init__(
        self,
        options: SimulatorOptions,
        folders: Folders,
        catalog: Catalog,
        faults: Faults,
        log: ExecutionLog,
        actions: control.Actions,
    ) -> None:
        self._options = options
        self._flavor = options.behaviour
        self._catalog = catalog
        self._faults = faults
        self._settings: dict[str, Any] = {}
        self.queue = PromptQueue(self._queue_changed, options.max_history)
        self.sockets = Sockets(self._queue_info, self._flavor, faults, actions.crash)
        self.engine = Engine(
            Parts(
                catalog=catalog,
                folders=folders,
                queue=self.queue,
                sockets=self.sockets,
                options=options,
                faults=faults,
                log=log,
                crash=actions.crash,
            )
        )
        self._tasks: list[asyncio.Task[None]] = []
        self.application = self._application(folders, log, actions)

    def start(self) -> None:
        """Start the worker and the sender of messages. Needs a running event loop."""
        self._tasks = [asyncio.create_task(self.engine.work()), asyncio.create_task(self.sockets.publish())]

    async def stop(self) -> None:
        """End the background tasks, whatever they are doing."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def worker_alive(self) -> bool:
        """False once an exception outside a node has ended the worker (Q9)."""
        return not self._tasks[0].done()

    def _queue_changed(self) -> None:
        self.sockets.broadcast_status()

    def _queue_info(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": self.queue.remaining()}}

    def _application(self, folders: Folders, log: ExecutionLog, actions: control.Actions) -> web.Application:
        application = web.Application(
            client_max_size=self._options.max_upload_bytes, middlewares=[self._middleware]
        )
        views = Views(folders, self._flavor, self._faults)
        uploads = Uploads(folders)
        prompts = Prompts(self._catalog, folders, self._flavor, self._faults, self.queue)
        routes = [
            web.get("/ws", self.sockets.handle),
            *prompts.routes(self.engine),
            web.get("/view", views.handle),
            web.post("/upload/image", uploads.image),
            web.post("/upload/mask", uploads.mask),
            *self._information_routes(),
        ]
        for prefix in ("", "/api"):
            application.add_routes(
                [
                    web.RouteDef(route.method, prefix + route.path, route.handler, route.kwargs)
                    for route in routes
                ]
            )
        if self._flavor.jobs_api:
            application.add_routes(self._modern_routes())
        application.add_routes(control.routes(self._faults, log, actions))
        application.router.add_get("/", _page)
        application.router.add_get("/{rest:.*}", _missing)  # other methods get a 405, as in ComfyUI
        return application

    def _information_routes(self) -> list[web.RouteDef]:
        def fixed(document: Any) -> Handler:
            async def handler(_request: web.Request) -> web.Response:
                return answer(document)

            return handler

        return [
            web.get("/object_info", self._object_info),
            web.get("/object_info/{name}", self._object_info_one),
            web.get("/system_stats", self._system_stats),
            web.get("/features", self._features),
            web.get("/embeddings", fixed([])),
            web.get("/models", fixed(MODEL_FOLDERS)),
            web.get("/models/{folder}", self._models),
            web.get("/extensions", fixed([])),
            web.get("/i18n", fixed({})),
            web.get("/workflow_templates", fixed({})),
            web.get("/users", fixed({"storage": "server", "migrated": True})),
            web.get("/settings", self._get_settings),
            web.get("/settings/{name}", self._get_setting),
            web.post("/settings", self._post_settings),
            web.post("/settings/{name}", self._post_setting),
        ]

    def _modern_routes(self) -> list[web.RouteDef]:
        jobs = Jobs(self.queue, self.engine.interrupt)

        async def no_replacements(_request: web.Request) -> web.Response:
            return answer({})

        async def disabled(_request: web.Request) -> web.Response:
            error = {"code": "SERVICE_DISABLED", "message": "Assets are disabled.", "details": {}}
            return answer({"error": error}, 503)

        return [
            web.get("/api/jobs", jobs.page),
            web.post("/api/jobs/cancel", jobs.cancel_many),
            web.get("/api/jobs/{job_id}", jobs.one),
            web.post("/api/jobs/{job_id}/cancel", jobs.cancel),
            web.get("/node_replacements", no_replacements),
            web.get("/api/node_replacements", no_replacements),
            web.route("*", "/api/assets{rest:.*}", disabled),
            web.get("/api/tags", disabled),
        ]

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith(control.PREFIX):
            return await handler(request)
        if self._faults.http_delay_seconds > 0:
            await timing.pause(self._faults.http_delay_seconds)
        if self._faults.http_statuses:
            status = self._faults.http_statuses.get(request.path.removeprefix("/api"))
            if status is not None:
                return web.Response(status=status, text=f"{status}: switched on")
        if refused(request.headers, self._flavor):
            return web.Response(status=403)
        if request.method == "OPTIONS":
            return web.Response()
        return await handler(request)

    async def _object_info(self, _request: web.Request) -> web.Response:
        return answer(self._catalog.documents())

    async def _object_info_one(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        entry = self._catalog.document(name)
        return answer({} if entry is None else {name: entry})

    async def _features(self, _request: web.Request) -> web.Response:
        return answer(self.sockets.features())

    async def _models(self, request: web.Request) -> web.Response:
        folder = request.match_info["folder"]
        if folder not in MODEL_FOLDERS:
            return web.Response(status=404)
        files = {"checkpoints": self._options.checkpoints, "loras": self._options.loras}
        return answer(list(files.get(folder, ())))

    async def _system_stats(self, _request: web.Request) -> web.Response:
        system = {
            "os": "linux" if self._flavor.jobs_api else "posix",
            "ram_total": MEMORY,
            "ram_free": MEMORY // 2,
            "comfyui_version": self._flavor.version,
            "required_frontend_version": None,
            "python_version": sys.version,
            "pytorch_version": "none (simulator)",
            "embedded_python": False,
            "argv": ["main.py"],
        }
        device = {
            "name": "simulator",
            "type": "cpu",
            "index": None,
            "vram_total": MEMORY,
            "vram_free": MEMORY // 2,
            "torch_vram_total": MEMORY,
            "torch_vram_free": MEMORY // 2,
        }
        return answer({"system": system, "devices": [device]})

    async def _get_settings(self, _request: web.Request) -> web.Response:
        return answer(self._settings)

    async def _get_setting(self, request: web.Request) -> web.Response:
        return answer(self._settings.get(request.match_info["name"]))

    async def _post_settings(self, request: web.Request) -> web.Response:
        self._settings.update(await request.json())
        return web.Response()

    async def _post_setting(self, request: web.Request) -> web.Response:
        self._settings[request.match_info["name"]] = await request.json()
        return web.Response()


async def _page(_request: web.Request) -> web.Response:
    return web.Response(text=PAGE, content_type="text/html")


async def _missing(_request: web.Request) -> web.Response:
    return web.Response(status=404, content_type="application/octet-stream")


async def end(runner: web.AppRunner, server: asyncio.Server | None, *, abruptly: bool) -> None:
    """End the HTTP side: stop listening and close every connection, with a reset if `abruptly`."""
    if server is not None:
        server.close()
    if abruptly and runner.server is not None:
        for connection in runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()
    with contextlib.suppress(asyncio.TimeoutError):
        await runner.cleanup()
