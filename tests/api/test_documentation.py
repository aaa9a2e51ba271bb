"""The OpenAPI document says what there is, and the page that shows it needs no other host."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it has no types
from openapi_spec_validator import validate

from comfyd.api.openapi import document, error_codes
from comfyd.api.operations import OPERATIONS, TAGS
from comfyd.api.routes import ROUTES
from comfyd.tasks import EventType
from comfyd.workflows import parse_template
from tests.api.conftest import Edge
from tests.support.values import GRAPH


async def whole(edge: Edge) -> Any:
    status, made = await edge.call("GET", "/openapi.json")
    assert status == 200
    return made


def test_every_route_is_described_and_every_description_is_a_route() -> None:
    routes = [(method, path) for method, path, _ in ROUTES]
    assert len(set(routes)) == len(routes)
    assert set(routes) == set(OPERATIONS)


def test_operation_ids_are_unique_and_tags_known() -> None:
    ids = [operation.id for operation in OPERATIONS.values()]
    assert len(set(ids)) == len(ids)
    assert {operation.tag for operation in OPERATIONS.values()} == set(TAGS)


async def test_document_is_valid_openapi_3_1_with_typed_templates(edge: Edge) -> None:
    made = await whole(edge)
    assert made["openapi"].startswith("3.1")
    validate(made)
    run = made["paths"]["/api/workflows/text-to-image/run"]["post"]
    body = run["requestBody"]["content"]["application/json"]
    assert "prompt" in body["schema"]["properties"]
    Draft202012Validator(body["schema"]).validate(body["example"])
    assert "path" not in {parameter["in"] for parameter in run["parameters"]}
    examples = made["paths"]["/api/tasks"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    assert set(examples) == {"template", "graph"}


async def test_messages_to_webhooks_are_described(edge: Edge) -> None:
    told = (await whole(edge))["webhooks"]
    assert set(told) == set(EventType)
    for event, item in told.items():
        schema = item["post"]["requestBody"]["content"]["application/json"]["schema"]
        message = "OutputMessage" if event == EventType.OUTPUT else "TaskMessage"
        assert schema == {"$ref": f"#/components/schemas/{message}"}
        names = [parameter["name"] for parameter in item["post"]["parameters"]]
        assert names == ["webhook-id", "webhook-timestamp", "webhook-signature"]


async def test_answers_are_what_the_document_says(edge: Edge) -> None:
    made = await whole(edge)

    async def check(method: str, path: str, address: str, **facts: Any) -> Any:
        status, answer = await edge.call(method, address, **facts)
        response = made["paths"][path][method.lower()]["responses"][str(status)]
        schema = response["content"]["application/json"]["schema"]
        validator = Draft202012Validator({**schema, "components": made["components"]})
        validator.validate(answer)
        return answer

    task = await check("POST", "/api/tasks", "/api/tasks", json={"workflow": GRAPH, "metadata": {"a": "b"}})
    own = f"/api/tasks/{task['task_id']}"
    await check("POST", "/api/tasks", "/api/tasks", json={"workflow": 1})
    await check("POST", "/api/tasks", "/api/tasks", json={"workflow": {}})
    await check("GET", "/api/tasks", "/api/tasks")
    await edge.fail(await edge.claim(task["task_id"]))
    await check("GET", "/api/tasks/{task_id}", own)
    await check("POST", "/api/tasks/{task_id}/cancel", f"{own}/cancel")
    await check("POST", "/api/tasks/{task_id}/retry", f"{own}/retry")
    await check("POST", "/api/tasks/{task_id}/retry", f"{own}/retry")
    await check("GET", "/api/workflows", "/api/workflows")
    await check("GET", "/api/workflows/{name}", "/api/workflows/text-to-image")
    await check("POST", "/api/workflows/{name}/run", "/api/workflows/noise-image/run", json={})
    await check("GET", "/api/health", "/api/health")
    await check("GET", "/api/ready", "/api/ready")
    await check("GET", "/api/status", "/api/status")
    await check("GET", "/api/comfyui-queue-status", "/api/comfyui-queue-status")


async def test_examples_are_accepted(edge: Edge) -> None:
    made = await whole(edge)
    examples = made["paths"]["/api/tasks"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    for name, example in examples.items():
        status, answer = await edge.call("POST", "/api/tasks", json=example["value"])
        assert status == 202, (name, answer)


def test_templates_with_like_names_have_operations_of_their_own() -> None:
    text = msgspec.json.encode(GRAPH)
    table = b'description = "Draws."\n[inputs.width]\nnode = "1"\nfield = "width"\nrequired = true\n'
    templates = [
        parse_template("a.b", text, None),
        parse_template("a-b", text, table),
    ]
    made = document("1", "http://comfyd.example", templates)
    validate(msgspec.json.decode(msgspec.json.encode(made)))
    first = made["paths"]["/api/workflows/a.b/run"]["post"]
    second = made["paths"]["/api/workflows/a-b/run"]["post"]
    assert (first["operationId"], second["operationId"]) == ("run_a_b", "run_a_b_2")
    assert first["requestBody"]["required"] is False
    assert second["requestBody"]["required"] is True
    assert second["description"] == "Draws."


def test_example_of_a_template_fits_whatever_it_requires() -> None:
    graph = {
        "1": {
            "class_type": "Many",
            "inputs": {
                "text": "t",
                "image": "x.png",
                "flag": False,
                "count": 1,
                "size": 2,
                "loose": 3,
                "kind": "a",
            },
        }
    }
    extra = {
        "text": 'type = "text"',
        "image": 'type = "image"',
        "flag": 'type = "boolean"',
        "count": 'type = "integer"\nminimum = 4',
        "size": 'type = "number"\nmaximum = 9.5',
        "loose": 'type = "number"',
        "kind": 'type = "choice"\nchoices = ["a", "b"]',
    }
    table = "".join(
        f'[inputs.{name}]\nnode = "1"\nfield = "{name}"\nrequired = true\n{lines}\n'
        for name, lines in extra.items()
    )
    template = parse_template("many", msgspec.json.encode(graph), table.encode())
    made = document("1", "http://comfyd.example", [template])
    body = made["paths"]["/api/workflows/many/run"]["post"]["requestBody"]["content"]["application/json"]
    assert set(body["example"]) == set(extra)
    Draft202012Validator(body["schema"]).validate(body["example"])


def test_every_error_code_has_one_status() -> None:
    codes = error_codes()
    assert codes["invalid_workflow"] == 422
    assert codes["method_not_allowed"] == 405
    assert set(codes.values()) <= {400, 403, 404, 405, 409, 413, 415, 422, 429, 500, 502, 503, 504, 507}


async def test_page_needs_no_other_host_and_no_inline_script(edge: Edge) -> None:
    async with edge.http.get(f"{edge.base}/docs") as response:
        page = await response.text()
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/html")
        policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "http" not in policy
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)
    assert not re.search(r"<script(?![^>]*\bsrc=)", page)
    for source in re.findall(r'(?:src|href)="(docs/[^"]+)"', page):
        async with edge.http.get(f"{edge.base}/{source}") as response:
            assert response.status == 200
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert len(await response.read()) > 0


@pytest.mark.parametrize("name", ["index.html", "LICENSE", "..%2f__init__.py", "x"])
async def test_only_the_files_of_the_page_are_served(edge: Edge, name: str) -> None:
    status, answer = await edge.call("GET", f"/docs/{name}")
    assert status == 404
    assert answer["error"]["code"] in {"file_not_found", "not_found"}


async def test_root_leads_to_the_documentation(edge: Edge) -> None:
    async with edge.http.get(f"{edge.base}/", allow_redirects=False) as response:
        assert response.status == 307
        assert response.headers["Location"] == f"{edge.base}/docs"


def test_licence_of_the_page_comes_with_it(pytestconfig: pytest.Config) -> None:
    folder = pytestconfig.rootpath / Path("comfyd/api/static/swagger-ui")
    assert "Apache License" in (folder / "LICENSE").read_text()
