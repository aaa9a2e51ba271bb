"""Refuses what a browser sends on behalf of another site; never looks at who the client is.

ComfyUI refuses such requests itself, but what comfyd passes on bears no trace of where it came from. Clients
that are no browsers send neither header and are let through.
"""

from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from comfyd.api.errors import refuse
from comfyd.errors import ForeignOrigin

_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class Origins:
    """A layer of the app, before its routes."""

    def __init__(self, app: ASGIApp, public_url: str | None) -> None:
        self._app = app
        self._ours = urlsplit(public_url).netloc.lower() if public_url else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403."""
        if scope["type"] in {"http", "websocket"} and self._foreign(scope):
            message = "this request comes from a web page of another site; comfyd serves its own origin only"
            await refuse(ForeignOrigin(message), scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _foreign(self, scope: Scope) -> bool:
        """Whether another site's page sent it. A link to a picture or to the documentation is no harm."""
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is None:
            crossing = headers.get("sec-fetch-site") == "cross-site"
            return crossing and scope.get("method", "GET") not in _READING
        return urlsplit(origin).netloc.lower() not in {headers.get("host", "").lower(), self._ours}
