"""Reads the configuration from its four places into `Config`; never reads `os.environ` or keeps anything.

Precedence: command line, environment, `.env` file, `comfyd.toml`, default. Within the environment and within
`.env` the `COMFYD__SECTION__KEY` names win over the names of the project that comfyd replaces. Every problem
that can be found is found in one go.
"""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from dotenv import dotenv_values

from comfyd.config import ComfyUIConfig, Config, StorageConfig
from comfyd.errors import ConfigError
from comfyd.keys import Parts, Unfit, convert, defaults, is_loopback, nearest, shown, slot

PREFIX: Final = "COMFYD__"

SEED_NAMES: Final[Mapping[str, str]] = {
    "APP_ENV": "log.format",
    "LOG_LEVEL": "log.level",
    "TASK_API_URL": "client.url",
    "COMFYUI_URL": "comfyui.0.url",
    "COMFYUI_CLIENT_ID": "comfyui.0.client_id",
    "STORAGE_PROVIDER": "storage.provider",
    "GCS_BUCKET_NAME": "storage.gcs.bucket",
    "GCS_BUCKET_REGION": "storage.gcs.region",
    "GOOGLE_APPLICATION_CREDENTIALS": "storage.gcs.credentials",
    "R2_BUCKET_NAME": "storage.r2.bucket",
    "R2_ACCOUNT_ID": "storage.r2.account_id",
    "R2_ACCESS_KEY": "storage.r2.access_key",
    "R2_SECRET_KEY": "storage.r2.secret_key",
    "R2_PUBLIC_DOMAIN": "storage.r2.public_domain",
    "CF_IMAGES_ACCOUNT_ID": "storage.cf_images.account_id",
    "CF_IMAGES_API_TOKEN": "storage.cf_images.api_token",
    "CF_IMAGES_DELIVERY_DOMAIN": "storage.cf_images.delivery_domain",
}
"""The environment names of the project that comfyd replaces, and the keys that they set."""

_OLDER_NAMES: Final = {key: name for name, key in SEED_NAMES.items()}

_APP_ENV_FORMATS: Final = {"production": "json", "development": "console"}
"""Any other value, such as `staging`, says nothing about logs: the name is too common to refuse one."""


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One value as one place gives it. `text` marks places that know only strings."""

    value: Any
    origin: str
    text: bool


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with one key; `key` is empty where a whole file cannot be read."""

    key: str
    message: str


Merged = dict[Parts, Setting]
Given = Iterator[tuple[Parts, Setting]]


def load(
    path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, Any], dotenv: Path | None
) -> Config:
    """The configuration from the named files, `environ`, and `overrides` by dotted key (None: not given).

    Raises `ConfigError` with all problems: one line each in `message`, as values in `details["problems"]`,
    and the first one's key in `details["key"]`.
    """
    problems: list[Problem] = []
    merged: Merged = {}
    _merge(merged, problems, _from_file(path, problems))
    _merge(merged, problems, _from_variables(_dotenv_values(dotenv, problems), ".env", problems))
    _merge(merged, problems, _from_variables(environ, "environment", problems))
    _merge(merged, problems, _from_overrides(overrides))
    tree = _tree(merged, problems)
    config = Config() if problems else msgspec.convert(tree, Config)
    problems += _contradictions(config)
    if problems:
        raise ConfigError(
            "\n".join(problem.message for problem in problems),
            details={"key": problems[0].key, "problems": msgspec.to_builtins(problems)},
        )
    return config


def named(key: str) -> str:
    """A key as people look for it: with the older name that sets it too, where there is one."""
    older = _OLDER_NAMES.get(key)
    return f"{key} ({older})" if older else key


def require_private_bind(config: Config, *, insecure: bool) -> None:
    """Refuse to listen where strangers can reach a comfyd that knows no API keys, unless they said so."""
    host = config.server.host
    if insecure or is_loopback(host):
        return
    raise ConfigError(
        f"server.host = {host!r} is reachable from other machines, and this version has no API keys: whoever "
        "reaches it can run workflows. Listen on 127.0.0.1, or say --insecure where the network is closed",
        details={"key": "server.host"},
    )


# --- the places ---------------------------------------------------------------------------------------------


def _from_file(path: Path | None, problems: list[Problem]) -> Given:
    if path is None:
        return
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        problems.append(Problem(key="", message=f"{path} cannot be read: {error.strerror} (--config)"))
    except (ValueError, RecursionError) as error:  # broken TOML, UTF-8 or number; nested too deep
        problems.append(Problem(key="", message=f"{path} is not valid TOML: {error}"))
    else:
        for parts, value in _flatten(table, ()):
            yield parts, Setting(value=value, origin=str(path), text=False)


def _dotenv_values(path: Path | None, problems: list[Problem]) -> dict[str, str]:
    if path is None:
        return {}
    try:
        # Without interpolation: it would read os.environ, and would change secrets that hold a `$`.
        values = dotenv_values(path, interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem(key="", message=f"{path} cannot be read: {error}"))
        return {}
    return {name: value for name, value in values.items() if value is not None}


def _from_variables(variables: Mapping[str, str], place: str, problems: list[Problem]) -> Given:
    """The seed's names first, then ours, the more specific later, so that the later one wins.

    An empty variable counts as not set: that is what `${NAME:-}` in a compose file makes.
    """
    given = {name: value.strip() for name, value in variables.items() if value.strip()}
    yield from _from_seed_names(given, place)
    ours = (name for name in given if name.upper().startswith(PREFIX))
    for name in sorted(ours, key=lambda name: (name.count("__"), name.isupper(), name)):
        parts = tuple(name[len(PREFIX) :].lower().split("__"))
        origin = f"{name}, {place}"
        if slot(parts) == "unknown":
            known = [PREFIX + key.upper().replace(".", "__") for key in defaults()]
            problems.append(Problem(key=name, message=f"unknown {origin}{nearest(name.upper(), known)}"))
        elif slot(parts) == "list":
            yield from _from_json_list(given[name], parts, origin, problems)
        else:
            yield parts, Setting(value=given[name], origin=origin, text=True)


def _from_seed_names(given: Mapping[str, str], place: str) -> Given:
    for name, key in SEED_NAMES.items():
        value = given.get(name, "")
        if name == "APP_ENV":
            value = _APP_ENV_FORMATS.get(value.lower(), "")
        elif name == "TASK_API_URL":
            value = value.rstrip("/").removesuffix("/api")
        if value:
            yield tuple(key.split(".")), Setting(value=value, origin=f"{name}, {place}", text=True)


def _from_json_list(text: str, parts: Parts, origin: str, problems: list[Problem]) -> Given:
    try:
        tables = msgspec.json.decode(text.encode(), type=list[dict[str, Any]])
    except msgspec.DecodeError as error:
        message = f"{'.'.join(parts)} ({origin}): expected a JSON list of objects: {error}"
        problems.append(Problem(key=".".join(parts), message=message))
        return
    for below, value in _flatten(tables, parts):
        yield below, Setting(value=value, origin=origin, text=False)


def _from_overrides(overrides: Mapping[str, Any]) -> Given:
    for key, value in overrides.items():
        if value is not None:
            text = isinstance(value, str)
            yield tuple(key.split(".")), Setting(value=value, origin="command line", text=text)


def _flatten(value: Any, parts: Parts) -> Iterator[tuple[Parts, Any]]:
    """Leaves with their paths; an empty table yields itself, a list of tables `[]` before its items."""
    if isinstance(value, dict) and (value or not parts):
        for key, item in value.items():
            yield from _flatten(item, (*parts, str(key)))
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        yield parts, []
        for index, item in enumerate(value):
            yield from _flatten(item, (*parts, str(index)))
    else:
        yield parts, value


# --- merging and checking -----------------------------------------------------------------------------------


def _merge(merged: Merged, problems: list[Problem], given: Given) -> None:
    for parts, setting in given:
        key = ".".join(parts)
        kind = slot(parts)
        if kind == "unknown":
            near = nearest(key, list(defaults()))
            problems.append(Problem(key=key, message=f"unknown key {key} ({setting.origin}){near}"))
        elif kind == "list" and setting.value == []:
            # A list that is given whole takes the place of the one before, not of its first items only.
            for other in [other for other in merged if other[: len(parts)] == parts]:
                del merged[other]
            merged[parts] = setting
        elif kind in {"section", "list"} and setting.value != {}:
            expected = "a table of keys" if kind == "section" else f"a list of tables, [[{key}]]"
            problems.append(_misfit(parts, setting, f"expected {expected}"))
        else:
            merged[_indexed(parts)] = setting


def _indexed(parts: Parts) -> Parts:
    """`comfyui.url` is `comfyui.0.url`: whoever names no server means the first."""
    bare = parts[0] == "comfyui" and not (len(parts) > 1 and parts[1].isdigit())
    return (parts[0], "0", *parts[1:]) if bare else parts


def _misfit(parts: Parts, setting: Setting, expected: str) -> Problem:
    key = ".".join(parts)
    value = shown(setting.value, parts)
    return Problem(key=key, message=f"{key} = {value} ({setting.origin}): {expected}")


def _tree(merged: Merged, problems: list[Problem]) -> dict[str, Any]:
    """Nested tables with converted values; the servers as a list in their order."""
    tree: dict[str, Any] = {}
    for parts, setting in merged.items():
        kind = slot(parts)
        if kind == "list":
            tree.setdefault(parts[0], {})
            continue
        table = tree
        for part in parts[:-1]:
            table = table.setdefault(part, {})
        if kind == "section":
            table.setdefault(parts[-1], {})
            continue
        try:
            table[parts[-1]] = convert(parts, setting.value, text=setting.text)
        except Unfit as unfit:
            problems.append(_misfit(parts, setting, str(unfit)))
    if "comfyui" in tree:
        servers = {int(index): server for index, server in tree["comfyui"].items()}
        tree["comfyui"] = _server_list(servers, problems)
    return tree


def _server_list(servers: dict[int, dict[str, Any]], problems: list[Problem]) -> list[dict[str, Any]]:
    """The servers in order, each with a name of its own."""
    if not servers:
        problems.append(Problem(key="comfyui", message="comfyui = []: expected at least one server"))
    elif max(servers) >= len(servers):
        key = f"comfyui.{max(servers)}"
        gap = next(index for index in range(len(servers)) if index not in servers)
        message = f"{key} is set, but comfyui.{gap} is not: number the servers from 0 without a gap"
        problems.append(Problem(key=key, message=message))
    name = ComfyUIConfig().name
    return [{"name": f"{name}-{index + 1}" if index else name, **servers[index]} for index in sorted(servers)]


def _contradictions(config: Config) -> Iterator[Problem]:
    """Values that are each fine and do not go together."""
    yield from _queue_contradictions(config)
    yield from _server_contradictions(config)
    yield from _storage_contradictions(config.storage)


def _queue_contradictions(config: Config) -> Iterator[Problem]:
    delay, most = config.queue.retry_delay, config.queue.retry_delay_max
    if most < delay:
        key = "queue.retry_delay_max"
        yield Problem(key=key, message=f"{key} = {most:g}: expected at least queue.retry_delay = {delay:g}")


def _server_contradictions(config: Config) -> Iterator[Problem]:
    for field in ("name", "url"):
        first: dict[str, int] = {}
        for index, server in enumerate(config.comfyui):
            value = getattr(server, field)
            if value in first:
                key = f"comfyui.{index}.{field}"
                message = f"{key} = {shown(value)}: comfyui.{first[value]} has it already, each needs its own"
                yield Problem(key=key, message=message)
            first.setdefault(value, index)


def _storage_contradictions(storage: StorageConfig) -> Iterator[Problem]:
    wanted = {storage.provider: "storage.provider"}
    wanted.setdefault(storage.fallback, "storage.fallback")
    for name, by in wanted.items():
        for field in storage.missing(name):
            key = f"storage.{name}.{field}"
            yield Problem(key=key, message=f"{named(key)} is not set, and {by} = '{name}' needs it")
    if storage.fallback == "cf_images":
        key = "storage.fallback"
        message = f"{key} = 'cf_images': expected another one, for what Cloudflare Images does not take"
        yield Problem(key=key, message=message)
    # With half a pair the driver would take the machine's own credentials, which are not what is meant.
    for field, other in (("access_key", "secret_key"), ("secret_key", "access_key")):
        if getattr(storage.s3, field) is None and getattr(storage.s3, other) is not None:
            key = f"storage.s3.{field}"
            yield Problem(key=key, message=f"{key} is not set, and storage.s3.{other} needs it")
