"""The official contract against comfyd: requests made from the OpenAPI file, and every answer held to it.

Schemathesis runs as the program it is, so that nothing of it gets into the other tests.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from comfy_sdk import Comfy, Workflow

from tests.conformance import graphs
from tests.sdk.stage import Stage, finished
from tests.support.comfy_v2 import DOCUMENT

pytestmark = [
    pytest.mark.parametrize("kind", ["simulator-0.33"], indirect=True),
    pytest.mark.timeout(180),
]

EXAMPLES: Final = 30
"""Requests that are made up for each operation, beside those of the systematic phases."""
WITHOUT: Final = (
    # the schema cannot tell a graph that runs, a hash or a range that is there from those that are not
    "positive_data_acceptance",
)

# What the reference of the contract allows and its OpenAPI file does not name; each with its section there.
STATUSES: Final = (
    ("/api/v2/jobs", "post", 400, "3 invalid_request; 6: a body that is no JSON, a bad Idempotency-Key"),
    ("/api/v2/jobs", "post", 413, "3 payload_too_large"),
    ("/api/v2/assets", "post", 400, "3 invalid_request; 6: a bad Idempotency-Key"),
    ("/api/v2/assets", "post", 413, "3 payload_too_large; 11: the size limit"),
    ("/api/v2/assets/from-hash", "post", 400, "3 invalid_request: a body that is no JSON"),
    ("/api/v2/assets/from-hash", "post", 422, "3 invalid_request: no hash, or one of another form"),
)
ROUTES: Final = (
    ("/api/v2/jobs", "get", "10: lists"),
    ("/api/v2/health", "get", "2: extras of the proxy"),
)


def ref(kind: str, name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/{kind}/{name}"}


def answer(schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "See the reference.", "content": {"application/json": {"schema": schema}}}


def extended(document: dict[str, Any]) -> dict[str, Any]:
    """The contract with what the reference adds to it."""
    paths = document["paths"]
    for path, method, status, _ in STATUSES:
        responses = paths[path][method]["responses"]
        assert str(status) not in responses
        responses[str(status)] = answer(ref("schemas", "ErrorEnvelope"))
    for (path, method, _), operation in zip(ROUTES, (listing(), health()), strict=True):
        known = paths.setdefault(path, {})
        assert method not in known
        known[method] = operation
    content = paths["/api/v2/assets/{id}/content"]["get"]["responses"]
    for found in (content["200"], content["206"]):  # 4 and 11: the bytes have their asset's content type
        found["content"] = {"*/*": found["content"]["application/octet-stream"]}
    events = paths["/api/v2/jobs/{id}/events"]["get"]
    stream = events["responses"]["200"]["content"]["text/event-stream"]
    stream["schema"] = {"oneOf": [told(name, each) for name, each in events["x-sse-events"].items()]}
    return document


def told(name: str, event: dict[str, Any]) -> dict[str, Any]:
    """An event of the stream, as `x-sse-events` has it."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": event["schema"]},
    }
    return {
        "type": "object",
        "required": ["event", "data"],
        "properties": {"event": {"enum": [name]}, "data": data},
    }


def listing() -> dict[str, Any]:
    """`GET /jobs`: items are jobs, and have the fields of light records."""
    record = {
        "type": "object",
        "required": ["id", "status", "create_time", "update_time", "metadata"],
        "properties": {
            "create_time": {"type": "string", "format": "date-time"},
            "update_time": {"type": "string", "format": "date-time"},
            "deployment_id": {"type": "string", "nullable": True},
            "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }
    page = {
        "type": "object",
        "required": ["jobs"],
        "properties": {
            "jobs": {"type": "array", "items": {"allOf": [ref("schemas", "Job"), record]}},
            "next_cursor": {"type": "string", "minLength": 1},
        },
    }
    limit = {"type": "integer", "minimum": 1, "maximum": 100}
    labels = {"type": "object", "additionalProperties": {"type": "string"}}
    return {
        "parameters": [
            {"name": "limit", "in": "query", "schema": limit},
            {"name": "cursor", "in": "query", "schema": {"type": "string"}},
            {"name": "metadata", "in": "query", "style": "deepObject", "explode": True, "schema": labels},
        ],
        "responses": {"200": answer(page), "400": answer(ref("schemas", "ErrorEnvelope"))},
    }


def health() -> dict[str, Any]:
    """`GET /health`."""
    state = {
        "type": "object",
        "required": ["status", "upstream"],
        "properties": {"status": {"enum": ["healthy"]}, "upstream": {"type": "string"}},
    }
    return {"responses": {"200": answer(state)}}


def exemplified(document: dict[str, Any], client: Comfy) -> dict[str, Any]:
    """The contract with examples that are there, so that more than refusals is seen."""
    job = finished(client.submit(Workflow(graphs.named("multi-output"))))
    asset = client.assets.from_bytes(b"an example", filename="example.txt")
    parameters = document["components"]["parameters"]
    parameters["AssetId"]["example"] = asset.commit()
    parameters["JobId"]["example"] = job.id
    parameters["BlakeHash"]["example"] = asset.hash
    body = document["paths"]["/api/v2/jobs"]["post"]["requestBody"]["content"]["application/json"]
    body["example"] = {"workflow": graphs.picture()}
    by_hash = document["paths"]["/api/v2/assets/from-hash"]["post"]["requestBody"]["content"]
    by_hash["application/json"]["example"] = {"hash": asset.hash, "file_path": "again.txt"}
    form = document["paths"]["/api/v2/assets"]["post"]["requestBody"]["content"]["multipart/form-data"]
    del form["schema"]["properties"]["expected_hash"]["example"]
    form["example"] = {"file": "a file", "content_type": "text/plain", "file_path": "a.txt"}
    return document


def seen(report: Path) -> dict[str, set[int]]:
    """The statuses that each operation answered with."""
    statuses = defaultdict(set)
    for line in report.read_text().splitlines():
        for event in json.loads(line).values():
            recorder = event.get("recorder") or {}
            for case, interaction in recorder.get("interactions", {}).items():
                made = recorder["cases"][case]["value"]
                if interaction["response"]:
                    statuses[f"{made['method']} {made['path']}"].add(interaction["response"]["status_code"])
    return statuses


def test_every_answer_is_within_the_official_contract(stage: Stage, client: Comfy, tmp_path: Path) -> None:
    document = exemplified(extended(yaml.safe_load(DOCUMENT.read_text())), client)
    (tmp_path / "contract.json").write_text(json.dumps(document))
    command = [str(Path(sys.executable).with_name("st")), "run", "contract.json"]
    command += ["--url", stage.comfyd.url, "--generation-deterministic", "--max-examples", str(EXAMPLES)]
    command += ["--checks", "all", "--exclude-checks", ",".join(WITHOUT), "--continue-on-failure"]
    command += ["--report", "ndjson", "--report-ndjson-path", "events.ndjson", "--no-color"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "NO_PROXY": "127.0.0.1"}, capture_output=True, text=True,
        timeout=150, check=False,
    )  # fmt: skip
    print(done.stdout[-20_000:])
    assert done.returncode == 0, done.stderr
    statuses = seen(tmp_path / "events.ndjson")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            good = {int(status) for status in operation["responses"] if status.startswith("2")}
            assert good <= statuses[f"{method.upper()} {path}"], (method, path)
