"""What a browser sends on behalf of another site is refused; everybody else is served."""

import aiohttp
import msgspec
import pytest

from comfyd.config import Config, ServerConfig
from tests.api.conftest import Edge, serving
from tests.support.values import GRAPH

FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
]


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize("path", ["/api/tasks", "/api/workflows/noise-image/run", "/api/comfyui/queue"])
async def test_a_foreign_page_cannot_change_anything(edge: Edge, headers: dict[str, str], path: str) -> None:
    status, body = await edge.call("POST", path, json={"workflow": GRAPH}, headers=headers)
    assert (status, body["error"]["code"]) == (403, "foreign_origin")
    assert sum((await edge.state.store.counts()).values()) == 0


async def test_a_foreign_page_cannot_open_a_socket(edge: Edge) -> None:
    url = f"{edge.base}/api/tasks/5e1f6c1e-0000-4000-8000-000000000001/ws"
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        await edge.http.ws_connect(url, headers={"Origin": "http://evil.example"})
    assert refusal.value.status == 403


def own_origins(base: str) -> list[dict[str, str]]:
    return [{"Origin": base}, {}, {"Sec-Fetch-Site": "same-origin", "Origin": base}]


async def test_comfyds_own_pages_and_programs_are_served(edge: Edge) -> None:
    for headers in own_origins(edge.base):
        status, _ = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH}, headers=headers)
        assert status == 202


async def test_a_link_from_another_site_can_be_followed(edge: Edge) -> None:
    status, _ = await edge.call("GET", "/api/health", headers={"Sec-Fetch-Site": "cross-site"})
    assert status == 200


async def test_the_public_url_is_an_own_origin(config: Config) -> None:
    server = ServerConfig(public_url="https://images.example.com")
    async with serving(msgspec.structs.replace(config, server=server)) as edge:
        headers = {"Origin": "https://images.example.com"}
        status, _ = await edge.call("POST", "/api/tasks", json={"workflow": GRAPH}, headers=headers)
        assert status == 202
