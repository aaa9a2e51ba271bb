"""The official npm SDK under node, end to end against comfyd."""

import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, ImageOps

from tests.conformance import graphs
from tests.sdk.installed import npm_sdk
from tests.sdk.stage import REAL_ONLY, Stage

pytestmark = [
    REAL_ONLY,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        shutil.which("npm") is None and os.environ.get("CI") != "true", reason="npm is not installed"
    ),
]

SIZE = (24, 16)


def run(stage: Stage, *arguments: Path) -> dict[str, Any]:
    """What the script saw."""
    script = npm_sdk() / "whole_way.mjs"
    environment = {**os.environ, "COMFY_BASE_URL": stage.comfyd.url, "NO_PROXY": "127.0.0.1"}
    environment.pop("COMFY_API_KEY", None)
    command = ["node", str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_a_job_goes_the_whole_way_under_node(stage: Stage, tmp_path: Path) -> None:
    photo, graph = tmp_path / "my photo.png", tmp_path / "graph.json"
    pixels = bytes(255 * (value & 1) for value in os.urandom(SIZE[0] * SIZE[1] * 3))
    Image.frombytes("RGB", SIZE, pixels).save(photo)
    workflow = graphs.chain()
    workflow["1"] = graphs.node("LoadImage", image="to be set")
    graph.write_text(json.dumps(workflow))
    said = run(stage, graph, photo, tmp_path)
    assert (said["status"], said["canceled"], said["format"]) == ("succeeded", "succeeded", "api")
    assert said["created"] == [True, False]
    check_picture(said, photo, tmp_path)
    check_events(said["events"], said["output"]["id"])
    assert said["reuse"] == {"name": "IdempotencyKeyReuse", "code": "idempotency_key_reuse", "status": 422}
    assert said["failure"] == {"name": "JobFailed", "node": "1", "class": "RegexReplace"}
    assert said["unknown"] == {"name": "NotFound", "code": said["unknown"]["code"], "status": 404}
    assert said["invalid"] == {"name": "InvalidWorkflow", "code": "invalid_workflow", "status": 422}
    assert said["deleted"]["name"] == "NotFound"


def check_picture(said: dict[str, Any], photo: Path, folder: Path) -> None:
    """The result is the photo inverted, and the result of the result is the photo."""
    data = (folder / "whole.png").read_bytes()
    assert said["output"] == {
        "id": said["output"]["id"],
        "size": len(data),
        "type": "image",
        "contentType": "image/png",
    }
    assert said["start"].encode("latin1") == data[:4] == b"\x89PNG"
    assert httpx.get(said["url"]).content == data
    with Image.open(photo) as sent, Image.open(io.BytesIO(data)) as received:
        assert received.convert("RGB").tobytes() == ImageOps.invert(sent).tobytes()
        with Image.open(folder / "twice.png") as back:
            assert back.convert("RGB").tobytes() == sent.tobytes()


def check_events(events: dict[str, Any], output_id: str) -> None:
    """Every output before the end, and no step back."""
    assert events["statuses"][-1] == "succeeded"
    assert events["order"][-1] == "statusChange"
    assert events["outputs"] == [output_id]
    assert events["values"] == sorted(events["values"])
