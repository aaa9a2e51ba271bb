"""Assets: what clients uploaded and what tasks made, by ids of one kind; never a second kind of file input.

A graph that names an asset gets the reference of an upload instead.
"""

import re
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import PurePosixPath
from typing import Any, Final

import structlog

from comfyd.assets import Asset, OutputAsset
from comfyd.clock import Clock
from comfyd.disk import to_its_end
from comfyd.errors import (
    AssetInUse,
    AssetNotFound,
    BlobNotFound,
    ComfydError,
    FileNotFound,
    InputError,
    InputNotFound,
    MissingAsset,
)
from comfyd.progress import Board
from comfyd.storage.base import StoredFile
from comfyd.storage.opening import Storages
from comfyd.store.base import Store
from comfyd.tasks import Artefact
from comfyd.uploads import Received, Uploads

log = structlog.get_logger("comfyd.library")

TAG: Final = "core/ASSET"
"""What `__type` says where an object in a graph stands for an asset."""
EXPIRED_AT_ONCE: Final = 100
"""How many records `Library.expire` forgets at most."""
MISSING_TOLD: Final = 100
"""How many ids of missing assets a refusal lists, each cut to `ID_TOLD` characters."""
ID_TOLD: Final = 100
LOOKED_AHEAD_MS: Final = 10_000
"""How long bytes still have to be here for `Library.has`: clients look first, and `mint` then."""

_MISSING_SHOWN: Final = 5  # of them in the message, which is one line
_ID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_UNKNOWN_TYPE: Final = "application/octet-stream"
_TYPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")


class Library:
    """The files that clients uploaded as assets, and the outputs of tasks by the same kind of id: found,
    referenced, forgotten. Lives as long as the process.

    A record may outlive its file only where somebody else deletes that; whoever is to rely on the file looks.
    Verbs raise `StoreError` and `StorageError` where database and disk fail.
    """

    def __init__(
        self, store: Store, uploads: Uploads, storages: Storages, board: Board, clock: Clock, keep_ms: int
    ) -> None:
        self._store = store
        self._uploads = uploads
        self._storages = storages
        self._board = board
        self._clock = clock
        self._keep_ms = keep_ms

    async def add(
        self, received: Received, *, content_type: str, file_path: str, keep_ms: int | None = None
    ) -> tuple[Asset, bool]:
        """Keep what was received, under a new id; whether there was no asset of these bytes before.

        `content_type` is the client's word, and counts only where the content itself says nothing.
        """
        upload, now = received.upload, self._clock.now()
        asset = Asset(
            id=self._clock.new_id(),
            file=upload.file,
            blake3=received.blake3,
            size_bytes=upload.size_bytes,
            content_type=_shown(upload.content_type, content_type),
            file_path=file_path,
            created_at=now,
            expires_at=now + (self._keep_ms if keep_ms is None else keep_ms),
        )
        async with self._uploads.keeping(received, self._store.unused_uploads):
            # a write that began goes on without us: what happens to the file has to wait for its end
            return asset, await to_its_end(self._store.add_asset(asset))

    async def mint(
        self, blake3: str, *, file_path: str | None, keep_ms: int | None = None
    ) -> tuple[Asset, bool]:
        """An asset over bytes that are here, and whether it is new. Raises `BlobNotFound`.

        The newest one over these bytes that has this `file_path` is returned, to be kept longer; where there
        is none, a new one has the bytes of the newest. None is whatever `file_path` the newest has.
        """
        async with AsyncExitStack() as stack:
            now = self._clock.now()
            expires_at = now + (self._keep_ms if keep_ms is None else keep_ms)
            identical = await self._of_bytes(blake3, file_path, now, stack)
            if identical is not None:
                extended = await self._store.extend_asset(identical.id, expires_at)
                if extended is not None:  # else it was forgotten just now
                    return extended, False
            known = identical or await self._of_bytes(blake3, None, now, stack)
            if known is None:
                raise BlobNotFound("there is no asset with these bytes (any more): upload the file")
            asset = Asset(
                id=self._clock.new_id(),
                file=known.file,
                blake3=known.blake3,
                size_bytes=known.size_bytes,
                content_type=known.content_type,
                file_path=known.file_path if file_path is None else file_path,
                created_at=now,
                expires_at=expires_at,
            )
            await to_its_end(self._store.add_asset(asset))
            return asset, True

    async def has(self, blake3: str) -> bool:
        """Whether `mint` would find these bytes, now and `LOOKED_AHEAD_MS` later."""
        async with AsyncExitStack() as stack:
            return await self._of_bytes(blake3, None, self._clock.now() + LOOKED_AHEAD_MS, stack) is not None

    async def find(self, asset_id: str) -> Asset | OutputAsset:
        """An upload's record, or an output of a task that runs or has ended. Raises `AssetNotFound`."""
        if _ID.fullmatch(asset_id):
            # Looked at first: the outputs of a task that ends between the looks are here no more, but rows.
            running, now = tuple(self._board.running_artefacts()), self._clock.now()
            found = (
                await self._store.asset(asset_id, now)
                or await self._store.output_asset(asset_id)
                or _running(asset_id, running, now)
            )
            if found is not None:
                return found
        raise AssetNotFound(f"there is no asset {_told(asset_id)} (any more)")

    async def delete(self, asset_id: str) -> None:
        """Forget a record, and its upload where nothing else names that.

        Raises `AssetNotFound`, also the second time, and `AssetInUse` for an output.
        """
        gone = None
        if _ID.fullmatch(asset_id):
            gone = await self._store.delete_asset(asset_id, self._clock.now())
        if gone is None:
            await self.find(asset_id)
            raise AssetInUse("this is an output of a job: it is deleted with that")
        await self._forget([gone.file])

    async def resolve(self, value: Any, stack: AsyncExitStack) -> Any:
        """A copy of a JSON value with an upload's reference for every asset in it; itself if there is none.

        An asset is `{"__type": "core/ASSET", "info": {"id": ...}}`. Nobody forgets its file until `stack`
        ends. An output becomes an upload, which goes again when `stack` ends and no task names it. Raises
        `MissingAsset` for all that are malformed, unknown or without a file; `InputError` for an output that
        cannot be an input, whose id is `details["asset"]`.
        """
        ids = [_id_of(tagged) for tagged in _tagged(value)]
        if not ids:
            return value
        named = {asset_id: "" for asset_id in ids if asset_id is not None}
        missing: list[str] = []
        malformed = ids.count(None)
        outputs: dict[str, OutputAsset] = {}
        for asset_id in named:
            if len(missing) >= MISSING_TOLD:
                break
            reference = await self._reference(asset_id, outputs, stack)
            if reference is None:
                missing.append(asset_id)
            else:
                named[asset_id] = reference
        if not missing and not malformed:  # nothing is copied for a request that is wrong anyway
            for asset_id, output in outputs.items():
                try:
                    named[asset_id] = await self._copied(output.artefact, stack)
                except FileNotFound:
                    missing.append(asset_id)
                except InputError as exc:
                    exc.details.setdefault("asset", asset_id)
                    raise
        if missing or malformed:
            raise _missing(missing, malformed)
        return _replaced(value, named)

    @asynccontextmanager
    async def open(
        self, asset: Asset, start: int = 0, length: int | None = None
    ) -> AsyncIterator[StoredFile]:
        """Read `length` of its bytes from `start`, within the block, even if it is forgotten meanwhile.

        Entering it raises `FileNotFound`.
        """
        async with AsyncExitStack() as stack:
            try:
                opening = self._uploads.open(asset.file, start, length)
                chunks = await stack.enter_async_context(opening)
            except InputNotFound:
                raise _no_file(asset) from None
            yield StoredFile(size_bytes=asset.size_bytes, chunks=chunks)

    async def expire(self) -> int:
        """Forget one batch of records that have expired, and their uploads where nothing else names them."""
        gone = await self._store.expire_assets(self._clock.now(), EXPIRED_AT_ONCE)
        if gone:
            await self._forget({asset.file for asset in gone})
        return len(gone)

    async def _of_bytes(
        self, blake3: str, file_path: str | None, moment: int, stack: AsyncExitStack
    ) -> Asset | None:
        """The newest record over these bytes, of this path or any; its file is there until the stack ends."""
        known = await self._store.asset_of_bytes(blake3, None, moment, file_path)
        if known is None or not await self._held(known.file, stack):
            return None
        return known

    async def _held(self, file: str, stack: AsyncExitStack) -> bool:
        """Hold an upload until the stack ends; whether it is there."""
        await stack.enter_async_context(self._uploads.hold(f"upload:{file}"))
        return await self._uploads.is_there(file)

    async def _reference(
        self, asset_id: str, outputs: dict[str, OutputAsset], stack: AsyncExitStack
    ) -> str | None:
        """The reference of a record's upload; None for a missing one. An output is put with the others."""
        try:
            found = await self.find(asset_id)
        except AssetNotFound:
            return None
        if isinstance(found, OutputAsset):
            outputs[asset_id] = found
            return ""
        if not await self._held(found.file, stack):
            return None
        now = self._clock.now()
        if found.expires_at - now < self._keep_ms / 2:
            await self._store.extend_asset(asset_id, now + self._keep_ms)
        return f"upload:{found.file}"

    async def _copied(self, artefact: Artefact, stack: AsyncExitStack) -> str:
        """The reference of an upload with the bytes of an output. Raises `FileNotFound`, `InputError`."""
        ending = PurePosixPath(artefact.name).suffix.removeprefix(".").lower()
        if re.fullmatch(r"[a-z0-9]{1,16}", ending):
            file = f"{artefact.sha256}.{ending}"
            async with AsyncExitStack() as trying:
                if await self._held(file, trying):
                    await stack.enter_async_context(trying.pop_all())
                    return f"upload:{file}"
        self._uploads.check_size(artefact.size_bytes)
        storage = await self._storages.get(artefact.storage)
        async with (
            storage.open(artefact.key) as stored,
            self._uploads.receive(stored.chunks, artefact.name) as received,
        ):
            keeping = self._uploads.keeping(received, self._store.unused_uploads)
            return (await stack.enter_async_context(keeping)).reference

    async def _forget(self, files: Iterable[str]) -> None:
        """Delete those of these uploads that nothing names. What stays is swept later."""
        try:
            await self._uploads.forget(files, self._store.unused_uploads)
        except ComfydError as exc:
            log.warning("upload.left", files=list(files), reason=exc.message)


def _running(asset_id: str, running: Iterable[tuple[str, Artefact]], now: int) -> OutputAsset | None:
    """The output with this id. Each id has to be made first: nothing to do for what a row may tell."""
    for task_id, artefact in running:
        if artefact.id == asset_id:
            return OutputAsset(task_id=task_id, artefact=artefact, created_at=now)
    return None


def _shown(found: str, given: str) -> str:
    """The media type of an asset: that of its content, or the client's where that says nothing."""
    return given.lower() if found == _UNKNOWN_TYPE and _TYPE.fullmatch(given) else found


def _is_tagged(value: object) -> bool:
    return isinstance(value, dict) and value.get("__type") == TAG


def _tagged(value: Any) -> list[dict[str, Any]]:
    """Every object that says that it is an asset. Every submission comes by here, as deep as it likes."""
    found: list[dict[str, Any]] = []
    pending: list[Any] = [[value]]
    while pending:
        here: Any = pending.pop()
        if isinstance(here, dict):
            if _is_tagged(here):
                found.append(here)
                continue
            here = here.values()
        for inner in here:
            if isinstance(inner, (dict, list)):  # half as long as with `dict | list`
                pending.append(inner)  # noqa: PERF401 - and a comprehension takes longer
    return found


def _id_of(tagged: Mapping[str, Any]) -> str | None:
    """The id of an asset; None for a malformed one. Whatever else it says is a hint."""
    info = tagged.get("info")
    asset_id = info.get("id") if isinstance(info, dict) else None
    return asset_id if isinstance(asset_id, str) else None


def _replaced(value: Any, references: Mapping[str, str]) -> Any:
    """A copy with the references in place of their assets."""
    top = [value]
    pending: list[Any] = [top]
    while pending:
        container = pending.pop()
        members = container.items() if isinstance(container, dict) else enumerate(container)
        for place, inner in members:
            if _is_tagged(inner):
                container[place] = references[_id_of(inner) or ""]
            elif isinstance(inner, dict | list):
                container[place] = inner.copy()
                pending.append(container[place])
    return top[0]


def _missing(ids: Iterable[str], malformed: int) -> MissingAsset:
    """The error that names all of them."""
    told = sorted({asset_id[:ID_TOLD] for asset_id in ids})[:MISSING_TOLD]
    shown = [_told(asset_id) for asset_id in told[:_MISSING_SHOWN]]
    if len(told) > _MISSING_SHOWN:
        shown.append(f"{len(told) - _MISSING_SHOWN} more")
    if malformed:
        shown.append(f"{malformed} without an info.id that is a string")
    message = f"Unresolvable {TAG} reference(s): {', '.join(shown)}"
    return MissingAsset(message, details={"missing_ids": told})


def _told(asset_id: str) -> str:
    """An id as a message can hold it."""
    return "".join(char if char.isprintable() else "?" for char in asset_id[:ID_TOLD])


def _no_file(asset: Asset) -> FileNotFound:
    return FileNotFound(f"the file of asset {asset.id} is gone")
