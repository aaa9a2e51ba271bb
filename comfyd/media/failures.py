"""Tells a disk that fails from a file that is broken: libraries raise the same kind of error for both."""

import errno
import os
from typing import Final

from comfyd.errors import DiskFull, MediaError, StorageError

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_DISK: Final = _FULL | {  # not EIO: libav says that of broken files, too
    errno.EACCES,
    errno.EFBIG,
    errno.EMFILE,
    errno.ENOENT,
    errno.EPERM,
    errno.EROFS,
}


def failure(exc: BaseException, what: str, otherwise: str) -> MediaError | StorageError:
    """What to raise: `StorageError` where the disk is to blame, which is waited for, else `MediaError`."""
    if isinstance(exc, OSError) and exc.errno in _DISK:
        kind = DiskFull if exc.errno in _FULL else StorageError
        return kind(f"{what}: the disk says: {os.strerror(exc.errno).lower()}")
    return MediaError(f"{what}: {otherwise}")
