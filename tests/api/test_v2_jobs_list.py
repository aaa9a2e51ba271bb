"""Lists of jobs: newest first, each once, by labels and words, page after page."""

from typing import Any, Final

from yarl import URL

from comfyd.tasks import Settlement, Status
from tests.api.conftest import Edge
from tests.support.comfy_v2 import check_error, check_job
from tests.support.values import GRAPH

JOBS = "/api/v2/jobs"


async def submitted(edge: Edge, **labels: str) -> str:
    status, job = await edge.call("POST", JOBS, json={"workflow": GRAPH, "metadata": labels})
    assert status == 201
    return str(job["id"])


async def listed(edge: Edge, query: str = "") -> Any:
    status, page = await edge.call("GET", f"{JOBS}{query}")
    assert status == 200, page
    for item in page["jobs"]:
        check_job(item)
        assert {"create_time", "update_time", "deployment_id"} <= set(item)
    return page


def ids(page: Any) -> list[str]:
    return [item["id"] for item in page["jobs"]]


async def test_empty_list_has_no_cursor(edge: Edge) -> None:
    assert await listed(edge) == {"jobs": []}


async def test_pages_show_each_job_once_newest_first(edge: Edge) -> None:
    made = [await submitted(edge) for _ in range(5)]
    seen, cursors, query = [], [], "?limit=2"
    while True:
        page = await listed(edge, query)
        seen += ids(page)
        if "next_cursor" not in page:
            break
        cursors.append(page["next_cursor"])
        query = f"?limit=2&cursor={page['next_cursor']}"
    assert seen == made[::-1]
    assert len(set(cursors)) == 2


async def test_item_is_a_job_in_the_words_of_both_kinds_of_client(edge: Edge) -> None:
    job_id = await submitted(edge, client="acme")
    (item,) = (await listed(edge))["jobs"]
    assert (item["id"], item["metadata"], item["deployment_id"]) == (job_id, {"client": "acme"}, None)
    assert item["create_time"] == item["update_time"] == item["created_at"]
    await edge.claim(job_id)
    (item,) = (await listed(edge))["jobs"]
    assert item["update_time"] == item["started_at"]
    await edge.call("POST", f"{JOBS}/{job_id}/cancel")
    (item,) = (await listed(edge))["jobs"]
    assert (item["status"], item["update_time"] >= item["started_at"]) == ("canceling", True)


async def test_labels_must_all_be_there(edge: Edge) -> None:
    one = await submitted(edge, client="acme", run="a b&=%é")
    two = await submitted(edge, client="acme", run="")
    assert ids(await listed(edge, "?metadata%5Bclient%5D=acme")) == [two, one]
    assert ids(await listed(edge, "?metadata[client]=acme&metadata[run]=a+b%26%3D%25%C3%A9")) == [one]
    assert ids(await listed(edge, "?metadata[run]=")) == [two]
    assert ids(await listed(edge, "?metadata[client]=ACME")) == []
    assert ids(await listed(edge, "?metadata[a]=1&metadata[b]=2&metadata[c]=3")) == []


NO_FILTERS: Final = [
    "metadata[a]=1&metadata[b]=1&metadata[c]=1&metadata[d]=1",
    "metadata[a]=1&metadata[a]=1",
    "metadata[a]=1&metadata%5ba%5d=2",
    "metadata[]=1",
    "metadata=1",
    "metadata[a=1",
    "metadata[a]b=1",
    "metadata[a%20b]=1",
    f"metadata[{'k' * 41}]=1",
    "metadata[a%ZZ]=1",
    "metadata[%FF]=1",
    "metadata[a]=%ZZ",
    "metadata[a]=%",
    "metadata[a]=%FF",
    "metadata[a]=%00",
    "metadata[a]=%E2%80%AE",
    f"metadata[a]={'x' * 257}",
]


async def test_labels_that_cannot_be_are_refused(edge: Edge) -> None:
    for query in NO_FILTERS:
        url = URL(f"{edge.base}{JOBS}?{query}", encoded=True)  # as it is written
        async with edge.http.get(url) as response:
            code, _ = check_error(await response.json())
            assert (response.status, code) == (400, "invalid_metadata_filter"), query


BAD_PARAMETERS: Final = [
    ("limit=0", "invalid_request"),
    ("limit=101", "invalid_request"),
    ("limit=", "invalid_request"),
    ("limit=x", "invalid_request"),
    ("limit=1.5", "invalid_request"),
    ("status=", "invalid_request"),
    ("status=PENDING", "invalid_request"),
    ("status=queued,", "invalid_request"),
    ("cursor=x", "invalid_cursor"),
    ("cursor=", "invalid_cursor"),
    ("cursor=AAAA", "invalid_cursor"),
]


async def test_bad_parameters_are_refused(edge: Edge) -> None:
    for query, code in BAD_PARAMETERS:
        status, answer = await edge.call("GET", f"{JOBS}?{query}")
        assert (status, check_error(answer)[0]) == (400, code), query


async def test_other_parameters_are_ignored(edge: Edge) -> None:
    job_id = await submitted(edge)
    assert ids(await listed(edge, "?deployment=x&metadata_x=1&workflow=y")) == [job_id]


async def test_statuses_are_the_words_of_this_api(edge: Edge) -> None:
    made = {name: await submitted(edge) for name in ("queued", "running", "canceling", "failed", "canceled")}
    made["succeeded"] = await submitted(edge)
    for name in ("running", "canceling", "failed", "succeeded"):
        claim = await edge.claim(made[name])
        if name == "failed":
            await edge.fail(claim)
        if name == "succeeded":
            await edge.settle(claim, Settlement(status=Status.SUCCEEDED, outcome="succeeded"))
    for name in ("canceling", "canceled"):
        await edge.call("POST", f"{JOBS}/{made[name]}/cancel")
    for name, job_id in made.items():
        page = await listed(edge, f"?status={name}")
        assert [(item["id"], item["status"]) for item in page["jobs"]] == [(job_id, name)]
    assert set(ids(await listed(edge, "?status=queued,failed,expired"))) == {made["queued"], made["failed"]}
    assert await listed(edge, "?status=expired") == {"jobs": []}
    assert len(ids(await listed(edge))) == len(made)


async def test_list_and_job_say_the_same(edge: Edge) -> None:
    job_id = await submitted(edge)
    await edge.succeed(await edge.claim(job_id))
    (item,) = (await listed(edge))["jobs"]
    _, job = await edge.call("GET", f"{JOBS}/{job_id}")
    assert {key: value for key, value in item.items() if key in job} == job
