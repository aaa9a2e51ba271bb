"""POST /prompt can be made ambiguous, and takes what ComfyUI takes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from tests.simulator.rig import MODERN, picture, rig, tiles

SHORT = aiohttp.ClientTimeout(total=0.3)
ID = "00000000-0000-4000-8000-000000000001"
BROKEN = {"string": "abc", "regex_pattern": "(unclosed", "replace": "x"}


async def test_a_stalled_post_runs_after_the_client_gave_up() -> None:
    async with rig() as running:
        running.simulator.faults.prompt_stall_seconds = 0.6
        body = {"prompt": picture(), "prompt_id": ID}
        with pytest.raises(asyncio.TimeoutError):
            await running.server.post("/prompt", body, timeout=SHORT)
        assert await running.server.queue() == ([], [])
        assert (await running.server.finished(ID))["status"]["completed"] is True


async def test_a_late_answer_is_for_a_prompt_that_runs_already() -> None:
    async with rig() as running:
        running.simulator.faults.prompt_answer_seconds = 0.6
        with pytest.raises(asyncio.TimeoutError):
            await running.server.post("/prompt", {"prompt": picture(), "prompt_id": ID}, timeout=SHORT)
        assert await running.server.history(ID) is not None


async def test_a_lost_answer_never_comes_and_the_prompt_runs() -> None:
    async with rig() as running:
        running.simulator.faults.prompt_answers_lost = 1
        with pytest.raises(asyncio.TimeoutError):
            await running.server.post("/prompt", {"prompt": picture(), "prompt_id": ID}, timeout=SHORT)
        await running.server.finished(ID)
        assert (await running.server.post("/prompt", {"prompt": picture()})).status == 200


async def test_a_cut_answer_is_a_broken_connection_and_the_prompt_runs() -> None:
    async with rig() as running:
        running.simulator.faults.prompt_answers_cut = 1
        with pytest.raises(aiohttp.ClientError):
            await running.server.post("/prompt", {"prompt": picture(), "prompt_id": ID})
        await running.server.finished(ID)


async def test_a_path_can_answer_a_status_without_doing_anything() -> None:
    async with rig() as running:
        running.simulator.faults.http_statuses = {"/prompt": 503}
        running.simulator.faults.http_delay_seconds = 0.01
        assert (await running.server.post("/api/prompt", {"prompt": picture()})).status == 503
        assert await running.server.queue() == ([], [])


async def test_odd_numbers_make_the_answers_invalid_json() -> None:
    async with rig() as running:
        running.simulator.faults.worker_dead = True
        answer = await running.server.post("/prompt", {"prompt": picture(), "number": "nan"})
        assert b"NaN" in answer.body
        assert b"NaN" in (await running.server.get("/queue")).body


async def test_huge_integers_stay_integers() -> None:
    async with rig() as running:
        graph = picture()
        graph["1"]["inputs"]["width"] = 10**25
        errors = (await running.server.post("/prompt", {"prompt": graph})).json()["node_errors"]["1"][
            "errors"
        ]
        assert errors[0]["message"] == f"Value {10**25} bigger than max of 16384"


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[" * 100_000, b'{"prompt": {"1": 5}}'])
async def test_broken_bodies_are_500(body: bytes) -> None:
    async with rig() as running:
        answer = await running.server.request("POST", "/prompt", data=body)
        assert (answer.status, answer.headers["Content-Type"]) == (500, "text/plain; charset=utf-8")


@pytest.mark.parametrize("body", [b"{}", b"[]", b'"x"'])
async def test_a_body_without_a_prompt_is_refused(body: bytes) -> None:
    async with rig() as running:
        answer = await running.server.request("POST", "/prompt", data=body)
        assert (answer.status, answer.json()["error"]["type"]) == (400, "no_prompt")


async def test_secrets_are_hidden_and_the_source_is_noted() -> None:
    async with rig(flavor=MODERN) as running:
        body = {"prompt": picture(), "prompt_id": ID, "extra_data": {"api_key_comfy_org": "secret", "x": 1}}
        headers = {"Comfy-Usage-Source": "here"}
        assert (await running.server.post("/prompt", body, headers=headers)).status == 200
        extra = (await running.server.finished(ID))["prompt"][3]
        assert (extra["x"], extra["comfy_usage_source"]) == (1, "here")
        assert "secret" not in json.dumps(extra)


async def test_the_modern_flavor_wants_canonical_ids() -> None:
    async with rig(flavor=MODERN) as running:
        wrong_ids: list[Any] = ["abc", 5, ID.upper().replace("0001", "000A"), [], ""]
        for wrong in wrong_ids:
            answer = await running.server.post("/prompt", {"prompt": picture(), "prompt_id": wrong})
            assert (answer.status, answer.json()["error"]["type"]) == (400, "invalid_prompt_id")
        minted = await running.server.post("/prompt", {"prompt": picture(), "prompt_id": None})
        assert (minted.status, minted.json()["number"]) == (200, 5)


async def test_front_and_explicit_numbers() -> None:
    async with rig() as running:
        running.simulator.faults.worker_dead = True
        numbers = [
            (await running.server.post("/prompt", {"prompt": picture(), **fields})).json()["number"]
            for fields in ({}, {"front": True}, {"number": "2.5"}, {"front": False})
        ]
        assert numbers == [0, -1, 2.5, 2]
        assert (await running.server.get("/prompt")).json() == {"exec_info": {"queue_remaining": 4}}


async def test_the_queue_is_changed_by_delete_and_clear() -> None:
    async with rig() as running:
        running.simulator.faults.worker_dead = True
        ids = [await running.server.submit(picture()) for _ in range(3)]
        await running.server.post("/queue", {"delete": [ids[0], "unknown"]})
        assert sorted((await running.server.queue())[1]) == sorted(ids[1:])
        await running.server.post("/queue", {"clear": True})
        assert (await running.server.queue())[1] == []
        assert (await running.server.request("POST", "/queue", data=b"[]")).status == 200


async def test_history_is_paged_deleted_and_cleared() -> None:
    async with rig() as running:
        ids = [(await running.server.run(picture(color=color))).prompt_id for color in range(3)]
        assert list((await running.server.get("/history?max_items=2")).json()) == ids[1:]
        assert list((await running.server.get("/history?max_items=1&offset=1")).json()) == ids[1:2]
        assert (await running.server.get("/history?max_items=abc")).status == 500
        await running.server.post("/history", {"delete": [ids[0]]})
        assert list((await running.server.get("/history")).json()) == ids[1:]
        await running.server.post("/history", {"clear": True})
        assert (await running.server.get("/history")).json() == {}


@pytest.mark.parametrize("body", [b"", b"{", b"{}", b'{"prompt_id": null}', b'{"prompt_id": ""}'])
async def test_an_interrupt_without_an_id_hits_whatever_runs(body: bytes) -> None:
    async with rig(step_seconds=0.02) as running:
        prompt_id = await running.server.submit(tiles(size=512))
        await running.server.running(prompt_id)
        await running.server.post("/interrupt", {"prompt_id": "another"})
        assert (await running.server.request("POST", "/interrupt", data=body)).status == 200
        entry = await running.server.finished(prompt_id)
        assert entry["status"]["messages"][-1][0] == "execution_interrupted"


async def test_an_interrupt_with_a_list_is_500() -> None:
    async with rig() as running:
        assert (await running.server.request("POST", "/interrupt", data=b"[]")).status == 500


@pytest.mark.parametrize("repeated", [False, True])
async def test_secrets_are_in_no_answer_unless_the_switch_says_so(*, repeated: bool) -> None:
    extra = {"api_key_comfy_org": "secret-key"}
    async with rig() as running:
        running.simulator.faults.secrets_repeated = repeated
        broken = {**picture(), "8": {"class_type": "RegexReplace", "inputs": BROKEN}}
        broken["7"] = {"class_type": "PreviewAny", "inputs": {"source": ["8", 0]}}
        body = {"prompt": broken, "prompt_id": ID, "extra_data": extra}
        assert (await running.server.post("/prompt", body)).status == 200
        entry = await running.server.finished(ID)
        failure = next(facts for name, facts in entry["status"]["messages"] if name == "execution_error")
        refused = await running.server.post("/prompt", {"prompt": picture(size=-1), "extra_data": extra})
        assert refused.status == 400
        for shown in (
            failure["exception_message"],
            failure["traceback"],
            failure["current_inputs"],
            refused.json()["error"],
            refused.json()["node_errors"],
        ):
            assert ("secret-key" in json.dumps(shown)) is repeated
        assert running.simulator.secrets == {ID: extra}
