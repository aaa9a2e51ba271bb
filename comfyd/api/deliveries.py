"""The routes of what webhooks are owed: read it, list it, deliver it once more; never deliver themselves."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from comfyd.api import requests
from comfyd.api.responses import JsonResponse
from comfyd.api.schemas import DeliveryListView
from comfyd.api.state import state_of
from comfyd.api.views import delivery_view
from comfyd.deliveries import Delivery, DeliveryFilter, DeliveryStatus
from comfyd.errors import DeliveryNotFound, MalformedRequest

_FRESH: Final = {"Cache-Control": "no-store"}


async def list_deliveries(request: Request) -> Response:
    """`GET /api/deliveries`."""
    query = request.query_params
    requests.known(query, "task_id", "status", "cursor", "limit")
    cursor, limit = requests.page(request)
    wanted = DeliveryFilter(task_id=_task_id(query.get("task_id")), status=_status(query.get("status")))
    page = await state_of(request).store.list_deliveries(wanted, cursor, limit)
    views = tuple(delivery_view(delivery) for delivery in page.deliveries)
    return JsonResponse(DeliveryListView(deliveries=views, next_cursor=page.next_cursor), headers=_FRESH)


async def read(request: Request) -> Response:
    """`GET /api/deliveries/{delivery_id}`."""
    wanted = _delivery_id(request)
    delivery = _found(await state_of(request).store.delivery(wanted), wanted)
    return JsonResponse(delivery_view(delivery), headers=_FRESH)


async def redeliver(request: Request) -> Response:
    """`POST /api/deliveries/{delivery_id}/redeliver`."""
    state, wanted = state_of(request), _delivery_id(request)
    delivery = _found(await state.store.redeliver(wanted, state.clock.now()), wanted)
    state.wake_deliverer()
    return JsonResponse(delivery_view(delivery), 202)


def _delivery_id(request: Request) -> str:
    given: str = request.path_params["delivery_id"]
    return given


def _found(delivery: Delivery | None, wanted: str) -> Delivery:
    if delivery is None:
        raise DeliveryNotFound(f"there is no delivery {wanted[:100]!r}")
    return delivery


def _task_id(text: str | None) -> str | None:
    if text is None:
        return None
    if not requests.is_task_id(text.lower()):
        raise MalformedRequest(
            f"?task_id= must be the id of a task, not {text[:50]!r}", details={"parameter": "task_id"}
        )
    return text.lower()


def _status(word: str | None) -> DeliveryStatus | None:
    if word is None:
        return None
    if word.lower() not in list(DeliveryStatus):
        raise MalformedRequest(
            f"?status= must be one of {', '.join(DeliveryStatus)}, not {word[:50]!r}",
            details={"parameter": "status"},
        )
    return DeliveryStatus(word.lower())
