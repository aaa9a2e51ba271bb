"""Requests of others, passed on to one ComfyUI as they are; never judges what they ask for.

What would make ComfyUI refuse them (`Origin`, `Sec-Fetch-*`), what is a secret of ours (`Authorization`,
`Cookie`, `X-API-Key`) and what belongs to one connection is left out.
"""

import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Final

import msgspec
from yarl import URL

from comfyd.comfy.client import Client
from comfyd.errors import MalformedRequest

_HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "expect",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "trailers",
        "transfer-encoding",
        "upgrade",
    }
)
_NOT_SENT: Final = _HOP_BY_HOP | {"authorization", "cookie", "host", "origin", "referer", "x-api-key"}
_NOT_RETURNED: Final = _HOP_BY_HOP | {"set-cookie", "server", "date"}
_PATH: Final = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@%/-]*")
_QUERY: Final = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@%/?\[\]-]*")
_DOTS: Final = re.compile(r"(?:\.|%2e){1,2}", re.IGNORECASE)
_METHOD: Final = re.compile(r"[A-Z]{1,16}")


class ForwardedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is passed on. `path` and `query` are percent-encoded, as they came.

    `body` is read only if the headers announce one (`Content-Length`, `Transfer-Encoding`).
    """

    method: str
    path: str
    query: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    body: AsyncIterator[bytes] | None = None


class ForwardedResponse(msgspec.Struct, frozen=True, kw_only=True):
    """ComfyUI's answer as it comes. Valid inside its context only; `chunks` can be read once."""

    status: int
    headers: tuple[tuple[str, str], ...]
    chunks: AsyncIterator[bytes]


@asynccontextmanager
async def forward(client: Client, request: ForwardedRequest) -> AsyncIterator[ForwardedResponse]:
    """See `Backend.forward`."""
    has_body = request.body is not None and _announces_body(request)
    async with client.exchange(
        request.method,
        _target(client, request),
        headers=_sent(request, has_body),
        data=request.body if has_body else None,
    ) as response:
        yield ForwardedResponse(
            status=response.status,
            headers=tuple(_kept(response.headers.items(), _NOT_RETURNED, "access-control-")),
            chunks=client.chunks(response),
        )


def _target(client: Client, request: ForwardedRequest) -> URL:
    path = request.path.lstrip("/")
    if not _METHOD.fullmatch(request.method):
        raise MalformedRequest(f"{request.method!r} is not a method that is passed on")
    if not _PATH.fullmatch(path) or any(_DOTS.fullmatch(part) for part in path.split("/")):
        raise MalformedRequest("This path is not passed on to ComfyUI")
    if not _QUERY.fullmatch(request.query):
        raise MalformedRequest("This query is not passed on to ComfyUI")
    return client.url(f"/{path}?{request.query}" if request.query else f"/{path}")


def _announces_body(request: ForwardedRequest) -> bool:
    """By its headers: a server offers a body to read for every request, and most have none."""
    headers = {name.lower(): value for name, value in request.headers}
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _sent(request: ForwardedRequest, has_body: bool) -> list[tuple[str, str]]:
    kept = _kept(request.headers, _NOT_SENT, "sec-fetch-")
    return [(name, value) for name, value in kept if has_body or name.lower() != "content-length"]


def _kept(headers: Iterable[tuple[str, str]], dropped: frozenset[str], prefix: str) -> list[tuple[str, str]]:
    """The headers that go on: none that is dropped, that `Connection` names, or that has the prefix."""
    headers = list(headers)
    named = {
        name.strip().lower()
        for header, value in headers
        if header.lower() == "connection"
        for name in value.split(",")
    }
    return [
        (name, value)
        for name, value in headers
        if name.lower() not in dropped and name.lower() not in named and not name.lower().startswith(prefix)
    ]
