"""Labels and lists of jobs through the official SDK."""

import uuid
from datetime import UTC, datetime, timedelta

import pytest
from comfy_low.errors import ApiError
from comfy_low.transport import ComfyLow
from comfy_sdk import AsyncComfy, Comfy, ComfyError, Workflow

from tests.conformance import graphs
from tests.sdk.stage import Stage, finished


def picture() -> Workflow:
    return Workflow(graphs.picture())


def label() -> str:
    return uuid.uuid4().hex


def test_labels_come_back_everywhere(client: Comfy) -> None:
    labels = {"client": "acme", "run-7.b_c": f"grüße {label()}", "empty": ""}
    job = client.submit(picture(), metadata=labels)
    assert job.metadata == labels
    assert finished(job).metadata == labels
    assert client.jobs.get(job.id).metadata == labels
    (item,) = client.list_jobs(metadata={"run-7.b_c": labels["run-7.b_c"]})
    assert (item.id, item.metadata, item.status) == (job.id, labels, "succeeded")
    assert finished(client.submit(picture())).metadata == {}


def test_an_item_of_the_list_has_its_times(client: Comfy) -> None:
    began = datetime.now(UTC) - timedelta(seconds=5)
    job = finished(client.submit(picture()))
    item = next(found for found in client.list_jobs(limit=20) if found.id == job.id)
    assert item.create_time is not None
    assert item.update_time is not None
    assert began < item.create_time <= item.update_time < datetime.now(UTC) + timedelta(seconds=5)
    assert item.deployment_id is None


@pytest.mark.parametrize("size", [1, 4, 11, 12, 13, 100])
def test_pages_have_every_job_once_newest_first(client: Comfy, size: int) -> None:
    batch = label()
    ids = [client.submit(picture(), metadata={"batch": batch}).id for _ in range(12)]
    assert [item.id for item in client.list_jobs(metadata={"batch": batch}, limit=size)] == ids[::-1]


async def test_pages_are_read_asynchronously_too(async_client: AsyncComfy) -> None:
    batch = label()
    ids = [(await async_client.submit(picture(), metadata={"batch": batch})).id for _ in range(7)]
    found = [item.id async for item in async_client.list_jobs(metadata={"batch": batch}, limit=3)]
    assert found == ids[::-1]


def test_a_list_that_is_read_is_not_disturbed_by_new_jobs(client: Comfy) -> None:
    batch = {"batch": label()}
    ids = [client.submit(picture(), metadata=batch).id for _ in range(6)]
    items = client.list_jobs(metadata=batch, limit=2)
    found = [next(items).id]
    client.submit(picture(), metadata=batch)
    assert found + [item.id for item in items] == ids[::-1]


def test_all_filters_have_to_match(client: Comfy) -> None:
    one, two = label(), label()
    both = client.submit(picture(), metadata={"a": one, "b": two, "c": "x"}).id
    single = client.submit(picture(), metadata={"a": one}).id
    assert [item.id for item in client.list_jobs(metadata={"a": one})] == [single, both]
    assert [item.id for item in client.list_jobs(metadata={"a": one, "b": two})] == [both]
    assert [item.id for item in client.list_jobs(metadata={"a": one, "b": two, "c": "x"})] == [both]
    assert list(client.list_jobs(metadata={"a": one, "b": one})) == []
    assert list(client.list_jobs(metadata={"a": one[:-1]})) == []


def test_a_list_without_filters_has_jobs_of_every_status(client: Comfy) -> None:
    failed = finished(client.submit(Workflow(graphs.failing())))
    succeeded = finished(client.submit(picture()))
    found = {item.id: item.status for item in client.list_jobs()}
    assert (found[failed.id], found[succeeded.id]) == ("failed", "succeeded")


@pytest.mark.parametrize(
    "labels",
    [
        {"": "x"},
        {"a b": "x"},
        {"k" * 41: "x"},
        {"k": "v" * 257},
        {"k": "ü" * 129},
        {"k": "a\nb"},
        {"k": "a\u202eb"},
        {str(number): "x" for number in range(17)},
    ],
    ids=["empty key", "blank in key", "long key", "long", "long in bytes", "control", "bidi", "seventeen"],
)
def test_bad_labels_are_refused(client: Comfy, labels: dict[str, str]) -> None:
    with pytest.raises(ComfyError) as caught:
        client.submit(picture(), metadata=labels)
    assert (caught.value.http_status, caught.value.code) == (422, "metadata_invalid")


def test_labels_may_be_as_large_as_allowed(client: Comfy) -> None:
    labels = {f"{number:040d}": "ü" * 128 for number in range(16)}
    assert finished(client.submit(picture(), metadata=labels)).metadata == labels


@pytest.mark.parametrize(
    "wanted", [{"a": "1", "b": "2", "c": "3", "d": "4"}, {"a b": "x"}, {"": "x"}, {"k": "v" * 257}]
)
def test_a_bad_filter_is_refused(client: Comfy, wanted: dict[str, str]) -> None:
    with pytest.raises(ComfyError) as caught:
        list(client.list_jobs(metadata=wanted))
    assert (caught.value.http_status, caught.value.code) == (400, "invalid_metadata_filter")


@pytest.mark.parametrize("cursor", ["nonsense", "0", "AAAA", "ü"])
def test_a_cursor_of_somebody_else_is_refused(stage: Stage, cursor: str) -> None:
    with ComfyLow(stage.comfyd.url) as low, pytest.raises(ApiError) as caught:
        low.list_jobs(cursor=cursor)
    assert (caught.value.http_status, caught.value.code) == (400, "invalid_cursor")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_page_has_a_size(client: Comfy, limit: int) -> None:
    with pytest.raises(ComfyError) as caught:
        list(client.list_jobs(limit=limit))
    assert (caught.value.http_status, caught.value.code) == (400, "invalid_request")
