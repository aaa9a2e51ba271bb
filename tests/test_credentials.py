"""Credentials reach ComfyUI and nobody else: not a file, not a log line, not an answer, not a message."""

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import web

from comfyd.api.requests import converted
from comfyd.api.schemas import TaskRequest
from comfyd.api.tasks import credentials
from comfyd.comfy.messages import ExecutionError, MessageReader, NodeBlocked, ProgressText
from comfyd.comfy.redaction import LONGEST as LONGEST_TEXT
from comfyd.comfy.redaction import clean, without_paths
from comfyd.comfy.rejections import rejection
from comfyd.comfy.sightings import read_history
from comfyd.credentials import LONGEST, NO_SECRETS, REMOVED, WITHHELD, Credentials, Secrets
from comfyd.errors import Conflict, IdempotencyKeyReuse, MalformedRequest
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.submission import SubmitRequest
from comfyd.tasks import IdempotencyKey, Status, Task
from tests.support.comfyd import Client, ComfydProcess
from tests.support.service import Bench, bench, colored, configuration, sampled, until

GRAPHS = Path(__file__).parent / "graphs"
CANARY = "kanarienvogel"
KEY = f"/srv/{CANARY}/x y{CANARY}/é'\"\\{CANARY}"
"""Would be cut apart by what shortens paths, and is written otherwise in JSON and in Python."""
JSON = {"Content-Type": "application/json"}
EXTRA = {"api_key_comfy_org": KEY}


def graph(name: str) -> Any:
    return json.loads((GRAPHS / f"{name}.json").read_text())


# the values


def test_what_is_kept_is_there_until_it_is_forgotten() -> None:
    held, given = Credentials(), dict(EXTRA)
    held.keep("t", given)
    given.clear()
    assert held.of("t") == EXTRA
    assert held.of("u") is None
    assert repr(held) == "Credentials(1 tasks)"
    held.forget("t")
    held.forget("t")
    assert held.of("t") is None


@pytest.mark.parametrize(
    "shown", [KEY, repr(KEY), json.dumps(KEY), json.dumps(KEY, ensure_ascii=False), quote(KEY, safe="")]
)
def test_a_secret_is_found_however_it_is_written(shown: str) -> None:
    said = Secrets([KEY]).without(f"401 for {shown}, {shown}")
    assert CANARY not in said
    assert said.count(REMOVED) == 2
    assert said.startswith("401 for ")


def test_the_longest_of_several_secrets_goes_first() -> None:
    assert Secrets(["abc", "abcdef"]).without("abcdef abc") == f"{REMOVED} {REMOVED}"


def test_without_secrets_a_text_stays_as_it_is() -> None:
    assert NO_SECRETS.without("a text") == Secrets([""]).without("a text") == "a text"


def test_no_text_is_safe_where_the_secrets_are_not_known() -> None:
    assert Secrets(None).without("a text") == WITHHELD
    assert Secrets(None).without("") == ""


def test_a_secret_goes_before_anything_is_cut() -> None:
    secrets = Secrets([KEY])
    assert CANARY not in without_paths(f"no key {KEY}", secrets)
    assert CANARY not in without_paths("x" * (LONGEST_TEXT - 20) + KEY, secrets)
    cleaned = clean({KEY: [f"it is {KEY}", 3], "traceback": KEY}, secrets)
    assert cleaned == {REMOVED: [f"it is {REMOVED}", 3]}


# what ComfyUI says


def test_a_refusal_does_not_repeat_the_secret() -> None:
    wrong = {"type": "invalid", "message": f"m {KEY}", "details": f"d {KEY}"}
    values = {**wrong, "extra_info": {"received_value": {"key": KEY}, "input_name": "x"}}
    for answer in (
        {"error": wrong, "node_errors": {"1": {"class_type": "X", "errors": [values]}}},
        {"error": wrong, "node_errors": {}},
        {"error": {**wrong, "type": "invalid_prompt", "extra_info": {"node_id": "9"}}, "node_errors": {}},
    ):
        said = rejection(400, json.dumps(answer).encode(), {}, Secrets([KEY]))
        assert CANARY not in repr((said.message, said.details))
        assert REMOVED in said.message


def test_history_and_socket_do_not_repeat_the_secret() -> None:
    facts: dict[str, Any] = {
        "prompt_id": "p",
        "node_id": "3",
        "exception_message": f"bad {KEY}",
        "traceback": [KEY],
    }
    facts["current_inputs"] = {"key": [KEY]}
    body = {"p": {"status": {"messages": [["execution_error", facts]]}}}
    entry = read_history(json.dumps(body).encode(), "p", Secrets([KEY]))
    assert entry is not None
    assert entry.error is not None
    assert (entry.error.message, CANARY in repr(entry)) == (f"bad {REMOVED}", False)

    reader = MessageReader({"p": Secrets([KEY]), "q": NO_SECRETS}.__getitem__)
    error = reader.text(json.dumps({"type": "execution_error", "data": facts}))
    assert error == ExecutionError(prompt_id="p", node_id="3", exception_message=f"bad {REMOVED}")
    blocked = {**facts, "exception_type": "ExecutionBlocked"}
    message = reader.text(json.dumps({"type": "execution_error", "data": blocked}))
    assert message == NodeBlocked(prompt_id="p", node_id="3", message=f"bad {REMOVED}")
    reader.text(json.dumps({"type": "executing", "data": {"prompt_id": "p", "node": "3"}}))
    frame = b"\0\0\0\3" + b"\0\0\0\1" + b"3" + f"with {KEY}".encode()
    assert reader.binary(frame) == ProgressText(prompt_id="p", node_id="3", text=f"with {REMOVED}")
    other = reader.text(json.dumps({"type": "execution_error", "data": {**facts, "prompt_id": "q"}}))
    assert isinstance(other, ExecutionError)
    assert CANARY in other.exception_message  # it is nobody's secret there


# what is sent


def sent(extra_data: Any) -> TaskRequest:
    return converted({"workflow": "w", "extra_data": extra_data}, TaskRequest)


@pytest.mark.parametrize("wrong", ["", "x" * (LONGEST + 1), "a\nb", "a\u202eb", 7, [KEY], {"k": KEY}])
def test_a_key_that_is_none_is_refused_and_not_repeated(wrong: Any) -> None:
    with pytest.raises(MalformedRequest) as refusal:
        credentials(sent({"api_key_comfy_org": wrong}).extra_data)
    assert refusal.value.details == {"path": "$.extra_data.api_key_comfy_org"}
    assert CANARY not in refusal.value.message


@pytest.mark.parametrize("wrong", [{"api_key": "x"}, "x", ["x"]])
def test_extra_data_is_a_closed_object(wrong: Any) -> None:
    with pytest.raises(MalformedRequest):
        sent(wrong)


@pytest.mark.parametrize("nothing", [{}, None, {"api_key_comfy_org": None}])
def test_extra_data_without_a_key_brings_nothing(nothing: Any) -> None:
    assert credentials(sent(nothing).extra_data) == {}


def test_no_request_shows_its_key() -> None:
    wanted = sent({"api_key_comfy_org": "x" * LONGEST})
    assert credentials(wanted.extra_data) == {"api_key_comfy_org": "x" * LONGEST}
    assert "xxx" not in repr(wanted)
    assert CANARY not in repr(SubmitRequest(workflow="w", credentials=EXTRA))


# through the legs


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions(step_seconds=0.01)) as made:
        yield made


@pytest.fixture
async def made(simulator: Simulator, tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(configuration(tmp_path / "data", simulator.url)) as running:
        yield running


def held(made: Bench) -> str:
    """How many tasks' credentials are remembered."""
    return repr(made.state.submission._credentials)  # noqa: SLF001 - nothing shows them, on purpose


async def test_credentials_reach_comfyui_and_are_forgotten_at_the_end(
    made: Bench, simulator: Simulator
) -> None:
    plain = await made.ended((await made.submit(colored(1))).id)
    task = await made.ended((await made.submit(colored(2), credentials=EXTRA)).id)
    assert (plain.status, task.status) == (Status.SUCCEEDED, Status.SUCCEEDED)
    assert (plain.credentials, task.credentials) == (False, True)
    assert simulator.secrets == {plain.attempts[0].id: {}, task.attempts[0].id: EXTRA}
    with pytest.raises(Conflict, match="submit it again"):
        await made.state.control.retry(task.id)
    assert held(made) == "Credentials(0 tasks)"


async def test_credentials_are_kept_for_the_task_that_was_made_only(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with bench(configuration(tmp_path / "data", simulator.url), works=False) as idle:
        request = SubmitRequest(workflow=colored(1), credentials=EXTRA)
        first = await idle.state.submission.submit(request, IdempotencyKey(key="k", body_sha256="a"))
        again = await idle.state.submission.submit(request, IdempotencyKey(key="k", body_sha256="a"))
        assert (again.replayed, again.task.id) == (True, first.task.id)
        with pytest.raises(IdempotencyKeyReuse):
            await idle.state.submission.submit(request, IdempotencyKey(key="k", body_sha256="b"))
        assert held(idle) == "Credentials(1 tasks)"


async def test_a_task_that_goes_back_to_the_queue_keeps_its_credentials(
    made: Bench, simulator: Simulator
) -> None:
    simulator.faults.class_seconds = {"EmptyImage": 60}
    task = await made.submit(colored(3), credentials=EXTRA)
    await made.until(lambda row: bool(row.attempts) and row.attempts[0].seen_running_at is not None, task.id)
    simulator.faults.class_seconds = {}
    await simulator.crash()
    await simulator.restart()
    ended = await made.ended(task.id)
    assert [attempt.outcome for attempt in ended.attempts] == ["suspect", "succeeded"]
    assert simulator.secrets[ended.attempts[1].id] == EXTRA


async def test_what_comfyui_says_of_a_failure_comes_without_the_key(
    made: Bench, simulator: Simulator
) -> None:
    simulator.faults.secrets_repeated = True
    refused = await made.ended((await made.submit(graph("image-to-image"), credentials=EXTRA)).id)
    failed = await made.ended((await made.submit(graph("fail-at-runtime"), credentials=EXTRA)).id)
    assert refused.error is not None
    assert failed.error is not None
    assert (refused.error.code, failed.error.code) == ("invalid_workflow", "execution_error")
    for task in (refused, failed):
        assert CANARY not in repr(task)
        assert REMOVED in repr(task.error)
    assert "unterminated subpattern" in failed.error.message
    assert held(made) == "Credentials(0 tasks)"


async def test_the_credentials_of_a_task_that_is_canceled_while_it_waits_are_forgotten(
    made: Bench, simulator: Simulator
) -> None:
    await simulator.crash()
    task = await made.submit(colored(4), credentials=EXTRA)
    assert held(made) == "Credentials(1 tasks)"
    assert (await made.state.control.cancel(task.id)).status is Status.CANCELED
    assert held(made) == "Credentials(0 tasks)"


async def left_behind(simulator: Simulator, data: Path, workflow: Any) -> Task:
    """A task with credentials that is running when its comfyd goes."""
    async with bench(configuration(data, simulator.url), grace_ms=0) as made:
        task = await made.submit(workflow, credentials=EXTRA)
        return await made.until(
            lambda row: bool(row.attempts) and row.attempts[0].seen_running_at is not None, task.id
        )


async def test_an_adopted_prompt_that_fails_may_not_say_why(simulator: Simulator, tmp_path: Path) -> None:
    simulator.faults.secrets_repeated = True
    simulator.faults.class_seconds = {"RegexReplace": 1.0}
    task = await left_behind(simulator, tmp_path / "data", graph("fail-at-runtime"))
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        ended = await made.ended(task.id)
    assert ended.error is not None
    assert ended.error.message == f"node 3 (RegexReplace): {WITHHELD}"
    assert ended.error.details["exception_type"] is not None
    assert CANARY not in repr(ended)


async def test_an_adopted_prompt_that_comfyui_lost_is_not_run_without_its_key(
    simulator: Simulator, tmp_path: Path
) -> None:
    task = await left_behind(simulator, tmp_path / "data", sampled(1, 3_000))
    await simulator.crash()
    await simulator.restart()
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        ended = await made.ended(task.id)
    assert ended.error is not None
    assert (ended.error.code, ended.error.retryable) == ("credentials_lost", False)
    assert "submit it again" in ended.error.message
    assert simulator.secrets == {}


# the whole service, as a process


class Receiver:
    """A webhook's receiver that keeps what it is sent. Lives as long as the block of `receiving`."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[str] = []

    async def handle(self, request: web.Request) -> web.Response:
        """Any request."""
        self.bodies.append(await request.text())
        return web.Response()


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver, application = Receiver(), web.Application()
    application.router.add_post("/hook", receiver.handle)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
        yield receiver
    finally:
        await runner.cleanup()


@asynccontextmanager
async def comfyd_at(folder: Path, simulator: Simulator) -> AsyncIterator[tuple[ComfydProcess, Client]]:
    """A comfyd that logs all it has to say."""
    settings = {"COMFYD__LOG__LEVEL": "debug", "COMFYD__OUTBOUND__ALLOW": "127.0.0.1"}
    settings["COMFYD__LOG__FILE"] = str(folder / "data" / "comfyd.jsonl")
    process = ComfydProcess(folder, simulator.url, **settings)
    try:
        await asyncio.to_thread(process.start)
        async with aiohttp.ClientSession() as session:
            yield process, Client(session, process.url)
    finally:
        await asyncio.to_thread(process.kill)


TRACES = re.compile(
    "|".join(("kanarien", "vogel", hashlib.sha256(KEY.encode()).hexdigest())).encode(), re.IGNORECASE
)


def left_traces(folder: Path, *digests: str) -> list[str]:
    """The files that hold the key, a part of it, or a digest that tells of it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"comfyd.db", "comfyd.log", "comfyd.jsonl"} <= {path.name for path in files}
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    told = tuple(digest.encode() for digest in digests)
    return [
        name
        for name, content in contents.items()
        if TRACES.search(content) or any(digest in content for digest in told)
    ]


async def test_the_key_is_in_no_file_no_log_line_no_answer_and_no_message(
    simulator: Simulator, tmp_path: Path
) -> None:
    simulator.faults.secrets_repeated = True
    answers: list[str] = []
    async with receiving() as receiver, comfyd_at(tmp_path, simulator) as (_, client):
        facts = {"extra_data": EXTRA, "webhook_url": receiver.url}

        async def asked(method: str, path: str, **options: Any) -> Any:
            status, body = await client.call(method, path, **options)
            answers.append(json.dumps([status, body], ensure_ascii=False))
            return status, body

        async def submitted(workflow: Any, **more: Any) -> str:
            status, body = await asked("POST", "/api/tasks", json={"workflow": workflow, **facts, **more})
            assert status == 202, body
            return str(body["task_id"])

        good = await submitted(colored(1), inputs={"1.width": 32}, metadata={"a": "b"})
        refused, failed = await submitted(graph("image-to-image")), await submitted(graph("fail-at-runtime"))
        statuses = [(await client.ended(task))["status"] for task in (good, refused, failed)]
        assert statuses == ["COMPLETED", "FAILED", "FAILED"]
        running = await submitted(sampled(1, 3_000), webhook_events=["task.started", "task.canceled"])
        more = [await submitted(sampled(2 + number, 3_000)) for number in range(4)]
        await until(lambda: len(simulator.executions) >= 5)
        for task in (*more, running):
            await asked("POST", f"/api/tasks/{task}/cancel")
        assert {(await client.ended(task))["status"] for task in (*more, running)} == {"CANCELED"}
        for task in (good, refused, failed, running):
            status, body = await asked("POST", f"/api/tasks/{task}/retry")
            assert (status, body["error"]["code"]) == (409, "conflict")
            assert "submit it again" in body["error"]["message"]
            await asked("GET", f"/api/tasks/{task}")
            await asked("GET", f"/api/v2/jobs/{task}")
            await asked("GET", f"/api/v2/jobs/{task}/workflow")
        for wrong in ({"api_key_comfy_org": f"{KEY}\n"}, {"api_key_comfy_org": [KEY]}, {"k": 1, **EXTRA}):
            body = {"workflow": colored(1), "extra_data": wrong}
            assert (await asked("POST", "/api/tasks", json=body))[0] == 400
        deep = b'{"workflow": "w", "extra_data": {}, "inputs": ' + b"[" * 400 + b"]" * 400 + b"}"
        assert (await asked("POST", "/api/tasks", data=deep, headers=JSON))[0] == 400
        body = {"workflow": {"1": {"class_type": "None such", "inputs": {}}}, "extra_data": EXTRA}
        assert (await asked("POST", "/api/tasks", json=body))[0] == 422

        await until(lambda: len(receiver.bodies) >= 9)
        for path in ("/api/tasks", "/api/status", "/api/deliveries", "/api/v2/jobs", "/api/ready"):
            await asked("GET", path)
        async with aiohttp.ClientSession() as session:
            answers.append((await client.read(f"{_base(client)}/metrics")).decode())
            async with session.get(f"{_base(client)}/api/tasks/{failed}/events") as stream:
                answers.append(await stream.text())
        assert left_traces(tmp_path) == []
    assert left_traces(tmp_path) == []
    assert len(answers) > 30
    assert [text for text in (*answers, *receiver.bodies) if TRACES.search(text.encode())] == []
    assert list(simulator.secrets.values()).count(EXTRA) >= 3


def _base(client: Client) -> str:
    return client._url  # noqa: SLF001 - where it asks


async def test_a_repeat_is_known_whatever_its_credentials_and_its_digest_tells_nothing(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with comfyd_at(tmp_path, simulator) as (_, client):
        headers = {"Idempotency-Key": "k", **JSON}

        async def sent(body: dict[str, Any]) -> tuple[int, Any, str]:
            raw = json.dumps(body).encode()
            status, answer = await client.call("POST", "/api/tasks", data=raw, headers=headers)
            return status, answer, hashlib.sha256(raw).hexdigest()

        body = {"workflow": colored(5), "priority": 3}
        status, first, digest = await sent({**body, "extra_data": EXTRA})
        assert status == 202
        for extra in ({"api_key_comfy_org": "another"}, {}, None):
            status, again, _ = await sent({"extra_data": extra, **body})
            assert (status, again["task_id"]) == (202, first["task_id"])
        assert (await sent({**body, "priority": 4, "extra_data": EXTRA}))[0] == 422
        assert (await client.ended(first["task_id"]))["status"] == "COMPLETED"
        assert [secrets for secrets in simulator.secrets.values() if secrets] == [EXTRA]
        assert left_traces(tmp_path, digest) == []


@pytest.mark.parametrize("way", ["killed", "stopped"])
async def test_after_a_restart_what_waited_fails_and_what_ran_goes_on(
    simulator: Simulator, tmp_path: Path, way: str
) -> None:
    async with comfyd_at(tmp_path, simulator) as (process, client):
        tasks = [await client.submit(sampled(1, 200), extra_data=EXTRA)]
        await until(lambda: len(simulator.executions) == 1)
        tasks += [await client.submit(colored(10 + number), extra_data=EXTRA) for number in range(6)]
        plain = await client.submit(colored(20))
        await asyncio.to_thread(process.kill if way == "killed" else process.terminate)
        sent = dict(simulator.secrets)
        assert 1 <= len(sent) < len(tasks)
        await asyncio.to_thread(process.start)
        ended = [await client.ended(task["task_id"]) for task in tasks]
        adopted = [task for task in ended if task["status"] == "COMPLETED"]
        assert tasks[0]["task_id"] in {task["task_id"] for task in adopted}
        assert {task["attempts"][0]["id"] for task in adopted} == set(sent)
        lost = [task for task in ended if task not in adopted]
        assert {task["status"] for task in lost} == {"FAILED"}
        assert {task["error"]["code"] for task in lost} == {"credentials_lost"}
        assert all("submit it again" in task["error"]["message"] for task in lost)
        own = (await client.ended(plain["task_id"]))["attempts"][0]["id"]
        assert simulator.secrets == {**sent, own: {}}
        assert left_traces(tmp_path) == []
