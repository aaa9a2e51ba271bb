"""What follows from one try to deliver: delivered, gone, failed, or when to try again; asks no clock."""

import datetime as dt
import email.utils
import re
from typing import Final

import msgspec

from comfyd.deliveries import DeliveryStatus

_SECOND: Final = 1_000
_MINUTE: Final = 60 * _SECOND
_HOUR: Final = 60 * _MINUTE

RETRIES_MS: Final = (
    5 * _SECOND,
    5 * _MINUTE,
    30 * _MINUTE,
    2 * _HOUR,
    5 * _HOUR,
    10 * _HOUR,
    14 * _HOUR,
    20 * _HOUR,
    24 * _HOUR,
)
"""The pause after the first try that failed, after the second, and so on: a bit more than three days."""
SPREAD: Final = 0.1
"""What chance adds to a pause, at most, so that what failed together does not come back together."""
LONGEST_PAUSE_MS: Final = round(RETRIES_MS[-1] * (1 + SPREAD))
LONGEST_WISH_MS: Final = 24 * _HOUR
"""The latest that a receiver's `Retry-After` puts off the next try."""

_GONE: Final = 410
_SECONDS: Final = re.compile(r"[0-9]{1,9}", re.ASCII)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one POST."""

    status: int | None = None
    """The receiver's HTTP status; None where it gave none."""
    error: str | None = None
    """Why that does not count, in one line; None for a 2xx."""
    retry_after: str | None = None
    """The header as it came."""
    hopeless: bool = False
    """Whether no other try can do better."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of the delivery."""

    status: DeliveryStatus
    wait_ms: int | None = None
    """How long until the next try; None unless it stays pending."""


def judge(answer: Answer, tried: int, now: int, jitter: float) -> Verdict:
    """What follows from the answer to a try before which there were so many others in this round.

    `now` is the wall clock's, for a `Retry-After` that is a date; `jitter` is in 0..1.
    """
    if answer.error is None:
        return Verdict(status=DeliveryStatus.DELIVERED)
    if answer.status == _GONE:
        return Verdict(status=DeliveryStatus.GONE)
    if answer.hopeless or tried >= len(RETRIES_MS):
        return Verdict(status=DeliveryStatus.FAILED)
    pause = round(RETRIES_MS[tried] * (1 + SPREAD * jitter))
    wish = 0 if answer.retry_after is None else wished_ms(answer.retry_after, now)
    return Verdict(status=DeliveryStatus.PENDING, wait_ms=max(pause, min(wish, LONGEST_WISH_MS)))


def wished_ms(retry_after: str, now: int) -> int:
    """How long a `Retry-After` in seconds or as a date asks to wait; 0 for one that is past or is neither."""
    text = retry_after.strip()
    if _SECONDS.fullmatch(text):
        return int(text) * _SECOND
    try:
        moment = email.utils.parsedate_to_datetime(text)
        if moment.tzinfo is None:  # `-0000`: UTC, but nobody says where
            moment = moment.replace(tzinfo=dt.UTC)
        return max(round(moment.timestamp() * 1000) - now, 0)
    except (ValueError, OverflowError):
        return 0
