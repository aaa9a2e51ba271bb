"""Artefacts on Cloudflare Images: pictures, each under its key as custom id; never converts or resizes one.

Pages of developers.cloudflare.com that this follows: API reference "Upload an image", "Image details",
"Download image" (blob), "Delete image"; "Upload images" and "Limits and formats"; "Upload via custom path";
"Serve uploaded images" and "Serve images from custom domains".

What a url shows is a *variant*: resized and encoded as the account says. The bytes that were put come back
through `open`, of which Cloudflare says: "for larger images it can be a near-lossless version".
"""

import hashlib
import io
import re
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import IO, Any, Final
from urllib.parse import quote, unquote, urlsplit

import aiohttp
import msgspec

from comfyd.clock import Clock
from comfyd.config import CfImagesStorageConfig
from comfyd.errors import FileNotFound, NotAccepted, StorageError
from comfyd.storage.base import LocalFile, StoredFile
from comfyd.storage.cloudflare_api import (
    ACCOUNT,
    CALLS,
    FULL,
    TOKEN,
    CloudflareApi,
    FileForm,
    Reply,
    open_api,
)
from comfyd.storage.objects import object_name, public_url

ACCEPTED: Final = frozenset(
    {
        "image/png",
        "image/jpeg",
        "image/gif",
        "image/webp",
        "image/svg+xml",
        "image/heic",
        "image/heif",
        "image/avif",
    }
)
"""The kinds that "Upload images" lists, and AVIF, for which "Limits and formats" has a limit of its own."""
LARGEST: Final = 10 * 1024 * 1024
"""Bytes: "10 MB", read generously. Sides, areas and frames are left to Cloudflare, which answers."""
LONGEST_ID: Final = 1024

_EXISTS: Final = 5409
_PASSING: Final = frozenset({5408, 5415, 5433, 5450, FULL})
"""Codes of an upload that say nothing against the file: too slow, no form, aborted, broken off, no room."""
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_PROBE: Final = bytes.fromhex(
    "89504e470d0a1a0a 0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a4944415478da63f80f00010101001cb08c99 0000000049454e44ae426082"
)
"""A white pixel, as PNG."""


class _Image(msgspec.Struct, frozen=True):
    """What "Image details" says of an image, as far as it is needed."""

    variants: tuple[str, ...] = ()
    meta: Any = None

    @property
    def sha256(self) -> str | None:
        """What `_store` wrote down of the file."""
        return self.meta.get("sha256") if isinstance(self.meta, dict) else None


class CloudflareImages:
    """The images of one account. Made by `open_cloudflare_images`, which owns the connection.

    The API cannot replace an image: an older one under the same key is deleted first, so that for a moment
    there is none.
    """

    name = "cf_images"

    def __init__(self, api: CloudflareApi, variant: str, delivery_domain: str | None) -> None:
        self._api = api
        self._variant = variant
        self._domain = delivery_domain

    async def put(self, key: str, file: LocalFile) -> str:
        """See `Storage`. Returns the url of the configured variant.

        An image that is there already with the same digest is left as it is.
        """
        image_id = object_name("", key)
        if len(image_id) > LONGEST_ID or _UUID.fullmatch(image_id):
            raise NotAccepted(f"Cloudflare Images does not take the id {key}")
        if file.content_type not in ACCEPTED:
            raise NotAccepted(f"Cloudflare Images does not take {file.content_type}: {key}")
        if file.size_bytes > LARGEST:
            raise NotAccepted(f"Cloudflare Images takes at most 10 MB, {key} has {file.size_bytes} bytes")
        reply = await self._store(image_id, file.content_type, file.sha256, lambda: file.path.open("rb"))
        return self._location(f"cannot store {key}", reply)

    @asynccontextmanager
    async def open(self, key: str, start: int = 0, length: int | None = None) -> AsyncIterator[StoredFile]:
        """See `Storage`. What comes before `start` is read and dropped: the API promises no ranges."""
        what = f"cannot read {key}"
        async with AsyncExitStack() as stack:
            response = await self._blob(stack, what, key)
            size = response.content_length
            if size is None:  # it is not promised either: read once to know, and again to hand out
                size = sum([len(chunk) async for chunk in self._api.chunks(what, response)])
                response = await self._blob(stack, what, key)
            yield StoredFile(size_bytes=size, chunks=_part(self._api.chunks(what, response), start, length))

    async def delete(self, key: str) -> None:
        """See `Storage`. Cloudflare takes the image out of its caches too ("Delete image")."""
        what = f"cannot delete {key}"
        reply = await self._api.call(what, "DELETE", _path(key))
        if not reply.fine and not reply.missing:
            raise self._api.problem(what, reply)

    async def url(self, key: str, location: str | None) -> str | None:  # noqa: ARG002 - `location` has it
        """See `Storage`: the variant configured now, at Cloudflare's domain or one's own. Never expires."""
        if location is None:
            return None
        image = location.rpartition("/")[0]
        if self._domain is not None:
            image = public_url(self._domain, f"cdn-cgi/imagedelivery{unquote(urlsplit(image).path)}")
        return f"{image}/{self._variant}"

    async def ping(self) -> None:
        """See `Storage`."""
        key = f"comfyd-probe/{secrets.token_hex(8)}.png"
        digest = hashlib.sha256(_PROBE).hexdigest()
        reply = await self._store(key, "image/png", digest, lambda: io.BytesIO(_PROBE))
        try:
            self._location("cannot name a url", reply)
            async with self.open(key) as file:
                found = b"".join([chunk async for chunk in file.chunks])
        except FileNotFound as exc:
            raise StorageError("Cloudflare Images does not have what was just stored") from exc
        finally:
            await self.delete(key)
        if not found.startswith(_PROBE[:8]):
            raise StorageError("Cloudflare Images gives back something else than the PNG that was stored")

    async def _store(
        self, key: str, content_type: str, sha256: str, source: Callable[[], IO[bytes]]
    ) -> Reply:
        """Upload under a custom id, with the digest as metadata, which tells a repeat from a replacement."""
        what = f"cannot store {key}"
        upload = FileForm(
            fields={"id": key, "metadata": msgspec.json.encode({"sha256": sha256}).decode()},
            open=source,
            filename=key.rpartition("/")[2],
            content_type=content_type,
        )
        reply = await self._api.call(what, "POST", "", upload)
        if reply.status == 409 or _EXISTS in reply.codes:
            there = await self._api.call(what, "GET", _path(key))
            if there.fine and _image(there).sha256 == sha256:
                return there
            await self.delete(key)
            reply = await self._api.call(what, "POST", "", upload)
        if _is_about_the_file(reply):
            raise NotAccepted(f"{what}: Cloudflare Images does not take it: {self._api.words(reply)}")
        if not reply.fine:
            raise self._api.problem(what, reply)
        return reply

    def _location(self, what: str, reply: Reply) -> str:
        """The url of the configured variant, of those that the account has."""
        urls = {url.rpartition("/")[2]: url for url in _image(reply).variants}
        if self._variant not in urls:
            names = ", ".join(sorted(urls)) or "none"
            message = f"{what}: the account has no variant {self._variant!r}, it has: {names}"
            raise StorageError(message, details={"key": "storage.cf_images.variant"})
        return urls[self._variant]

    async def _blob(self, stack: AsyncExitStack, what: str, key: str) -> aiohttp.ClientResponse:
        """The original's bytes, to be read. Raises `FileNotFound`."""
        response = await self._api.answer(stack, what, "GET", f"{_path(key)}/blob")
        if response.status == 200:
            return response
        reply = await self._api.read(what, response)
        if reply.missing:
            raise FileNotFound(f"there is no file {key}")
        raise self._api.problem(what, reply)


@asynccontextmanager
async def open_cloudflare_images(
    config: CfImagesStorageConfig, clock: Clock, *, calls: int = CALLS, timeout: float = 300.0
) -> AsyncIterator[CloudflareImages]:
    """Open the images of the configured account; nothing is sent yet. Raises `ConfigError`.

    `calls` are allowed in five minutes; `timeout` is in seconds, for an upload as for a silence.
    """
    async with open_api(config, clock, calls, timeout) as api:
        yield CloudflareImages(api, config.variant, config.delivery_domain)


def _path(key: str) -> str:
    """An id is one segment of the path, as Cloudflare's own client libraries send it.

    Raises `FileNotFound` for what is no key.
    """
    return f"/{quote(object_name('', key), safe='')}"


def _image(reply: Reply) -> _Image:
    """The image that an answer is about; an empty one where it is about none."""
    try:
        return msgspec.json.decode(reply.result or b"", type=_Image)
    except msgspec.DecodeError:
        return _Image()


def _is_about_the_file(reply: Reply) -> bool:
    """Whether an upload was refused for what it is: its kind, bytes, sides, area or frames."""
    if reply.codes & (ACCOUNT | TOKEN | _PASSING):
        return False
    return reply.status in {413, 415} or (reply.status in {400, 422} and bool(reply.errors))


async def _part(chunks: AsyncIterator[bytes], start: int, length: int | None) -> AsyncIterator[bytes]:
    """`length` bytes from `start`."""
    left = length
    async for chunk in chunks:
        part = chunk[start:] if left is None else chunk[start : start + left]
        start = max(start - len(chunk), 0)
        if part:
            yield part
        if left is not None:
            left -= len(part)
            if left <= 0:
                return
