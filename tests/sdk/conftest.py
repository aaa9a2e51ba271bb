"""The servers behind the SDK, a pair for each kind: a simulated ComfyUI, and the real one if asked for."""

from collections.abc import AsyncIterator, Generator, Iterator
from typing import Final

import pytest
from comfy_sdk import AsyncComfy, Comfy

from tests.sdk.stage import EquippedComfyUI, Stage, new_async_client, new_client
from tests.support.comfyd import ComfydProcess
from tests.support.comfyui import ServerKind

KINDS: Final = ["simulator-0.33", pytest.param("real", marks=pytest.mark.comfyui)]

stage_key: Final = pytest.StashKey[Stage]()


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> ServerKind:
    """Which ComfyUI."""
    chosen: ServerKind = request.param
    return chosen


@pytest.fixture(scope="session")
def comfyui(kind: ServerKind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EquippedComfyUI]:
    """The ComfyUI all tests of one kind share."""
    with EquippedComfyUI(kind, tmp_path_factory.mktemp("comfyui")) as process:
        yield process


@pytest.fixture(scope="session")
def shared(comfyui: EquippedComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """It, with the comfyd all tests of one kind share, configured as it comes."""
    with ComfydProcess(tmp_path_factory.mktemp("comfyd"), comfyui.url) as process:
        yield Stage(comfyui=comfyui, comfyd=process)


@pytest.fixture(scope="session")
def narrow(comfyui: EquippedComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """It, with a comfyd of narrow limits: two waiting jobs, and uploads of 100 kB."""
    limits = {"COMFYD__LIMITS__QUEUED_TASKS": "2", "COMFYD__LIMITS__UPLOAD_BYTES": "100000"}
    with ComfydProcess(tmp_path_factory.mktemp("narrow"), comfyui.url, **limits) as process:
        yield Stage(comfyui=comfyui, comfyd=process)


@pytest.fixture
def stage(shared: Stage, request: pytest.FixtureRequest) -> Stage:
    """The shared pair, whose logs are shown when the test fails."""
    request.node.stash[stage_key] = shared
    return shared


@pytest.fixture
def client(stage: Stage) -> Iterator[Comfy]:
    """The SDK's client."""
    with new_client(stage.comfyd.url) as made:
        yield made


@pytest.fixture
async def async_client(stage: Stage) -> AsyncIterator[AsyncComfy]:
    """The SDK's asynchronous client."""
    async with new_async_client(stage.comfyd.url) as made:
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show both logs with a failure."""
    report = yield
    failed = item.stash.get(stage_key, None)
    if report.failed and failed is not None:
        report.sections.append((f"log of {failed.comfyui.kind}", failed.comfyui.log_tail()))
        report.sections.append(("log of comfyd", failed.comfyd.log_text()))
    return report
