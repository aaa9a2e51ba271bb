"""`comfyd submit`, in this process, against a scripted comfyd."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from comfyd.cli import main
from comfyd.commands.submit import parse_input
from comfyd.commands.uploads import Attachment
from tests.commands.fake_comfyd import TASK_ID, FakeComfyd, event, output, task

GRAPH = {"1": {"class_type": "KSampler", "inputs": {"seed": 2**64 - 1}}}


def submit(fake: FakeComfyd, *arguments: str) -> int:
    return main(["submit", *arguments], {"COMFYD__CLIENT__URL": fake.url})


def failed(code: str, message: str, **details: Any) -> dict[str, Any]:
    return task("FAILED", error={"code": code, "message": message, "details": details})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=1.5", 1.5),
        ("a=true", True),
        ("a=null", None),
        ("a=[1, 2]", [1, 2]),
        ('a={"b": 1}', {"b": 1}),
        ('a="42"', "42"),
        ("a=a lighthouse at dusk", "a lighthouse at dusk"),
        ("a=b=c", "b=c"),
        ("a=", ""),
        ("a=NaN", "NaN"),
        ("a=-Infinity", "-Infinity"),
        (f"a={2**64 - 1}", 2**64 - 1),
        ("a=" + "[" * 100_000, "[" * 100_000),
        ("a=@photo.png", Attachment(path=Path("photo.png"))),
        ("a=@in a folder/@me.png", Attachment(path=Path("in a folder/@me.png"))),
        ("a=@@me", "@me"),
        ("a=@@", "@"),
        ("a=@@@me", "@@me"),
        ('a="@me"', "@me"),
        ("a=me@x", "me@x"),
    ],
)
def test_a_value_is_json_where_it_is_json(text: str, value: object) -> None:
    assert parse_input(text) == ("a", value)


@pytest.mark.parametrize("text", ["a", "=1", "", "a=@"])
def test_an_input_without_name_or_value_is_a_wrong_usage(
    comfyd: FakeComfyd, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(comfyd, "x", "-i", text) == 64
    assert capsys.readouterr().err.count("\n") == 1
    assert comfyd.submissions == []


def test_a_template_is_submitted_and_its_id_printed(
    comfyd: FakeComfyd, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(comfyd, "text-to-image", "-i", "prompt=a cat", "-i", "seed=7", "--priority", "high") == 0
    assert capsys.readouterr().out == f"{TASK_ID}\n"
    assert comfyd.submissions == [
        {"workflow": "text-to-image", "inputs": {"prompt": "a cat", "seed": 7}, "priority": "high"}
    ]


def test_a_graph_is_read_from_its_file(comfyd: FakeComfyd, tmp_path: Path) -> None:
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    assert submit(comfyd, "graph.json", "--priority", "-3") == 0
    assert comfyd.submissions == [{"workflow": GRAPH, "priority": -3}]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"{", "is not JSON"), (b"[]", "is not a workflow"), (b"\xff", "is not JSON")],
)
def test_a_file_that_is_no_graph_is_not_sent(
    comfyd: FakeComfyd, tmp_path: Path, content: bytes | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "graph.json").write_bytes(content)
    assert submit(comfyd, "./graph.json") == 65
    assert words in capsys.readouterr().err
    assert comfyd.submissions == []


def reference(data: bytes) -> str:
    return f"upload:{hashlib.sha256(data).hexdigest()}.png"


def test_files_are_uploaded_first_and_named_by_their_references(comfyd: FakeComfyd, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"photo")
    (tmp_path / "mask.png").write_bytes(b"mask")
    arguments = [
        "-i",
        "image=@photo.png",
        "-i",
        f"mask=@{tmp_path}/mask.png",
        "-i",
        "prompt=@@home",
        "-i",
        "n=1",
    ]
    assert submit(comfyd, "x", *arguments) == 0
    assert comfyd.uploads == [("photo.png", b"photo"), ("mask.png", b"mask")]
    inputs = {"image": reference(b"photo"), "mask": reference(b"mask"), "prompt": "@home", "n": 1}
    assert comfyd.submissions == [{"workflow": "x", "inputs": inputs}]


def test_a_file_that_is_given_twice_is_uploaded_once(comfyd: FakeComfyd, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"photo")
    (tmp_path / "same.png").symlink_to("photo.png")
    arguments = ["-i", "image=@photo.png", "-i", "mask=@./photo.png", "-i", "other=@same.png"]
    assert submit(comfyd, "x", *arguments) == 0
    assert comfyd.uploads == [("photo.png", b"photo")]
    assert set(comfyd.submissions[0]["inputs"].values()) == {reference(b"photo")}


def test_a_file_that_cannot_be_read_is_told_before_anything_is_sent(
    comfyd: FakeComfyd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.png").write_bytes(b"photo")
    arguments = ["-i", "image=@photo.png", "-i", "mask=@missing.png", "-o", "out"]
    assert submit(comfyd, "x", *arguments) == 65
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "comfyd: missing.png cannot be read: No such file or directory "
        "(-i mask=@FILE uploads a file, mask=@@ begins a text with @)"
    )
    assert (comfyd.uploads, comfyd.submissions) == ([], [])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("status", "code"), [(413, 65), (422, 65), (404, 65), (507, 69)])
def test_a_file_that_is_refused_is_told_in_one_line(
    comfyd: FakeComfyd, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, code: int
) -> None:
    (tmp_path / "photo.png").write_bytes(b"photo")
    error = {"code": "input_too_large", "message": "photo.png: too\nlarge", "details": {"name": "photo.png"}}
    comfyd.upload_refusal = (status, {"error": error})
    assert submit(comfyd, "x", "-i", "image=@photo.png") == code
    assert capsys.readouterr().err == "photo.png: too large\n"
    assert comfyd.submissions == []


def test_what_is_wanted_of_the_outputs_is_sent(comfyd: FakeComfyd) -> None:
    arguments = ["--format", "webp", "--quality", "80", "--strip", "--storage", "s3", "--prefix", "a/42"]
    assert submit(comfyd, "x", *arguments) == 0
    assert submit(comfyd, "x", "--format", "png") == 0
    wanted = {"format": "webp", "quality": 80, "metadata": "strip", "storage": "s3", "prefix": "a/42"}
    assert [sent["output"] for sent in comfyd.submissions] == [wanted, {"format": "png"}]


def test_json_prints_the_whole_answer(comfyd: FakeComfyd, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(comfyd, "x", "--json") == 0
    assert json.loads(capsys.readouterr().out) == task("PENDING")


def test_waiting_shows_progress_and_saves_the_outputs(
    comfyd: FakeComfyd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comfyd.files = [b"png"]
    done = task("COMPLETED", outputs=[output("a.png", b"png"), output("../a.png", b"png")])
    comfyd.states = [task("PENDING"), done]
    comfyd.streams = [
        [event("progress", {"value": 0.42, "current_node_class": "KSampler"}), event("status", done)]
    ]
    assert submit(comfyd, "x", "-o", "out") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [TASK_ID, "out/a.png", "out/a-2.png"]
    assert captured.err.splitlines() == ["waiting", "40 % KSampler", "100 % completed"]
    assert (tmp_path / "out" / "a-2.png").read_bytes() == b"png"


def test_waiting_with_json_prints_one_document(
    comfyd: FakeComfyd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comfyd.files = [b"png"]
    comfyd.states = [task("COMPLETED", outputs=[output("a.png", b"png")])]
    assert submit(comfyd, "x", "--wait", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["status"], printed["saved"]) == ("COMPLETED", ["a.png"])
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("ended", "lines"),
    [
        (
            failed("execution_error", "no\nmemory", node_id="4", class_type="KSampler"),
            ["FAILED execution_error: no memory"],
        ),
        (
            failed("timeout", "too long"),
            ["FAILED timeout: too long"],
        ),
        (
            failed("x", "y", node_id=1),
            ["FAILED x: y"],
        ),
        (task("CANCELED", outputs=None), [f"task {TASK_ID}: CANCELED"]),
    ],
)
def test_a_task_that_does_not_complete_ends_with_one_and_says_why(
    comfyd: FakeComfyd,
    ended: dict[str, Any],
    lines: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    comfyd.states = [ended]
    assert submit(comfyd, "x", "--wait") == 1
    assert capsys.readouterr().err.splitlines()[1:] == lines


def test_a_refused_workflow_names_each_node_and_input(
    comfyd: FakeComfyd, capsys: pytest.CaptureFixture[str]
) -> None:
    node_errors = {
        "4": {
            "class_type": "KSampler",
            "title": "Sampler",
            "errors": [{"message": "too big", "details": "steps"}, "odd"],
        },
        "5": {"errors": [{"message": "unknown class"}]},
    }
    inputs = {"seed": ["not a number", "too long"], "size": "missing"}
    details = {"node_errors": node_errors, "inputs": inputs}
    comfyd.refusal = (
        422,
        {"error": {"code": "invalid_workflow", "message": "cannot run", "details": details}},
    )
    assert submit(comfyd, "x") == 65
    assert capsys.readouterr().err.splitlines() == [
        "input seed: not a number",
        "input seed: too long",
        "input size: missing",
        "node 4 (Sampler): too big: steps",
        "node 4 (Sampler): odd",
        "node 5: unknown class",
    ]


def test_a_full_queue_is_unavailable_rather_than_wrong(
    comfyd: FakeComfyd,
) -> None:
    comfyd.refusal = (429, {"error": {"code": "queue_full", "message": "full", "details": {}}})
    assert submit(comfyd, "x") == 69


def test_a_server_that_does_not_run_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "x", "--url", "http://127.0.0.1:1"], {}) == 69
    (line,) = capsys.readouterr().err.splitlines()
    assert "is it running? Start it with `comfyd serve`" in line


def test_a_folder_that_cannot_be_written_ends_with_73(comfyd: FakeComfyd, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    comfyd.states = [task("COMPLETED", outputs=[output("a.png", b"")])]
    assert submit(comfyd, "x", "-o", "out") == 73


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--url", "nonsense"], 78),
        (["--priority", "soon"], 64),
        (["--format", "gif"], 64),
        (["--storage", "ftp"], 64),
        (["--quality", "80"], 64),
        (["--quality", "80", "--format", "png"], 64),
        (["--quality", "0", "--format", "webp"], 64),
        (["--quality", "0101", "--format", "webp"], 64),
        (["--quality", "high", "--format", "webp"], 64),
    ],
)
def test_wrong_options_are_refused_before_anything_is_sent(
    comfyd: FakeComfyd, arguments: list[str], code: int
) -> None:
    assert submit(comfyd, "x", *arguments) == code
    assert comfyd.submissions == []


def test_ctrl_c_while_waiting_leaves_the_task_alone(
    comfyd: FakeComfyd,
) -> None:
    comfyd.states = [task("PROCESSING")]
    comfyd.streams = [405]
    command = [sys.executable, "-m", "comfyd", "submit", "x", "--wait", "--url", comfyd.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{TASK_ID}\n"
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"task {TASK_ID} goes on" in err
    assert "Traceback" not in err


def test_a_folder_for_outputs_that_cannot_be_made_is_refused_before_anything_runs(
    comfyd: FakeComfyd, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert submit(comfyd, "x", "--wait", "-o", str(tmp_path / "file" / "below")) == 73
    assert comfyd.submissions == []
