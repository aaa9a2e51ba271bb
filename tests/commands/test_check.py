"""`comfyd check` against a real simulated ComfyUI, real folders and a real lock."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from comfyd.cli import main
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.store.sqlite import open_sqlite


@contextmanager
def simulated_comfyui() -> Iterator[str]:
    """The url of a simulator in a thread of its own."""
    urls: list[str] = []
    started, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with Simulator(SimulatorOptions()) as simulator:
            urls.append(simulator.url)
            started.set()
            await stop.wait()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(10)
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


@pytest.fixture(scope="module")
def comfyui() -> Iterator[str]:
    with simulated_comfyui() as url:
        yield url


def check(capsys: pytest.CaptureFixture[str], **environ: str) -> tuple[int, dict[str, str]]:
    """The exit code, and the line of each part (the last one of several)."""
    code = main(["check"], environ)
    lines = capsys.readouterr().out.splitlines()
    return code, {line.split()[1]: line for line in lines}


def closed_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_whole_set_up_is_ok(comfyui: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"], {}) == 0
    capsys.readouterr()
    code, lines = check(capsys, COMFYUI_URL=comfyui)
    assert code == 0
    assert lines["comfyui"] == f"ok  comfyui   {comfyui} ComfyUI 0.3.75"
    assert lines["queue"] == "ok  queue     data/comfyd.db 0 tasks"
    assert lines["storage"].startswith("ok  storage   data/files")
    assert lines["workflows"].startswith("ok  workflows workflows image-to-image, noise-image")


def test_a_comfyui_that_does_not_run_is_bad_and_the_key_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    url, other = closed_url(), closed_url()
    code, lines = check(capsys, COMFYUI_URL=url, COMFYD__COMFYUI__1__URL=other)
    assert code == 1
    assert lines["comfyui"] == f"BAD comfyui   {other} connection refused: start ComfyUI or set comfyui.1.url"
    code, lines = check(capsys, COMFYUI_URL=url)
    assert lines["comfyui"].endswith("start ComfyUI or set comfyui.url (COMFYUI_URL)")


def test_a_server_that_is_no_comfyui_is_bad(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        code, lines = check(capsys, COMFYUI_URL=url, COMFYD__COMFYUI__REQUEST_TIMEOUT="0.1")
    assert code == 1
    assert lines["comfyui"].startswith(f"BAD comfyui   {url} ")


def test_a_directory_that_a_running_comfyd_holds_is_fine(
    comfyui: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "workflows").mkdir()
    unfinished = tmp_path / "data" / "files" / ".unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "being-written").write_bytes(b"x")

    async def hold() -> tuple[int, dict[str, str]]:
        async with open_sqlite(tmp_path / "data" / "comfyd.db"):
            return await asyncio.to_thread(check, capsys, COMFYUI_URL=comfyui)

    code, lines = asyncio.run(hold())
    assert code == 0
    assert lines["queue"] == "ok  queue     data in use by a running comfyd"
    assert lines["storage"].startswith("ok ")
    assert (unfinished / "being-written").exists()


def test_a_data_directory_that_cannot_be_used_is_bad(
    comfyui: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "comfyd.db").write_bytes(b"this is no database" * 100)
    code, lines = check(capsys, COMFYUI_URL=comfyui, COMFYD__DATA__DIR="file/below")
    assert code == 1
    assert lines["queue"].startswith("BAD queue     file/below cannot be made")
    assert "data.dir" in lines["queue"]
    code, lines = check(capsys, COMFYUI_URL=comfyui, COMFYD__DATA__DIR="broken")
    assert code == 1
    assert lines["queue"].startswith("BAD queue")


def test_a_storage_that_cannot_be_written_is_bad(
    comfyui: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    code, lines = check(capsys, COMFYUI_URL=comfyui, COMFYD__STORAGE__LOCAL__DIR="file")
    assert code == 1
    assert lines["storage"].startswith("BAD storage")
    assert "storage.local.dir" in lines["storage"]


def test_templates_that_cannot_be_read_are_bad(
    comfyui: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = check(capsys, COMFYUI_URL=comfyui)
    assert code == 1
    assert lines["workflows"].startswith("BAD workflows workflows: No such file")
    (tmp_path / "workflows").mkdir()
    code, lines = check(capsys, COMFYUI_URL=comfyui)
    assert code == 0
    assert lines["workflows"] == "ok  workflows workflows holds no template yet: `comfyd init` writes three"
    (tmp_path / "workflows" / "broken.json").write_text("{")
    code, lines = check(capsys, COMFYUI_URL=comfyui)
    assert code == 1
    assert lines["workflows"].startswith("BAD workflows workflows/broken.json")


def test_no_password_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    url = closed_url().replace("//", "//me:hidden@")
    _, lines = check(capsys, COMFYUI_URL=url)
    assert "hidden" not in str(lines)
