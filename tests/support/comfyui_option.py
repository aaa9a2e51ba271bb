"""The pytest option that asks for the real ComfyUI; without it, tests marked `comfyui` are deselected.

It is imported by `tests/conftest.py` and starts nothing itself.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--comfyui`, or COMFYD_TEST_COMFYUI=1 in the environment."""
    parser.addoption(
        "--comfyui",
        action="store_true",
        default=os.environ.get("COMFYD_TEST_COMFYUI") == "1",
        help="also run the tests that need the real ComfyUI (set up on first use: minutes)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect, rather than skip, what nobody asked for."""
    if config.getoption("--comfyui"):
        return
    wanted = [item for item in items if item.get_closest_marker("comfyui") is None]
    unwanted = [item for item in items if item.get_closest_marker("comfyui") is not None]
    if unwanted:
        config.hook.pytest_deselected(items=unwanted)
        items[:] = wanted
