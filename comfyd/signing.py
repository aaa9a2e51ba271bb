"""Signed, expiring urls of files that comfyd serves itself: made and checked with a key that stays here."""

import hashlib
import hmac
import os
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from comfyd.clock import Clock
from comfyd.disk import sync_folder
from comfyd.errors import ConfigError, InvalidSignature

KEY_BYTES: Final = 32


class Signer:
    """Signs paths. Made with `key_of`; lives as long as the process."""

    def __init__(self, key: bytes, expires_ms: int, clock: Clock) -> None:
        self._key = key
        self._expires_ms = expires_ms
        self._clock = clock

    @property
    def required(self) -> bool:
        """Whether a file is given only to who has a signature."""
        return self._expires_ms > 0

    def query(self, path: str) -> str:
        """What a url to this path ends with: `?expires=SECONDS&signature=HEX`, or nothing."""
        if not self.required:
            return ""
        expires = str((self._clock.now() + self._expires_ms) // 1000)
        return f"?expires={expires}&signature={self._signature(path, expires)}"

    def check(self, path: str, expires: str | None, signature: str | None) -> None:
        """Raise `InvalidSignature` unless these were made here for this path, and are still good.

        Where none is required, none may be given either way; a wrong one is refused all the same.
        """
        if expires is None and signature is None and not self.required:
            return
        good = hmac.compare_digest(
            self._signature(path, expires or "").encode(), (signature or "").encode(errors="replace")
        )
        if not good:
            raise InvalidSignature("the url's signature is missing or wrong: read the task for a new url")
        if int(expires or "0") * 1000 <= self._clock.now():
            raise InvalidSignature("the url has expired: read the task for a new one")

    def _signature(self, path: str, expires: str) -> str:
        return hmac.new(self._key, f"{expires}\n{path}".encode(), hashlib.sha256).hexdigest()


def key_of(file: Path) -> bytes:
    """The key in this file, which is made at the first start. Raises `ConfigError`."""
    key = kept(file, partial(secrets.token_bytes, KEY_BYTES))
    if len(key) != KEY_BYTES:
        message = f"{file} is not a key of comfyd's: delete it, and urls that were signed with it are void"
        raise ConfigError(message, details={"key": "data.dir"})
    return key


def kept(file: Path, fresh: Callable[[], bytes]) -> bytes:
    """What this file of secrets holds; a fresh one, which only its owner reads, where there is none.

    Raises `ConfigError`.
    """
    try:
        if not file.exists():
            unfinished = file.with_suffix(".new")
            unfinished.unlink(missing_ok=True)  # whoever left it may have let others read it
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(fresh())
                opened.flush()
                os.fsync(opened.fileno())
            unfinished.replace(file)
            sync_folder(file.parent)
        return file.read_bytes()
    except OSError as exc:
        message = f"data.dir: cannot use {file}: {exc.strerror or exc}"
        raise ConfigError(message, details={"key": "data.dir"}) from exc
