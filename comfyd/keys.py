"""What each key of the configuration accepts, and the words for it; never where a value comes from.

A key is known by its parts, `("comfyui", "0", "url")`; the tree of structs in `config` says which there are.
"""

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Final, Literal, get_args, get_origin
from urllib.parse import urlsplit

import msgspec

from comfyd.config import Config, masked

Parts = tuple[str, ...]

_LEVEL_ALIASES: Final = {"warn": "warning", "critical": "error", "fatal": "error"}


class Unfit(Exception):
    """A value that its key does not accept; the message says what it expects."""


# --- which keys there are -----------------------------------------------------------------------------------


def defaults() -> dict[str, Any]:
    """Every key by its dotted path and its default, in the order of the tree; a list's keys without index."""
    return {".".join(parts): default for parts, default in _walk(Config, ())}


def slot(parts: Parts) -> Any:
    """What a path names: the type of a key, or the word `unknown`, `section` or `list`."""
    struct: type[msgspec.Struct] = Config
    hint: Any = Config
    listed = False
    for part in parts:
        if listed and part.isascii() and part.isdigit() and len(part) <= 3:
            listed, hint = False, struct
            continue
        inner = _inner(hint)
        fields = {field.name: field.type for field in msgspec.structs.fields(inner)} if inner else {}
        if part not in fields:
            return "unknown"
        hint = fields[part]
        struct = _inner(hint) or struct
        listed = get_origin(hint) is tuple
    if listed:
        return "list"
    return hint if _inner(hint) is None else "section"


def nearest(name: str, known: list[str]) -> str:
    """The end of a sentence about an unknown name: the known one that it resembles, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _walk(struct: type[msgspec.Struct], above: Parts) -> Iterator[tuple[Parts, Any]]:
    for field in msgspec.structs.fields(struct):
        inner = _inner(field.type)
        if inner is None:
            yield (*above, field.name), field.default
        else:
            yield from _walk(inner, (*above, field.name))


def _inner(hint: Any) -> type[msgspec.Struct] | None:
    """The struct that a field holds or lists; None for a key."""
    candidate = get_args(hint)[0] if get_origin(hint) is tuple else hint
    return candidate if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct) else None


# --- what they accept ---------------------------------------------------------------------------------------


def convert(parts: Parts, value: Any, *, text: bool) -> Any:
    """The value as the type of the key `parts`; `text` for places that know only strings. Raises `Unfit`."""
    pattern = ".".join(part for part in parts if not part.isdigit())
    hint = slot(parts)
    if text:
        value = _from_text(value, hint)
    if _literals(hint) and isinstance(value, str):
        value = _LEVEL_ALIASES.get(value.lower(), value.lower())
    try:
        converted = msgspec.convert(value, type=hint, strict=not text)
    except msgspec.ValidationError:
        raise Unfit(f"expected {_EXPECTATIONS.get(pattern) or _expectation(hint)}") from None
    check = _CHECKS.get(pattern)
    return check(converted) if check and converted is not None else converted


def shown(value: Any) -> str:
    """A value for an error message: short, and without the password that a url may carry."""
    text = masked(value) if isinstance(value, str) else str(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return repr(text) if isinstance(value, str) else text


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. Names are not looked up: a name may change its address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _from_text(text: str, hint: Any) -> Any:
    """`null` unsets an optional key; blanks around a value are nobody's intention."""
    stripped = text.strip()
    return None if type(None) in get_args(hint) and stripped.lower() == "null" else stripped


def _literals(hint: Any) -> tuple[str, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _expectation(hint: Any) -> str:
    if words := _literals(hint):
        return f"one of {', '.join(words)}"
    for candidate in (hint, *get_args(hint)):
        if get_origin(candidate) is Annotated:
            described: str = candidate.__metadata__[0].description
            return described
    return "true or false" if hint is bool else "a text"


# --- what a type cannot say ---------------------------------------------------------------------------------


def _url(value: str, *, with_path: bool) -> str:
    """The url without a slash at its end."""
    example = "expected http://host:port or https://host"
    if re.search(r"[\s\\\x00-\x1f\x7f]", value):
        raise Unfit(f"{example}, without blanks or backslashes")
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise Unfit(f"{example}: {error}") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        raise Unfit(example)
    if "?" in value or "#" in value:
        raise Unfit(f"{example}, without ? or #")
    if not with_path and parts.path.strip("/"):
        raise Unfit(f"{example}, without the path {parts.path}")
    return value.rstrip("/")


def _base_url(value: str) -> str:
    return _url(value, with_path=True)


def _origin_url(value: str) -> str:
    return _url(value, with_path=False)


def _host(value: str) -> str:
    if re.search(r"[\s/@\[\]]", value) or value.count(":") == 1:
        raise Unfit("expected a host name or an address alone, such as 127.0.0.1 or ::1")
    return value


def _queue_url(value: str) -> str:
    if value.lower() != "sqlite":
        raise Unfit(f"expected {_EXPECTATIONS['queue.url']}")
    return "sqlite"


_EXPECTATIONS: Final[Mapping[str, str]] = {
    "queue.url": "sqlite, the only queue of this version",
    "storage.provider": "local: this version stores on its own disk only",
}

_CHECKS: Final[Mapping[str, Callable[[str], str]]] = {
    "server.host": _host,
    "server.public_url": _base_url,
    "queue.url": _queue_url,
    "comfyui.url": _origin_url,
    "client.url": _base_url,
}
