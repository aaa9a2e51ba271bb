"""Documentation under test: what exists is written down, and what is written down as a default is one."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from comfyd import errors
from comfyd.api.routes import ROUTES
from comfyd.api.views import STATUSES
from comfyd.cli import parser
from comfyd.commands.exits import Exit
from comfyd.config import Config
from comfyd.errors import ComfydError
from comfyd.keys import defaults
from comfyd.metrics import Metrics
from comfyd.settings import SEED_NAMES, load

TOP = Path(__file__).resolve().parents[1]
CONFIGURATION = TOP / "comfyd.toml"
README = re.sub(r"\{\w+\}", "{}", (TOP / "README.md").read_text())
"""With every parameter of a path as `{}`: its name is a matter of taste."""


def configuration_lines() -> Iterator[tuple[str, str, bool, bool]]:
    """Key, value as written, whether it is active, and whether a comment stands right above it."""
    section, commented = "", False
    for line in CONFIGURATION.read_text().splitlines():
        if header := re.fullmatch(r"\[+([a-z0-9_.]+)\]+", line):
            section = header[1]
        key = re.fullmatch(r"(# )?([a-z_]+) = (.+)", line)
        if key:
            yield f"{section}.{key[2]}", key[3], key[1] is None, commented
        commented = line.startswith("# ") and not key


def missing_from_readme(words: set[str]) -> list[str]:
    """What the README does not name as a word of its own; a number only counts in backquotes or a table."""
    return sorted(
        word
        for word in words
        if not re.search(
            rf"[`|] *{word} *[`|]" if word.isdigit() else rf"(?<![\w/]){re.escape(word)}(?![\w/])", README
        )
    )


def test_the_shipped_configuration_is_the_defaults() -> None:
    assert load(CONFIGURATION, {}, {}, None) == Config()


def test_every_key_is_in_the_shipped_configuration_with_its_default_and_a_comment() -> None:
    lines = {key: (value, active, commented) for key, value, active, commented in configuration_lines()}
    assert set(lines) == set(defaults())
    for key, default in defaults().items():
        value, active, commented = lines[key]
        assert commented, f"{key} has no comment above it"
        assert active == (default is not None), key
        # An example of a key without default is valid as well.
        assert active is False or tomllib.loads(f"x = {value}")["x"] == default, key


def test_the_examples_in_the_shipped_configuration_are_valid(tmp_path: Path) -> None:
    text = re.sub(r"^# ([a-z_]+ = )", r"\1", CONFIGURATION.read_text(), flags=re.MULTILINE)
    (tmp_path / "comfyd.toml").write_text(text)
    config = load(tmp_path / "comfyd.toml", {}, {}, None)
    assert None not in (
        config.server.public_url,
        config.storage.local.dir,
        config.log.file,
        config.client.url,
    )


def test_every_older_name_is_in_the_shipped_configuration() -> None:
    text = CONFIGURATION.read_text()
    assert [name for name in SEED_NAMES if name not in text] == []


def documented() -> dict[str, set[str]]:
    """What the README has to name, by kind."""
    commands = next(action for action in parser()._actions if action.dest == "command")  # noqa: SLF001 - no other way
    assert commands.choices is not None
    return {
        "configuration section": {key.split(".")[0] for key in defaults()},
        "older environment name": set(SEED_NAMES),
        "command": {f"comfyd {name}" for name in commands.choices},
        "exit code": {str(int(code)) for code in Exit},
        "error code": {kind.code for kind in error_kinds(ComfydError)},
        "status word": set(STATUSES),
        "metric": {
            metric.name + ("_total" if metric.type == "counter" else "")
            for metric in Metrics().registry.collect()
        },
        "route": {re.sub(r"\{[\w:]+\}", "{}", path) for _, path, _ in ROUTES if path != "/"},
    }


def error_kinds(kind: type[ComfydError]) -> Iterator[type[ComfydError]]:
    """The tree of `errors.py`; commands have a few errors of their own, which no client sees."""
    if kind.__module__ == errors.__name__:
        yield kind
    for below in kind.__subclasses__():
        yield from error_kinds(below)


def test_the_readme_names_everything_that_a_user_meets() -> None:
    missing = [
        f"{kind}: {word}" for kind, words in documented().items() for word in missing_from_readme(words)
    ]
    assert not missing, "README.md does not name:\n" + "\n".join(missing)
