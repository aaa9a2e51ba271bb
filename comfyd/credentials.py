"""What tasks bring along for ComfyUI that must be stored nowhere and logged nowhere: in memory only.

A restart of comfyd forgets it: a task that needs it and had not reached ComfyUI by then fails, because
running it without would be another task.
"""

from collections.abc import Mapping


class Credentials:
    """The credentials of tasks that have not ended, by task id. Lives as long as the process."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, str]] = {}

    def __repr__(self) -> str:
        return f"Credentials({len(self._held)} tasks)"

    def keep(self, task_id: str, credentials: Mapping[str, str]) -> None:
        """Remember them, in the words of ComfyUI's `extra_data`."""
        self._held[task_id] = dict(credentials)

    def of(self, task_id: str) -> dict[str, str] | None:
        """What the task brought; None if that is not known (any more)."""
        return self._held.get(task_id)

    def forget(self, task_id: str) -> None:
        """The task has ended, or was never made."""
        self._held.pop(task_id, None)
