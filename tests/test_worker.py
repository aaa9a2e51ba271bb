"""Workers take up what is there, settle what was done, and leave what they cannot finish."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from comfyd.errors import StaleClaim, StoreUnavailable
from comfyd.lifecycle import RetryPolicy
from comfyd.metrics import Metrics
from comfyd.progress import Board
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.store.base import Store
from comfyd.tasks import (
    Artefact,
    Attempt,
    Claim,
    OutputFile,
    OutputType,
    Settlement,
    Status,
    Step,
    Succeeded,
    Task,
)
from comfyd.worker import Settler
from tests.support.clock import HandClock
from tests.support.service import Bench, bench, colored, configuration, sampled, until
from tests.support.values import artefact, attempt, task


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions(step_seconds=0.01)) as made:
        yield made


async def left_behind(made: Bench, workflow: dict[str, Any], **facts: Any) -> Claim:
    """A task whose attempt an earlier process left at some step."""
    row = await made.submit(workflow)
    now = made.state.clock.now()
    claim = await made.store.claim(row.id, made.state.clock.new_id(), now)
    assert claim is not None
    if facts:
        known = {"backend": "comfyui-0", "client_id": "gone", "intent_at": now, "accepted_at": now}
        left = msgspec.structs.replace(claim.attempt, **{**known, **facts})
        await made.store.record(left)
    return claim


def starts(simulator: Simulator) -> list[str]:
    return [entry.prompt_id for entry in simulator.executions if entry.event == "start"]


async def test_an_attempt_that_was_only_claimed_is_run(simulator: Simulator, tmp_path: Path) -> None:
    settings = configuration(tmp_path / "data", simulator.url)
    async with bench(settings, works=False) as made:
        claim = await left_behind(made, colored(1))
    async with bench(settings) as made:
        ended = await made.ended(claim.task.id)
    assert ended.status is Status.SUCCEEDED
    assert starts(simulator) == [claim.attempt.id]


async def test_a_running_prompt_is_adopted_with_its_slot(simulator: Simulator, tmp_path: Path) -> None:
    settings = configuration(tmp_path / "data", simulator.url)
    async with bench(settings, grace_ms=0) as made:
        running = await made.submit(sampled(1, 80))
        await made.until(
            lambda row: row.attempts != () and row.attempts[0].seen_running_at is not None, running.id
        )
    async with bench(settings) as made:
        await until(lambda: made.ground.slots.used == {"comfyui-0": 1})
        with made.state.board.watch(running.id) as watcher:
            event = await watcher.next(timeout=10)
            assert event is not None
        ended = await made.ended(running.id)
    assert ended.status is Status.SUCCEEDED
    assert ended.attempt_count == 1
    assert len(starts(simulator)) == 1


async def test_an_intent_whose_post_never_arrived_is_run_anew_for_free(
    simulator: Simulator, tmp_path: Path
) -> None:
    settings = configuration(tmp_path / "data", simulator.url)
    async with bench(settings, works=False) as made:
        claim = await left_behind(made, colored(2), step=Step.SUBMITTING, accepted_at=None)
    async with bench(settings) as made:
        ended = await made.ended(claim.task.id)
    assert [entry.outcome for entry in ended.attempts] == ["lost", "succeeded"]
    assert ended.failures == 0
    assert starts(simulator) == [ended.attempts[1].id]


async def test_an_intent_whose_post_had_arrived_is_not_posted_again(
    simulator: Simulator, tmp_path: Path
) -> None:
    settings = configuration(tmp_path / "data", simulator.url)
    async with bench(settings, works=False) as made:
        claim = await left_behind(made, colored(3), step=Step.SUBMITTING, accepted_at=None)
        await until_ready(made)
        await made.ground.backends[0].submit(claim.attempt.id, "gone", claim.graph, {})
    async with bench(settings) as made:
        ended = await made.ended(claim.task.id)
    assert ended.attempt_count == 1
    assert starts(simulator) == [claim.attempt.id]


async def until_ready(made: Bench) -> None:
    await made.ground.backends[0].probe()
    assert made.ground.backends[0].state.ready


async def test_what_was_collected_is_stored_without_another_run(simulator: Simulator, tmp_path: Path) -> None:
    settings = configuration(tmp_path / "data", simulator.url)
    text = OutputFile(
        node_id="2", index=0, kind="text", type=OutputType.TEXT, filename="text.txt", text="kept"
    )
    async with bench(settings, works=False) as made:
        claim = await left_behind(made, colored(4), step=Step.COLLECTED, collected=(text,))
    async with bench(settings) as made:
        ended = await made.ended(claim.task.id)
    assert [output.text for output in ended.artefacts] == ["kept"]
    assert starts(simulator) == []


async def test_socket_images_that_were_lost_in_a_restart_are_made_again(
    simulator: Simulator, tmp_path: Path
) -> None:
    settings = configuration(tmp_path / "data", simulator.url)
    image = OutputFile(
        node_id="9", index=0, kind="images", type=OutputType.IMAGE, filename="w.png", folder="socket"
    )
    async with bench(settings, works=False) as made:
        claim = await left_behind(made, colored(5), step=Step.COLLECTED, collected=(image,))
    async with bench(settings) as made:
        ended = await made.ended(claim.task.id)
    assert [entry.outcome for entry in ended.attempts] == ["lost", "succeeded"]


async def test_images_that_every_restart_loses_are_not_made_for_ever(
    simulator: Simulator, tmp_path: Path
) -> None:
    settings = configuration(tmp_path / "data", simulator.url)
    image = OutputFile(
        node_id="9", index=0, kind="images", type=OutputType.IMAGE, filename="w.png", folder="socket"
    )
    async with bench(settings, works=False) as made:
        task_id = (await left_behind(made, colored(8), step=Step.COLLECTED, collected=(image,))).task.id
    for _ in range(2):
        await simulator.stop_listening()  # the re-run does not start: only the adopted attempt is settled
        async with bench(settings) as made:
            await made.until(lambda row: row.status is Status.QUEUED, task_id)
        await simulator.start_listening()
        async with bench(settings, works=False) as made:
            now = made.state.clock.now()
            claim = await made.store.claim(task_id, made.state.clock.new_id(), now)
            assert claim is not None
            known = {"backend": "comfyui-0", "client_id": "gone", "intent_at": now, "accepted_at": now}
            left = {**known, "step": Step.COLLECTED, "collected": (image,)}
            await made.store.record(msgspec.structs.replace(claim.attempt, **left))
    async with bench(settings) as made:
        ended = await made.ended(task_id)
    assert ended.status is Status.FAILED
    assert ended.error is not None
    assert ended.error.code == "output_unavailable"


async def test_a_hurry_ends_the_draining(simulator: Simulator, tmp_path: Path) -> None:
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        await made.submit(sampled(1, 1_000))
        await until(lambda: len(simulator.executions) == 1)
        hurry = asyncio.Event()
        draining = asyncio.ensure_future(made.service.workers.drain(60_000, hurry))
        await asyncio.sleep(0.05)
        assert not draining.done()
        hurry.set()
        async with asyncio.timeout(5):
            await draining


async def test_an_attempt_on_a_comfyui_that_is_gone_from_the_configuration_is_run_elsewhere(
    simulator: Simulator, tmp_path: Path
) -> None:
    settings = configuration(tmp_path / "data", simulator.url)
    async with bench(settings, works=False) as made:
        claim = await left_behind(made, colored(6), step=Step.SUBMITTED, backend="sold")
    async with bench(settings) as made:
        ended = await made.ended(claim.task.id)
    assert [entry.outcome for entry in ended.attempts] == ["lost", "succeeded"]


async def test_a_worker_whose_database_refuses_a_claim_tries_again(
    simulator: Simulator, tmp_path: Path
) -> None:
    settings = configuration(tmp_path / "data", simulator.url, workers=1)
    async with bench(settings, works=False) as made:
        row = await made.submit(colored(7))
        made.service.workers._store = RefusingOnce(made.store)  # type: ignore[assignment] # noqa: SLF001 - a store that fails
        async with working_now(made):
            assert (await made.ended(row.id)).status is Status.SUCCEEDED


class RefusingOnce:
    """A store whose first claim fails."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._refused = False

    async def claim(self, task_id: str, attempt_id: str, now: int) -> Claim | None:
        """See `Store`."""
        if not self._refused:
            self._refused = True
            raise StoreUnavailable("locked")
        return await self._store.claim(task_id, attempt_id, now)


def working_now(made: Bench) -> Any:
    from comfyd.app import working  # noqa: PLC0415 - only this test works by hand

    return working(made.service, 200, asyncio.Event())


class Rows:
    """The part of a store that settling needs; fails as often as told."""

    def __init__(self, row: Task | None, *errors: Exception) -> None:
        self.row = row
        self.errors = list(errors)
        self.settled: list[Settlement] = []

    async def get(self, task_id: str) -> Task | None:
        """See `Store`."""
        assert self.row is None or task_id == self.row.id
        return self.row

    async def settle(self, attempt_id: str, settlement: Settlement, now: int) -> Task:
        """See `Store`."""
        assert attempt_id == "a"
        if self.errors:
            raise self.errors.pop(0)
        self.settled.append(settlement)
        assert self.row is not None
        return msgspec.structs.replace(self.row, status=settlement.status, completed_at=now)


class Files:
    """The part of a `Forgetter` that settling needs."""

    def __init__(self) -> None:
        self.deleted: list[str] = []

    async def outputs(self, artefacts: Sequence[Artefact]) -> None:
        """See `Forgetter`."""
        self.deleted += [artefact.key for artefact in artefacts]


def settler(rows: Rows, files: Files, clock: HandClock) -> Settler:
    policy = RetryPolicy(first_ms=1, most_ms=1)
    return Settler(rows, files, Board(), Metrics(), clock, policy)  # type: ignore[arg-type] # the parts it uses


def claimed(row: Task, run: Attempt | None = None) -> Claim:
    return Claim(task=row, attempt=run or attempt(task_id=row.id), graph={})


async def test_an_outcome_waits_for_a_database_that_refuses_it() -> None:
    row, clock = task(), HandClock()
    rows = Rows(row, StoreUnavailable("locked"), StoreUnavailable("locked"))
    settled = await settler(rows, Files(), clock).settle(claimed(row), Succeeded(artefacts=()))
    assert settled.status is Status.SUCCEEDED
    assert len(clock.slept) == 2


async def test_a_stale_claim_is_dropped_at_once() -> None:
    row, clock = task(), HandClock()
    for rows in (Rows(row, StaleClaim("another attempt lives")), Rows(None)):
        with pytest.raises(StaleClaim):
            await settler(rows, Files(), clock).settle(claimed(row), Succeeded(artefacts=()))
    assert clock.slept == []


async def test_files_of_a_task_that_was_canceled_meanwhile_are_deleted() -> None:
    row, files = task(cancel_requested_at=1), Files()
    rows = Rows(row)
    settled = await settler(rows, files, HandClock()).settle(
        claimed(row), Succeeded(artefacts=(artefact(key="k"),))
    )
    assert settled.status is Status.CANCELED
    assert files.deleted == ["k"]


async def test_a_worker_that_is_stopped_while_nothing_is_due_leaves_nothing(
    simulator: Simulator, tmp_path: Path
) -> None:
    async with bench(configuration(tmp_path / "data", simulator.url)) as made:
        await until(lambda: made.ground.backends[0].state.ready)
        await asyncio.sleep(0)
    assert simulator.executions == []
