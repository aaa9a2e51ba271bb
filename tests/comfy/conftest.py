"""Fixtures of the way to ComfyUI: simulated servers in both flavors."""

from collections.abc import AsyncIterator

import pytest

from comfyd.comfy import Backend
from comfyd.simulator import Simulator, SimulatorOptions
from tests.comfy.stage import backend_at


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    """A simulated 0.3.75."""
    async with Simulator(SimulatorOptions()) as running:
        yield running


@pytest.fixture
async def backend(simulator: Simulator) -> AsyncIterator[Backend]:
    """A backend in front of it."""
    async with backend_at(simulator.url) as opened:
        yield opened


@pytest.fixture
async def newer() -> AsyncIterator[Simulator]:
    """A simulated 0.33."""
    async with Simulator(SimulatorOptions(flavor="0.33")) as running:
        yield running


@pytest.fixture
async def newer_backend(newer: Simulator) -> AsyncIterator[Backend]:
    """A backend in front of that."""
    async with backend_at(newer.url) as opened:
        yield opened
