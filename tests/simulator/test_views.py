"""GET /view serves files under ComfyUI's rules and can be made to serve them badly."""

from __future__ import annotations

import asyncio
import io

import aiohttp
import pytest
from PIL import Image

from tests.simulator.rig import MODERN, Rig, rig


async def upload(running: Rig, name: str, data: bytes) -> None:
    form = aiohttp.FormData()
    form.add_field("image", data, filename=name)
    assert (await running.server.post("/upload/image", data=form)).status == 200


async def test_a_short_file_looks_whole_to_http() -> None:
    async with rig() as running:
        item = await running.image_item()
        whole = (await running.server.view(item)).body
        running.simulator.faults.view = "short"
        running.simulator.faults.view_faults_left = 1
        assert (await running.server.view(item)).body == whole[: len(whole) // 2]
        assert (await running.server.view(item)).body == whole


async def test_a_cut_file_breaks_the_connection() -> None:
    async with rig() as running:
        item = await running.image_item()
        running.simulator.faults.view = "cut"
        with pytest.raises(aiohttp.ClientPayloadError):
            await running.server.view(item)


async def test_a_stalled_file_stops_in_the_middle() -> None:
    async with rig() as running:
        item = await running.image_item()
        running.simulator.faults.view = "stall"
        with pytest.raises(asyncio.TimeoutError):
            await running.server.get("/view", params=item, timeout=aiohttp.ClientTimeout(total=0.3))
        running.simulator.faults.view = "none"
        assert (await running.server.view(item)).status == 200


@pytest.mark.parametrize(("fault", "status"), [("missing", 404), ("error", 500)])
async def test_a_file_can_be_refused(fault: str, status: int) -> None:
    async with rig() as running:
        item = await running.image_item()
        running.simulator.faults.change({"view": fault})
        assert (await running.server.view(item)).status == status


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 404),
        ("filename=", 400),
        ("filename=/etc/passwd", 400),
        ("filename=a..b.png", 400),
        ("filename=a.png&type=nope", 400),
        ("filename=a.png&subfolder=../..", 403),
        ("filename=a.png", 404),
        ("filename=blake3:00", 404),
    ],
)
async def test_paths_are_checked(query: str, status: int) -> None:
    async with rig(flavor=MODERN) as running:
        assert (await running.server.get(f"/view?{query}")).status == status


@pytest.mark.parametrize(
    ("query", "kind"),
    [
        ("preview=webp;50", "image/webp"),
        ("preview=jpeg", "image/jpeg"),
        ("preview=png", "image/webp"),
        ("preview=jpeg&channel=a", "image/webp"),
        ("preview=webp&channel=rgb", "image/webp"),
        ("channel=rgb", "image/png"),
        ("channel=a", "image/png"),
    ],
)
async def test_pictures_are_reencoded(query: str, kind: str) -> None:
    async with rig() as running:
        for name, mode in (("plain.png", "RGB"), ("clear.png", "RGBA")):
            buffer = io.BytesIO()
            Image.new(mode, (20, 10), "red").save(buffer, "PNG")
            await upload(running, name, buffer.getvalue())
            answer = await running.server.get(f"/view?filename={name}&type=input&{query}")
            assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
            with Image.open(io.BytesIO(answer.body)) as picture:
                assert picture.size == (20, 10)


async def test_a_text_cannot_be_reencoded() -> None:
    async with rig() as running:
        await upload(running, "a.txt", b"text")
        assert (await running.server.get("/view?filename=a.txt&type=input&preview=webp")).status == 500


@pytest.mark.parametrize(
    ("name", "classic", "modern"),
    [
        ("a.html", "application/octet-stream", "application/octet-stream"),
        ("a.svg", "image/svg+xml", "application/octet-stream"),
        ("a.txt", "text/plain", "text/plain"),
        ("a.zzz", "application/octet-stream", "application/octet-stream"),
        ("a.js", "application/javascript; charset=utf-8", "application/octet-stream"),
    ],
)
async def test_content_types_by_flavor(name: str, classic: str, modern: str) -> None:
    for flavor, expected in (("0.3.75", classic), (MODERN, modern)):
        async with rig(flavor=flavor) as running:
            await upload(running, name, b"<svg/>")
            headers = (await running.server.get(f"/view?filename={name}&type=input")).headers
            assert headers["Content-Type"] == expected
            assert headers.get("X-Content-Type-Options") == (None if flavor == "0.3.75" else "nosniff")


async def test_the_modern_flavor_shows_svg_to_image_elements() -> None:
    async with rig(flavor=MODERN) as running:
        await upload(running, "a.svg", b"<svg/>")
        answer = await running.server.get(
            "/view?filename=a.svg&type=input", headers={"Sec-Fetch-Dest": "image"}
        )
        assert answer.headers["Content-Type"] == "image/svg+xml"
        assert answer.headers["Content-Disposition"] == 'filename="a.svg"'
