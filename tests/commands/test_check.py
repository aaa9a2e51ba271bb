"""`comfyd check` against a real simulated ComfyUI, real folders and a real lock."""

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from comfyd.cli import main
from comfyd.clock import SystemClock
from comfyd.commands import check as check_command
from comfyd.config import Config, R2StorageConfig, StorageConfig
from comfyd.simulator import Simulator, SimulatorOptions
from comfyd.store.sqlite import open_sqlite
from tests.support import seaweed


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


@pytest.fixture(scope="module")
def s3() -> Iterator[seaweed.SeaweedServer]:
    with seaweed.running() as server:
        yield server


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


def test_a_restart_command_that_is_not_there_is_bad(comfyui: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = check(capsys, COMFYUI_URL=comfyui, COMFYD__COMFYUI__RESTART="no-such-program,hidden")
    assert code == 1
    assert lines["restart"] == ("BAD restart   no-such-program cannot be found or run: set comfyui.0.restart")
    code, lines = check(capsys, COMFYUI_URL=comfyui, COMFYD__COMFYUI__RESTART="sh,-c,true")
    assert "restart" not in lines


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


# --- storages elsewhere

CANARY = "canary-5d1f"
"""A wrong key: no line may repeat it."""


def s3_environment(server: seaweed.SeaweedServer, bucket: str) -> dict[str, str]:
    return {
        "STORAGE_PROVIDER": "s3",
        "COMFYD__STORAGE__S3__BUCKET": bucket,
        "COMFYD__STORAGE__S3__ENDPOINT": server.endpoint,
        "COMFYD__STORAGE__S3__ACCESS_KEY": seaweed.ACCESS_KEY,
        "COMFYD__STORAGE__S3__SECRET_KEY": seaweed.SECRET_KEY,
    }


def r2_environment(server: seaweed.SeaweedServer, bucket: str) -> dict[str, str]:
    return {
        "STORAGE_PROVIDER": "r2",
        "COMFYD__STORAGE__R2__ENDPOINT": server.endpoint,
        "R2_BUCKET_NAME": bucket,
        "R2_ACCOUNT_ID": "0123456789abcdef",
        "R2_ACCESS_KEY": seaweed.ACCESS_KEY,
        "R2_SECRET_KEY": seaweed.SECRET_KEY,
    }


def bad_line(capsys: pytest.CaptureFixture[str], part: str, environ: dict[str, str]) -> str:
    """The one line about a part that is bad; the check has failed, and says no secret."""
    assert main(["check"], environ) == 1
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert CANARY not in said
    assert seaweed.SECRET_KEY not in said
    (line,) = [line for line in captured.out.splitlines() if line.split()[1] == part]
    assert line.startswith(f"BAD {part}")
    assert len(line) < 250
    return line


@pytest.fixture
def _whole(tmp_path: Path) -> None:
    """Everything else is right."""
    (tmp_path / "workflows").mkdir()


@pytest.mark.usefixtures("_whole")
def test_a_bucket_that_works_is_ok_and_left_empty(
    comfyui: str, s3: seaweed.SeaweedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = s3.new_bucket()
    code, lines = check(capsys, COMFYUI_URL=comfyui, **s3_environment(s3, bucket))
    assert lines["storage"] == (
        f"ok  storage   s3 bucket {bucket} at {s3.endpoint} written, read and deleted a probe"
    )
    assert code == 0
    assert "fallback" not in lines
    assert s3.held(bucket) == []
    code, lines = check(capsys, COMFYUI_URL=comfyui, **r2_environment(s3, bucket))
    assert lines["storage"].startswith(f"ok  storage   r2 bucket {bucket} at ")
    assert code == 0


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"ACCESS_KEY": CANARY}, "storage.s3.access_key"),
        ({"SECRET_KEY": CANARY}, "storage.s3.secret_key"),
        ({"BUCKET": "missing"}, "storage.s3.bucket"),
        (
            {"ACCESS_KEY": seaweed.READER_ACCESS_KEY, "SECRET_KEY": seaweed.READER_SECRET_KEY},
            "storage.s3.access_key",
        ),
    ],
    ids=["wrong-key-id", "wrong-secret", "missing-bucket", "may-only-read"],
)
@pytest.mark.usefixtures("_whole")
def test_what_is_wrong_with_a_bucket_is_one_line_with_its_key(
    comfyui: str,
    s3: seaweed.SeaweedServer,
    capsys: pytest.CaptureFixture[str],
    wrong: dict[str, str],
    key: str,
) -> None:
    environ = s3_environment(s3, s3.new_bucket()) | {"COMFYUI_URL": comfyui}
    environ |= {f"COMFYD__STORAGE__S3__{name}": value for name, value in wrong.items()}
    line = bad_line(capsys, "storage", environ)
    assert line.startswith("BAD storage   s3: ")
    assert line.count(key) == 1


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("R2_ACCESS_KEY", "storage.r2.access_key"),
        ("R2_SECRET_KEY", "storage.r2.secret_key"),
        ("R2_BUCKET_NAME", "storage.r2.bucket"),
    ],
)
@pytest.mark.usefixtures("_whole")
def test_the_older_name_of_the_key_is_said_too(
    comfyui: str, s3: seaweed.SeaweedServer, capsys: pytest.CaptureFixture[str], name: str, key: str
) -> None:
    wrong = "missing" if name == "R2_BUCKET_NAME" else CANARY
    environ = r2_environment(s3, s3.new_bucket()) | {"COMFYUI_URL": comfyui, name: wrong}
    assert f"{key} ({name})" in bad_line(capsys, "storage", environ)


@pytest.mark.usefixtures("_whole")
def test_a_server_that_is_not_there_is_one_line_with_its_endpoint(
    comfyui: str, s3: seaweed.SeaweedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = s3_environment(s3, "results") | {"COMFYUI_URL": comfyui}
    started = time.monotonic()
    line = bad_line(capsys, "storage", environ | {"COMFYD__STORAGE__S3__ENDPOINT": closed_url()})
    assert "storage.s3.endpoint" in line
    line = bad_line(capsys, "storage", environ | {"COMFYD__STORAGE__S3__ENDPOINT": comfyui})
    assert line.startswith("BAD storage   s3: ")
    assert time.monotonic() - started < 10


async def test_a_server_that_never_answers_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        table = R2StorageConfig(
            bucket="results",
            account_id="account",
            access_key=CANARY,
            secret_key=CANARY,
            endpoint=f"http://127.0.0.1:{deaf.getsockname()[1]}",
        )
        config = Config(storage=StorageConfig(provider="r2", r2=table))
        started = time.monotonic()
        found = await check_command.storage("r2", config, SystemClock(), ours=True, patience=0.2)
    assert found == (
        False,
        "r2: no answer within 0.2 s: mend the network, or set storage.r2.endpoint",
    )
    assert time.monotonic() - started < 5
    assert check_command.STORAGE_PATIENCE_S <= 10


@pytest.mark.usefixtures("_whole")
def test_a_driver_that_is_not_installed_is_named_with_its_command(
    comfyui: str,
    s3: seaweed.SeaweedServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "aioboto3", None)  # what Python itself takes for 'it is not there'
    line = bad_line(capsys, "storage", s3_environment(s3, "results") | {"COMFYUI_URL": comfyui})
    assert line.endswith("pip install 'comfyd[s3]'")


@pytest.mark.usefixtures("_whole")
def test_credentials_of_google_that_are_not_there_are_named(
    comfyui: str, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {
        "STORAGE_PROVIDER": "gcs",
        "GCS_BUCKET_NAME": "results",
        "GOOGLE_APPLICATION_CREDENTIALS": "missing.json",
        "COMFYD__STORAGE__GCS__ENDPOINT": closed_url(),
        "COMFYUI_URL": comfyui,
    }
    line = bad_line(capsys, "storage", environ)
    assert "storage.gcs.credentials (GOOGLE_APPLICATION_CREDENTIALS)" in line


@pytest.mark.usefixtures("_whole")
def test_the_fallback_of_cloudflare_images_is_tried_too(
    comfyui: str, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {
        "STORAGE_PROVIDER": "cf_images",
        "CF_IMAGES_ACCOUNT_ID": "account",
        "CF_IMAGES_API_TOKEN": CANARY,
        "COMFYD__STORAGE__CF_IMAGES__ENDPOINT": closed_url(),
        "COMFYUI_URL": comfyui,
    }
    assert "storage.cf_images.endpoint" in bad_line(capsys, "storage", environ)
    _, lines = check(capsys, **environ)
    assert lines["fallback"] == "ok  fallback  data/files written, read and deleted a probe"


@pytest.mark.usefixtures("_whole")
def test_a_fallback_that_is_chosen_is_tried(
    comfyui: str, s3: seaweed.SeaweedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = s3_environment(s3, "missing") | {"COMFYUI_URL": comfyui, "STORAGE_PROVIDER": "local"}
    environ |= {"COMFYD__STORAGE__FALLBACK": "s3"}
    assert "storage.s3.bucket" in bad_line(capsys, "fallback", environ)
    _, lines = check(capsys, **environ)
    assert lines["storage"].startswith("ok  storage   data/files ")


def test_storages_elsewhere_are_tried_without_a_data_directory(
    comfyui: str, tmp_path: Path, s3: seaweed.SeaweedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    environ = s3_environment(s3, s3.new_bucket()) | {"COMFYUI_URL": comfyui}
    code, lines = check(capsys, **environ, COMFYD__DATA__DIR="file/below")
    assert code == 1
    assert lines["queue"].startswith("BAD queue     file/below cannot be made")
    assert lines["storage"].startswith("ok  storage   s3 bucket ")
