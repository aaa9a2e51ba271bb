"""`X-Request-Id` on every answer and in every line logged for it; never refuses a request.

Also writes the access log, if one is wanted: the id belongs into its lines.
"""

import re
from typing import Final

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from comfyd.api.faces import speaks_comfy_v2
from comfyd.clock import Clock

log = structlog.get_logger("comfyd.access")

HEADER: Final = "X-Request-Id"
COMFY_HEADER: Final = "X-Comfy-Request-Id"
"""What the clients of the Comfy API v2 look for."""
_SANE: Final = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_STARTS: Final = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})


class RequestIds:
    """The outermost layer of the app: takes a client's own id if it is sane, else makes one."""

    def __init__(self, app: ASGIApp, clock: Clock, *, access_log: bool) -> None:
        self._app = app
        self._clock = clock
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its id bound for the log."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _SANE.fullmatch(given) else self._clock.new_id()

        status = 101

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] in _STARTS:
                status = message.get("status", status)
                message.setdefault("headers", [])
                headers = MutableHeaders(raw=message["headers"])
                headers[HEADER] = request_id
                if speaks_comfy_v2(scope):
                    headers[COMFY_HEADER] = request_id
            await send(message)

        began = self._clock.monotonic()
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self._app(scope, receive, send_with_id)
            if self._access_log:
                facts = {"method": scope.get("method", "GET"), "path": scope["path"], "status": status}
                log.info("request", **facts, duration_ms=self._clock.monotonic() - began)
