"""What tasks bring along for ComfyUI that must be stored nowhere and logged nowhere: in memory only.

A restart of comfyd forgets it: a task that needs it and had not reached ComfyUI by then fails, because
running it without would be another task.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import quote

LONGEST: Final = 4096
"""Characters of one credential."""
REMOVED: Final = "[removed]"
"""What stands in a text where a credential was."""
WITHHELD: Final = "[removed: comfyd was restarted, and cannot tell the task's credentials from other words]"
"""What stands for a whole text that may hold credentials which are not known any more."""


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


class Secrets:
    """What is taken out of all that ComfyUI says about one prompt. Lives as long as that is listened to.

    `values` is None where they are not known any more: then no text is safe. What a node makes is not looked
    through: a workflow that writes its key into its outputs has asked for that.
    """

    def __init__(self, values: Iterable[str] | None = ()) -> None:
        self._unknown = values is None
        forms = {form for value in values or () if value for form in _forms(value)}
        longest_first = sorted(forms, key=len, reverse=True)
        self._hidden = re.compile("|".join(map(re.escape, longest_first))) if forms else None

    def without(self, text: str) -> str:
        """The text, fit to be shown as far as they are concerned."""
        if self._unknown:
            return text and WITHHELD
        return self._hidden.sub(REMOVED, text) if self._hidden is not None else text


NO_SECRETS: Final = Secrets()
"""Of a prompt that came without credentials."""


def _forms(value: str) -> tuple[str, ...]:
    """It as it is, and as Python, JSON and a url would show it."""
    in_json = (json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
    return value, repr(value)[1:-1], *in_json, quote(value, safe="")
