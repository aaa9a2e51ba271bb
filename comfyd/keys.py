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

from comfyd.config import SECRET_FIELDS, Config, masked

Parts = tuple[str, ...]

_LEVEL_ALIASES: Final = {"warn": "warning", "critical": "error", "fatal": "error"}


class Unfit(Exception):
    """A value that its key does not accept; the message says what it expects."""


# --- which keys there are -----------------------------------------------------------------------------------


def defaults() -> dict[str, Any]:
    """Every key by its dotted path and its default as TOML has it, in the order of the tree.

    The keys of a list of tables are without index.
    """
    tree = _walk(Config, ())
    return {".".join(parts): list(value) if isinstance(value, tuple) else value for parts, value in tree}


def slot(parts: Parts) -> Any:
    """What a path names: the type of a key, or the word `unknown`, `section` or `list` (of tables)."""
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
        listed = get_origin(hint) is tuple and _inner(hint) is not None
    if listed:
        return "list"
    return hint if _inner(hint) is None else "section"


def is_secret(parts: Parts) -> bool:
    """Whether the path names a secret, something below one, or a section that holds one."""
    if not SECRET_FIELDS.isdisjoint(parts):
        return True
    inside = (known for known, _ in _walk(Config, ()) if known[: len(parts)] == parts)
    return slot(parts) == "section" and any(is_secret(known) for known in inside)


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


def shown(value: Any, parts: Parts = ()) -> str:
    """A value of the key `parts` for an error message: short, without secrets and the password of a url."""
    if parts and is_secret(parts):
        return "***"
    text = masked(value) if isinstance(value, str) else str(_masked_within(value))
    text = text if len(text) <= 80 else text[:77] + "..."
    return repr(text) if isinstance(value, str) else text


def _masked_within(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_masked_within(item) for item in value]
    if isinstance(value, dict):
        return {key: _masked_within(item) for key, item in value.items()}
    return masked(value) if isinstance(value, str) else value


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. Names are not looked up: a name may change its address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _from_text(text: str, hint: Any) -> Any:
    """`null` unsets an optional key or empties a list; blanks around a value are nobody's intention."""
    stripped = text.strip()
    unset = stripped.lower() == "null"
    if get_origin(hint) is tuple:
        parts = [] if unset else stripped.split(",")
        return [part.strip() for part in parts if part.strip()]
    return None if unset and type(None) in get_args(hint) else stripped


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
    except ValueError:  # its message may hold a part of a password
        raise Unfit(example) from None
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


def _endpoint(value: str) -> str:
    """A url at which a storage is asked or shown: everybody sees it, so it holds no password."""
    url = _base_url(value)
    if "@" in urlsplit(url).netloc:
        raise Unfit("expected a url without a user and password")
    return url


def _origin_endpoint(value: str) -> str:
    return _origin_url(_endpoint(value))


def _domain(value: str) -> str:
    """A url; of a bare domain the one with https."""
    return _endpoint(value if "://" in value else f"https://{value}")


def _credentials_file(value: str) -> str:
    if re.search(r"[{}\n]", value):
        raise Unfit("expected the path of a service account's JSON file, not what the file holds")
    return value


def _allowed(entries: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_allowed_entry(entry.strip()) for entry in entries)


def _allowed_entry(entry: str) -> str:
    """One way out, as `ipaddress` and DNS write it. Strict: what is misread here opens the own network."""
    address, slash, length = entry.partition("/")
    try:
        host = ipaddress.ip_address(address)
    except ValueError:
        host = None
    if host is None or "%" in address:
        labels = entry.lower().split(".")
        # A last label that is a number makes it an address in one of its old spellings, such as 127.1.
        if len(entry) > 253 or not all(map(_LABEL.fullmatch, labels)) or _NUMBER.fullmatch(labels[-1]):
            raise Unfit(f"expected {_EXPECTATIONS['outbound.allow']}, not {shown(entry)}")
        return entry.lower()
    if not slash:
        return str(host)
    if not re.fullmatch(r"\d{1,3}", length, re.ASCII) or int(length) > host.max_prefixlen:
        raise Unfit(f"expected a network such as 10.0.0.0/8, not {shown(entry)}")
    network = ipaddress.ip_network(f"{host}/{length}", strict=False)
    if network.network_address != host:
        raise Unfit(f"expected the network {network} or the address {host}, not {shown(entry)}")
    return str(network)


def _host(value: str) -> str:
    if re.search(r"[\s/@\[\]]", value) or value.count(":") == 1:
        raise Unfit("expected a host name or an address alone, such as 127.0.0.1 or ::1")
    return value


def _queue_url(value: str) -> str:
    if value.lower() != "sqlite":
        raise Unfit(f"expected {_EXPECTATIONS['queue.url']}")
    return "sqlite"


_LABEL: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER: Final = re.compile(r"\d+|0x[0-9a-f]*")

_EXPECTATIONS: Final[Mapping[str, str]] = {
    "queue.url": "sqlite, the only queue of this version",
    "outbound.allow": "a list of networks such as 10.0.0.0/8, addresses and host names",
}

_CHECKS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "server.host": _host,
    "server.public_url": _base_url,
    "queue.url": _queue_url,
    "comfyui.url": _origin_url,
    "storage.s3.endpoint": _endpoint,
    "storage.s3.public_url": _domain,
    # Cloudflare's dashboard shows it with the bucket as its path.
    "storage.r2.endpoint": _origin_endpoint,
    "storage.r2.public_domain": _domain,
    "storage.gcs.credentials": _credentials_file,
    "storage.gcs.endpoint": _endpoint,
    "storage.gcs.public_url": _domain,
    "storage.cf_images.delivery_domain": _domain,
    "storage.cf_images.endpoint": _endpoint,
    "outbound.allow": _allowed,
    "client.url": _base_url,
}
