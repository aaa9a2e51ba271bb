"""Uploads follow ComfyUI's naming rules."""

from __future__ import annotations

import io
import json
from typing import Any

import aiohttp
import pytest
from PIL import Image

from tests.conformance.raw_client import Answer
from tests.simulator.rig import Rig, rig


def png(mode: str, color: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (4, 4), color).save(buffer, "PNG")  # type: ignore[arg-type]  # colors of several modes
    return buffer.getvalue()


async def send(running: Rig, path: str, data: bytes, name: str = "a.png", **fields: Any) -> Answer:
    form = aiohttp.FormData(quote_fields=False)
    form.add_field("image", data, filename=name)
    for field, value in fields.items():
        form.add_field(field, value)
    return await running.server.post(path, data=form)


async def test_names_are_kept_shared_or_numbered() -> None:
    async with rig() as running:
        names = [
            (await send(running, "/upload/image", data, **fields)).json()["name"]
            for data, fields in (
                (b"1", {}),
                (b"1", {}),
                (b"2", {}),
                (b"3", {}),
                (b"2", {}),
                (b"9", {"overwrite": "true"}),
                (b"8", {"overwrite": "True"}),
            )
        ]
        assert names == ["a.png", "a.png", "a (1).png", "a (2).png", "a (1).png", "a.png", "a (3).png"]


@pytest.mark.parametrize(
    ("fields", "name", "status"),
    [
        ({"type": "nope"}, "a.png", 500),
        ({"subfolder": "../.."}, "a.png", 400),
        ({}, "../../a.png", 400),
        ({}, "missing/a.png", 500),
        ({"subfolder": "s1/s2", "type": "temp"}, "a.png", 200),
    ],
)
async def test_bad_places_are_refused(fields: dict[str, str], name: str, status: int) -> None:
    async with rig() as running:
        assert (await send(running, "/upload/image", b"1", name, **fields)).status == status


async def test_nothing_uploaded_is_400() -> None:
    async with rig() as running:
        assert (await running.server.post("/upload/image", data=aiohttp.FormData({"x": "y"}))).status == 400
        assert (await running.server.post("/upload/image", {})).status == 400


async def test_a_mask_becomes_the_alpha_of_its_original() -> None:
    async with rig() as running:
        await send(running, "/upload/image", png("RGB", "red"), "original.png")
        reference = {"filename": "original.png", "subfolder": "", "type": "input"}
        mask = png("RGBA", (0, 0, 0, 77))
        answer = await send(running, "/upload/mask", mask, "masked.png", original_ref=json.dumps(reference))
        assert answer.json()["name"] == "masked.png"
        seen = await running.server.get("/view?filename=masked.png&type=input")
        with Image.open(io.BytesIO(seen.body)) as picture:
            assert picture.getpixel((0, 0)) == (255, 0, 0, 77)


@pytest.mark.parametrize(
    "reference",
    [
        {"filename": "missing.png"},
        {"filename": "../x.png", "type": "input"},
        {"filename": "x.png", "type": "nope"},
        {"filename": "x.png", "type": "input", "subfolder": "../.."},
    ],
)
async def test_a_mask_without_its_original_writes_nothing(reference: dict[str, str]) -> None:
    async with rig() as running:
        mask = png("RGBA", (0, 0, 0, 0))
        answer = await send(running, "/upload/mask", mask, "m.png", original_ref=json.dumps(reference))
        assert answer.status == 200
        assert (await running.server.get("/view?filename=m.png&type=input")).status == 404


async def test_a_mask_without_a_reference_is_500() -> None:
    async with rig() as running:
        assert (await send(running, "/upload/mask", png("RGBA", (0, 0, 0, 0)))).status == 500
