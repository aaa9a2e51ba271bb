"""A contract server for Cloudflare Images on loopback, written from their documentation alone.

It shares no code with comfyd, so that no misunderstanding can hide in both. From developers.cloudflare.com:
"Upload an image", "Image details", "Download image", "Delete image" (API reference), "Limits and formats",
"Upload via custom path", "Rate limits", "Serve uploaded images", "Serve images from custom domains", and the
list "Cloudflare Images errors". What is documented nowhere is said where it stands.
"""

import asyncio
import json
import math
import re
import secrets
import struct
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from tests.support.cf_images_account import MEGABYTE, Account, Fault, Image, Kind, Refused
from tests.support.multipart_form import ReceivedForm, TooLarge

UUID: Final = re.compile(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE)
ACCOUNT_ID: Final = re.compile(r"[0-9a-f]{32}")
DECLARED: Final = {
    "image/jpeg",
    "image/png",
    "image/webp",
    "image/gif",
    "image/svg+xml",
    "image/heic",
    "image/avif",
}
UNSUPPORTED: Final = (
    "Uploaded image must have image/jpeg, image/png, image/webp, image/gif or image/svg+xml content-type"
)


class ImagesServer:
    """The API, the delivery network and the accounts. Made by `running`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._accounts: list[Account] = []
        self.origin = ""
        """Where the API listens."""
        self.delivery = ""
        """Where images are delivered, in place of imagedelivery.net and of a domain of one's own."""

    @property
    def endpoint(self) -> str:
        """The API's base url."""
        return f"{self.origin}/client/v4"

    def new_account(self) -> Account:
        """An account without images."""
        account = Account(delivery=self.delivery)
        self._accounts.append(account)
        return account

    async def serve(self, started: "Future[asyncio.AbstractEventLoop]", stop: asyncio.Event) -> None:
        """Until `stop`."""
        async with AsyncExitStack() as stack:
            self.origin = await _listening(stack, self._api())
            self.delivery = await _listening(stack, self._network())
            started.set_result(asyncio.get_running_loop())
            await stop.wait()

    def _api(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        images = "/client/v4/accounts/{account}/images/v1"
        app.router.add_post(images, self._call(self._upload))
        app.router.add_get(images + "/{image}", self._call(self._details))
        app.router.add_get(images + "/{image}/blob", self._call(self._blob))
        app.router.add_delete(images + "/{image}", self._call(self._delete))
        app.router.add_route("*", "/client/v4/{rest:.*}", self._call(_no_route))
        return app

    def _network(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/cdn-cgi/imagedelivery/{hash}/{image:.+}/{variant}", self._deliver)
        app.router.add_get("/{hash}/{image:.+}/{variant}", self._deliver)
        return app

    def _call(
        self, action: Callable[[web.Request, Account], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """A route of the API: who calls, whether they may, and what goes wrong today."""

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                account = self._authorised(request)
                fault = account.faults.popleft() if account.faults else None
                account.calls.append(
                    f"{request.method} {request.rel_url.raw_path.rpartition('/images/v1')[2]}"
                )
                return await _answer(request, account, fault, action)
            except Refused as refused:
                return _refusal(refused)
            except ConnectionError:
                return web.Response()  # whoever asked is gone

        return handle

    def _authorised(self, request: web.Request) -> Account:
        header = request.headers.get("Authorization")
        if header is None:
            raise Refused(400, 9106, "Missing X-Auth-Key, X-Auth-Email or Authorization headers")
        scheme, _, token = header.partition(" ")
        if scheme != "Bearer" or not token or " " in token:
            raise Refused(400, 6003, "Invalid request headers")
        owner = next((account for account in self._accounts if account.token == token), None)
        if owner is None:
            raise Refused(401, 9109, "Invalid access token")
        account_id = request.match_info.get("account", owner.id)
        if not ACCOUNT_ID.fullmatch(account_id):
            path = request.rel_url.path.removeprefix("/client/v4")
            raise Refused(404, 7003, f"Could not route to {path}, perhaps your object identifier is invalid?")
        if account_id != owner.id:
            raise Refused(403, 10000, "Authentication error")
        if not owner.enabled:
            message = "The given account is not valid or is not authorized to access this service"
            raise Refused(403, 5403, message)
        return owner

    async def _upload(self, request: web.Request, account: Account) -> web.Response:
        if not request.content_type.startswith("multipart/form-data"):
            raise Refused(415, 5415, "Images must be uploaded as a form, not as raw image data")
        if len(account.images) >= account.capacity:
            raise Refused(403, 5453, f"The given account has reached a service limit ({account.capacity})")
        path = self._folder / secrets.token_hex(8)
        form = ReceivedForm(request.headers["Content-Type"], path, account.largest)
        try:
            await form.receive(request.content.iter_any())
        except TooLarge:
            message = f"Maximum image size of {account.largest} bytes is reached"
            raise Refused(413, 5413, message) from None
        if form.filename is None:
            raise Refused(400, 5400, "Bad request: there is no file")
        kind = _accepted(form)
        image_id = form.fields.get("id", secrets.token_hex(16))
        _check_id(image_id)
        if image_id in account.images:
            raise Refused(409, 5409, "Resource already exists")
        account.images[image_id] = Image(
            path=path,
            content_type=kind,
            filename=form.filename,
            metadata=_metadata(form.fields.get("metadata", "{}")),
            uploaded=datetime.now(UTC).isoformat(),
        )
        return _result(account.result(image_id))

    async def _details(self, request: web.Request, account: Account) -> web.Response:
        return _result(account.result(_known(request, account)))

    async def _delete(self, request: web.Request, account: Account) -> web.Response:
        account.images.pop(_known(request, account)).path.unlink()
        return _result({})

    async def _blob(self, request: web.Request, account: Account) -> web.StreamResponse:
        """The original. Ranges are not documented and not honoured."""
        image = account.images[_known(request, account)]
        if account.originals is not None:
            return web.Response(body=account.originals, content_type=image.content_type)
        response = web.StreamResponse(headers={"Content-Type": image.content_type})
        if not account.unsized:
            response.content_length = image.path.stat().st_size
        await response.prepare(request)
        with image.path.open("rb") as file:
            while chunk := file.read(65_536):
                await response.write(chunk)
        await response.write_eof()
        return response

    async def _deliver(self, request: web.Request) -> web.StreamResponse:
        """A variant. The real one resizes and encodes; this one delivers the original under every name."""
        asked = request.match_info
        for account in self._accounts:
            if account.hash == asked["hash"] and asked["variant"] in account.variants:
                image = account.images.get(asked["image"])
                if image is not None:
                    return web.FileResponse(image.path, headers={"Content-Type": image.content_type})
        return web.Response(status=404, text="ERROR 9404: image not found")


async def _listening(stack: AsyncExitStack, app: web.Application) -> str:
    """Serve it on a free port as long as the stack lives; its origin."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, lingering_time=0.5)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


async def _answer(
    request: web.Request,
    account: Account,
    fault: Fault | None,
    action: Callable[[web.Request, Account], Awaitable[web.StreamResponse]],
) -> web.StreamResponse:
    kind = fault.kind if fault is not None else None
    seconds = fault.seconds if fault is not None else None
    wait = account.admit()
    if kind == "429" or wait is not None:
        return _throttled(seconds if wait is None else math.ceil(wait))
    if kind is not None and (instead := _instead(request, kind)) is not None:
        return instead
    if kind == "slow":
        await asyncio.sleep(seconds or 0)
    if kind == "reset":
        await request.content.read(65_536)
        return _broken(request)
    if kind == "cut":
        response = web.StreamResponse(headers={"Content-Length": "1000000", "Content-Type": "image/png"})
        await response.prepare(request)
        await response.write(b"\x89PNG")
        return _broken(request, response)
    try:
        answer = await action(request, account)
    except Refused as refused:
        if account.plain_errors:
            return web.Response(status=refused.status, text=f"ERROR {refused.code}: {refused.message}")
        raise
    return _broken(request) if kind == "lost" else answer


def _instead(request: web.Request, kind: Kind) -> web.Response | None:
    """What is answered without doing anything, if that is the fault."""
    match kind:
        case "404":
            raise Refused(404, 5404, "Image not found")
        case "500":
            raise Refused(500, 5500, "Internal Server Error")
        case "echo":
            raise Refused(403, 10000, f"Authentication error\nwith {request.headers['Authorization']}")
        case "502":
            page = "<html><head><title>502 Bad Gateway</title></head><body>cloudflare</body></html>"
            return web.Response(status=502, text=page, content_type="text/html")
        case "empty":
            return _result(None)
        case "endless":
            return _result({"variants": ["x" * 5 * MEGABYTE]})
        case _:
            return None


def _broken(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return response or web.Response()


def _throttled(seconds: float | None) -> web.Response:
    refused = Refused(429, 971, "Please wait and consider throttling your request speed")
    response = _refusal(refused)
    if seconds is not None:
        response.headers["retry-after"] = str(math.ceil(seconds))
        response.headers["Ratelimit"] = f'"default";r=0;t={math.ceil(seconds)}'
        response.headers["Ratelimit-Policy"] = '"default";q=1200;w=300'
    return response


async def _no_route(request: web.Request, account: Account) -> web.StreamResponse:  # noqa: ARG001 - as its siblings
    raise Refused(404, 7000, "No route for that URI")


def _accepted(form: ReceivedForm) -> str:
    """The kind of file by its bytes; what it is declared as has to be an image too."""
    kind = _sniffed(form.head)
    if kind is None or form.content_type not in DECLARED:
        raise Refused(415, 5455, UNSUPPORTED)
    if kind == "image/png":
        width, height = struct.unpack(">II", form.head[16:24])
        if max(width, height) > 12_000 or width * height > 100_000_000:
            # "Troubleshooting" has this code for transformations; the one of uploads is documented nowhere.
            raise Refused(400, 9413, "The image exceeds the maximum image area of 100 megapixels")
    return kind


def _sniffed(head: bytes) -> str | None:
    signatures = {
        b"\x89PNG\r\n\x1a\n": "image/png",
        b"\xff\xd8\xff": "image/jpeg",
        b"GIF87a": "image/gif",
        b"GIF89a": "image/gif",
    }
    for signature, kind in signatures.items():
        if head.startswith(signature):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    if head[4:8] == b"ftyp":
        return {b"avif": "image/avif", b"heic": "image/heic", b"mif1": "image/heic"}.get(head[8:12])
    return "image/svg+xml" if b"<svg" in head and head.lstrip().startswith(b"<") else None


def _check_id(image_id: str) -> None:
    """Up to 1,024 characters with any subpaths ("Upload via custom path"); a UUID is Cloudflare's own."""
    if not 1 <= len(image_id) <= 1024 or UUID.fullmatch(image_id) or image_id.strip("/") != image_id:
        raise Refused(400, 5400, "Bad request: Custom ID is invalid")


def _metadata(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict) or len(text.encode()) > 1024:
        raise Refused(400, 5400, "Bad request: metadata must be a JSON object of at most 1024 bytes")
    return value


def _known(request: web.Request, account: Account) -> str:
    image_id = request.match_info["image"]
    if image_id not in account.images:
        raise Refused(404, 5404, "Image not found")
    return image_id


def _result(value: Any) -> web.Response:
    return web.json_response({"result": value, "success": True, "errors": [], "messages": []})


def _refusal(refused: Refused) -> web.Response:
    errors = [{"code": refused.code, "message": refused.message}]
    envelope = {"result": None, "success": False, "errors": errors, "messages": []}
    return web.json_response(envelope, status=refused.status)


@contextmanager
def running() -> Iterator[ImagesServer]:
    """A server on a free port of loopback, on a thread of its own, until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        server = ImagesServer(Path(folder))
        started: Future[asyncio.AbstractEventLoop] = Future()
        stop = asyncio.Event()
        thread = threading.Thread(target=_run, args=(server, started, stop), name="cf-images")
        thread.start()
        try:
            loop = started.result(timeout=30)
            try:
                yield server
            finally:
                loop.call_soon_threadsafe(stop.set)
        finally:
            thread.join(timeout=30)


def _run(server: ImagesServer, started: "Future[asyncio.AbstractEventLoop]", stop: asyncio.Event) -> None:
    try:
        asyncio.run(server.serve(started, stop))
    except OSError as exc:
        started.set_exception(exc)
