"""File names follow ComfyUI's rules."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from comfyd.simulator import timing
from comfyd.simulator.folders import REMEMBERED, Folders

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def save(folders: Folders, prefix: str) -> Path:
    place = folders.save_place(prefix, "output")
    path = place.folder / place.name(".png")
    path.write_bytes(b"x")
    folders.saved(place, place.number, path)
    return path


def test_numbers_go_on_from_the_highest_there_is(folders: Folders) -> None:
    (folders.roots["output"] / "a_00041_.png").write_bytes(b"x")
    (folders.roots["output"] / "a_x_.png").write_bytes(b"x")
    (folders.roots["output"] / "ab_00099_.png").write_bytes(b"x")
    assert save(folders, "a").name == "a_00042_.png"
    assert save(folders, "a").name == "a_00043_.png"


def test_a_number_is_used_again_after_its_file_is_deleted(folders: Folders) -> None:
    save(folders, "s/a")
    save(folders, "s/a").unlink()
    assert save(folders, "s/a").name == "a_00002_.png"


def test_a_number_somebody_else_took_is_left_out(folders: Folders) -> None:
    save(folders, "a").with_name("a_00002_.png").write_bytes(b"x")
    assert save(folders, "a").name == "a_00003_.png"


def test_prefixes_hold_subfolders_and_variables(folders: Folders) -> None:
    place = folders.save_place("x/%width%x%height%/%year%-%batch_num%", "output", 3, 4)
    assert place.subfolder == "x/3x4"
    assert place.name(".png", 1) == f"{timing.local_time().tm_year}-1_00002_.png"
    assert place.item("n") == {"filename": "n", "subfolder": "x/3x4", "type": "output"}


def test_annotations_name_a_folder(folders: Folders) -> None:
    assert folders.split_annotated("a.png [temp]") == ("a.png", folders.roots["temp"])
    assert folders.split_annotated("a.png[temp]") == ("a.pn", folders.roots["temp"])
    assert folders.split_annotated("a.png") == ("a.png", None)


def test_many_prefixes_are_forgotten_not_kept_for_ever(folders: Folders) -> None:
    path = save(folders, "a")
    place = folders.save_place("a", "output")
    for number in range(REMEMBERED):
        folders.saved(replace(place, stem=f"other-{number}"), 1, path)
    assert save(folders, "a").name == "a_00002_.png"


def test_confined_inputs_do_not_follow_links_out(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    (folders.roots["input"] / "link.png").symlink_to(tmp_path / "secret")
    assert folders.input_path("link.png", confined=False) is not None
    assert folders.input_path("link.png", confined=True) is None
