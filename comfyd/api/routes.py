"""The whole route table, and the ASGI app made from it; never opens what the routes work with."""

from collections.abc import Awaitable, Callable
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp

from comfyd.api import comfyui, deliveries, documentation, events, files, health, inputs, tasks, workflows
from comfyd.api.errors import EXPECTED_ERRORS, UNEXPECTED_ERRORS
from comfyd.api.origins import Origins
from comfyd.api.request_id import RequestIds
from comfyd.api.state import State
from comfyd.api.v2 import assets, jobs
from comfyd.api.v2 import events as job_events
from comfyd.api.v2 import health as comfy_health

Handler = Callable[[Request], Awaitable[Response]]

ROUTES: Final[tuple[tuple[str, str, Handler], ...]] = (
    ("POST", "/api/tasks", tasks.submit),
    ("POST", "/api/tasks/create", tasks.submit),
    ("GET", "/api/tasks", tasks.list_tasks),
    ("GET", "/api/tasks/{task_id}", tasks.read),
    ("DELETE", "/api/tasks/{task_id}", tasks.delete),
    ("POST", "/api/tasks/{task_id}/cancel", tasks.cancel),
    ("POST", "/api/tasks/{task_id}/retry", tasks.retry),
    ("GET", "/api/tasks/{task_id}/events", events.events),
    ("GET", "/api/tasks/{task_id}/ws", events.not_a_websocket),
    ("POST", "/api/inputs", inputs.create),
    ("GET", "/api/files/{key:path}", files.read_file),
    ("GET", "/api/deliveries", deliveries.list_deliveries),
    ("GET", "/api/deliveries/{delivery_id}", deliveries.read),
    ("POST", "/api/deliveries/{delivery_id}/redeliver", deliveries.redeliver),
    ("GET", "/api/workflows", workflows.list_workflows),
    ("GET", "/api/workflows/{name}", workflows.read_workflow),
    ("POST", "/api/workflows/{name}/run", tasks.run),
    ("GET", "/api/comfyui-queue-status", comfyui.queue_status),
    ("GET", "/api/comfyui-system-stats", comfyui.system_stats),
    ("POST", "/api/comfyui-interrupt", comfyui.interrupt),
    ("GET", "/api/comfyui/{path:path}", comfyui.pass_through),
    ("POST", "/api/comfyui/{path:path}", comfyui.pass_through),
    ("PUT", "/api/comfyui/{path:path}", comfyui.pass_through),
    ("PATCH", "/api/comfyui/{path:path}", comfyui.pass_through),
    ("DELETE", "/api/comfyui/{path:path}", comfyui.pass_through),
    ("GET", "/api/health", health.alive),
    ("GET", "/api/ready", health.ready),
    ("GET", "/api/status", health.status),
    ("POST", "/api/v2/jobs", jobs.submit),
    ("GET", "/api/v2/jobs", jobs.list_jobs),
    ("GET", "/api/v2/jobs/{job_id}", jobs.read),
    ("GET", "/api/v2/jobs/{job_id}/workflow", jobs.workflow),
    ("GET", "/api/v2/jobs/{job_id}/events", job_events.events),
    ("POST", "/api/v2/jobs/{job_id}/cancel", jobs.cancel),
    ("POST", "/api/v2/assets", assets.upload),
    ("POST", "/api/v2/assets/from-hash", assets.from_hash),
    ("HEAD", "/api/v2/assets/by-hash/{hash}", assets.by_hash),
    ("GET", "/api/v2/assets/{asset_id}", assets.read),
    ("DELETE", "/api/v2/assets/{asset_id}", assets.delete),
    ("GET", "/api/v2/assets/{asset_id}/content", assets.content),
    ("GET", "/api/v2/health", comfy_health.healthy),
    ("GET", "/metrics", health.metrics),
    ("GET", "/openapi.json", documentation.document),
    ("GET", "/docs", documentation.page),
    ("GET", "/docs/{file}", documentation.asset),
    ("GET", "/", documentation.home),
)

WEBSOCKETS: Final = (
    ("/api/tasks/{task_id}/ws", events.websocket),
    ("/api/comfyui/{path:path}", comfyui.no_websocket),
    ("/{path:path}", comfyui.nothing_there),
)


def create_api(state: State) -> ASGIApp:
    """The ASGI app. It has no lifespan: `state` is open, and stays so until the app has answered its last."""
    app = Starlette(
        routes=_routes(),
        # Starlette would answer an unexpected error and raise it once more, to be logged twice.
        middleware=[Middleware(ExceptionMiddleware, handlers=UNEXPECTED_ERRORS)],
        exception_handlers=EXPECTED_ERRORS,
    )
    app.router.redirect_slashes = False
    app.state.comfyd = state
    guarded = Origins(app, state.config.server.public_url)
    return RequestIds(guarded, state.clock, access_log=state.config.log.access)


def _routes() -> list[BaseRoute]:
    """One route for each path, so that `Allow` names every method."""
    paths: dict[str, dict[str, Handler]] = {}
    for method, path, handler in ROUTES:
        paths.setdefault(path, {})[method] = handler
    routes: list[BaseRoute] = [
        Route(path, _by_method(handlers), methods=_ALL) for path, handlers in paths.items()
    ]
    # Only a handler inside the route knows whether its WebSocket was accepted.
    inside = [Middleware(ExceptionMiddleware, handlers={**EXPECTED_ERRORS, **UNEXPECTED_ERRORS})]
    return routes + [WebSocketRoute(path, endpoint, middleware=inside) for path, endpoint in WEBSOCKETS]


_ALL: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")


def _by_method(handlers: dict[str, Handler]) -> Handler:
    if "GET" in handlers:
        handlers = {**handlers, "HEAD": handlers["GET"]}
    allow = {"Allow": ", ".join([*handlers, "OPTIONS"])}

    async def handle(request: Request) -> Response:
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=allow)
        handler = handlers.get(request.method)
        if handler is None:
            raise HTTPException(405, headers=allow)
        return await handler(request)

    return handle
