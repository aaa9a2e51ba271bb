"""`comfyd simulate`: the simulated ComfyUI alone, with its own options; never loads a configuration."""

from collections.abc import Sequence

from comfyd.commands.exits import Exit, ServerUnreachable
from comfyd.simulator.command import main


def run(arguments: Sequence[str]) -> int:
    """Run it with the arguments that follow `simulate`, until it is stopped.

    Raises `ServerUnreachable` where it cannot listen. A wrong argument ends with 64, as everywhere else.
    """
    try:
        return main(arguments)
    except SystemExit as stop:
        return Exit.USAGE if stop.code == 2 else Exit.OK
    except OSError as error:
        reason = error.strerror or error
        raise ServerUnreachable(f"the simulator cannot listen: {reason} (--host, --port)") from error
