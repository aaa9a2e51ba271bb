"""The routes to ComfyUI itself: its queue, its figures, an interrupt, and the rest of its API passed through.

Where there are several ComfyUIs the header `Comfyd-Backend` names one; without it the first that is ready is
meant.
"""

from collections.abc import AsyncIterator
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from comfyd.api import requests
from comfyd.api.responses import JsonResponse
from comfyd.api.schemas import InterruptView
from comfyd.api.state import state_of
from comfyd.api.waiting import gone, unless_stopped
from comfyd.comfy.backend import Backend
from comfyd.comfy.forwarding import ForwardedRequest, ForwardedResponse
from comfyd.errors import BackendError, BodyTooLarge, MalformedRequest, NotFound

BACKEND_HEADER: Final = "Comfyd-Backend"
PREFIX: Final = "/api/comfyui/"


def chosen(request: Request) -> Backend:
    """The ComfyUI that the request is for. Raises `NotFound` for a name that none has."""
    backends = state_of(request).backends
    wanted = request.headers.get(BACKEND_HEADER)
    if wanted is not None:
        for backend in backends:
            if backend.name == wanted:
                return backend
        names = ", ".join(backend.name for backend in backends)
        raise NotFound(f"there is no ComfyUI {wanted[:100]!r}; {BACKEND_HEADER} may be {names}")
    return next((backend for backend in backends if backend.state.ready), backends[0])


async def queue_status(request: Request) -> Response:
    """`GET /api/comfyui-queue-status`: ComfyUI's own answer."""
    return JsonResponse(await chosen(request).queue_status(), headers={"Cache-Control": "no-store"})


async def system_stats(request: Request) -> Response:
    """`GET /api/comfyui-system-stats`: ComfyUI's own answer."""
    return JsonResponse(await chosen(request).system_stats(), headers={"Cache-Control": "no-store"})


async def interrupt(request: Request) -> Response:
    """`POST /api/comfyui-interrupt`: end what runs now, and nothing else.

    A run of one of our tasks is ended by canceling the task: interrupted by itself it would only run again.
    """
    state = state_of(request)
    backend = chosen(request)
    running = (await backend.queue()).running
    if running:
        for claim in await state.store.live():
            if claim.attempt.id in running:
                await state.control.cancel(claim.task.id)
                return JsonResponse(
                    InterruptView(backend=backend.name, prompt_id=claim.attempt.id, task_id=claim.task.id)
                )
    prompt_id = await backend.interrupt_running() if running else None
    return JsonResponse(InterruptView(backend=backend.name, prompt_id=prompt_id, task_id=None))


async def pass_through(request: Request) -> Response:
    """`/api/comfyui/{path}`: ComfyUI's own API, as it is."""
    path = _checked_path(request)
    requests.refuse_too_large(request, "body_bytes")
    return Passed(chosen(request), request, path)


async def no_websocket(_: WebSocket) -> None:
    """A WebSocket below `/api/comfyui/`."""
    raise NotFound(
        "WebSockets are not passed through: follow a task by /api/tasks/{task_id}/events or /ws instead"
    )


async def nothing_there(socket: WebSocket) -> None:
    """A WebSocket anywhere else."""
    raise NotFound(f"there is no WebSocket at {socket.url.path}")


def _checked_path(request: Request) -> str:
    """The rest of the path as it was sent, percent-encoded: to ComfyUI `%2F` is another thing than `/`."""
    raw: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
    sent = raw.partition(b"?")[0].decode("ascii", "replace")
    path = sent.partition(PREFIX)[2]
    plain: str = request.path_params["path"]
    strange = any(ord(character) < 0x20 or character in "\\\x7f" for character in plain)
    if (
        plain.startswith("/")
        or "//" in plain
        or strange
        or any(part in {".", ".."} for part in plain.split("/"))
    ):
        raise MalformedRequest("a path to ComfyUI has no '..', no '//' and no control characters")
    return path


class Passed(Response):
    """ComfyUI's answer, streamed both ways. Lives as long as its request."""

    def __init__(self, backend: Backend, request: Request, path: str) -> None:
        super().__init__()
        self._backend = backend
        self._request = request
        self._path = path
        self._too_large: BodyTooLarge | None = None

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and the answer back."""
        request = self._request
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        forwarded = ForwardedRequest(
            method=request.method,
            path=self._path,
            query=request.scope["query_string"].decode("ascii", "replace"),
            headers=tuple(request.headers.items()),
            body=self._body() if has_body else None,
        )
        try:
            async with self._backend.forward(forwarded) as response:
                await unless_stopped(_send(response, send), gone(receive), state_of(request).closing)
        except BackendError:
            if self._too_large is not None:
                raise self._too_large from None
            raise

    async def _body(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in requests.chunks(self._request, "body_bytes"):
                yield chunk
        except BodyTooLarge as exc:
            self._too_large = exc
            raise


async def _send(response: ForwardedResponse, send: Send) -> None:
    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in response.headers]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    async for chunk in response.chunks:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
