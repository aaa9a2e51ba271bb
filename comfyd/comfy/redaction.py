"""Takes the server's own file paths, and secrets, out of texts that are shown; never decides what is shown.

ComfyUI's error messages name files where they lie on the server. An absolute path is replaced by its last
part. Urls and relative paths stay as they are.
"""

import re
from typing import Any, Final

from comfyd.credentials import NO_SECRETS, Secrets

LONGEST: Final = 2_000
"""Characters of a message that are kept: some nodes put whole tensors into their errors."""

_URL = r"\b(?!file:)[A-Za-z][A-Za-z0-9+.-]+://[^\s'\"<>]*"
_QUOTED = r"(?P<quote>['\"])(?:file:/+)?(?:/|[A-Za-z]:[\\/]|\\\\)[^'\"\n]*(?P=quote)"
_PART = r"[^\s/'\"<>|:,;()\[\]{}]+"
# A folder may hold blanks where a separator follows.
_POSIX = rf"(?:file:/*|(?<![\w./\\)\]}}]))(?:/+{_PART}(?:[ ]{_PART}(?=/))*){{2,}}/*"
_WINDOWS = (
    r"(?<![A-Za-z0-9])(?:[A-Za-z]:[\\/]+|\\{2,})(?:[^\\/:*?\"'<>|\r\n]{1,255}[\\/]+)*[^\s\\/:*?\"'<>|,;()]*"
)
_PLACES = re.compile(f"(?P<url>{_URL})|(?P<quoted>{_QUOTED})|(?P<path>{_POSIX}|{_WINDOWS})")
_SEPARATORS = re.compile(r"[\\/]+")


def without_paths(text: str, secrets: Secrets = NO_SECRETS) -> str:
    """The text, at most `LONGEST` characters, with each absolute path cut down to its last part.

    The secrets go first: what is cut afterwards would leave a part of one that nothing recognises.
    """
    text = secrets.without(text)
    if len(text) > LONGEST:
        text = text[:LONGEST] + "..."
    return _PLACES.sub(_shortened, text)


def clean(value: Any, secrets: Secrets = NO_SECRETS) -> Any:
    """A JSON value with every text in it treated so; whatever is called `traceback` is left out."""
    if isinstance(value, str):
        return without_paths(value, secrets)
    if isinstance(value, list):
        return [clean(item, secrets) for item in value]
    if isinstance(value, dict):
        return {
            without_paths(key, secrets): clean(item, secrets)
            for key, item in value.items()
            if key != "traceback"
        }
    return value


def _shortened(match: re.Match[str]) -> str:
    if match["url"] is not None:
        return match["url"]
    quote = match["quote"] or ""
    path = match["quoted"] if quote else match["path"]
    parts = [part for part in _SEPARATORS.split(path.strip(quote) if quote else path) if part]
    return f"{quote}{parts[-1] if parts else ''}{quote}"
