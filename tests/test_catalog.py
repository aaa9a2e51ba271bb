"""`comfyd.catalog`: a directory of templates while people edit it."""

import json
import os
from pathlib import Path

import pytest

from comfyd.catalog import Catalog, TemplateChange
from comfyd.errors import UnknownWorkflow
from comfyd.graphs import GraphLimits

GRAPH = {"1": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 20}}}


def write(path: Path, text: str) -> None:
    """Write as careful editors do: a new file renamed over the old one."""
    new = path.with_name(path.name + ".new~")
    new.write_text(text)
    new.replace(path)


def kinds(changes: tuple[TemplateChange, ...]) -> list[tuple[str, str]]:
    return [(change.name, change.kind) for change in changes]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    directory = tmp_path / "flows"
    directory.mkdir()
    write(directory / "a.json", json.dumps(GRAPH))
    write(directory / "a.toml", 'title = "First"')
    return directory


@pytest.fixture
def catalog(folder: Path) -> Catalog:
    made = Catalog(folder)
    assert kinds(made.refresh()) == [("a", "added")]
    return made


def test_templates_are_got_by_name_and_listed(folder: Path, catalog: Catalog) -> None:
    write(folder / "B-2.x.json", json.dumps(GRAPH))
    assert kinds(catalog.refresh()) == [("B-2.x", "added")]
    assert catalog.get("a").title == "First"
    assert [template.name for template in catalog.list()] == ["B-2.x", "a"]
    assert catalog.problems() == ()


def test_nothing_is_read_again_while_nothing_changes(folder: Path, catalog: Catalog) -> None:
    before = catalog.get("a")
    assert catalog.refresh() == ()
    write(folder / "b.json", json.dumps(GRAPH))
    catalog.refresh()
    assert catalog.get("a") is before


def test_a_change_of_either_file_is_a_new_version(folder: Path, catalog: Catalog) -> None:
    versions = {catalog.get("a").version}
    write(folder / "a.toml", 'title = "Other"')
    assert kinds(catalog.refresh()) == [("a", "changed")]
    assert catalog.get("a").title == "Other"
    versions.add(catalog.get("a").version)
    (folder / "a.json").write_text(json.dumps(GRAPH, indent=1))  # in place
    assert kinds(catalog.refresh()) == [("a", "changed")]
    versions.add(catalog.get("a").version)
    (folder / "a.toml").unlink()
    assert kinds(catalog.refresh()) == [("a", "changed")]
    assert catalog.get("a").title == "A"
    versions.add(catalog.get("a").version)
    assert len(versions) == 4


def test_a_touched_file_is_no_change(folder: Path, catalog: Catalog) -> None:
    os.utime(folder / "a.json", (1, 1))
    assert catalog.refresh() == ()


def test_a_deleted_template_is_gone_and_its_toml_a_problem(folder: Path, catalog: Catalog) -> None:
    (folder / "a.json").unlink()
    changes = catalog.refresh()
    assert kinds(changes) == [("a", "broken"), ("a", "removed")]
    assert "there is no a.json beside it" in changes[0].message
    with pytest.raises(UnknownWorkflow, match=r"there is no a\.json"):
        catalog.get("a")
    (folder / "a.toml").unlink()
    catalog.refresh()
    assert (catalog.list(), catalog.problems()) == ((), ())


def test_a_broken_file_leaves_the_last_good_version_in_place(folder: Path, catalog: Catalog) -> None:
    good = catalog.get("a")
    write(folder / "a.toml", 'title = "First"\ntitel = "x"\n')
    (change,) = catalog.refresh()
    assert (change.kind, change.message) == ("broken", "flows/a.toml:2: titel: unknown key")
    (problem,) = catalog.problems()
    assert (problem.name, problem.file, problem.line) == ("a", "flows/a.toml", 2)
    assert catalog.get("a") is good
    assert catalog.refresh() == ()
    assert catalog.problems() == (problem,)
    write(folder / "b.json", "{")
    assert kinds(catalog.refresh()) == [("b", "broken")]
    assert len(catalog.problems()) == 2
    write(folder / "a.toml", 'title = "First"')
    assert kinds(catalog.refresh()) == [("a", "mended")]
    assert catalog.get("a").version == good.version
    assert [item.name for item in catalog.problems()] == ["b"]


def test_a_template_that_was_never_good_says_why(folder: Path, catalog: Catalog) -> None:
    write(folder / "b.json", json.dumps({"nodes": [], "links": []}))
    catalog.refresh()
    with pytest.raises(UnknownWorkflow, match=r"b cannot be used: flows/b.json: .*Export \(API\)"):
        catalog.get("b")
    write(folder / "b.json", json.dumps(GRAPH))
    assert kinds(catalog.refresh()) == [("b", "added")]


def test_an_unknown_name_is_answered_with_the_nearest(catalog: Catalog) -> None:
    with pytest.raises(UnknownWorkflow, match="did you mean a") as caught:
        catalog.get("aa")
    assert caught.value.code == "workflow_not_found"
    with pytest.raises(UnknownWorkflow) as caught:
        catalog.get("zzz" * 1000)
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("name", ["-a", "a b", "ä", "a" * 101, "_a"])
def test_a_name_that_no_address_can_carry_is_a_problem(folder: Path, catalog: Catalog, name: str) -> None:
    write(folder / f"{name}.json", json.dumps(GRAPH))
    assert kinds(catalog.refresh()) == [(name, "broken")]
    assert "rename it" in catalog.problems()[0].message
    assert [template.name for template in catalog.list()] == ["a"]


def test_other_files_and_folders_are_none_of_its_business(folder: Path, catalog: Catalog) -> None:
    write(folder / "README.md", "x")
    write(folder / ".hidden.json", "x")
    write(folder / "a.json~", "x")
    (folder / "sub.json").mkdir()
    assert catalog.refresh() == ()


def test_a_link_to_a_file_is_followed_and_a_dangling_one_is_no_file(folder: Path, catalog: Catalog) -> None:
    (folder / "b.json").symlink_to(folder / "a.json")
    (folder / "c.json").symlink_to(folder / "nowhere.json")
    assert kinds(catalog.refresh()) == [("b", "added")]


def test_a_link_that_leads_to_itself_is_reported_and_read_when_it_is_mended(
    folder: Path, catalog: Catalog
) -> None:
    (folder / "b.json").symlink_to(folder / "b.json")
    assert kinds(catalog.refresh()) == [("b", "broken")]
    assert "flows/b.json: cannot be read: " in catalog.problems()[0].message
    assert catalog.refresh() == ()
    (folder / "b.json").unlink()
    write(folder / "b.json", json.dumps(GRAPH))
    assert kinds(catalog.refresh()) == [("b", "added")]


def test_a_file_past_the_limit_is_not_even_read(folder: Path) -> None:
    small = Catalog(folder, GraphLimits(size_bytes=20))
    assert kinds(small.refresh()) == [("a", "broken")]
    assert "flows/a.json: is larger than 20 bytes" in small.problems()[0].message


def test_a_missing_directory_is_a_problem_and_takes_nothing_away(folder: Path, catalog: Catalog) -> None:
    away = folder.with_name("away")
    folder.rename(away)
    assert kinds(catalog.refresh()) == [("", "broken")]
    assert catalog.refresh() == ()
    assert "workflows.dir" in catalog.problems()[0].message
    assert catalog.get("a").title == "First"
    away.rename(folder)
    assert kinds(catalog.refresh()) == [("", "mended")]
    assert catalog.problems() == ()


def test_a_directory_that_comes_back_empty_has_no_templates(folder: Path, catalog: Catalog) -> None:
    folder.rename(folder.with_name("away"))
    catalog.refresh()
    folder.mkdir()
    assert kinds(catalog.refresh()) == [("", "mended"), ("a", "removed")]
    assert catalog.list() == ()


def test_no_message_tells_the_whole_path(folder: Path, catalog: Catalog) -> None:
    write(folder / "b.json", "{")
    write(folder / "c.toml", "x")
    (folder / "d.json").symlink_to(folder / "d.json")
    catalog.refresh()
    assert len(catalog.problems()) == 3
    for problem in catalog.problems():
        assert str(folder.parent) not in problem.message + problem.file
