"""Messages to webhooks: the words of the API, urls of this moment, and never too long."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest

from comfyd.api.links import Links
from comfyd.api.notices import LIMIT, METADATA, Notices, OutputMessage, TaskMessage, base_of
from comfyd.config import ServerConfig
from comfyd.deliveries import Delivery
from comfyd.signing import KEY_BYTES, Signer
from comfyd.storage.opening import open_storages
from comfyd.tasks import Artefact, EventType, OutputType, Status, Task, TaskError
from tests.support.clock import HandClock
from tests.support.service import configuration
from tests.support.values import artefact, attempt, task

BASE = "https://comfy.example"
ID = "5e1f6c1e-0000-4000-8000-000000000001"
HOUR = 3_600_000
LONG = {"names": "名" * 512, "smileys": "😀" * 512, "controls": "\x01" * 512, "letters": "a" * 512}


def owed(subject: Task, event: EventType = EventType.COMPLETED, output: int | None = None) -> Delivery:
    return Delivery(
        id="msg_1",
        task_id=subject.id,
        type=event,
        url="https://example.com/hook?token=t0ken",
        endpoint="https://example.com:443",
        created_at=1_700_000_000_123,
        subject=subject,
        output=output,
        next_at=1_700_000_000_123,
    )


def picture(number: int, **facts: Any) -> Artefact:
    return artefact(index=number, key=f"{ID}/1/2_{number}_a.png", **facts)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def notices(tmp_path: Path, clock: HandClock) -> AsyncIterator[Notices]:
    async with open_storages(configuration(tmp_path), clock) as storages:
        yield Notices(Links(storages, Signer(bytes(KEY_BYTES), HOUR, clock)), BASE)


async def told(notices: Notices, delivery: Delivery) -> Any:
    """The message, checked against what the API's document says of it."""
    body = await notices.render(delivery)
    assert len(body) <= LIMIT < 20_000
    msgspec.json.decode(body, type=TaskMessage if delivery.output is None else OutputMessage, strict=True)
    return msgspec.json.decode(body)


async def test_an_ended_task_is_told_in_the_words_of_the_api(notices: Notices) -> None:
    stored = picture(0, width=16, height=8, data=b"secret bytes")
    ended = task(
        status=Status.SUCCEEDED,
        workflow="text-to-image",
        priority=5,
        metadata={"customer": "42"},
        inputs={"prompt": "a secret"},
        attempts=(attempt(),),
        artefacts=(stored,),
        started_at=1_500,
        completed_at=2_000,
    )
    message = await told(notices, owed(ended))
    url = message["data"]["outputs"][0].pop("url")
    assert url.startswith(f"{BASE}/api/files/{ID}/1/2_0_a.png?expires=")
    assert message == {
        "type": "task.completed",
        "timestamp": "2023-11-14T22:13:20.123Z",
        "data": {
            "task_id": ID,
            "status": "COMPLETED",
            "workflow": "text-to-image",
            "priority": 5,
            "created_at": "1970-01-01T00:00:01.000Z",
            "started_at": "1970-01-01T00:00:01.500Z",
            "completed_at": "1970-01-01T00:00:02.000Z",
            "cancel_requested": False,
            "outputs": [
                {
                    "node_id": "2",
                    "name": "t_00001_.png",
                    "type": "image",
                    "content_type": "image/png",
                    "size_bytes": 3,
                    "sha256": "0" * 64,
                    "width": 16,
                    "height": 8,
                    "duration": None,
                    "storage": "local",
                    "text": None,
                }
            ],
            "outputs_total": 1,
            "error": None,
            "metadata": {"customer": "42"},
            "urls": {
                "self": f"{BASE}/api/tasks/{ID}",
                "events": f"{BASE}/api/tasks/{ID}/events",
                "ws": f"wss://comfy.example/api/tasks/{ID}/ws",
                "cancel": f"{BASE}/api/tasks/{ID}/cancel",
                "retry": f"{BASE}/api/tasks/{ID}/retry",
                "deliveries": f"{BASE}/api/deliveries?task_id={ID}",
            },
            "truncated": False,
        },
    }


@pytest.mark.parametrize(
    ("event", "status", "word"),
    [
        (EventType.STARTED, Status.RUNNING, "PROCESSING"),
        (EventType.FAILED, Status.FAILED, "FAILED"),
        (EventType.CANCELED, Status.CANCELED, "CANCELED"),
    ],
)
async def test_every_event_has_the_status_of_that_moment(
    notices: Notices, event: EventType, status: Status, word: str
) -> None:
    subject = task(status=status, cancel_requested_at=1_000 if status is Status.CANCELED else None)
    message = await told(notices, owed(subject, event))
    assert (message["type"], message["data"]["status"]) == (str(event), word)
    assert message["data"]["cancel_requested"] is (status is Status.CANCELED)
    assert message["data"]["outputs"] == []


async def test_a_failure_says_why(notices: Notices) -> None:
    # ComfyUI's details may hold whole numbers of any size, as seeds are
    details = {"node_id": "3", "seed": 2**70}
    error = TaskError(code="execution_error", message="KSampler: it broke", details=details, retryable=True)
    message = await told(notices, owed(task(status=Status.FAILED, error=error), EventType.FAILED))
    assert message["data"]["error"] == {
        "code": "execution_error",
        "message": "KSampler: it broke",
        "details": details,
        "retryable": True,
    }


async def test_an_output_is_told_alone(notices: Notices) -> None:
    several = tuple(picture(number, name=f"{number}.png") for number in range(3))
    ended = task(status=Status.SUCCEEDED, artefacts=several, metadata={"a": "b"})
    message = await told(notices, owed(ended, EventType.OUTPUT, output=1))
    assert message["type"] == "task.output"
    assert set(message["data"]) == {"task_id", "output", "metadata", "urls", "truncated"}
    assert message["data"]["output"]["name"] == "1.png"
    assert "data" not in message["data"]["output"]
    assert message["data"]["metadata"] == {"a": "b"}
    assert message["data"]["truncated"] is False


async def test_urls_are_made_when_the_message_is(notices: Notices, clock: HandClock) -> None:
    def expiry(message: Any) -> int:
        return int(parse_qs(urlsplit(message["data"]["outputs"][0]["url"]).query)["expires"][0])

    delivery = owed(task(status=Status.SUCCEEDED, artefacts=(picture(0),)))
    first = expiry(await told(notices, delivery))
    clock.advance(10 * HOUR)
    assert expiry(await told(notices, delivery)) == first + 36_000


async def test_long_texts_are_cut_first_and_nothing_else(notices: Notices) -> None:
    texts = tuple(picture(number, type=OutputType.TEXT, text="名" * 2_000) for number in range(4))
    short = picture(4, type=OutputType.TEXT, text="short")
    ended = task(status=Status.SUCCEEDED, artefacts=(*texts, short, picture(5)), metadata={"a": "b" * 500})
    data = (await told(notices, owed(ended)))["data"]
    assert [output["text"] for output in data["outputs"]] == ["名" * 200 + "…"] * 4 + ["short", None]
    assert data["truncated"] is True
    assert data["outputs_total"] == 6
    assert data["metadata"] == {"a": "b" * 500}


async def test_an_error_is_cut_before_outputs_are(notices: Notices) -> None:
    error = TaskError(code="execution_error", message="m" * 100_000, details={"node_id": "3", "x": "y" * 100})
    stored = (picture(0), picture(1))
    ended = task(status=Status.FAILED, error=error, artefacts=stored, metadata={"a": "b"})
    data = (await told(notices, owed(ended, EventType.FAILED)))["data"]
    assert data["error"] == {
        "code": "execution_error",
        "message": "m" * 500 + "…",
        "details": {},
        "retryable": False,
    }
    assert len(data["outputs"]) == 2
    assert data["metadata"] == {"a": "b"}
    assert data["truncated"] is True


async def test_of_many_outputs_the_first_are_told_as_far_as_they_fit(notices: Notices) -> None:
    many = tuple(picture(number, name=f"{number}.png") for number in range(500))
    ended = task(status=Status.SUCCEEDED, artefacts=many, metadata={"a": "b"})
    body = await notices.render(owed(ended))
    data = msgspec.json.decode(body)["data"]
    names = [output["name"] for output in data["outputs"]]
    assert names == [f"{number}.png" for number in range(len(names))]
    assert data["outputs_total"] == 500
    assert data["truncated"] is True
    assert data["metadata"] == {"a": "b"}
    # one more would not have fitted
    assert LIMIT - len(msgspec.json.encode(data["outputs"][-1])) - 2 < len(body) <= LIMIT


@pytest.mark.parametrize("kind", LONG)
async def test_metadata_gives_way_in_whole_pairs_where_nothing_else_is_left(
    notices: Notices, kind: str
) -> None:
    pairs = {f"{LONG[kind][:62]}{number:02}": LONG[kind] for number in range(16)}
    error = TaskError(code="execution_error", message=LONG[kind] * 200)
    texts = tuple(picture(number, text=LONG[kind], type=OutputType.TEXT) for number in range(500))
    ended = task(status=Status.FAILED, metadata=pairs, error=error, artefacts=texts)
    data = (await told(notices, owed(ended, EventType.FAILED)))["data"]
    kept = data["metadata"]
    assert 0 < len(kept) < 16
    assert list(kept.items()) == list(pairs.items())[: len(kept)]
    assert len(msgspec.json.encode(kept)) <= METADATA
    assert data["truncated"] is True
    assert data["outputs"], "there is room for an output beside the longest of all else"


@pytest.mark.parametrize("kind", ["names", "smileys", "controls"])
async def test_an_output_is_told_however_long_metadata_is(notices: Notices, kind: str) -> None:
    pairs = {f"{LONG[kind][:62]}{number:02}": LONG[kind] for number in range(16)}
    stored = picture(0, text=LONG[kind], type=OutputType.TEXT)
    ended = task(status=Status.SUCCEEDED, metadata=pairs, artefacts=(stored,))
    data = (await told(notices, owed(ended, EventType.OUTPUT, output=0)))["data"]
    assert data["output"]["text"] == LONG[kind][:200] + "…"
    assert list(data["metadata"].items()) == list(pairs.items())[: len(data["metadata"])]
    assert data["truncated"] is True


async def test_an_output_that_is_too_long_by_itself_is_left_out(notices: Notices) -> None:
    endless = picture(0, name="n" * 30_000)
    ended = task(status=Status.SUCCEEDED, artefacts=(endless,))
    data = (await told(notices, owed(ended, EventType.OUTPUT, output=0)))["data"]
    assert (data["output"], data["truncated"]) == (None, True)
    data = (await told(notices, owed(ended)))["data"]
    assert (data["outputs"], data["outputs_total"], data["truncated"]) == ([], 1, True)


@pytest.mark.parametrize(
    ("server", "base"),
    [
        (ServerConfig(public_url="https://comfy.example/x/"), "https://comfy.example/x"),
        (ServerConfig(), "http://127.0.0.1:8000"),
        (ServerConfig(host="0.0.0.0", port=81), "http://127.0.0.1:81"),  # noqa: S104 - nothing is bound
        (ServerConfig(host="::", port=81), "http://[::1]:81"),
        (ServerConfig(host="comfyd.internal", port=81), "http://comfyd.internal:81"),
    ],
)
def test_urls_begin_with_the_public_address_or_our_own(server: ServerConfig, base: str) -> None:
    assert base_of(server) == base
