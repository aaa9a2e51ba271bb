"""Errors as HTTP answers: the only place that knows their statuses; never decides what is an error.

One envelope on every route: `{"error": {"code", "message", "details"}}`. The Comfy API v2 has some words of
its own for the same errors (`v2/errors.py`).
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketState

from comfyd.api.faces import speaks_comfy_v2
from comfyd.api.responses import JsonResponse
from comfyd.api.v2 import errors as v2
from comfyd.api.views import WORDS
from comfyd.errors import (
    AssetInUse,
    BackendError,
    BackendUnclear,
    BackendUnreachable,
    BodyTooLarge,
    ComfydError,
    Conflict,
    DiskFull,
    ForeignOrigin,
    HashMismatch,
    IdempotencyKeyReuse,
    InputError,
    InputTooLarge,
    InsufficientStorage,
    InvalidInputs,
    InvalidSignature,
    InvalidWorkflow,
    MissingAsset,
    NotFound,
    QueueFull,
    RequestError,
    StorageError,
    StorageNotConfigured,
    StoreError,
    UnsupportedMediaType,
)
from comfyd.tasks import Status

log = structlog.get_logger("comfyd.api")

STATUSES: Final[dict[type[ComfydError], int]] = {
    ComfydError: 500,
    RequestError: 400,
    NotFound: 404,
    Conflict: 409,
    BodyTooLarge: 413,
    UnsupportedMediaType: 415,
    ForeignOrigin: 403,
    InvalidWorkflow: 422,
    InvalidInputs: 422,
    MissingAsset: 422,
    HashMismatch: 409,
    AssetInUse: 409,
    v2.InvalidField: 422,
    v2.InvalidLabels: 422,
    IdempotencyKeyReuse: 422,
    InputError: 422,
    InputTooLarge: 413,
    StorageNotConfigured: 422,
    InvalidSignature: 403,
    QueueFull: 429,
    StoreError: 503,
    InsufficientStorage: 507,
    StorageError: 503,
    DiskFull: 507,
    BackendError: 502,
    BackendUnreachable: 502,
    BackendUnclear: 504,
}
"""An error has the status of the nearest class above it that stands here."""

RETRY_AFTER: Final = {429: 10, 503: 5}
"""Seconds that `Retry-After` says where the error itself says nothing."""

FRAMEWORK_CODES: Final = {404: "not_found", 405: "method_not_allowed"}
"""Error codes of what the router finds out by itself."""

_SOCKET_FAILED: Final = 1011
"""The WebSocket close code for an unexpected condition."""


class Face(msgspec.Struct, frozen=True, kw_only=True):
    """How one of the two APIs calls errors; in each table the nearest class above one counts."""

    statuses: Mapping[type[ComfydError], int]
    codes: Mapping[type[ComfydError], str | None]
    """Where they are not those of the errors themselves; None where they are."""
    framework_codes: Mapping[int, str]

    def status_of(self, kind: type[ComfydError]) -> int:
        """The HTTP status that errors of this class are answered with."""
        return next(self.statuses[above] for above in kind.__mro__ if above in self.statuses)

    def code_of(self, kind: type[ComfydError]) -> str:
        """The code that they are answered with."""
        named = next((self.codes[above] for above in kind.__mro__ if above in self.codes), None)
        return named or kind.code


OWN: Final = Face(statuses=STATUSES, codes={}, framework_codes=FRAMEWORK_CODES)
COMFY_V2: Final = Face(
    statuses={**STATUSES, **v2.STATUSES}, codes=v2.CODES, framework_codes=v2.FRAMEWORK_CODES
)


def status_of(kind: type[ComfydError]) -> int:
    """The status of errors of this class on comfyd's own API."""
    return OWN.status_of(kind)


def face_of(scope: Scope) -> Face:
    """The API that this request is for."""
    return COMFY_V2 if speaks_comfy_v2(scope) else OWN


def envelope(code: str, message: str, details: dict[str, Any] | None = None) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"code": code, "message": message, "details": details or {}}}


def answer(error: ComfydError, face: Face = OWN) -> Response:
    """The HTTP answer to an error that comfyd raised on purpose."""
    status = face.status_of(type(error))
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        return _unexpected(face)
    headers = {}
    if status in RETRY_AFTER:
        headers["Retry-After"] = str(error.details.get("retry_after", RETRY_AFTER[status]))
    code = face.code_of(type(error))
    return JsonResponse(envelope(code, error.message, _in_our_words(error)), status, headers)


def _in_our_words(error: ComfydError) -> dict[str, Any]:
    """The details, with a task's status as this API calls it."""
    if isinstance(error, Conflict) and "status" in error.details:
        return {**error.details, "status": WORDS[Status(error.details["status"])]}
    return error.details


async def refuse(error: ComfydError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with this error before any route is asked."""
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(answer(error, face_of(scope)))
    else:
        await answer(error, face_of(scope))(scope, receive, send)


async def _on_comfyd_error(connection: HTTPConnection, error: Exception) -> Response | None:
    assert isinstance(error, ComfydError)  # noqa: S101 - how the framework calls it
    response = answer(error, face_of(connection.scope))
    if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.warning("request.failed", path=connection.url.path, code=error.code, reason=error.message)
    return await _answered(connection, response)


async def _on_framework_error(connection: HTTPConnection, error: Exception) -> Response | None:
    """404 and 405 of the router, and what the framework refuses by itself."""
    assert isinstance(error, HTTPException)  # noqa: S101 - how the framework calls it
    code = face_of(connection.scope).framework_codes.get(error.status_code, "invalid_request")
    path = connection.url.path[:200]
    messages = {404: f"there is nothing at {path}", 405: f"{path} does not take this method"}
    message = messages.get(error.status_code, error.detail)
    headers = dict(error.headers or {})
    return await _answered(connection, JsonResponse(envelope(code, message), error.status_code, headers))


async def _on_disconnect(_: HTTPConnection, __: Exception) -> Response:
    """The client went away while its request was read: nobody reads this."""
    return Response(status_code=400)


async def _on_unexpected(connection: HTTPConnection, error: Exception) -> Response | None:
    """A mistake of ours: the client learns nothing but that it happened."""
    log.error("request.broken", path=connection.url.path, exc_info=error)
    return await _answered(connection, _unexpected(face_of(connection.scope)))


def _unexpected(face: Face) -> Response:
    message = "comfyd made a mistake; its log has the details under the X-Request-Id of this answer"
    return JsonResponse(envelope(face.code_of(ComfydError), message), HTTPStatus.INTERNAL_SERVER_ERROR)


async def _answered(connection: HTTPConnection, response: Response) -> Response | None:
    """The response itself over HTTP; a WebSocket is refused with it, or closed if it was accepted already."""
    if isinstance(connection, Request):
        return response
    assert isinstance(connection, WebSocket)  # noqa: S101 - there is no third kind
    if connection.application_state is WebSocketState.CONNECTING:
        await connection.send_denial_response(response)
    else:
        await connection.close(_SOCKET_FAILED)
    return None


EXPECTED_ERRORS: Final[dict[Any, Any]] = {
    ComfydError: _on_comfyd_error,
    HTTPException: _on_framework_error,
    ClientDisconnect: _on_disconnect,
}
UNEXPECTED_ERRORS: Final[dict[Any, Any]] = {Exception: _on_unexpected}
