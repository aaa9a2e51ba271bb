"""A server's paths leave no trace in a message; urls and relative paths stay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.comfy.redaction import LONGEST, clean, without_paths


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("cannot open /home/ann/ComfyUI/models/x.safetensors", "cannot open x.safetensors"),
        ("No such file: '/srv/my comfy/input/a b.png'", "No such file: 'a b.png'"),
        ('File "/opt/comfy/nodes.py", line 3', 'File "nodes.py", line 3'),
        ("Error:/opt/comfy/nodes.py", "Error:nodes.py"),
        ("(/opt/comfy/nodes.py)", "(nodes.py)"),
        ("at /home/my user/ComfyUI/x.py now", "at x.py now"),
        ("from /a/b and /c/d/", "from b and d"),
        ("file:///opt/comfy/nodes.py", "nodes.py"),
        ("'file:///opt/comfy/nodes.py'", "'nodes.py'"),
        (r"C:\Users\Ann B\ComfyUI\main.py failed", "main.py failed"),
        (r"'C:\\Users\\Ann\\x y.png'", "'x y.png'"),
        ("D:/comfy/models/x.pt!", "x.pt!"),
        (r"\\nas\share\models\x.pt", "x.pt"),
        ("see https://example.org/a/b?c=/d/e", "see https://example.org/a/b?c=/d/e"),
        ("expected image/png, and/or a/b/c.png", "expected image/png, and/or a/b/c.png"),
        ("./models/x and ../y/z", "./models/x and ../y/z"),
        ("1 / 2 or /x", "1 / 2 or /x"),
        ("'/'", "''"),
        ("width: 3, height: 4", "width: 3, height: 4"),
    ],
)
def test_absolute_paths_are_cut_down_to_their_last_part(text: str, cleaned: str) -> None:
    assert without_paths(text) == cleaned


def test_a_long_message_is_cut() -> None:
    assert without_paths("x" * 100_000) == "x" * LONGEST + "..."


def test_values_are_cleaned_in_depth_and_tracebacks_left_out() -> None:
    raw = {"traceback": ["secret"], "a": ["/x/y/z", {"/k/l": 3, "b": None}]}
    assert clean(raw) == {"a": ["z", {"l": 3, "b": None}]}


@given(st.lists(st.text("abcXYZ019_-. ", min_size=1, max_size=9), min_size=2, max_size=6))
def test_no_folder_of_a_quoted_path_is_left(parts: list[str]) -> None:
    folders = [f"<{part}>" for part in parts[:-1]]
    path = "/" + "/".join([*folders, parts[-1]])
    assert not any(folder in without_paths(f"cannot read '{path}'") for folder in folders)


@given(st.text("/\\:C'\" a.", max_size=400))
def test_any_mixture_is_survived(text: str) -> None:
    assert len(without_paths(text)) <= max(len(text), LONGEST + 3)
