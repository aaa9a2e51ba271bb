"""Tells a disk that cannot be written from a file that is broken: both come as the same kind of error."""

import errno
import os
from typing import Final

_DISK: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EMFILE}
)


def reason(exc: BaseException, otherwise: str) -> str:
    """Why it failed, for people: what the disk says, if it is the disk's fault."""
    if isinstance(exc, OSError) and exc.errno in _DISK:
        return f"the disk says: {os.strerror(exc.errno).lower()}"
    return otherwise
