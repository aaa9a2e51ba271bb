"""The routes of assets: files that clients bring and outputs that jobs made; never a job.

The bytes of an upload go from the socket to the disk as they come. One that is refused or breaks off leaves
nothing.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from comfyd.api import files, requests
from comfyd.api.content import Content, answer
from comfyd.api.forms import Form, boundary_of
from comfyd.api.responses import JsonResponse, base_url
from comfyd.api.state import State, state_of
from comfyd.api.v2 import asset_fields
from comfyd.api.v2.asset_form import PARTS, AssetForm, read_form
from comfyd.api.v2.asset_views import asset_view, content_path
from comfyd.api.v2.errors import InvalidField
from comfyd.assets import Asset, OutputAsset
from comfyd.errors import (
    AssetNotFound,
    FileNotFound,
    HashMismatch,
    MalformedRequest,
    UnsupportedContent,
)
from comfyd.library import Library
from comfyd.storage.base import StoredFile


class HashRequest(msgspec.Struct, frozen=True, kw_only=True):
    """An asset over bytes that are here already."""

    hash: Annotated[str, Meta(description="`blake3:<hex>`.")]
    file_path: Annotated[
        str | None, Meta(description="A bare name, or one below `input/`; null takes over the last one.")
    ] = None
    tags: Annotated[tuple[str, ...] | None, Meta(description="Nothing is made of them.")] = None
    expires_in: Annotated[
        int | None, Meta(description="Seconds that it is kept: {} to {}.".format(*asset_fields.EXPIRES_IN))
    ] = None


async def upload(request: Request) -> Response:
    """`POST /api/v2/assets`."""
    state = state_of(request)
    state.room.check()
    async with AsyncExitStack() as stack:
        try:
            given = await _form(request, state, stack)
        except (MalformedRequest, UnsupportedContent) as exc:
            raise InvalidField(exc.message, details=exc.details) from exc
        blake3 = given.received.blake3
        if given.expected_blake3 not in {None, blake3}:
            raise HashMismatch(f"the bytes that came have the hash blake3:{blake3}: nothing was kept")
        asset, new = await state.library.add(
            given.received,
            content_type=given.content_type,
            file_path=given.file_path,
            keep_ms=given.keep_ms,
        )
    view = await asset_view(state, asset, base_url(request), created_new=new)
    return JsonResponse(view, 201 if new else 200)


async def _form(request: Request, state: State, stack: AsyncExitStack) -> AssetForm:
    body = requests.chunks(request, "upload_bytes")
    boundary = boundary_of(request.headers.get("content-type"))
    if boundary is None:
        raise MalformedRequest("send the file in multipart/form-data, with its content_type and file_path")
    return await read_form(Form(boundary, body, PARTS), state.uploads, stack)


async def from_hash(request: Request) -> Response:
    """`POST /api/v2/assets/from-hash`."""
    state = state_of(request)
    body = requests.parse_json(await requests.read_body(request))
    try:
        given = requests.converted(body, HashRequest)
        blake3 = asset_fields.blake3_of(given.hash, "hash")
        file_path = None if given.file_path is None else asset_fields.file_path(given.file_path)
        keep_ms = None if given.expires_in is None else asset_fields.keep_ms(given.expires_in)
    except MalformedRequest as exc:
        raise InvalidField(exc.message, details=exc.details) from exc
    asset, made = await state.library.mint(blake3, file_path=file_path, keep_ms=keep_ms)
    view = await asset_view(state, asset, base_url(request), created_new=False)
    return JsonResponse(view, 201 if made else 200)


async def by_hash(request: Request) -> Response:
    """`HEAD /api/v2/assets/by-hash/{hash}`: whether `from_hash` would find these bytes."""
    try:
        blake3 = asset_fields.blake3_of(request.path_params["hash"], "hash")
    except MalformedRequest:
        return Response(status_code=404)
    return Response(status_code=200 if await state_of(request).library.has(blake3) else 404)


async def read(request: Request) -> Response:
    """`GET /api/v2/assets/{asset_id}`."""
    state = state_of(request)
    asset = await state.library.find(_id(request))
    view = await asset_view(state, asset, base_url(request))
    return JsonResponse(view, headers={"Cache-Control": "no-store"})


async def delete(request: Request) -> Response:
    """`DELETE /api/v2/assets/{asset_id}`."""
    await state_of(request).library.delete(_id(request))
    return Response(status_code=204)


async def content(request: Request) -> Response:
    """`GET /api/v2/assets/{asset_id}/content`: the bytes, or where they are.

    Whoever may read the asset needs no signature, but one that is given has to be good.
    """
    state, asset_id, query = state_of(request), _id(request), request.query_params
    if "expires" in query or "signature" in query:
        state.links.check(content_path(asset_id), query.get("expires"), query.get("signature"))
    asset = await state.library.find(asset_id)
    if isinstance(asset, OutputAsset):
        elsewhere = await state.links.elsewhere(asset.artefact)
        if elsewhere is None:
            return files.served(request, asset.artefact)
        return Response(status_code=302, headers={"Location": elsewhere, "Cache-Control": "no-store"})
    said = Content(
        name=asset.file_path.rpartition("/")[2],
        content_type=asset.content_type,
        size_bytes=asset.size_bytes,
        digest=asset.blake3,
    )
    return answer(request, said, partial(_opened, state.library, asset))


@asynccontextmanager
async def _opened(library: Library, asset: Asset, start: int, length: int) -> AsyncIterator[StoredFile]:
    """Entering it raises `AssetNotFound` where the file is gone: the record is of no more use then."""
    async with AsyncExitStack() as stack:
        try:
            file = await stack.enter_async_context(library.open(asset, start, length))
        except FileNotFound as exc:
            raise AssetNotFound(exc.message) from exc
        yield file


def _id(request: Request) -> str:
    asset_id: str = request.path_params["asset_id"]
    return asset_id.lower()
