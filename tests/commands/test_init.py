"""`comfyd init`: what it writes, and what it leaves alone."""

import io
from pathlib import Path

import pytest

from comfyd import settings
from comfyd.cli import main
from comfyd.commands import init, shipped
from comfyd.commands.exits import CannotCreate
from comfyd.config import Config


def test_a_new_folder_gets_a_configuration_and_workflows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init"], {}) == 0
    assert settings.load(tmp_path / "comfyd.toml", {}, {}, None) == Config()
    written = {file.name for file in (tmp_path / "workflows").iterdir()}
    assert written == {file.name for file in shipped.workflows()}
    assert {"noise-image.json", "text-to-image.json", "image-to-image.json"} <= written
    assert len(capsys.readouterr().out.splitlines()) == len(written) + 1


def test_what_exists_is_kept_and_the_rest_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "comfyd.toml").write_text("mine")
    assert main(["init"], {}) == 0
    captured = capsys.readouterr()
    assert (tmp_path / "comfyd.toml").read_text() == "mine"
    assert captured.err == "kept comfyd.toml: it exists already\n"
    assert "wrote workflows/noise-image.json" in captured.out


def test_a_second_time_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"], {}) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert main(["init"], {}) == 0
    assert len(capsys.readouterr().err.splitlines()) == len(shipped.workflows()) + 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotCreate, match="Not a directory"):
        init.run(tmp_path / "file" / "below", io.StringIO(), io.StringIO())


def test_something_in_the_way_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "workflows").write_text("a file, not a folder")
    assert main(["init"], {}) == 73
    assert "workflows is in the way of" in capsys.readouterr().err


def test_a_link_that_leads_nowhere_is_not_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "comfyd.toml").symlink_to("elsewhere.toml")
    assert main(["init"], {}) == 73
    assert "comfyd.toml is in the way of" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere.toml").exists()
