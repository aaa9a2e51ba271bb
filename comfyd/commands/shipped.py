"""The files that come with comfyd: the commented `comfyd.toml` and the example workflows; never writes."""

from importlib import resources
from importlib.resources.abc import Traversable


def shipped() -> Traversable:
    """The folder that holds `comfyd.toml` and `workflows/`.

    In an installed comfyd that is `comfyd/_defaults`, which the build fills from the top of the checkout; in
    a checkout it is that top itself, so that each file has one source.
    """
    package = resources.files("comfyd")
    packaged = package / "_defaults"
    return packaged if packaged.is_dir() else package / ".."


def configuration() -> Traversable:
    """The commented `comfyd.toml`, with every key at its default."""
    return shipped() / "comfyd.toml"


def workflows() -> tuple[Traversable, ...]:
    """The example workflows' files, by name."""
    files = (shipped() / "workflows").iterdir()
    wanted = (file for file in files if file.is_file() and file.name.endswith((".json", ".toml")))
    return tuple(sorted(wanted, key=lambda file: file.name))
