"""What every store promises of assets: records over uploads, and outputs under the ids of assets."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyd.assets import Asset, OutputAsset
from comfyd.store.base import Store
from tests.store.conftest import IMPLEMENTATIONS
from tests.store.samples import (
    NOW,
    Opener,
    added,
    again,
    artefact,
    asset,
    claim,
    claimed,
    ended,
    failed,
    new_id,
    succeeded,
)

HASH = "5a" * 32
OTHER_HASH = "5b" * 32
END = NOW + 1000
"""When the records of `asset` expire."""


# add, asset, asset_of_bytes


async def test_asset_reads_back_as_it_was_added(store: Store) -> None:
    plain = asset(file_path="Ordner/Grüße 🎨.png", size_bytes=2**40)
    owned = asset(key_id="key-1", file_path="", content_type="video/mp4")
    for each in (plain, owned):
        assert await store.add_asset(each)
        assert await store.asset(each.id, NOW) == each
    assert await store.asset(new_id(), NOW) is None


async def test_owner_is_told_whether_these_bytes_are_new_to_it(store: Store) -> None:
    assert await store.add_asset(asset())
    assert not await store.add_asset(asset())
    assert await store.add_asset(asset(key_id="key-1"))
    assert await store.add_asset(asset(key_id="key-2"))
    assert not await store.add_asset(asset(key_id="key-1"))
    assert await store.add_asset(asset(blake3=OTHER_HASH, file="b.png"))


async def test_bytes_whose_records_have_expired_are_new_again(store: Store) -> None:
    await store.add_asset(asset())
    assert not await store.add_asset(asset(created_at=END - 1, expires_at=END))
    assert await store.add_asset(asset(created_at=END, expires_at=END + 1))


async def test_of_many_adds_at_once_of_the_same_bytes_one_is_new(store: Store) -> None:
    answers = await asyncio.gather(*(store.add_asset(asset()) for _ in range(50)))
    assert answers.count(True) == 1


async def test_newest_record_over_the_bytes_is_found_and_only_its_owners(store: Store) -> None:
    first, second = asset(), asset(file_path="second.png")
    foreign = asset(key_id="key-1")
    for each in (first, second, foreign):
        await store.add_asset(each)
    assert await store.asset_of_bytes(HASH, None, NOW) == second
    assert await store.asset_of_bytes(HASH, "key-1", NOW) == foreign
    assert await store.asset_of_bytes(HASH, "key-2", NOW) is None
    assert await store.asset_of_bytes(OTHER_HASH, None, NOW) is None
    await store.delete_asset(second.id, NOW)
    assert await store.asset_of_bytes(HASH, None, NOW) == first


async def test_newest_record_over_the_bytes_with_one_path_is_found_behind_others(store: Store) -> None:
    older, newer = asset(file_path="a.png"), asset(file_path="a.png", expires_at=NOW + 5)
    other, foreign = asset(file_path="b.png"), asset(file_path="a.png", key_id="key-1")
    for each in (older, newer, other, foreign):
        await store.add_asset(each)
    assert await store.asset_of_bytes(HASH, None, NOW, "a.png") == newer
    assert await store.asset_of_bytes(HASH, None, NOW + 5, "a.png") == older
    assert await store.asset_of_bytes(HASH, None, NOW, "b.png") == other
    assert await store.asset_of_bytes(HASH, None, NOW, "A.png") is None
    assert await store.asset_of_bytes(OTHER_HASH, None, NOW, "a.png") is None
    assert await store.asset_of_bytes(HASH, "key-1", NOW, "a.png") == foreign


async def test_older_record_over_the_bytes_serves_once_the_newest_has_expired(store: Store) -> None:
    long, short = asset(expires_at=END), asset(expires_at=NOW + 5)
    await store.add_asset(long)
    await store.add_asset(short)
    assert await store.asset_of_bytes(HASH, None, NOW + 4) == short
    assert await store.asset_of_bytes(HASH, None, NOW + 5) == long
    assert await store.asset_of_bytes(HASH, None, END) is None


# what has expired


async def test_asset_that_has_expired_is_not_there_to_any_verb_that_asks(store: Store) -> None:
    record = asset()
    await store.add_asset(record)
    assert await store.asset(record.id, END - 1) == record
    assert await store.asset(record.id, END) is None
    assert await store.asset_of_bytes(HASH, None, END) is None
    assert await store.delete_asset(record.id, END) is None
    assert await store.expire_assets(END, 10) == (record,)


async def test_expired_assets_are_forgotten_a_few_at_a_time_and_returned_once(store: Store) -> None:
    records = [asset(expires_at=END + number) for number in range(5)]
    for each in reversed(records):
        await store.add_asset(each)
    assert await store.expire_assets(END - 1, 10) == ()
    gone = await store.expire_assets(END + 3, 3)
    assert sorted(gone, key=lambda each: each.expires_at) == records[:3]  # those that expired first
    assert await store.expire_assets(END + 3, 3) == (records[3],)
    assert await store.expire_assets(END + 3, 3) == ()
    assert await store.asset(records[4].id, END + 3) == records[4]
    assert await store.expire_assets(END + 99, 0) == ()


# extend, delete


async def test_asset_that_is_used_again_expires_later_and_never_earlier(store: Store) -> None:
    record = asset()
    await store.add_asset(record)
    assert await store.extend_asset(record.id, END - 1) == record
    later = msgspec.structs.replace(record, expires_at=END + 7)
    assert await store.extend_asset(record.id, END + 7) == later
    assert await store.extend_asset(record.id, END) == later
    assert await store.asset(record.id, END + 6) == later
    assert await store.expire_assets(END + 6, 10) == ()
    assert await store.extend_asset(new_id(), END) is None


async def test_extending_one_asset_leaves_others_over_the_same_bytes_alone(store: Store) -> None:
    first, second = asset(), asset()
    await store.add_asset(first)
    await store.add_asset(second)
    await store.extend_asset(first.id, END + 7)
    assert await store.asset(second.id, NOW) == second


async def test_deleted_asset_is_returned_once_and_others_over_the_same_bytes_stay(store: Store) -> None:
    first, second = asset(), asset()
    await store.add_asset(first)
    await store.add_asset(second)
    assert await store.delete_asset(first.id, NOW) == first
    assert await store.delete_asset(first.id, NOW) is None
    assert await store.asset(first.id, NOW) is None
    assert await store.extend_asset(first.id, END + 1) is None
    assert await store.asset(second.id, NOW) == second


async def test_of_two_deletions_at_once_one_has_it(store: Store) -> None:
    record = asset()
    await store.add_asset(record)
    answers = await asyncio.gather(*(store.delete_asset(record.id, NOW) for _ in range(10)))
    assert [each for each in answers if each is not None] == [record]


# uploads


async def test_upload_that_an_asset_names_is_in_use_as_long_as_the_record_is_there(store: Store) -> None:
    first, second = asset(file="a.png"), asset(file="a.png")
    for each in (first, second):
        await store.add_asset(each)
    files = ("c.png", "a.png")
    assert await store.unused_uploads(files) == ("c.png",)
    await store.delete_asset(first.id, NOW)
    assert await store.unused_uploads(files) == ("c.png",)
    assert await store.asset(second.id, END) is None  # expired, but its row is still there
    assert await store.unused_uploads(files) == ("c.png",)
    await store.expire_assets(END, 10)
    assert await store.unused_uploads(files) == files


async def test_upload_that_a_task_names_outlives_its_asset(store: Store) -> None:
    record = asset(file="a.png")
    await store.add_asset(record)
    task = await added(store, uploads=("a.png",))
    await store.delete_asset(record.id, NOW)
    assert await store.unused_uploads(("a.png",)) == ()
    await store.cancel(task.id, NOW)
    await store.delete(task.id)
    assert await store.unused_uploads(("a.png",)) == ("a.png",)


# outputs


async def test_output_is_found_under_its_id_with_the_end_of_its_task(store: Store) -> None:
    taken = await claimed(store)
    outputs = tuple(
        msgspec.structs.replace(artefact(number), key=f"{taken.task.id}/{number}", blake3=HASH)
        for number in range(3)
    )
    task = await store.settle(taken.attempt.id, succeeded(*outputs), NOW + 9)
    for each in outputs:
        assert await store.output_asset(each.id) == OutputAsset(
            task_id=task.id, artefact=each, created_at=NOW + 9, ended_at=NOW + 9
        )
    assert await store.output_asset(new_id()) is None


async def test_output_asset_comes_without_its_data(store: Store) -> None:
    taken = await claimed(store)
    inline = msgspec.structs.replace(artefact(), data=b"\x89PNG", location="id-1/public", text="hello")
    await store.settle(taken.attempt.id, succeeded(inline), NOW)
    found = await store.output_asset(inline.id)
    assert found is not None
    assert found.artefact == msgspec.structs.replace(inline, data=None)


async def test_output_asset_goes_with_its_task_and_with_a_new_run(store: Store) -> None:
    first, second = await ended(store, key="first"), await ended(store, key="second")
    (gone,), (rerun,) = first.artefacts, second.artefacts
    await store.delete(first.id)
    await store.retry(second.id, NOW)
    assert await store.output_asset(gone.id) is None
    assert await store.output_asset(rerun.id) is None
    taken = await claim(store, second.id)
    await store.settle(taken.attempt.id, succeeded(rerun), NOW + 5)
    found = await store.output_asset(rerun.id)
    assert found is not None
    assert (found.task_id, found.ended_at) == (second.id, NOW + 5)


async def test_task_that_did_not_succeed_has_no_output_assets(store: Store) -> None:
    for settlement in (failed(artefacts=(artefact(),)), again(NOW, artefacts=(artefact(),))):
        taken = await claimed(store)
        await store.settle(taken.attempt.id, settlement, NOW)
    assert await store.output_asset(artefact().id) is None


async def test_artefacts_with_one_key_end_their_task_all_the_same(store: Store) -> None:
    first, twin = artefact(), msgspec.structs.replace(artefact(node_id="10"), key=artefact().key)
    assert first.id == twin.id
    taken = await claimed(store)
    task = await store.settle(taken.attempt.id, succeeded(first, twin), NOW)
    assert task.artefacts == (first, twin)
    found = await store.output_asset(first.id)
    assert found is not None
    assert found.artefact == first


# over restarts


async def test_assets_are_there_after_opening_again(opener: Opener) -> None:
    kept, dropped = asset(), asset()
    async with opener() as store:
        await store.add_asset(kept)
        await store.add_asset(dropped)
        await store.delete_asset(dropped.id, NOW)
        (output,) = (await ended(store)).artefacts
        named = await store.output_asset(output.id)
        assert named is not None
    async with opener() as store:
        assert await store.asset(kept.id, NOW) == kept
        assert await store.asset(dropped.id, NOW) is None
        assert await store.output_asset(output.id) == named
        assert await store.unused_uploads((kept.file,)) == ()


# any sequence of verbs, held against a plain model

OWNERS = st.sampled_from([None, "key-1"])
HASHES = st.sampled_from([HASH, OTHER_HASH])
SPANS = st.integers(0, 6)
PLACES = st.integers(0, 9)
VERBS = st.one_of(
    st.tuples(st.just("add"), HASHES, OWNERS, SPANS),
    st.tuples(st.just("extend"), PLACES, SPANS),
    st.tuples(st.just("delete"), PLACES),
    st.tuples(st.just("expire"), st.integers(0, 3)),
    st.tuples(st.just("pass"), st.integers(1, 3)),
)


class Model:
    """Assets in a list, oldest first, beside the store that should agree with it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.now = NOW
        self.ids = [new_id() for _ in range(10)]
        self.rows: dict[str, Asset] = {}

    async def add(self, blake3: str, owner: str | None, span: int) -> None:
        """A new record; more than there are ids are not made."""
        asset_id = next((each for each in self.ids if each not in self.rows), None)
        if asset_id is None:
            return
        record = asset(
            id=asset_id,
            blake3=blake3,
            file=f"{blake3}.png",
            key_id=owner,
            created_at=self.now,
            expires_at=self.now + span,
        )
        assert await self.store.add_asset(record) == (self.newest(blake3, owner) is None)
        self.rows[asset_id] = record

    def newest(self, blake3: str, owner: str | None) -> Asset | None:
        """What the store should find over these bytes."""
        found = [
            each
            for each in self.rows.values()
            if (each.blake3, each.key_id) == (blake3, owner) and each.expires_at > self.now
        ]
        return found[-1] if found else None

    async def extend(self, place: int, span: int) -> None:
        """Perhaps of one that is not there."""
        asset_id, moment = self.ids[place], self.now + span
        if asset_id in self.rows:
            old = self.rows[asset_id]
            self.rows[asset_id] = msgspec.structs.replace(old, expires_at=max(old.expires_at, moment))
        assert await self.store.extend_asset(asset_id, moment) == self.rows.get(asset_id)

    async def delete(self, place: int) -> None:
        """Perhaps of one that is not there, or has expired."""
        there = self.rows.get(self.ids[place])
        if there is not None and there.expires_at <= self.now:
            there = None
        assert await self.store.delete_asset(self.ids[place], self.now) == there
        if there is not None:
            del self.rows[there.id]

    async def expire(self, limit: int) -> None:
        """As many as may go, of those that have expired."""
        expired = [each for each in self.rows.values() if each.expires_at <= self.now]
        gone = await self.store.expire_assets(self.now, limit)
        assert len(gone) == min(limit, len(expired))
        for each in gone:
            assert self.rows.pop(each.id) == each
            assert each.expires_at <= self.now

    async def agrees(self) -> None:
        """Every read says what the model says."""
        for asset_id in self.ids:
            row = self.rows.get(asset_id)
            there = row if row is not None and row.expires_at > self.now else None
            assert await self.store.asset(asset_id, self.now) == there
        for blake3 in (HASH, OTHER_HASH):
            for owner in (None, "key-1"):
                found = await self.store.asset_of_bytes(blake3, owner, self.now)
                assert found == self.newest(blake3, owner)
        used = {each.file for each in self.rows.values()}
        files = [f"{HASH}.png", f"{OTHER_HASH}.png"]
        assert set(await self.store.unused_uploads(files)) == set(files) - used


@pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
@settings(max_examples=15, deadline=None)  # a loaded machine is not a failure
@given(verbs=st.lists(VERBS, max_size=25))
def test_any_sequence_of_verbs_agrees_with_the_model(
    tmp_path_factory: pytest.TempPathFactory, implementation: str, verbs: list[tuple[object, ...]]
) -> None:
    async def run() -> None:
        async with IMPLEMENTATIONS[implementation](tmp_path_factory.mktemp("model")) as store:
            model = Model(store)
            for name, *words in verbs:
                if name == "pass":
                    (pause,) = words
                    assert isinstance(pause, int)
                    model.now += pause
                else:
                    await getattr(model, str(name))(*words)
                await model.agrees()

    asyncio.run(run())
