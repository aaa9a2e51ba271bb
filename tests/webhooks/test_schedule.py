"""What follows from each answer, and when the next try is."""

import email.utils

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.deliveries import DeliveryStatus
from comfyd.webhooks.schedule import LONGEST_WISH_MS, RETRIES_MS, Answer, judge, wished_ms

NOW = 1_700_000_000_000
HOUR = 3_600_000


def refusal(status: int = 500, **facts: str) -> Answer:
    return Answer(status=status, error=f"it answered {status}", retry_after=facts.get("retry_after"))


def test_a_2xx_is_delivered() -> None:
    assert judge(Answer(status=204), 0, NOW, 0.0).status is DeliveryStatus.DELIVERED


@pytest.mark.fault(31)
def test_410_ends_it_at_once() -> None:
    verdict = judge(refusal(410, retry_after="5"), 0, NOW, 0.0)
    assert (verdict.status, verdict.wait_ms) == (DeliveryStatus.GONE, None)


def test_the_schedule_is_the_one_that_is_written_down() -> None:
    waits = [judge(refusal(), tried, NOW, 0.0).wait_ms for tried in range(len(RETRIES_MS))]
    assert [wait / 1000 for wait in waits if wait is not None] == [
        5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400
    ]  # fmt: skip
    assert judge(refusal(), len(RETRIES_MS), NOW, 0.0).status is DeliveryStatus.FAILED


def test_chance_adds_a_tenth_at_most() -> None:
    assert judge(refusal(), 1, NOW, 1.0).wait_ms == 330_000


def test_what_is_hopeless_fails_at_once() -> None:
    assert judge(Answer(error="no url", hopeless=True), 0, NOW, 0.0).status is DeliveryStatus.FAILED


@pytest.mark.fault(31)
@pytest.mark.parametrize(
    ("retry_after", "wait_ms"),
    [
        ("3600", HOUR),
        (" 3600 ", HOUR),
        ("1", 5_000),
        ("0", 5_000),
        ("-5", 5_000),
        ("999999999", LONGEST_WISH_MS),
        ("9" * 5000, 5_000),
        ("soon", 5_000),
        ("", 5_000),
        ("٣٦٠٠", 5_000),
        (email.utils.formatdate(NOW / 1000 + 7200, usegmt=True), 2 * HOUR),
        (email.utils.formatdate(NOW / 1000 + 7200), 2 * HOUR),
        (email.utils.formatdate(NOW / 1000 + 10 * 86400, usegmt=True), LONGEST_WISH_MS),
        (email.utils.formatdate(NOW / 1000 - 7200, usegmt=True), 5_000),
        ("Fri, 31 Dec 9999 23:59:59 -2300", LONGEST_WISH_MS),
        ("Mon, 01 Jan 0001 00:00:00 +2300", 5_000),
    ],
)
def test_retry_after_is_kept_to_where_it_is_later_and_not_too_late(retry_after: str, wait_ms: int) -> None:
    verdict = judge(refusal(429, retry_after=retry_after), 0, NOW, 0.0)
    assert (verdict.status, verdict.wait_ms) == (DeliveryStatus.PENDING, wait_ms)


def test_a_wish_does_not_outlive_the_schedule() -> None:
    verdict = judge(refusal(503, retry_after="60"), len(RETRIES_MS), NOW, 0.0)
    assert verdict.status is DeliveryStatus.FAILED


@given(st.text() | st.from_regex(r"[A-Z][a-z]{2}, \d{1,3} [A-Z][a-z]{2} \d{1,5} [\d:]{0,9} ?[-+\w]{0,6}"))
def test_no_retry_after_breaks_anything(text: str) -> None:
    assert wished_ms(text, NOW) >= 0
