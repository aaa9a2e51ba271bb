"""Opening, wiring and closing: what cannot be had is said in one line, and a signal ends it cleanly."""

import asyncio
import os
import signal
import socket
from pathlib import Path

import aiohttp
import msgspec
import pytest

from comfyd.app import Changes, listen, open_ground, serve
from comfyd.clock import SystemClock
from comfyd.config import DataConfig, ServerConfig
from comfyd.errors import ConfigError, StoreUnavailable
from comfyd.simulator import Simulator
from tests.support.service import configuration


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
