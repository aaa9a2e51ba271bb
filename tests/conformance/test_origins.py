"""Which requests a server refuses because of where they come from: Host, Origin and Sec-Fetch-Site."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp
import pytest

if TYPE_CHECKING:
    from tests.conformance.raw_client import Server
    from tests.support.comfyui import ComfyUIProcess


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:{port}", "http://127.0.0.1:{port}", 200),
        ("127.0.0.1:{port}", "http://127.0.0.1", 200),
        ("127.0.0.1:{port}", "null", 200),
        ("127.0.0.1:{port}", "http://localhost:{port}", 403),
        ("127.0.0.1:{port}", "http://evil.example", 403),
        ("127.0.0.1:{port}", "http://127.0.0.1:1", 403),
        ("127.0.0.1", "http://127.0.0.1:1", 200),
        ("localhost:1", "http://localhost:2", 403),
        ("localhost:1", "http://localhost:1", 200),
        ("192.0.2.1:{port}", "http://evil.example", 200),
    ],
)
async def test_a_loopback_host_takes_only_its_own_origin(
    server: Server, process: ComfyUIProcess, host: str, origin: str, status: int
) -> None:
    headers = {"Host": host.format(port=process.port), "Origin": origin.format(port=process.port)}
    answer = await server.get("/queue", headers=headers)
    assert answer.status == status
    if status == 403:
        assert answer.body == b""
        assert (await server.get("/object_info/SaveImage", headers=headers)).status == 403
        assert (await server.post("/interrupt", {}, headers=headers)).status == 403


async def test_a_websocket_from_a_foreign_origin_is_refused(server: Server) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await server.http.ws_connect("/ws", headers={"Origin": "http://evil.example"})
    assert refused.value.status == 403


async def test_only_newer_servers_refuse_cross_site_requests(server: Server) -> None:
    expected = 403 if server.facts.modern else 200
    answer = await server.get("/queue", headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status == expected
    foreign = {"Host": "192.0.2.1", "Sec-Fetch-Site": "cross-site"}
    assert (await server.get("/queue", headers=foreign)).status == expected
    for site in ("same-site", "same-origin", "none", "Cross-Site"):
        assert (await server.get("/queue", headers={"Sec-Fetch-Site": site})).status == 200


async def test_options_is_answered_on_every_path(server: Server) -> None:
    answer = await server.request("OPTIONS", "/prompt")
    assert (answer.status, answer.body) == (200, b"")
