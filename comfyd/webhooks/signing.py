"""Signatures of webhooks as Standard Webhooks 1.0 wants them; never shows a secret."""

import base64
import datetime as dt
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from standardwebhooks import Webhook

from comfyd.config import WHSEC
from comfyd.errors import ConfigError
from comfyd.signing import kept

SECRET_BYTES: Final = 32
_SECRET: Final = re.compile(WHSEC)


class Signatures:
    """Signs messages with every secret that receivers may know. Lives as long as the process."""

    def __init__(self, secret: str, old_secrets: Sequence[str] = ()) -> None:
        self._signers = tuple(Webhook(one) for one in (secret, *old_secrets))

    def headers(self, message_id: str, now: int, body: bytes) -> dict[str, str]:
        """`webhook-id`, `webhook-timestamp` (in seconds) and `webhook-signature`: one for each secret."""
        seconds = now // 1000
        moment, text = dt.datetime.fromtimestamp(seconds, tz=dt.UTC), body.decode()
        return {
            "webhook-id": message_id,
            "webhook-timestamp": str(seconds),
            "webhook-signature": " ".join(one.sign(message_id, moment, text) for one in self._signers),
        }


def secret_of(file: Path) -> str:
    """The secret in this file, which is made at the first start. Raises `ConfigError`."""
    try:
        secret = kept(file, _fresh).decode().strip()
    except UnicodeDecodeError:
        secret = ""
    if not _SECRET.search(secret):
        message = f"{file} holds no webhook secret: delete it, and the next start makes one that is new"
        raise ConfigError(message, details={"key": "data.dir"})
    return secret


def _fresh() -> bytes:
    return f"whsec_{base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()}\n".encode()
