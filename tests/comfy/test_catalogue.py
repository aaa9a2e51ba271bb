"""One question for many who ask, and no answer of a server that is gone."""

import asyncio

import pytest

from comfyd.clock import SystemClock
from comfyd.comfy.catalogue import Remembered
from comfyd.comfy.health import Health
from comfyd.errors import BackendUnclear


class Server:
    """Answers with how often it was asked, when it is let."""

    def __init__(self) -> None:
        self.asked = 0
        self.let = asyncio.Event()
        self.fails = False

    async def fetch(self) -> int:
        self.asked += 1
        asked = self.asked
        await self.let.wait()
        if self.fails:
            raise BackendUnclear(f"failed {asked}", details={"n": asked})
        return asked


@pytest.fixture
def health() -> Health:
    return Health(SystemClock(), lambda: None)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def remembered(server: Server, health: Health) -> Remembered[int]:
    return Remembered(server.fetch, health)


async def ask(remembered: Remembered[int], times: int, refresh: bool = False) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(remembered.get(refresh)) for _ in range(times)]
    await asyncio.sleep(0)
    return tasks


async def test_many_who_ask_at_once_cost_one_request(server: Server, remembered: Remembered[int]) -> None:
    tasks = await ask(remembered, 5)
    server.let.set()
    assert await asyncio.gather(*tasks) == [1] * 5
    assert await remembered.get() == 1


async def test_a_refresh_asks_again_and_is_shared_too(server: Server, remembered: Remembered[int]) -> None:
    server.let.set()
    await remembered.get()
    server.let.clear()
    tasks = await ask(remembered, 3, refresh=True)
    server.let.set()
    assert await asyncio.gather(*tasks) == [2] * 3
    assert await remembered.get() == 2


async def test_a_failure_is_shared_and_not_remembered(server: Server, remembered: Remembered[int]) -> None:
    server.fails = True
    tasks = await ask(remembered, 3)
    server.let.set()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(error) for error in errors] == ["failed 1"] * 3
    assert all(isinstance(error, BackendUnclear) and error.details == {"n": 1} for error in errors)
    server.fails = False
    assert await remembered.get() == 2


async def test_a_new_life_forgets(server: Server, health: Health, remembered: Remembered[int]) -> None:
    server.let.set()
    await remembered.get()
    health.renewed()
    assert await remembered.get() == 2


async def test_an_answer_of_a_former_life_serves_only_those_who_asked_then(
    server: Server, health: Health, remembered: Remembered[int]
) -> None:
    tasks = await ask(remembered, 2)
    health.renewed()
    server.let.set()
    assert await asyncio.gather(*tasks) == [1, 1]
    assert await remembered.get() == 2


async def test_whoever_gives_up_leaves_the_turn_to_the_next(
    server: Server, remembered: Remembered[int]
) -> None:
    first, second = await ask(remembered, 2)
    first.cancel()
    await asyncio.wait([first])
    server.let.set()
    assert await second == 2
