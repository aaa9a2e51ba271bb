"""Requests of foreign pages are refused as ComfyUI refuses them."""

from __future__ import annotations

import pytest

from comfyd.simulator.options import FLAVORS
from comfyd.simulator.origin import refused
from tests.simulator.rig import rig

CLASSIC, MODERN = FLAVORS["0.3.75"], FLAVORS["0.33"]


@pytest.mark.parametrize(
    ("host", "origin", "expected"),
    [
        ("127.0.0.1:1", "http://127.0.0.1:1", False),
        ("127.0.0.1:1", "http://127.0.0.1", False),
        ("127.0.0.1:1", "null", False),
        ("127.0.0.1:1", "http://localhost:1", True),
        ("127.0.0.1:1", "http://evil.example", True),
        ("localhost:1", "http://localhost:2", True),
        ("comfy.example", "http://anything.example", False),
        (":1", "http://anything.example", False),
    ],
)
def test_a_loopback_host_wants_its_own_origin(host: str, origin: str, *, expected: bool) -> None:
    assert refused({"Host": host, "Origin": origin}, CLASSIC) is expected


def test_only_the_modern_flavor_minds_cross_site_requests() -> None:
    headers = {"Host": "a", "Sec-Fetch-Site": "cross-site"}
    assert refused(headers, MODERN)
    assert not refused(headers, CLASSIC)


async def test_a_refused_request_is_an_empty_403() -> None:
    async with rig() as running:
        answer = await running.server.get("/queue", headers={"Origin": "http://evil.example"})
        assert (answer.status, answer.body) == (403, b"")
