"""Opening, wiring and closing: what cannot be had is said in one line, and a signal ends it cleanly."""

import asyncio
import os
import signal
import socket
from pathlib import Path

import aiohttp
import msgspec
import pytest

from comfyd.app import Changes, open_ground
from comfyd.clock import SystemClock
from comfyd.config import DataConfig, LimitsConfig, ServerConfig, WorkflowsConfig
from comfyd.errors import ConfigError, StoreUnavailable
from comfyd.serving import listen, serve
from comfyd.simulator import Simulator, SimulatorOptions
from tests.support.logs import captured_logs
from tests.support.service import configuration, sampled, until


async def test_a_data_folder_that_cannot_be_made_names_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    config = configuration(tmp_path)
    config = msgspec.structs.replace(config, data=DataConfig(dir=str(tmp_path / "file" / "data")))
    with pytest.raises(ConfigError) as refusal:
        async with open_ground(config, SystemClock()):
            pass
    assert refusal.value.details["key"] == "data.dir"


async def test_data_of_another_comfyd_is_refused(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    async with open_ground(config, SystemClock()):
        with pytest.raises(StoreUnavailable):
            async with open_ground(config, SystemClock()):
                pass


def test_both_families_of_addresses_can_be_listened_on() -> None:
    for host in ("127.0.0.1", "::1"):
        with listen(
            msgspec.structs.replace(configuration(Path()), server=ServerConfig(host=host, port=0))
        ) as s:
            assert s.getsockname()[1] > 0
            assert s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_a_port_that_is_taken_names_its_key() -> None:
    config = configuration(Path())
    with listen(msgspec.structs.replace(config, server=ServerConfig(port=0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as refusal:
            listen(msgspec.structs.replace(config, server=ServerConfig(port=port)))
    assert refusal.value.details["key"] == "server.port"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_serving(tmp_path: Path, number: signal.Signals) -> None:
    async with Simulator() as simulator:
        config = configuration(tmp_path, simulator.url)
        config = msgspec.structs.replace(config, server=ServerConfig(port=0, grace=0.2))
        with listen(config) as listening:
            serving = asyncio.ensure_future(serve(config, listening))
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/api/health"
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                assert answer.status == 200
            os.kill(os.getpid(), number)
            async with asyncio.timeout(20):
                await serving


def test_everybody_is_told_of_a_change() -> None:
    changes, told = Changes(), []
    changes.tell()
    changes.tell_to(lambda: told.append("slots"))
    changes.tell_to(lambda: told.append("probe"))
    changes.tell()
    assert told == ["slots", "probe"]


async def test_a_template_that_is_broken_from_the_start_is_said(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    config = configuration(tmp_path / "data")
    config = msgspec.structs.replace(config, workflows=WorkflowsConfig(dir=str(tmp_path)))
    with captured_logs() as lines:
        async with open_ground(config, SystemClock()):
            pass
    assert [line["workflow"] for line in lines if line["log_level"] == "warning"] == ["broken"]


async def test_limits_hold_for_templates_too(tmp_path: Path) -> None:
    config = configuration(tmp_path / "data")
    config = msgspec.structs.replace(config, limits=LimitsConfig(nodes=2))
    async with open_ground(config, SystemClock()) as ground:
        assert ground.catalog.list() == ()
        assert len(ground.catalog.problems()) == 3


async def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    async with Simulator(SimulatorOptions(step_seconds=0.05)) as simulator:
        config = configuration(tmp_path, simulator.url)
        config = msgspec.structs.replace(config, server=ServerConfig(port=0, grace=60))
        with listen(config) as listening:
            serving = asyncio.ensure_future(serve(config, listening))
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/api/tasks"
            body = {"workflow": sampled(1, 2_000)}
            async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
                assert answer.status == 202
            await until(lambda: len(simulator.executions) == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.2)
            assert not serving.done()
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(20):
                await serving
