"""POST /upload/image and /upload/mask: files into the input folder under ComfyUI's naming rules.

The bytes are not looked at. Faulty form data raises where ComfyUI's does, which is a 500 there too.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web
from PIL import Image

from comfyd.simulator.sockets import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from comfyd.simulator.folders import Folders


class Uploads:
    """The handlers of one server. Lives as long as the simulator."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders

    async def image(self, request: web.Request) -> web.Response:
        """POST /upload/image."""
        with closing_files(await request.post()) as form:
            return self._store(form, write)

    async def mask(self, request: web.Request) -> web.Response:
        """POST /upload/mask: the picture of `original_ref` with the alpha of the uploaded one."""
        with closing_files(await request.post()) as form:

            def merge(data: bytes, path: Path) -> None:
                self._merge(json.loads(form["original_ref"]), data, path)

            return self._store(form, merge)

    def _store(self, form: dict[str, Any], writer: Callable[[bytes, Path], None]) -> web.Response:
        image = form.get("image")
        if not image:
            return web.Response(status=400)
        file, name = image.file, image.filename  # plain text instead of a file raises: 500
        kind = form.get("type", "input")
        root = self._folders.roots[kind]  # an unknown type raises: 500
        if not name:
            return web.Response(status=400)
        subfolder = form.get("subfolder", "")
        folder = root / os.path.normpath(subfolder)
        if self._folders.inside(root, os.path.join(subfolder, name)) is None:  # noqa: PTH118  # not yet a path
            return web.Response(status=400)
        folder.mkdir(parents=True, exist_ok=True)
        data = file.read()
        name, wanted = chosen_name(folder, name, data, overwrite=form.get("overwrite") in {"true", "1"})
        if wanted:
            writer(data, folder / name)
        answer = {"name": name, "subfolder": subfolder, "type": kind}
        return web.Response(body=encode(answer), content_type="application/json", charset="utf-8")

    def _merge(self, reference: dict[str, Any], data: bytes, path: Path) -> None:
        """Write the referenced picture with the alpha of `data`; a missing one writes nothing."""
        name, root = self._folders.split_annotated(reference["filename"])
        root = root or self._folders.roots.get(reference.get("type", "output"))
        if not name or name.startswith("/") or ".." in name or root is None:
            return
        folder = self._folders.inside(root, reference.get("subfolder", ""))
        original = None if folder is None else folder / name
        if original is None or not original.is_file():
            return
        with Image.open(original) as file, Image.open(io.BytesIO(data)) as mask:
            merged = file.convert("RGBA")
            merged.putalpha(mask.convert("RGBA").getchannel("A"))
        merged.save(path, compress_level=4)


@contextmanager
def closing_files(form: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The form's fields; large files lie in temporary ones, which end with the block."""
    try:
        yield dict(form)
    finally:
        for field in form.values():
            if isinstance(field, web.FileField):
                field.file.close()


def write(data: bytes, path: Path) -> None:
    """Write a file; a folder that is missing inside the name raises: 500."""
    path.write_bytes(data)


def chosen_name(folder: Path, name: str, data: bytes, *, overwrite: bool) -> tuple[str, bool]:
    """The name to store under, and whether to write: same name and bytes are not stored twice."""
    if overwrite:
        return name, True
    stem, extension = os.path.splitext(name)  # noqa: PTH122  # the name may hold folders
    digest = hashlib.sha256(data).digest()
    number = 1
    candidate = name
    while (folder / candidate).exists():
        if hashlib.sha256((folder / candidate).read_bytes()).digest() == digest:
            return candidate, False
        candidate = f"{stem} ({number}){extension}"
        number += 1
    return candidate, True
