"""The command line: parses, loads the configuration, runs one command; the only reader of the environment.

Never does a command's work, and imports a command only when it runs, so that `comfyd --help` is quick. An
error that a user can mend is one line per problem on stderr and an exit code of `commands.exits`.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, get_args

import msgspec

from comfyd import __version__, failpoints, settings
from comfyd.commands.exits import Exit, exit_for
from comfyd.config import Config, LogConfig, StorageName
from comfyd.errors import ComfydError
from comfyd.tasks import PictureFormat

CONFIG_FILE: Final = "comfyd.toml"
DOTENV_FILE: Final = ".env"
PRIORITIES: Final = ("low", "normal", "high")
FORMATS: Final = get_args(PictureFormat)
STORAGES: Final = get_args(StorageName)

Environment = Mapping[str, str]


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and end with 64."""

    def error(self, message: str) -> NoReturn:
        self.exit(Exit.USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None, environ: Environment | None = None) -> int:
    """Run `comfyd` with `arguments` (default: the process's own) and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(given, os.environ if environ is None else environ)
        sys.stdout.flush()
    except ComfydError as error:
        for line in error.message.splitlines():
            print(f"comfyd: {line}", file=sys.stderr)
        code = exit_for(error)
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.PIPE
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else Exit.OK
    return int(code)


def _run(given: Sequence[str], environ: Environment) -> int:
    if given[:1] == ["simulate"]:
        # The simulator has a parser of its own; argparse cannot hand options on untouched.
        from comfyd.commands import simulate  # noqa: PLC0415 - a command is imported when it runs

        return simulate.run(given[1:])
    chosen = parser().parse_args(given)
    command: Callable[[argparse.Namespace, Environment], int] = chosen.run
    return command(chosen, environ)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="comfyd",
        description="A durable REST service in front of ComfyUI.",
        epilog="Every key of comfyd.toml is also an environment variable: COMFYD__SECTION__KEY.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"comfyd {__version__}")
    commands = top.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, parser_class=_Parser
    )

    def add(name: str, text: str, run: Callable[[argparse.Namespace, Environment], int]) -> _Parser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    _serve_arguments(add("serve", "Serve the REST API and work the queue.", _serve))
    _demo_arguments(add("demo", "Show it all on a simulated ComfyUI: one workflow, one picture.", _demo))
    _submit_arguments(add("submit", "Submit a workflow to a running comfyd.", _submit))
    _configuration_arguments(add("check", "Say in plain words what is wrong with the set-up.", _check))
    add("init", "Write a commented comfyd.toml and example workflows here; overwrite nothing.", _init)
    add("simulate", "Run the simulated ComfyUI alone; `comfyd simulate --help` shows its options.", _simulate)
    return top


# --- arguments ----------------------------------------------------------------------------------------------


def _configuration_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", type=Path, metavar="FILE", help=f"configuration (default: ./{CONFIG_FILE} if it exists)"
    )
    command.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error (log.level)")


def _serve_arguments(command: argparse.ArgumentParser) -> None:
    _configuration_arguments(command)
    command.add_argument("--host", help="address to listen on (server.host)")
    command.add_argument("--port", type=int, help="port to listen on (server.port)")
    command.add_argument("--data-dir", metavar="DIR", help="where everything is kept (data.dir)")
    command.add_argument("--comfyui", metavar="URL", help="the ComfyUI to work with (comfyui.url)")
    command.add_argument(
        "--insecure", action="store_true", help="listen where other machines can reach it, without API keys"
    )


def _demo_arguments(command: argparse.ArgumentParser) -> None:
    _configuration_arguments(command)
    command.add_argument("--keep", action="store_true", help="leave the server running when it is done")
    command.add_argument("--port", type=int, help="port of a server that is kept (server.port)")
    command.add_argument("--output", "-o", type=Path, metavar="DIR", help="where the picture goes")


def _submit_arguments(command: argparse.ArgumentParser) -> None:
    _configuration_arguments(command)
    command.add_argument(
        "workflow", metavar="WORKFLOW", help="a template's name, or the path of an API-format .json"
    )
    command.add_argument(
        "--input",
        "-i",
        dest="inputs",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help='an input; the value is JSON (42, true, null, [1], "42") or else a text; @FILE uploads a file '
        "of this machine, @@ begins a text that begins with @; may be repeated",
    )
    command.add_argument("--wait", action="store_true", help="wait for the end and save the outputs")
    command.add_argument(
        "--output", "-o", type=Path, metavar="DIR", help="where outputs are saved (default: here); waits"
    )
    command.add_argument("--priority", type=_priority, metavar="N", help="higher first; or low, normal, high")
    command.add_argument("--url", help="the comfyd to talk to (client.url)")
    command.add_argument("--json", action="store_true", help="print the task as JSON")
    _output_arguments(command.add_argument_group("what becomes of the outputs"))


def _output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--format", choices=FORMATS, help="convert pictures to this")
    group.add_argument(
        "--quality", type=_quality, metavar="N", help="1 to 100; for --format jpeg, webp or avif"
    )
    group.add_argument(
        "--strip", action="store_true", help="take prompts and other metadata out of the files"
    )
    group.add_argument("--storage", choices=STORAGES, help="where they go (storage.provider)")
    group.add_argument("--prefix", metavar="FOLDER", help="a folder before their names in the storage")


def _priority(text: str) -> int | str:
    if text in PRIORITIES:
        return text
    try:
        return int(text)
    except ValueError:
        words = ", ".join(PRIORITIES)
        raise argparse.ArgumentTypeError(f"expected a whole number or one of {words}, not {text!r}") from None


def _quality(text: str) -> int:
    if text.isascii() and text.isdecimal() and len(text) <= 3 and 1 <= int(text) <= 100:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 100, not {text!r}")


# --- commands -----------------------------------------------------------------------------------------------


def _serve(chosen: argparse.Namespace, environ: Environment) -> int:
    overrides = {
        "server.host": chosen.host,
        "server.port": chosen.port,
        "data.dir": chosen.data_dir,
        "comfyui.0.url": chosen.comfyui,
    }
    config = _config(chosen, environ, overrides)
    settings.require_private_bind(config, insecure=chosen.insecure)
    _configure_log(config.log, environ)
    failpoints.arm(environ.get(failpoints.VARIABLE))
    from comfyd.commands import serve  # noqa: PLC0415 - a command is imported when it runs

    return serve.run(config)


def _demo(chosen: argparse.Namespace, environ: Environment) -> int:
    config = _config(chosen, environ, {"server.port": chosen.port})
    _log_quietly(chosen, config, environ)
    from comfyd.commands import demo  # noqa: PLC0415 - a command is imported when it runs

    return demo.run(config, chosen.output or Path(), keep=chosen.keep, out=sys.stdout, err=sys.stderr)


def _submit(chosen: argparse.Namespace, environ: Environment) -> int:
    from comfyd.commands import submit  # noqa: PLC0415 - a command is imported when it runs

    try:
        inputs = tuple(submit.parse_input(text) for text in chosen.inputs)
    except ValueError as error:
        print(f"comfyd submit: -i {error} (see comfyd submit --help)", file=sys.stderr)
        return Exit.USAGE
    if chosen.quality is not None and chosen.format in {None, "png"}:
        print("comfyd submit: --quality needs --format jpeg, webp or avif", file=sys.stderr)
        return Exit.USAGE
    config = _config(chosen, environ, {"client.url": chosen.url})
    _log_quietly(chosen, config, environ)
    order = submit.Order(
        workflow=chosen.workflow,
        inputs=inputs,
        priority=chosen.priority,
        wait=chosen.wait or chosen.output is not None,
        directory=chosen.output or Path(),
        as_json=chosen.json,
        output=_wanted(chosen),
    )
    return submit.run(config, order, sys.stdout, sys.stderr)


def _wanted(chosen: argparse.Namespace) -> dict[str, Any]:
    """What is wanted of the outputs, as the API calls it; only what was given."""
    names = ("format", "quality", "storage", "prefix")
    given = {name: getattr(chosen, name) for name in names if getattr(chosen, name) is not None}
    return {**given, "metadata": "strip"} if chosen.strip else given


def _check(chosen: argparse.Namespace, environ: Environment) -> int:
    config = _config(chosen, environ, {})
    _log_quietly(chosen, config, environ)
    from comfyd.commands import check  # noqa: PLC0415 - a command is imported when it runs

    return check.run(config, sys.stdout)


def _init(_chosen: argparse.Namespace, _environ: Environment) -> int:
    from comfyd.commands import init  # noqa: PLC0415 - a command is imported when it runs

    return init.run(Path(), sys.stdout, sys.stderr)


def _simulate(_chosen: argparse.Namespace, _environ: Environment) -> NoReturn:
    raise AssertionError("unreachable: _run hands `simulate` on before parsing")


def _config(chosen: argparse.Namespace, environ: Environment, overrides: Mapping[str, Any]) -> Config:
    return settings.load(
        chosen.config or _existing(CONFIG_FILE),
        environ,
        {**overrides, "log.level": chosen.log_level},
        _existing(DOTENV_FILE),
    )


def _existing(name: str) -> Path | None:
    return Path(name) if Path(name).is_file() else None


def _log_quietly(chosen: argparse.Namespace, config: Config, environ: Environment) -> None:
    """For commands that speak to a person: only what is wrong, unless `--log-level` asks for more.

    Never into `log.file`: that belongs to the process that serves, and two may not rotate one file.
    """
    level = config.log.level if chosen.log_level else "warning"
    quiet = msgspec.structs.replace(config.log, level=level, file=None)
    _configure_log(quiet, environ)


def _configure_log(config: LogConfig, environ: Environment) -> None:
    from comfyd import log  # noqa: PLC0415 - structlog is what takes longest to import

    log.configure(config, sys.stderr, colours="NO_COLOR" not in environ)
