"""A customer of the contract server for Cloudflare Images: images, limit, and what goes wrong today."""

import math
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

MEGABYTE: Final = 1024 * 1024

Kind = Literal["404", "429", "500", "502", "reset", "lost", "cut", "slow", "echo", "endless", "empty"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to one call instead of its answer."""

    kind: Kind
    seconds: float | None = None
    """Of `retry-after`, or of waiting."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """One hosted image; its bytes are a file."""

    path: Path
    content_type: str
    filename: str
    metadata: dict[str, Any]
    uploaded: str


@dataclass(kw_only=True)
class Account:
    """One customer, with a token of their own; tests turn its switches. Lives as long as its server."""

    delivery: str
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    token: str = field(default_factory=lambda: secrets.token_urlsafe(30))
    hash: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    variants: list[str] = field(default_factory=lambda: ["public", "thumbnail"])
    images: dict[str, Image] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    """Each call that reached the account, as `METHOD path-after-v1`."""
    faults: deque[Fault] = field(default_factory=deque)
    largest: int = 10 * MEGABYTE
    capacity: int = 100_000
    allowed: int = 1200
    window: float = 300.0
    now: Callable[[], float] = time.monotonic
    enabled: bool = True
    """Whether the account has Cloudflare Images at all."""
    plain_errors: bool = False
    """Whether a refused upload is answered with a line of text, as the real service is known to."""
    originals: bytes | None = None
    """What is sent for every original, if set: "a near-lossless version"."""
    unsized: bool = False
    """Whether originals are sent without a Content-Length."""
    _made: deque[float] = field(default_factory=deque)
    _blocked_until: float = -math.inf

    def fail(self, kind: Kind, times: int = 1, seconds: float | None = None) -> None:
        """Let the next calls go wrong."""
        self.faults.extend([Fault(kind=kind, seconds=seconds)] * times)

    def admit(self) -> float | None:
        """Count a call; the seconds to wait where it is one too many, which blocks the whole window."""
        now = self.now()
        while self._made and self._made[0] <= now - self.window:
            self._made.popleft()
        if now >= self._blocked_until and len(self._made) >= self.allowed:
            self._blocked_until = now + self.window
        if now < self._blocked_until:
            return self._blocked_until - now
        self._made.append(now)
        return None

    def result(self, image_id: str) -> dict[str, Any]:
        """An image as the API shows it."""
        image = self.images[image_id]
        return {
            "id": image_id,
            "filename": image.filename,
            "meta": image.metadata,
            "uploaded": image.uploaded,
            "requireSignedURLs": False,
            "variants": [f"{self.delivery}/{self.hash}/{image_id}/{name}" for name in self.variants],
        }


class Refused(Exception):
    """An answer that is an error of the API."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
