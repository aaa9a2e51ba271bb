"""Answers as bytes: JSON, and the address under which a client reached comfyd; never what an answer says."""

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import orjson
from starlette.requests import HTTPConnection
from starlette.responses import Response

from comfyd.api.state import state_of

_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,255}(:\d{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:\d{1,5})?")
_SECURE: Final = {"ws": "http", "wss": "https"}


def encoded(value: Any) -> bytes:
    """JSON of plain values and structs."""
    return orjson.dumps(value, default=msgspec.to_builtins)


class JsonResponse(Response):
    """A JSON answer, encoded at once."""

    media_type = "application/json"

    def __init__(
        self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(encoded(content), status_code, headers)


def base_url(connection: HTTPConnection) -> str:
    """What urls in answers begin with, without a slash at the end: as configured, or as the client asked.

    A `Host` header that is none is not repeated: then the address is the one that the connection came to.
    """
    public = state_of(connection).config.server.public_url
    if public is not None:
        return public.rstrip("/")
    scheme = _SECURE.get(connection.scope["scheme"], connection.scope["scheme"])
    host = connection.headers.get("host", "")
    if not _HOST.fullmatch(host):
        address, port = connection.scope.get("server") or ("localhost", None)
        host = address if port is None else f"{address}:{port}"
    return f"{scheme}://{host}{connection.scope.get('root_path', '').rstrip('/')}"
