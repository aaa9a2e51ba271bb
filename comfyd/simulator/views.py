"""GET /view: files of the three folders, whole, in ranges or re-encoded.

Path rules, headers and their changes in 0.33.0 are ComfyUI's. It never serves anything outside its folders.
"""

from __future__ import annotations

import asyncio
import io
import mimetypes
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web
from PIL import Image

from comfyd.simulator import timing

if TYPE_CHECKING:
    from comfyd.simulator.faults import Faults
    from comfyd.simulator.folders import Folders
    from comfyd.simulator.options import Flavor

DOWNLOAD_ONLY = {
    "text/html",
    "text/html-sandboxed",
    "application/xhtml+xml",
    "text/javascript",
    "text/css",
}
SCRIPT = "application/javascript; charset=utf-8"  # what ComfyUI makes of .js
ACTIVE = DOWNLOAD_ONLY | {SCRIPT, "image/svg+xml", "text/xml", "application/xml"}  # 0.33.0


class Views:
    """The handler of one server. Lives as long as the simulator."""

    def __init__(self, folders: Folders, flavor: Flavor, faults: Faults) -> None:
        self._folders = folders
        self._flavor = flavor
        self._faults = faults

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """GET /view."""
        query = request.query
        if "filename" not in query:
            return web.Response(status=404)
        if self._flavor.jobs_api and query["filename"].startswith("blake3:"):
            return web.Response(status=404)  # an asset by its hash: assets are off
        name, root = self._folders.split_annotated(query["filename"])
        if not name or name.startswith("/") or ".." in name:
            return web.Response(status=400)
        root = root or self._folders.roots.get(query.get("type", "output"))
        if root is None:
            return web.Response(status=400)
        folder = self._folders.inside(root, query.get("subfolder", ""))
        if folder is None:
            return web.Response(status=403)
        path = folder / Path(name).name
        if not path.is_file():
            return web.Response(status=404)
        if self._faults.view != "none" and self._faults.use("view_faults_left"):
            return await self._faulty(request, path)
        return await self._serve(request, path)

    async def _serve(self, request: web.Request, path: Path) -> web.StreamResponse:
        channel = request.query.get("channel", "")
        named = {"Content-Disposition": f'filename="{path.name}"'}
        if "preview" in request.query:
            kind, data = await asyncio.to_thread(reencoded, path, request.query["preview"], channel)
            return web.Response(body=data, content_type=kind, headers=named)
        if channel in {"rgb", "a"}:
            data = await asyncio.to_thread(one_channel, path, channel)
            return web.Response(body=data, content_type="image/png", headers=named)
        return web.FileResponse(path, headers=self._headers(request, path.name))

    def _headers(self, request: web.Request, name: str) -> dict[str, str]:
        kind = SCRIPT if name.endswith(".js") else mimetypes.guess_type(name)[0] or "application/octet-stream"
        headers = {"Content-Disposition": f'filename="{name}"'}
        if not self._flavor.hardened_view:
            return headers | {"Content-Type": "application/octet-stream" if kind in DOWNLOAD_ONLY else kind}
        headers["X-Content-Type-Options"] = "nosniff"
        inline_svg = kind == "image/svg+xml" and request.headers.get("Sec-Fetch-Dest") == "image"
        if kind in ACTIVE:
            headers |= {"Cache-Control": "no-store", "Vary": "Sec-Fetch-Dest"}
            if not inline_svg:
                kind = "application/octet-stream"
                headers["Content-Disposition"] = f'attachment; filename="{name}"'
        return headers | {"Content-Type": kind}

    async def _faulty(self, request: web.Request, path: Path) -> web.StreamResponse:
        data = await asyncio.to_thread(path.read_bytes)
        fault = self._faults.view
        if fault == "missing":
            return web.Response(status=404)
        if fault == "error":
            return web.Response(status=500, text="500 Internal Server Error")
        if fault == "short":  # whole by HTTP's measure, and half of the file is not there
            return web.Response(body=data[: len(data) // 2], headers=self._headers(request, path.name))
        if fault == "garbled":
            start, end = len(data) * 6 // 10, len(data) * 9 // 10
            garbled = data[:start] + bytes(end - start) + data[end:]
            return web.Response(body=garbled, headers=self._headers(request, path.name))
        response = web.StreamResponse(headers=self._headers(request, path.name))
        response.content_length = len(data)
        await response.prepare(request)
        await response.write(data[: len(data) // 2])
        if fault == "stall":
            while self._faults.view == "stall" and request.transport is not None:
                await timing.pause(0.02)
        if request.transport is not None:
            request.transport.abort()  # the connection ends before Content-Length bytes came
        return response


def reencoded(path: Path, preview: str, channel: str) -> tuple[str, bytes]:
    """A picture as WEBP or JPEG: `preview` is like `webp;50`. Raises on anything else than a picture."""
    kind, *rest = preview.split(";")
    if kind not in {"webp", "jpeg"} or "a" in channel:
        kind = "webp"
    quality = int(rest[-1]) if rest and rest[-1].isdigit() else 90
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        converted = picture.convert("RGB") if kind == "jpeg" or channel == "rgb" else picture
        converted.save(buffer, kind, quality=quality)
    return f"image/{kind}", buffer.getvalue()


def one_channel(path: Path, channel: str) -> bytes:
    """The colours without alpha ("rgb"), or the alpha alone ("a"), as PNG."""
    with Image.open(path) as picture:
        if channel == "rgb":
            result = picture.convert("RGB")
        else:
            has_alpha = picture.mode == "RGBA"
            alpha = picture.getchannel("A") if has_alpha else Image.new("L", picture.size, 255)
            result = Image.new("RGBA", picture.size)
            result.putalpha(alpha)
    buffer = io.BytesIO()
    result.save(buffer, "PNG")
    return buffer.getvalue()
