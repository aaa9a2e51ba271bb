"""The container files, as far as they can be checked without an engine."""

import json
import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

from comfyd.cli import parser
from comfyd.config import Config
from comfyd.settings import SEED_NAMES, load

TOP = Path(__file__).resolve().parents[1]
DOCKERFILE = (TOP / "Dockerfile").read_text()
COMPOSE = (TOP / "compose.yaml").read_text()


def instructions() -> list[tuple[str, str]]:
    """Name and rest of each instruction, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (line.split()[0], line.split(maxsplit=1)[1].strip()) for line in text.splitlines() if line.strip()
    ]


def stages() -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for name, rest in instructions():
        if name == "FROM":
            found.append([])
        found[-1].append((name, rest))
    return found


def only(name: str) -> str:
    """The one instruction of that name in the last stage."""
    (rest,) = [rest for found, rest in stages()[-1] if found == name]
    return rest


def environment(text: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in shlex.split(text))


def compose_environment() -> dict[str, str]:
    block = re.search(r"^    environment:\n((?:      .*\n)+)", COMPOSE, flags=re.MULTILINE)
    assert block is not None
    lines = [line.strip() for line in block[1].splitlines()]
    return dict(line.split(": ", 1) for line in lines if not line.startswith("#"))


def copied() -> list[str]:
    """Every source that is copied out of the build context."""
    found = [shlex.split(rest) for stage in stages() for name, rest in stage if name == "COPY"]
    return [source for words in found if not words[0].startswith("--from") for source in words[:-1]]


def test_everything_that_is_copied_exists_and_is_let_in() -> None:
    rules = [line for line in (TOP / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    allowed = {rule[1:].rstrip("/") for rule in rules}
    assert copied()
    for source in copied():
        assert (TOP / source).exists(), source
        assert source in allowed, source
    assert allowed == set(copied())


def test_nothing_private_is_let_into_the_build() -> None:
    rules = (TOP / ".dockerignore").read_text().splitlines()
    patterns = [rule for rule in rules if rule and not rule.startswith("#")]
    assert patterns[0] == "*"
    for private in (".env", "data", ".git", "logs"):
        assert not any(fnmatch(private, rule[1:].rstrip("/")) for rule in patterns if rule.startswith("!"))


def test_the_image_runs_as_nobody_special() -> None:
    user = only("USER")
    uid = user.split(":")[0]
    assert uid.isdigit()
    assert int(uid) >= 10_000
    names = [name for name, _ in stages()[-1]]
    assert "RUN" not in names[names.index("USER") :]


def test_the_command_is_one_that_comfyd_knows_and_gets_the_signals() -> None:
    entrypoint, command = json.loads(only("ENTRYPOINT")), json.loads(only("CMD"))
    assert entrypoint == ["comfyd"]
    chosen = parser().parse_args(command)
    assert (chosen.command, chosen.insecure) == ("serve", True)
    assert only("STOPSIGNAL") == "SIGTERM"


def test_the_image_serves_without_any_file() -> None:
    environ = environment(only("ENV"))
    config = load(None, environ, {}, None)
    assert config.server.host == ".".join("0000")
    assert config.data.dir == only("VOLUME") == "/data"
    assert config.workflows.dir == "/workflows"
    assert str(config.server.port) == only("EXPOSE")


def test_the_health_check_is_python_that_compiles_and_asks_the_right_path() -> None:
    command = json.loads(only("HEALTHCHECK").split("CMD", 1)[1])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "healthcheck", "exec")
    assert "/api/health" in command[2]


def test_every_package_is_installed_by_its_hash() -> None:
    installs = re.findall(r"pip install (.*?)(?:&&|$)", " ".join(rest for _, rest in instructions()))
    assert len(installs) == 3
    assert all("--require-hashes" in install or "--no-deps" in install for install in installs)


def test_the_drivers_of_all_storages_are_installed() -> None:
    locks = re.findall(r"-r (\S+)", " ".join(rest for _, rest in instructions()))
    assert sorted(locks) == ["requirements-all.lock", "requirements-build.lock"]
    locked = set(re.findall(r"^([\w.-]+)==", (TOP / "requirements-all.lock").read_text(), flags=re.MULTILINE))
    extras = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = {re.split(r"[<>=;\[ ]", wanted)[0] for wants in extras.values() for wanted in wants}
    assert needed
    assert needed <= locked


def test_the_stages_run_the_same_python() -> None:
    bases = [rest.split()[0] for name, rest in instructions() if name == "FROM"]
    assert len(bases) == 2
    assert len(set(bases)) == 1


def test_the_environment_of_the_composed_comfyd_is_understood() -> None:
    environ = compose_environment()
    assert all(name.startswith("COMFYD__") or name in SEED_NAMES for name in environ)
    values = {name: re.sub(r"\$\{\w+:-(.*?)\}", r"\1", value) for name, value in environ.items()}
    config = load(None, values, {}, None)
    assert config.comfyui[0].url == "http://comfyui:8188"
    assert (config.log.format, config.log.level, config.server.public_url) == ("json", "info", None)
    assert config.storage == Config().storage


def test_every_setting_of_a_storage_reaches_the_composed_comfyd() -> None:
    given = compose_environment()
    assert {name for name, key in SEED_NAMES.items() if key.startswith("storage.")} <= set(given)
    values = {name: "xx" for name in given if name.startswith(("R2_", "GCS_", "CF_", "COMFYD__STORAGE__"))}
    values |= {name: "https://xx" for name in values if name.endswith("ENDPOINT")}
    assert load(None, values, {}, None).storage.usable == ("local", "s3", "r2", "gcs", "cf_images")


def test_only_comfyd_is_published_and_only_on_this_machine() -> None:
    comfyd, comfyui = re.split(r"^  comfyui:\n", COMPOSE.split("\nnetworks:")[0], flags=re.MULTILINE)
    assert re.findall(r'- "([\d.:]+)"', comfyd) == ["127.0.0.1:8000:8000"]
    assert "ports:" not in comfyui
    assert "networks: [comfyui]" in comfyui
    assert re.search(r"^  comfyui:\n    internal: true$", COMPOSE, flags=re.MULTILINE)


def test_compose_is_indented_by_two_blanks_and_never_by_tabs() -> None:
    for line in COMPOSE.splitlines():
        assert "\t" not in line
        assert (len(line) - len(line.lstrip())) % 2 == 0, line
