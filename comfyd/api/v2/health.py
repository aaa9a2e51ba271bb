"""The route that says that comfyd runs; never fails, and asks nobody."""

from starlette.requests import Request
from starlette.responses import Response

from comfyd.api.responses import JsonResponse
from comfyd.api.state import state_of
from comfyd.api.v2.schemas import HealthView


async def healthy(request: Request) -> Response:
    """`GET /api/v2/health`."""
    ready = any(backend.state.ready for backend in state_of(request).backends)
    view = HealthView(upstream="ready" if ready else "unreachable")
    return JsonResponse(view, headers={"Cache-Control": "no-store"})
