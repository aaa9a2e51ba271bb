"""Uploads: the name a file gets, where it may go, and what is refused."""

from __future__ import annotations

import io
import json
import uuid
from typing import TYPE_CHECKING

import pytest
from aiohttp import FormData
from PIL import Image

from tests.conformance import graphs
from tests.conformance.graphs import node

if TYPE_CHECKING:
    from tests.conformance.raw_client import Answer, Server
    from tests.support.comfyui import ComfyUIProcess


def picture(color: tuple[int, ...] = (1, 2, 3)) -> bytes:
    """A small PNG, with transparency when the color has four parts."""
    buffer = io.BytesIO()
    Image.new("RGB" if len(color) == 3 else "RGBA", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def new_name() -> str:
    """A file name nobody else uses."""
    return f"{uuid.uuid4().hex}.png"


async def upload(
    server: Server,
    name: str,
    content: bytes,
    *,
    path: str = "/upload/image",
    quoted: bool = False,
    **fields: str,
) -> Answer:
    """POST one file; `quoted` percent-encodes its name, as aiohttp does by default."""
    form = FormData(quote_fields=quoted)
    form.add_field("image", content, filename=name)
    for field, value in fields.items():
        form.add_field(field, value)
    return await server.request("POST", path, data=form)


@pytest.mark.parametrize("prefix", ["", "/api"])
async def test_an_upload_is_answered_with_its_place(server: Server, prefix: str) -> None:
    name = new_name()
    answer = await upload(server, name, picture(), path=f"{prefix}/upload/image")
    assert answer.status == 200
    assert answer.json() == {"name": name, "subfolder": "", "type": "input"}
    assert (await server.get("/view", params={"filename": name, "type": "input"})).body == picture()


async def test_equal_content_keeps_the_name_and_other_content_gets_the_next(server: Server) -> None:
    name = new_name()
    stem = name.removesuffix(".png")

    async def named(color: tuple[int, ...], overwrite: str = "") -> str:
        answer = await upload(server, name, picture(color), overwrite=overwrite)
        assert answer.status == 200
        return str(answer.json()["name"])

    assert await named((1, 1, 1)) == name
    assert await named((1, 1, 1)) == name
    assert await named((2, 2, 2)) == f"{stem} (1).png"
    assert await named((2, 2, 2)) == f"{stem} (1).png"
    assert await named((3, 3, 3)) == f"{stem} (2).png"
    assert await named((4, 4, 4), overwrite="true") == name
    assert await named((5, 5, 5), overwrite="1") == name
    assert await named((6, 6, 6), overwrite="True") == f"{stem} (3).png"
    found = await server.get("/view", params={"filename": name, "type": "input"})
    assert found.body == picture((5, 5, 5))


@pytest.mark.parametrize("place", ["input", "temp", "output"])
async def test_an_upload_can_go_to_each_folder(server: Server, place: str) -> None:
    name = new_name()
    answer = await upload(server, name, picture(), type=place)
    assert answer.json() == {"name": name, "subfolder": "", "type": place}
    assert (await server.get("/view", params={"filename": name, "type": place})).status == 200


async def test_an_unknown_folder_crashes_the_handler(server: Server) -> None:
    assert (await upload(server, new_name(), picture(), type="nope")).status == 500


async def test_subfolders_are_made(server: Server, process: ComfyUIProcess) -> None:
    name, folder = new_name(), f"made/{uuid.uuid4().hex}"
    answer = await upload(server, name, picture(), subfolder=folder)
    assert answer.json() == {"name": name, "subfolder": folder, "type": "input"}
    assert (process.input_dir / folder / name).read_bytes() == picture()


@pytest.mark.parametrize("folder", ["../..", "/etc", "a/../../b"])
async def test_a_subfolder_outside_is_refused(server: Server, folder: str) -> None:
    answer = await upload(server, new_name(), picture(), subfolder=folder)
    assert (answer.status, answer.body) == (400, b"")


@pytest.mark.parametrize(
    ("name", "status"),
    [("../../a.png", 400), ("no-such-folder/a.png", 500), ("/nowhere/a.png", 500), ("", 500)],
)
async def test_names_with_folders_are_refused(server: Server, name: str, status: int) -> None:
    assert (await upload(server, name, picture())).status == status


async def test_percent_encoded_names_are_kept_as_they_come(server: Server) -> None:
    stem = uuid.uuid4().hex
    for name, kept in (("../../{}.png", "..%2F..%2F{}.png"), ("ü{}.png", "%C3%BC{}.png")):
        answer = await upload(server, name.format(stem), picture(), quoted=True)
        assert answer.json()["name"] == kept.format(stem)


async def test_names_beyond_ascii_are_kept(server: Server) -> None:
    name = f"ü{new_name()}"
    assert (await upload(server, name, picture())).json()["name"] == name


async def test_content_is_not_looked_at(server: Server) -> None:
    name = new_name()
    assert (await upload(server, name, b"no picture")).status == 200
    graph = {
        "1": node("LoadImage", image=name),
        "9": node("SaveImage", images=["1", 0], filename_prefix=graphs.prefix()),
    }
    run = await server.run(graph)
    (error,) = run.of_kind("execution_error")
    assert (error["node_id"], error["exception_type"]) == ("1", "PIL.UnidentifiedImageError")


async def test_a_body_without_the_file_field_is_refused(server: Server) -> None:
    form = FormData()
    form.add_field("file", picture(), filename=new_name())
    for options in ({"data": form}, {"data": b"x"}, {"json": {"image": "x"}}):
        answer = await server.request("POST", "/upload/image", **options)
        assert (answer.status, answer.body) == (400, b"")


@pytest.mark.parametrize("spelling", ["{name}", "{name} [input]", "{folder}/{name}"])
async def test_an_uploaded_file_is_loaded_by_each_of_its_names(server: Server, spelling: str) -> None:
    name, folder = new_name(), uuid.uuid4().hex
    await upload(server, name, picture((9, 8, 7)), subfolder=folder if "folder" in spelling else "")
    graph = {
        "1": node("LoadImage", image=spelling.format(name=name, folder=folder)),
        "9": node("SaveImage", images=["1", 0], filename_prefix=graphs.prefix()),
    }
    run = await server.run(graph)
    (item,) = run.outputs["9"]["images"]
    with Image.open(io.BytesIO((await server.view(item)).body)) as image:
        assert (image.size, image.convert("RGB").getpixel((0, 0))) == ((8, 8), (9, 8, 7))


async def test_a_saved_picture_can_be_loaded(server: Server) -> None:
    (item,) = (await server.run(graphs.picture())).outputs["9"]["images"]
    graph = {
        "1": node("LoadImage", image=f"{item['subfolder']}/{item['filename']} [output]"),
        "9": node("SaveImage", images=["1", 0], filename_prefix=graphs.prefix()),
    }
    assert (await server.run(graph)).verdict == "execution_success"


async def test_paths_out_of_the_folder_are_loaded_only_by_older_servers(
    server: Server, process: ComfyUIProcess
) -> None:
    outside = process.folder / new_name()
    outside.write_bytes(picture())
    for name in (str(outside), f"../{outside.name}"):
        graph = {
            "1": node("LoadImage", image=name),
            "9": node("SaveImage", images=["1", 0], filename_prefix=graphs.prefix()),
        }
        answer = await server.post("/prompt", {"prompt": graph})
        if server.facts.modern:
            assert answer.status == 400
            (error,) = answer.json()["node_errors"]["1"]["errors"]
            assert error["type"] == "custom_validation_failed"
        else:
            assert answer.status == 200
            entry = await server.finished(answer.json()["prompt_id"])
            assert entry["status"]["status_str"] == "success"


async def test_a_mask_becomes_the_alpha_of_its_original(server: Server) -> None:
    original, mask = new_name(), new_name()
    await upload(server, original, picture((10, 20, 30)))
    reference = json.dumps({"filename": original, "subfolder": "", "type": "input"})
    masked = picture((0, 0, 0, 77))
    answer = await upload(server, mask, masked, path="/upload/mask", original_ref=reference)
    assert answer.json() == {"name": mask, "subfolder": "", "type": "input"}
    found = await server.get("/view", params={"filename": mask, "type": "input"})
    with Image.open(io.BytesIO(found.body)) as image:
        assert image.getpixel((0, 0)) == (10, 20, 30, 77)


async def test_a_mask_of_nothing_is_accepted_and_not_written(server: Server) -> None:
    mask = new_name()
    reference = json.dumps({"filename": new_name(), "subfolder": "", "type": "input"})
    masked = picture((0, 0, 0, 77))
    answer = await upload(server, mask, masked, path="/upload/mask", original_ref=reference)
    assert answer.status == 200
    assert (await server.get("/view", params={"filename": mask, "type": "input"})).status == 404
    assert (await upload(server, new_name(), masked, path="/upload/mask")).status == 500


async def test_a_body_over_the_limit_is_refused(server: Server) -> None:
    limit = (await server.get("/features")).json()["max_upload_size"]
    answer = await server.request("POST", "/prompt", data=io.BytesIO(b"x" * (int(limit) + 1)))
    assert answer.status == 413
    assert answer.headers["Content-Type"].startswith("text/plain")
