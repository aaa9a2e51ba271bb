"""Which of the two APIs a path belongs to; never what either says."""

from typing import Final

from starlette.types import Scope

COMFY_V2: Final = "/api/v2"
"""Below this path comfyd speaks the words of the Comfy API v2."""


def speaks_comfy_v2(scope: Scope) -> bool:
    """Whether what is asked for lies there, whether it exists or not."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path == COMFY_V2 or path.startswith(f"{COMFY_V2}/")
