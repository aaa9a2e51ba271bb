"""The worker runs prompts in ComfyUI's way, and goes wrong in ComfyUI's ways."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.conformance.raw_client import ends, kind_is
from tests.simulator.rig import MODERN, node, painting, picture, rig, tiles, until


async def test_the_log_tells_what_ran_and_what_was_cached() -> None:
    async with rig() as running:
        first = await running.server.run(picture(prefix="a/x"))
        await running.server.run(picture(prefix="a/y"))
        start, end, _, second_end = running.simulator.executions
        assert (start.event, start.prompt_id, start.executed) == ("start", first.prompt_id, [])
        assert (end.event, end.outcome, sorted(end.executed), end.cached) == (
            "end",
            "success",
            ["1", "9"],
            [],
        )
        assert (end.client_id, end.number) == (first.client_id, 0)
        assert (second_end.executed, second_end.cached) == (["9"], ["1"])


async def test_history_can_appear_late() -> None:
    async with rig() as running, running.server.socket() as socket:
        running.simulator.faults.history_delay_seconds = 0.2
        prompt_id = await running.server.submit(picture(), client_id=socket.client_id)
        await socket.until(kind_is("execution_success"))
        assert await running.server.history(prompt_id) is None
        await socket.until(ends(prompt_id))
        assert await running.server.history(prompt_id) is not None


async def test_history_is_there_right_after_success_by_default() -> None:
    async with rig() as running, running.server.socket() as socket:
        prompt_id = await running.server.submit(picture(), client_id=socket.client_id)
        messages = await socket.until(ends(prompt_id))
        kinds = [message.kind for message in messages]
        assert kinds[-3:] == ["execution_success", "status", "executing"]


async def test_history_keeps_only_so_many() -> None:
    async with rig() as running:
        for color in range(3):
            await running.server.run(picture(color=color))
        running.simulator.faults.history_limit = 1
        last = await running.server.run(picture(color=9))
        assert list((await running.server.get("/history")).json()) == [last.prompt_id]


async def test_history_evicts_the_oldest_beyond_its_size() -> None:
    async with rig(max_history=2) as running:
        ids = [(await running.server.run(picture(color=color))).prompt_id for color in range(5)]
        assert list((await running.server.get("/history")).json()) == ids[-3:]


async def test_lost_interrupts_do_nothing() -> None:
    async with rig(step_seconds=0.01) as running:
        running.simulator.faults.interrupts_ignored = 1
        prompt_id = await running.server.submit(tiles(size=256))
        await running.server.running(prompt_id)
        await running.server.post("/interrupt", {"prompt_id": prompt_id})
        entry = await running.server.finished(prompt_id)
        assert entry["status"]["status_str"] == "success"
        assert running.simulator.faults.interrupts_ignored == 0


async def test_an_interrupt_ends_the_run_at_the_next_step() -> None:
    async with rig(step_seconds=0.02) as running:
        prompt_id = await running.server.submit(tiles(size=512))
        await running.server.running(prompt_id)
        await running.server.post("/interrupt", {"prompt_id": prompt_id})
        entry = await running.server.finished(prompt_id)
        assert entry["status"]["status_str"] == "error"
        assert entry["status"]["messages"][-1][0] == "execution_interrupted"
        assert running.simulator.executions[-1].outcome == "interrupted"


async def test_uninterruptible_nodes_run_to_their_end() -> None:
    async with rig(step_seconds=0.01) as running, running.server.socket() as socket:
        running.simulator.faults.uninterruptible = {"VAEDecodeTiled", "SaveImage"}
        prompt_id = await running.server.submit(tiles(size=256), client_id=socket.client_id)
        await socket.until(kind_is("progress"))
        await running.server.post("/interrupt", {"prompt_id": prompt_id})
        await socket.until(ends(prompt_id))
        entry = await running.server.finished(prompt_id)
        assert entry["status"]["status_str"] == "success"


async def test_time_per_node_can_be_given() -> None:
    async with rig(node_seconds=0.05) as running:
        running.simulator.faults.class_seconds = {"SaveImage": 0.1}
        await running.server.run(picture())
        start, end = running.simulator.executions
        assert end.at - start.at >= 190


async def test_a_dead_worker_takes_nothing_until_it_lives() -> None:
    async with rig() as running:
        running.simulator.faults.worker_dead = True
        prompt_id = await running.server.submit(picture())
        assert await running.server.queue() == ([], [prompt_id])
        running.simulator.faults.worker_dead = False
        await running.server.finished(prompt_id)


@pytest.mark.parametrize(
    "stray",
    [
        {"class_type": "ImageInvert"},
        {"class_type": "ImageInvert", "inputs": None},
        {"class_type": "ImageInvert", "inputs": []},
    ],
)
async def test_a_malformed_stray_node_kills_the_worker(stray: dict[str, object]) -> None:
    async with rig() as running:
        prompt_id = await running.server.submit({**picture(), "5": stray})
        await until(lambda: not running.simulator.worker_alive)
        later = await running.server.submit(picture())
        assert await running.server.queue() == ([prompt_id], [later])


async def test_a_dangling_link_on_an_unknown_input_kills_the_worker() -> None:
    async with rig() as running:
        graph = picture()
        graph["1"]["inputs"]["nonsense"] = ["77", 0]
        prompt_id = await running.server.submit(graph)
        await until(lambda: not running.simulator.worker_alive)
        assert await running.server.queue() == ([prompt_id], [])


async def test_equal_number_and_id_are_500_yet_queued_and_kill_the_worker() -> None:
    async with rig(step_seconds=0.02) as running:
        blocker = await running.server.submit(tiles())
        await running.server.running(blocker)
        body = {"prompt": picture(), "prompt_id": "same", "number": 5}
        statuses = [
            (await running.server.post("/prompt", {**body, "extra_data": {"n": n}})).status for n in range(3)
        ]
        assert statuses == [200, 500, 500]
        assert (await running.server.queue())[1] == ["same"] * 3
        await until(lambda: not running.simulator.worker_alive)


async def test_poison_takes_the_whole_server_down() -> None:
    async with rig() as running:
        running.simulator.faults.poison = {"SaveImage"}
        await running.server.submit(picture())
        async with asyncio.timeout(10):
            await running.simulator.crashed.wait()
        running.simulator.faults.poison = set()
        await running.simulator.restart()
        await running.server.run(picture())
        assert [entry.event for entry in running.simulator.executions] == ["start", "start", "end"]


async def test_a_cycle_found_while_running_leaves_a_stale_status() -> None:
    async with rig() as running:
        await running.server.run(picture())
        running.simulator.faults.cycles_found = 1
        run = await running.server.run(picture(color=4))
        assert run.entry["status"]["status_str"] == "success"
        assert run.verdict == "execution_error"
        assert running.simulator.executions[-1].outcome == "error"


async def test_freed_memory_forgets_results() -> None:
    async with rig() as running:
        await running.server.run(picture())
        await running.server.post("/free", {"free_memory": True})
        again = await running.server.run(picture())
        assert again.of_kind("execution_cached")[0]["nodes"] == []


async def test_previews_come_with_their_prompt_and_node() -> None:
    async with rig() as running:
        run = await running.server.run(painting(steps=3), previews=True)
        frames = [message.frame for message in run.messages if message.kind == "binary"]
        assert len(frames) == 3
        length = int.from_bytes(frames[0][4:8], "big")
        metadata = json.loads(frames[0][8 : 8 + length])
        assert frames[0][:4] == b"\0\0\0\4"
        assert (metadata["node_id"], metadata["prompt_id"]) == ("5", run.prompt_id)
        assert metadata["image_type"] == "image/jpeg"
        assert frames[0][8 + length :].startswith(b"\xff\xd8")


async def test_without_the_handshake_previews_name_nothing() -> None:
    async with rig() as running:
        run = await running.server.run(painting(steps=2))
        frames = [message.frame for message in run.messages if message.kind == "binary"]
        assert [frame[:8] for frame in frames] == [b"\0\0\0\1\0\0\0\1"] * 2


async def test_previews_can_be_off_and_need_an_audience() -> None:
    async with rig(previews=False) as running:
        run = await running.server.run(painting(steps=2), previews=True)
        assert [message for message in run.messages if message.kind == "binary"] == []
    async with rig() as running:
        _, entry = await running.server.run_quietly(painting(steps=2))
        assert entry["status"]["status_str"] == "success"


async def test_the_modern_flavor_throttles_progress() -> None:
    counts = {}
    for flavor in ("0.3.75", MODERN):
        async with rig(flavor=flavor) as running:
            run = await running.server.run(tiles(size=512))
            counts[flavor] = [step["value"] for step in run.of_kind("progress")]
    assert len(counts["0.3.75"]) == counts["0.3.75"][-1]
    assert 2 <= len(counts[MODERN]) < len(counts["0.3.75"])
    assert (counts[MODERN][0], counts[MODERN][-1]) == (1, counts["0.3.75"][-1])


@pytest.mark.parametrize(("flavor", "expected"), [("0.3.75", {}), (MODERN, {"9"})])
async def test_cached_outputs_without_a_client(flavor: str, expected: set[str]) -> None:
    async with rig(flavor=flavor) as running:
        await running.server.run_quietly(picture())
        _, entry = await running.server.run_quietly(picture())
        assert set(entry["outputs"]) == set(expected)


async def test_a_failing_saver_shows_the_whole_prompt_as_its_inputs() -> None:
    async with rig() as running:
        graph = {
            "1": node("PreviewAny", source=None),
            "9": node("SaveImage", images="x", filename_prefix="y"),
        }
        run = await running.server.run({"9": graph["9"]})
        (error,) = run.of_kind("execution_error")
        assert (error["exception_type"], error["current_outputs"]) == ("AttributeError", ["9"])
        assert set(error["current_inputs"]) == {"images", "filename_prefix", "prompt", "extra_pnginfo"}
