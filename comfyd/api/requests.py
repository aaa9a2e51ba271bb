"""What a client sent, as plain values: bodies, query parameters and headers; never what they mean.

Whatever cannot be read raises a `RequestError` that names the place.
"""

import hashlib
import math
import re
from collections.abc import AsyncIterator
from typing import Any, Final, Literal, TypeVar, get_args

import msgspec
import orjson
from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection, Request

from comfyd.api.schemas import METADATA_KEY, METADATA_PAIRS, METADATA_VALUE
from comfyd.api.state import state_of
from comfyd.config import StorageName
from comfyd.errors import BodyTooLarge, MalformedRequest, TaskNotFound, UnsupportedMediaType
from comfyd.tasks import EventType, IdempotencyKey, PictureFormat

T = TypeVar("T")
BodyLimit = Literal["body_bytes", "upload_bytes"]
"""Keys of `[limits]`."""

IDEMPOTENCY_KEY: Final = 255
"""Characters at most."""
PAGE: Final = 20
"""Entries on a page of a list where the client names no `limit`."""

_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_JSON_TYPE: Final = re.compile(r"application/json|[\w.+-]+/[\w.+-]+\+json", re.ASCII)
_PREFERRED_WAIT: Final = re.compile(r'\bwait\s*=\s*"?(\d{1,9})"?', re.ASCII)
_METADATA: Final = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_PLACE: Final = re.compile(r"(.*?)(?: - at (.*))?", re.DOTALL)
_FIELD: Final = re.compile(r"Object (?:contains unknown|missing required) field `(.*)`", re.DOTALL)
_EXPECTED: Final = {
    "$.output.prefix": "must be up to eight folders of letters, digits and . _ -, with / between them",
    "$.output.format": f"must be one of {', '.join(get_args(PictureFormat))}",
    "$.output.storage": f"must be one of {', '.join(get_args(StorageName))}",
    "$.output.metadata": "must be keep or strip",
    "$.webhook_events[...]": f"must be some of {', '.join(EventType)}",
}
"""What fields take, where the words of the validator do not help."""
_ELSEWHERE: Final = {"prompt": "there is no such field: comfyd calls the graph `workflow`"}


def task_id(connection: HTTPConnection) -> str:
    """The task that the path names. Raises `TaskNotFound` for what can be no task's id."""
    given: str = connection.path_params["task_id"]
    if not is_task_id(given.lower()):
        raise TaskNotFound(f"there is no task {given[:100]!r}: an id is a UUID")
    return given.lower()


def is_task_id(text: str) -> bool:
    """Whether a task may have this id."""
    return _UUID.fullmatch(text) is not None


async def read_body(request: Request) -> bytes:
    """The whole body. Raises `BodyTooLarge` as soon as it is known to be."""
    body = bytearray()
    async for chunk in chunks(request, "body_bytes"):
        body += chunk
    return bytes(body)


async def chunks(request: Request, key: BodyLimit) -> AsyncIterator[bytes]:
    """The body as it comes. Raises `BodyTooLarge` as soon as it is known to be longer than `limits.{key}`."""
    refuse_too_large(request, key)
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        _check_size(request, key, size)
        yield chunk


def refuse_too_large(request: Request, key: BodyLimit) -> None:
    """Raises `BodyTooLarge` where the announced length is."""
    announced = request.headers.get("content-length", "0")
    _check_size(request, key, int(announced) if announced.isdecimal() else 0)


def _check_size(request: Request, key: BodyLimit, size: int) -> None:
    limit: int = getattr(state_of(request).config.limits, key)
    if size > limit:
        message = f"the body is longer than the {limit} bytes that limits.{key} allows"
        raise BodyTooLarge(message, details={"limit": limit})


def check_json_type(request: Request) -> None:
    """Raises `UnsupportedMediaType` unless the body is announced as JSON, or as nothing, or is none."""
    if request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers:
        return  # some clients name a type for the body that they do not send
    announced = request.headers.get("content-type", "")
    kind = announced.partition(";")[0].strip().lower()
    if kind and not _JSON_TYPE.fullmatch(kind):
        raise UnsupportedMediaType(
            f"the body is announced as {kind[:100]}; send it as application/json",
            details={"content_type": announced[:100]},
        )


def parse_json(body: bytes) -> Any:
    """The body as plain values. Raises `MalformedRequest` with the place where it stops being JSON."""
    if not body:
        raise MalformedRequest("the body is empty; send a JSON object")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        place = {"line": exc.lineno, "column": exc.colno}
        message = f"the body is not JSON: {exc.msg} (line {exc.lineno}, column {exc.colno})"
        raise MalformedRequest(message, details=place) from exc


def converted(value: Any, kind: type[T]) -> T:
    """The value as a struct. Raises `MalformedRequest` whose `details["path"]` names the field."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        message, path = _explained(str(exc))
        raise MalformedRequest(f"{path}: {message}", details={"path": path}) from exc


def _explained(text: str) -> tuple[str, str]:
    """A sentence and a JSON path out of msgspec's one line."""
    found = _PLACE.fullmatch(text)
    message, place = (found[1], found[2] or "") if found else (text, "")
    path = re.sub(r"^`key` in ", "a key of ", place).replace("`", "") or "$"
    field = _FIELD.fullmatch(message)
    if field is None:
        expected = _EXPECTED.get(re.sub(r"\[\d+\]", "[...]", path))
        if expected and message.startswith(("Expected `str` matching", "Invalid enum value")):
            return expected, path
        return message.replace("`", ""), path
    name = field[1][:100]
    if path == "$.extra_data":  # a secret may have come as a key: it is not repeated
        return "takes api_key_comfy_org alone", path
    if "missing" in message:
        return "is required", f"{path}.{name}"
    return _ELSEWHERE.get(name, "there is no such field"), f"{path}.{name}"


def idempotency_key(request: Request, *parts: bytes) -> IdempotencyKey | None:
    """The client's key with the digest of what it sent; None without one."""
    given = request.headers.get("idempotency-key")
    if given is None:
        return None
    if not 1 <= len(given) <= IDEMPOTENCY_KEY or not (given.isascii() and given.isprintable()):
        raise MalformedRequest(
            f"Idempotency-Key must be 1 to {IDEMPOTENCY_KEY} printable ASCII characters",
            details={"header": "Idempotency-Key"},
        )
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return IdempotencyKey(key=given, body_sha256=digest.hexdigest())


def wait_seconds(request: Request) -> float | None:
    """How long the client wants to wait, by `?wait=` or `Prefer: wait=`, cut to the limit; None for no wait.

    A malformed preference is ignored, as RFC 7240 asks; a malformed parameter is an error.
    """
    seconds = number(request.query_params, "wait")
    if seconds is None:
        preferred = _PREFERRED_WAIT.search(",".join(request.headers.getlist("prefer")))
        seconds = float(preferred[1]) if preferred else None
    return None if seconds is None else min(seconds, state_of(request).config.limits.wait)


def known(query: QueryParams, *names: str) -> None:
    """Raises `MalformedRequest` for a parameter that is none of these, or is given twice.

    A misspelt filter would otherwise be no filter. `metadata[key]` among the names stands for any key.
    """
    seen: set[str] = set()
    for name, _ in query.multi_items():
        if ("metadata[key]" if _METADATA.fullmatch(name) else name) not in names:
            message = f"there is no parameter {name[:100]!r}; there are {', '.join(names)}"
            raise MalformedRequest(message, details={"parameter": name[:100]})
        if name in seen:
            message = f"the parameter {name[:100]!r} is given twice"
            raise MalformedRequest(message, details={"parameter": name[:100]})
        seen.add(name)


def number(query: QueryParams, name: str) -> float | None:
    """A query parameter that is a number from 0; None where it is not given."""
    text = query.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise MalformedRequest(
            f"?{name}= must be a number from 0, not {text[:50]!r}", details={"parameter": name}
        )
    return value


def integer(query: QueryParams, name: str, least: int, most: int) -> int | None:
    """A query parameter that is a whole number; None where it is not given."""
    text = query.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"-?[0-9]{1,15}", text) or not least <= int(text) <= most:
        raise MalformedRequest(
            f"?{name}= must be a whole number from {least} to {most}, not {text[:50]!r}",
            details={"parameter": name},
        )
    return int(text)


def page(request: Request) -> tuple[str | None, int]:
    """The cursor and the limit that a list is asked with."""
    most = state_of(request).config.limits.list_page
    query = request.query_params
    return query.get("cursor") or None, integer(query, "limit", 1, most) or min(PAGE, most)


def truth(query: QueryParams, name: str) -> bool:
    """A query parameter that is `true` or `false`, and false where it is not given."""
    text = query.get(name, "false").lower()
    if text not in {"true", "false", "1", "0"}:
        raise MalformedRequest(
            f"?{name}= must be true or false, not {text[:50]!r}", details={"parameter": name}
        )
    return text in {"true", "1"}


def metadata(query: QueryParams) -> dict[str, str]:
    """The pairs given as `metadata[key]=value`. Raises `MalformedRequest` for too many or too long ones."""
    pairs: dict[str, str] = {}
    for name, value in query.multi_items():
        found = _METADATA.fullmatch(name)
        if found is None:
            continue
        if not 1 <= len(found[1]) <= METADATA_KEY or len(value) > METADATA_VALUE:
            message = f"a key of metadata has 1 to {METADATA_KEY} characters, a value up to {METADATA_VALUE}"
            raise MalformedRequest(message, details={"parameter": name[:100]})
        pairs[found[1]] = value
    if len(pairs) > METADATA_PAIRS:
        raise MalformedRequest(
            f"at most {METADATA_PAIRS} pairs of metadata", details={"parameter": "metadata"}
        )
    return pairs
