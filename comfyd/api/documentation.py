"""The interactive documentation: one page, its files from this package, and the OpenAPI document.

Nothing is ever loaded from another host.
"""

from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response

from comfyd.api import openapi
from comfyd.api.responses import JsonResponse, base_url
from comfyd.api.state import state_of
from comfyd.errors import FileNotFound

_STATIC: Final = Path(__file__).parent / "static"
_FILES: Final = {
    "swagger-ui.css": (_STATIC / "swagger-ui" / "swagger-ui.css", "text/css"),
    "swagger-ui-bundle.js": (_STATIC / "swagger-ui" / "swagger-ui-bundle.js", "text/javascript"),
    "start.js": (_STATIC / "docs" / "start.js", "text/javascript"),
}
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


async def page(_: Request) -> Response:
    """`GET /docs`."""
    headers = {**_HEADERS, "Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"}
    return FileResponse(_STATIC / "docs" / "index.html", media_type="text/html", headers=headers)


async def asset(request: Request) -> Response:
    """`GET /docs/{file}`."""
    name: str = request.path_params["file"]
    if name not in _FILES:
        raise FileNotFound(f"there is no file {name[:100]!r} here")
    path, media_type = _FILES[name]
    return FileResponse(path, media_type=media_type, headers=_HEADERS)


async def document(request: Request) -> Response:
    """`GET /openapi.json`: made anew each time, because templates come and go."""
    state = state_of(request)
    whole = openapi.document(state.version, base_url(request), state.catalog.list())
    return JsonResponse(whole, headers={"Cache-Control": "no-cache"})


async def home(request: Request) -> Response:
    """`GET /`."""
    return RedirectResponse(f"{base_url(request)}/docs", status_code=307)
