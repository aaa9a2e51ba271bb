"""Assets are found, stand for files in graphs, and are forgotten; what anything still names is kept."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from blake3 import blake3

from comfyd.assets import Asset, OutputAsset
from comfyd.config import InputsConfig
from comfyd.errors import (
    AssetInUse,
    AssetNotFound,
    BlobNotFound,
    FileNotFound,
    InputTooLarge,
    MissingAsset,
    StorageError,
    StoreUnavailable,
    UnsupportedContent,
)
from comfyd.library import EXPIRED_AT_ONCE, ID_TOLD, LOOKED_AHEAD_MS, MISSING_TOLD, Library
from comfyd.maintenance import RETENTION_EVERY_MS, AssetSweep
from comfyd.progress import Board
from comfyd.storage.base import Storage
from comfyd.storage.local import open_local
from comfyd.storage.opening import Storages
from comfyd.store.base import Store
from comfyd.store.sqlite import open_sqlite
from comfyd.tasks import Artefact, OutputType, Settlement, Status
from comfyd.uploads import Uploads, open_uploads
from tests.support.clock import HandClock
from tests.support.files import local_file, only
from tests.support.logs import captured_logs
from tests.support.sources import png, wav
from tests.support.values import artefact, new_task

DAY = 86_400_000
LIMIT = 1 << 20
RED = png(0xFF0000)


class Shelf:
    """A library over real folders and a real database, with a clock turned by hand."""

    def __init__(
        self, store: Store, uploads: Uploads, storage: Storage, folder: Path, clock: HandClock
    ) -> None:
        self.store = store
        self.uploads = uploads
        self.storage = storage
        self.folder = folder
        self.clock = clock
        self.board = Board()
        self.library = self.over(only(storage))

    def over(self, storages: Storages) -> Library:
        """The same library with other storages."""
        return Library(self.store, self.uploads, storages, self.board, self.clock, DAY)

    def before(self, verb: str, action: Callable[[], Awaitable[None]]) -> Library:
        """The same library, with something that happens before this verb of the store."""
        store: Any = Interposed(self.store, verb, action)
        return Library(store, self.uploads, only(self.storage), self.board, self.clock, DAY)

    async def add(self, data: bytes = RED, name: str = "p.png", **facts: Any) -> tuple[Asset, bool]:
        """What a client uploads."""
        facts = {"content_type": "image/png", "file_path": name, **facts}
        async with self.uploads.receive(chunks(data), name) as received:
            return await self.library.add(received, **facts)

    async def stored(self, data: bytes, name: str, **facts: Any) -> Artefact:
        """An output in its storage, of no task yet."""
        key = f"t/1/9_0_{name}"
        file = local_file(self.folder / "sources", data, name)
        await self.storage.put(key, file)
        digests = {"sha256": file.sha256, "blake3": blake3(data).hexdigest()}
        return artefact(key=key, name=name, size_bytes=len(data), **digests, **facts)

    async def task(self, *files: str) -> str:
        """A queued task that names these uploads."""
        task_id = self.clock.new_id()
        await self.store.add(new_task(task_id, uploads=files), None, self.clock.now())
        return task_id

    async def ended(self, *artefacts: Artefact) -> str:
        """A task that succeeded with these."""
        task_id = await self.task()
        await self.settle(task_id, *artefacts)
        return task_id

    async def settle(self, task_id: str, *artefacts: Artefact) -> None:
        claim = await self.store.claim(task_id, self.clock.new_id(), self.clock.now())
        assert claim is not None
        settlement = Settlement(status=Status.SUCCEEDED, outcome="succeeded", artefacts=artefacts)
        await self.store.settle(claim.attempt.id, settlement, self.clock.now())

    async def drop(self, task_id: str) -> None:
        """Forget a task as `Control` does."""
        await self.store.cancel(task_id, self.clock.now())
        files = await self.store.uploads(task_id)
        await self.store.delete(task_id)
        await self.uploads.forget(files, self.store.unused_uploads)

    def files(self) -> list[str]:
        """The uploads that there are; and nothing is on its way."""
        uploads = self.folder / "inputs"
        assert list((uploads / ".unfinished").iterdir()) == []
        return sorted(path.name for path in uploads.iterdir() if path.is_file())

    async def resolved(self, value: Any) -> Any:
        """What becomes of a value, whose files are held no longer."""
        async with AsyncExitStack() as stack:
            return await self.library.resolve(value, stack)


@pytest.fixture
async def shelf(tmp_path: Path) -> AsyncIterator[Shelf]:
    clock = HandClock()
    config = InputsConfig(max_bytes=LIMIT, pixels=100_000)
    async with (
        open_sqlite(tmp_path / "comfyd.db") as store,
        open_uploads(tmp_path / "inputs", config, clock) as uploads,
        open_local(tmp_path / "files") as storage,
    ):
        yield Shelf(store, uploads, storage, tmp_path, clock)


class Interposed:
    """A store in which something happens before one of its verbs."""

    def __init__(self, store: Store, verb: str, action: Callable[[], Awaitable[None]]) -> None:
        self._store = store
        self._verb = verb
        self._action = action

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._store, name)

        async def interposed(*args: Any) -> Any:
            await self._action()
            return await verb(*args)

        return interposed if name == self._verb else verb


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def tagged(asset_id: object, **hints: object) -> dict[str, Any]:
    return {"__type": "core/ASSET", "info": {"id": asset_id, **hints}}


def named(data: bytes, extension: str = "png") -> str:
    return f"{hashlib.sha256(data).hexdigest()}.{extension}"


async def read(shelf: Shelf, asset: Asset | OutputAsset, *span: int) -> bytes:
    assert isinstance(asset, Asset)
    async with shelf.library.open(asset, *span) as file:
        return b"".join([chunk async for chunk in file.chunks])


async def missing(shelf: Shelf, value: Any) -> list[str]:
    """The ids that a refusal tells."""
    with pytest.raises(MissingAsset) as caught:
        await shelf.resolved(value)
    assert caught.value.message.startswith("Unresolvable core/ASSET reference(s): ")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1_000
    told = caught.value.details["missing_ids"]
    assert isinstance(told, list)
    return told


# added, found, minted


async def test_an_upload_becomes_a_record_that_is_found(shelf: Shelf) -> None:
    asset, created_new = await shelf.add(name="input/p.png")
    assert created_new
    assert asset == Asset(
        id=asset.id,
        file=named(RED),
        blake3=blake3(RED).hexdigest(),
        size_bytes=len(RED),
        content_type="image/png",
        file_path="input/p.png",
        created_at=shelf.clock.now(),
        expires_at=shelf.clock.now() + DAY,
    )
    assert await shelf.library.find(asset.id) == asset
    assert await read(shelf, asset) == RED
    assert await read(shelf, asset, 1, 3) == RED[1:4]
    assert await read(shelf, asset, 5) == RED[5:]


async def test_the_same_bytes_again_are_another_record_over_one_file(shelf: Shelf) -> None:
    first, new = await shelf.add(name="a.png")
    second, new_again = await shelf.add(name="b.png", keep_ms=5_000)
    assert (new, new_again) == (True, False)
    assert first.id != second.id
    assert (first.file, second.file) == (named(RED), named(RED))
    assert second.expires_at == shelf.clock.now() + 5_000
    assert shelf.files() == [named(RED)]
    assert ((await shelf.library.find(first.id)), (await shelf.library.find(second.id))) == (first, second)


@pytest.mark.parametrize(
    ("data", "given", "shown"),
    [
        (RED, "audio/wav", "image/png"),
        (b"\0\1\2\xff", "application/X-Thing+zip", "application/x-thing+zip"),
        (b"\0\1\2\xff", "text/html; charset=utf-8", "application/octet-stream"),
        (b"\0\1\2\xff", "nonsense", "application/octet-stream"),
        (b"\0\1\2\xff", "a/b\r\nX: y", "application/octet-stream"),
        (b"\0\1\2\xff", "", "application/octet-stream"),
    ],
)
async def test_the_content_says_what_it_is_and_the_client_only_where_that_does_not(
    shelf: Shelf, data: bytes, given: str, shown: str
) -> None:
    asset, _ = await shelf.add(data, content_type=given)
    assert asset.content_type == shown


async def test_an_upload_whose_record_cannot_be_written_leaves_no_file(shelf: Shelf) -> None:
    async def fail() -> None:
        raise StoreUnavailable("no room")

    library = shelf.before("add_asset", fail)
    async with shelf.uploads.receive(chunks(RED), "a.png") as received:
        with pytest.raises(StoreUnavailable):
            await library.add(received, content_type="", file_path="a.png")
    assert shelf.files() == []


@pytest.mark.parametrize(
    "asset_id", ["", "missing", "../x", "\ud800", "5E1F6C1E-0000-4000-8000-000000000001", "{}" * 18]
)
async def test_an_id_that_is_none_is_not_found(shelf: Shelf, asset_id: str) -> None:
    with pytest.raises(AssetNotFound) as caught:
        await shelf.library.find(asset_id)
    assert caught.value.message.isprintable()
    with pytest.raises(AssetNotFound):
        await shelf.library.delete(asset_id)


async def test_known_bytes_are_minted_and_unknown_ones_are_not(shelf: Shelf) -> None:
    digest = blake3(RED).hexdigest()
    assert not await shelf.library.has(digest)
    with pytest.raises(BlobNotFound):
        await shelf.library.mint(digest, file_path="a.png")
    first, _ = await shelf.add(name="a.png")
    assert await shelf.library.has(digest)
    shelf.clock.advance(1_000)
    minted, new = await shelf.library.mint(digest, file_path="b.png")
    assert new
    assert minted == msgspec.structs.replace(
        first,
        id=minted.id,
        file_path="b.png",
        created_at=shelf.clock.now(),
        expires_at=first.expires_at + 1_000,
    )
    assert minted.id != first.id
    assert await shelf.library.find(minted.id) == minted


@pytest.mark.parametrize("file_path", ["a.png", None])
async def test_an_identical_reference_is_the_same_record_kept_longer_and_never_shorter(
    shelf: Shelf, file_path: str | None
) -> None:
    first, _ = await shelf.add(name="a.png")
    shelf.clock.advance(1_000)
    same, new = await shelf.library.mint(first.blake3, file_path=file_path)
    assert not new
    assert same == msgspec.structs.replace(first, expires_at=first.expires_at + 1_000)
    again, _ = await shelf.library.mint(first.blake3, file_path=file_path, keep_ms=5)
    assert again == same
    assert await shelf.library.find(first.id) == same


async def test_references_that_take_turns_are_found_again_and_do_not_pile_up(shelf: Shelf) -> None:
    first, _ = await shelf.add(name="a.png")
    second, new = await shelf.library.mint(first.blake3, file_path="b.png")
    assert new
    for _ in range(2):
        for record in (first, second):
            assert await shelf.library.mint(first.blake3, file_path=record.file_path) == (record, False)


async def test_a_reference_whose_own_file_is_gone_is_made_over_one_that_is_there(shelf: Shelf) -> None:
    data = b"\0\1\2 points"
    lost, _ = await shelf.add(data, "a.ply")
    kept, _ = await shelf.add(data, "a.obj")
    assert lost.file != kept.file
    shelf.uploads.path(lost.file).unlink()
    minted, new = await shelf.library.mint(lost.blake3, file_path="a.ply")
    assert new
    assert await read(shelf, minted) == data


async def test_bytes_that_are_known_have_time_to_be_minted(shelf: Shelf) -> None:
    asset, _ = await shelf.add(keep_ms=LOOKED_AHEAD_MS + 1)
    assert await shelf.library.has(asset.blake3)
    shelf.clock.advance(1)
    assert not await shelf.library.has(asset.blake3)  # it may be gone before the client comes back
    shelf.clock.advance(LOOKED_AHEAD_MS - 1)
    minted, new = await shelf.library.mint(asset.blake3, file_path="p.png")
    assert (minted.id, new) == (asset.id, False)
    assert await shelf.library.has(asset.blake3)


async def test_a_reference_that_goes_while_it_is_minted_is_made_anew(shelf: Shelf) -> None:
    first, _ = await shelf.add(name="a.png")

    async def delete() -> None:
        await shelf.library.delete(first.id)

    minted, new = await shelf.before("extend_asset", delete).mint(first.blake3, file_path="a.png")
    assert new
    assert minted.id != first.id
    assert await read(shelf, await shelf.library.find(minted.id)) == RED


async def test_a_record_that_goes_while_it_is_resolved_leaves_its_file_to_the_request(shelf: Shelf) -> None:
    asset, _ = await shelf.add(keep_ms=1_000)

    async def delete() -> None:
        await shelf.library.delete(asset.id)

    async with AsyncExitStack() as stack:
        found = await shelf.before("extend_asset", delete).resolve(tagged(asset.id), stack)
        assert found == f"upload:{asset.file}"
        assert shelf.files() == [asset.file]


async def test_a_record_whose_file_is_gone_is_good_for_nothing(shelf: Shelf) -> None:
    asset, _ = await shelf.add()
    shelf.uploads.path(asset.file).unlink()
    assert not await shelf.library.has(asset.blake3)
    with pytest.raises(BlobNotFound):
        await shelf.library.mint(asset.blake3, file_path="a.png")
    assert await missing(shelf, tagged(asset.id)) == [asset.id]
    with pytest.raises(FileNotFound):
        await read(shelf, asset)
    again, _ = await shelf.add()
    assert await shelf.library.has(asset.blake3)
    assert await read(shelf, again) == RED


# outputs


async def test_an_output_is_found_while_its_task_runs_and_when_it_has_ended(shelf: Shelf) -> None:
    made = await shelf.stored(RED, "o.png")
    with pytest.raises(AssetNotFound):
        await shelf.library.find(made.id)
    task_id = await shelf.task()
    shelf.board.stored(task_id, made)
    shelf.board.stored(shelf.clock.new_id(), artefact(key="other/1/1_0_a.png"))
    running = await shelf.library.find(made.id)
    assert running == OutputAsset(task_id=task_id, artefact=made, created_at=shelf.clock.now())
    await shelf.settle(task_id, made)
    shelf.board.status(task_id, Status.SUCCEEDED)
    ended = await shelf.library.find(made.id)
    assert isinstance(ended, OutputAsset)
    assert (ended.task_id, ended.artefact, ended.ended_at) == (task_id, made, shelf.clock.now())


class Unasked:
    """An output whose id costs time."""

    key = "t/1/9_0_o.png"

    @property
    def id(self) -> str:
        """Made anew whenever somebody asks."""
        raise AssertionError("nobody should have asked")


async def test_what_rows_tell_is_found_without_the_ids_of_all_running_outputs(shelf: Shelf) -> None:
    asset, _ = await shelf.add()
    made = await shelf.stored(RED, "o.png")
    await shelf.ended(made)
    running: Any = Unasked()
    shelf.board.stored(shelf.clock.new_id(), running)
    assert await shelf.library.find(asset.id) == asset
    assert isinstance(await shelf.library.find(made.id), OutputAsset)


async def test_an_output_whose_task_ends_between_the_looks_is_found(shelf: Shelf) -> None:
    made = await shelf.stored(RED, "o.png")
    task_id = await shelf.task()
    shelf.board.stored(task_id, made)

    async def end() -> None:
        await shelf.settle(task_id, made)
        shelf.board.status(task_id, Status.SUCCEEDED)

    found = await shelf.before("output_asset", end).find(made.id)
    assert isinstance(found, OutputAsset)
    assert found.ended_at == shelf.clock.now()


async def test_an_output_that_left_the_board_after_the_look_is_found_as_it_was(shelf: Shelf) -> None:
    made = await shelf.stored(RED, "o.png")
    task_id = await shelf.task()
    shelf.board.stored(task_id, made)

    async def withdraw() -> None:
        shelf.board.withdrawn(task_id)

    found = await shelf.before("output_asset", withdraw).find(made.id)
    assert isinstance(found, OutputAsset)
    assert found.ended_at is None


async def test_an_output_is_deleted_with_its_task_only(shelf: Shelf) -> None:
    made = await shelf.stored(RED, "o.png")
    task_id = await shelf.ended(made)
    with pytest.raises(AssetInUse):
        await shelf.library.delete(made.id)
    assert isinstance(await shelf.library.find(made.id), OutputAsset)
    await shelf.drop(task_id)
    with pytest.raises(AssetNotFound):
        await shelf.library.delete(made.id)


# deleted, expired


async def test_a_record_goes_and_takes_the_file_along_that_nothing_else_names(shelf: Shelf) -> None:
    first, _ = await shelf.add(name="a.png")
    second, _ = await shelf.add(name="b.png")
    await shelf.library.delete(first.id)
    assert shelf.files() == [named(RED)]
    for verb in (shelf.library.find, shelf.library.delete):
        with pytest.raises(AssetNotFound):
            await verb(first.id)
    await shelf.library.delete(second.id)
    assert shelf.files() == []
    assert not await shelf.library.has(first.blake3)


async def test_a_file_that_a_task_names_outlives_its_records(shelf: Shelf) -> None:
    asset, _ = await shelf.add()
    task_id = await shelf.task(asset.file)
    await shelf.library.delete(asset.id)
    assert shelf.files() == [asset.file]
    await shelf.drop(task_id)
    assert shelf.files() == []


async def test_a_file_that_a_record_names_outlives_its_tasks_and_the_sweep(shelf: Shelf) -> None:
    asset, _ = await shelf.add(keep_ms=100 * DAY)
    await shelf.drop(await shelf.task(asset.file))
    shelf.clock.advance(10 * DAY)
    assert await shelf.uploads.sweep(shelf.store.unused_uploads, 10) == 0
    assert shelf.files() == [asset.file]


async def test_a_file_that_is_being_read_is_read_to_its_end_whatever_is_deleted(shelf: Shelf) -> None:
    data = bytes(700_000) + b"end"
    asset, _ = await shelf.add(data)
    async with shelf.library.open(asset) as file:
        assert file.size_bytes == len(data)
        await shelf.library.delete(asset.id)
        assert shelf.files() == []
        assert b"".join([chunk async for chunk in file.chunks]) == data


async def test_a_file_that_the_disk_does_not_let_go_of_does_not_bring_its_record_back(shelf: Shelf) -> None:
    asset, _ = await shelf.add()
    path = shelf.uploads.path(asset.file)
    path.unlink()
    path.mkdir()
    with captured_logs() as lines:
        await shelf.library.delete(asset.id)
    assert [line["files"] for line in lines if line["event"] == "upload.left"] == [[asset.file]]
    with pytest.raises(AssetNotFound):
        await shelf.library.find(asset.id)


async def test_what_has_expired_is_not_found_and_goes_in_batches(shelf: Shelf) -> None:
    kept, _ = await shelf.add(keep_ms=2 * DAY)
    for number in range(EXPIRED_AT_ONCE):
        await shelf.library.mint(kept.blake3, file_path=str(number))
    gone, _ = await shelf.add(wav())
    shelf.clock.advance(DAY)
    with pytest.raises(AssetNotFound):
        await shelf.library.find(gone.id)
    assert await missing(shelf, tagged(gone.id)) == [gone.id]
    sweep = AssetSweep(shelf.library)
    assert await sweep.step() == 0
    assert await sweep.step() == RETENTION_EVERY_MS
    assert shelf.files() == [kept.file]
    assert await shelf.library.find(kept.id) == kept
    shelf.clock.advance(DAY)
    assert await sweep.step() == RETENTION_EVERY_MS
    assert shelf.files() == []
    assert await shelf.library.expire() == 0


# in graphs


async def test_every_asset_becomes_a_reference_however_deep_and_the_value_stays_as_it_was(
    shelf: Shelf,
) -> None:
    one, _ = await shelf.add()
    two, _ = await shelf.add(wav())
    value = {
        "1": {"inputs": {"image": tagged(one.id, hash="blake3:lies", file_path="/etc/passwd"), "n": 1}},
        "2": {"inputs": {"list": {"__value__": [tagged(two.id), [[tagged(one.id)]], "x", ["1", 0]]}}},
        "__type": "core/OTHER",
    }
    before = msgspec.json.encode(value)
    first, second = f"upload:{one.file}", f"upload:{two.file}"
    assert await shelf.resolved(value) == {
        "1": {"inputs": {"image": first, "n": 1}},
        "2": {"inputs": {"list": {"__value__": [second, [[first]], "x", ["1", 0]]}}},
        "__type": "core/OTHER",
    }
    assert msgspec.json.encode(value) == before
    assert await shelf.resolved(tagged(one.id)) == first
    assert await shelf.resolved([tagged(one.id)]) == [first]


@pytest.mark.parametrize("value", [{"1": {"inputs": {"a": ["2", 0], "b": None}}}, [], "core/ASSET", 7, None])
async def test_a_value_without_assets_is_left_alone(shelf: Shelf, value: Any) -> None:
    assert await shelf.resolved(value) is value


async def test_a_value_may_be_as_deep_as_it_likes(shelf: Shelf) -> None:
    asset, _ = await shelf.add()
    value: Any = tagged(asset.id)
    for number in range(50_000):
        value = [value] if number % 2 else {"a": value}
    found = await shelf.resolved(value)
    while not isinstance(found, str):
        found = found["a"] if isinstance(found, dict) else found[0]
    assert found == f"upload:{asset.file}"


@pytest.mark.parametrize(
    "broken",
    [
        {"__type": "core/ASSET"},
        {"__type": "core/ASSET", "info": None},
        {"__type": "core/ASSET", "info": []},
        {"__type": "core/ASSET", "info": {}},
        tagged(None),
        tagged(7),
        tagged(["x"]),
        tagged({"id": "x"}),
    ],
)
async def test_a_malformed_asset_is_a_missing_one(shelf: Shelf, broken: Any) -> None:
    assert await missing(shelf, {"1": {"inputs": {"image": broken}}}) == []
    assert await missing(shelf, [broken, tagged("b"), tagged("a")]) == ["a", "b"]


async def test_a_refusal_tells_every_missing_id_in_bounds(shelf: Shelf) -> None:
    asset, _ = await shelf.add()
    unknown = shelf.clock.new_id()
    assert await missing(shelf, [tagged(asset.id), tagged(unknown), tagged(unknown)]) == [unknown]
    with pytest.raises(MissingAsset) as caught:
        await shelf.resolved(tagged("missing"))
    assert caught.value.message == "Unresolvable core/ASSET reference(s): missing"
    assert caught.value.details == {"missing_ids": ["missing"]}
    told = await missing(shelf, [tagged(f"{number:03}\n" + "x" * 1_000) for number in range(500)])
    assert len(told) == MISSING_TOLD
    assert told == sorted(told)
    assert {len(each) for each in told} == {ID_TOLD}


async def test_a_record_that_is_used_is_kept_longer_when_less_than_half_is_left(shelf: Shelf) -> None:
    asset, _ = await shelf.add()
    shelf.clock.advance(DAY // 2)
    await shelf.resolved(tagged(asset.id))
    assert await shelf.library.find(asset.id) == asset
    shelf.clock.advance(1)
    await shelf.resolved(tagged(asset.id))
    used = await shelf.library.find(asset.id)
    assert used == msgspec.structs.replace(asset, expires_at=shelf.clock.now() + DAY)


async def test_what_two_requests_resolved_stays_for_both_while_its_record_is_deleted(shelf: Shelf) -> None:
    asset, _ = await shelf.add()
    one, two = AsyncExitStack(), AsyncExitStack()
    async with one, two:
        for stack in (one, two):
            assert await shelf.library.resolve(tagged(asset.id), stack) == f"upload:{asset.file}"
        await shelf.library.delete(asset.id)
        assert await missing(shelf, tagged(asset.id)) == [asset.id]
        task_id = await shelf.task(asset.file)
        await one.aclose()
        assert shelf.files() == [asset.file]
    assert await read(shelf, asset) == RED
    await shelf.drop(task_id)
    assert shelf.files() == []


async def test_resolving_and_deleting_at_once_gives_a_held_file_or_a_missing_asset(shelf: Shelf) -> None:
    outcomes = set()
    for turns in range(0, 60, 4):
        asset, _ = await shelf.add()
        async with AsyncExitStack() as stack:
            resolving = asyncio.ensure_future(shelf.library.resolve(tagged(asset.id), stack))
            for _ in range(turns):
                await asyncio.sleep(0)
            await shelf.library.delete(asset.id)
            found: Any = (await asyncio.gather(resolving, return_exceptions=True))[0]
            outcomes.add(type(found))
            assert (shelf.files() == [asset.file]) == isinstance(found, str)
        await shelf.uploads.forget([asset.file], shelf.store.unused_uploads)
    assert outcomes <= {str, MissingAsset}


# outputs in graphs


@pytest.mark.parametrize("ended", [True, False])
async def test_an_output_becomes_an_upload_that_lives_as_long_as_a_task_names_it(
    shelf: Shelf, *, ended: bool
) -> None:
    made = await shelf.stored(RED, "o_00001_.png")
    if ended:
        await shelf.ended(made)
    else:
        shelf.board.stored(shelf.clock.new_id(), made)
    async with AsyncExitStack() as stack:
        assert await shelf.library.resolve([tagged(made.id)] * 2, stack) == [f"upload:{named(RED)}"] * 2
        assert shelf.uploads.path(named(RED)).read_bytes() == RED
        task_id = await shelf.task(named(RED))
    assert shelf.files() == [named(RED)]
    await shelf.drop(task_id)
    assert shelf.files() == []


async def test_an_output_that_no_task_came_to_name_is_forgotten_again(shelf: Shelf) -> None:
    made = await shelf.stored(RED, "o.png")
    await shelf.ended(made)
    assert await shelf.resolved(tagged(made.id)) == f"upload:{named(RED)}"
    assert shelf.files() == []


async def test_an_output_that_is_an_upload_already_is_not_copied(shelf: Shelf) -> None:
    made = await shelf.stored(RED, "o.png")
    await shelf.ended(made)
    asset, _ = await shelf.add()
    await shelf.storage.delete(made.key)
    async with AsyncExitStack() as stack:
        assert await shelf.library.resolve(tagged(made.id), stack) == f"upload:{asset.file}"
        await shelf.library.delete(asset.id)
        assert shelf.files() == [asset.file]


async def test_a_text_is_an_output_like_any_other(shelf: Shelf) -> None:
    made = await shelf.stored("Grüße".encode(), "text.txt", type=OutputType.TEXT, text="Grüße")
    await shelf.ended(made)
    async with AsyncExitStack() as stack:
        assert (
            await shelf.library.resolve(tagged(made.id), stack) == f"upload:{named('Grüße'.encode(), 'txt')}"
        )
        assert shelf.files() == [named("Grüße".encode(), "txt")]


async def test_the_name_of_an_output_says_what_its_content_does_not(shelf: Shelf) -> None:
    data = b"\0\1\2 points"
    for name, extension in (("a.PLY", "ply"), ("no-ending", "bin")):
        made = await shelf.stored(data, name)
        await shelf.ended(made)
        assert await shelf.resolved(tagged(made.id)) == f"upload:{named(data, extension)}"


async def test_an_output_that_is_too_large_for_an_input_is_refused_before_it_is_read(shelf: Shelf) -> None:
    made = msgspec.structs.replace(await shelf.stored(RED, "o.png"), size_bytes=LIMIT + 1)
    await shelf.ended(made)
    await shelf.storage.delete(made.key)
    with pytest.raises(InputTooLarge) as caught:
        await shelf.resolved(tagged(made.id))
    assert caught.value.details == {"limit": LIMIT, "asset": made.id}
    assert shelf.files() == []


async def test_an_output_that_cannot_be_an_input_is_named_among_others(shelf: Shelf) -> None:
    fine = await shelf.stored(RED, "o.png")
    empty = await shelf.stored(b"", "text.txt", type=OutputType.TEXT, node_id="10")
    await shelf.ended(fine, empty)
    with pytest.raises(UnsupportedContent) as caught:
        await shelf.resolved([tagged(fine.id), tagged(empty.id)])
    assert caught.value.details == {"asset": empty.id}
    assert shelf.files() == []


async def test_an_output_whose_bytes_are_gone_is_a_missing_asset(shelf: Shelf) -> None:
    made = await shelf.stored(RED, "o.png")
    await shelf.ended(made)
    await shelf.storage.delete(made.key)
    assert await missing(shelf, [tagged(made.id)]) == [made.id]
    assert shelf.files() == []


async def test_nothing_is_copied_for_a_request_that_misses_something_else(shelf: Shelf) -> None:
    made = await shelf.stored(RED, "o.png")
    await shelf.ended(made)
    async with AsyncExitStack() as stack:
        with pytest.raises(MissingAsset) as caught:
            await shelf.library.resolve([tagged(made.id), tagged("x")], stack)
        assert shelf.files() == []
    assert caught.value.details["missing_ids"] == ["x"]


class Down:
    """A storage that is down, from the start or in the middle of a file."""

    def __init__(self, begins: bytes = b"") -> None:
        self._begins = begins

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[Any]:
        """See `Storage`."""
        if not self._begins:
            raise StorageError(f"cannot reach it to read {key}")
        yield _Half(self._begins)


class _Half:
    def __init__(self, begins: bytes) -> None:
        self.chunks = self._chunks(begins)

    async def _chunks(self, begins: bytes) -> AsyncIterator[bytes]:
        yield begins
        raise StorageError("it broke off")


@pytest.mark.parametrize("begins", [b"", RED])
async def test_an_output_whose_storage_is_down_leaves_nothing(shelf: Shelf, begins: bytes) -> None:
    made = await shelf.stored(RED, "o.png")
    await shelf.ended(made)
    other, _ = await shelf.add(wav())
    async with AsyncExitStack() as stack:
        with pytest.raises(StorageError):
            await shelf.over(only(Down(begins))).resolve([tagged(other.id), tagged(made.id)], stack)
        assert shelf.files() == [other.file]
        await shelf.library.delete(other.id)
        assert shelf.files() == [other.file]  # held until the block ends
    await shelf.uploads.forget([other.file], shelf.store.unused_uploads)
    assert shelf.files() == []


async def test_one_output_in_many_requests_at_once_is_kept_for_those_that_are_taken(shelf: Shelf) -> None:
    made = await shelf.stored(RED, "o.png")
    await shelf.ended(made)

    async def request(*, taken: bool) -> None:
        async with AsyncExitStack() as stack:
            assert await shelf.library.resolve(tagged(made.id), stack) == f"upload:{named(RED)}"
            if taken:
                await shelf.task(named(RED))

    await asyncio.gather(*(request(taken=number % 2 == 0) for number in range(8)))
    assert shelf.files() == [named(RED)]
