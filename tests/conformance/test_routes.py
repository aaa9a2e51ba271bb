"""Which routes there are, and how each refuses what it does not take; never what running a prompt does."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.conformance.raw_client import Answer, Server

BOTH_SPELLINGS = pytest.mark.parametrize("prefix", ["", "/api"])


def crashed(answer: Answer) -> bool:
    """True for the answer aiohttp gives when a handler raises."""
    return (
        answer.status == 500
        and answer.headers["Content-Type"].startswith("text/plain")
        and b"Server got itself in trouble" in answer.body
    )


@BOTH_SPELLINGS
async def test_system_stats_name_the_version_and_every_device(server: Server, prefix: str) -> None:
    answer = await server.get(f"{prefix}/system_stats")
    assert answer.status == 200
    document = answer.json()
    system = document["system"]
    assert {
        "os",
        "ram_total",
        "ram_free",
        "comfyui_version",
        "python_version",
        "pytorch_version",
        "argv",
    } <= set(system)
    assert system["comfyui_version"].split(".")[:2] == (["0", "33"] if server.facts.modern else ["0", "3"])
    for device in document["devices"]:
        assert {
            "name",
            "type",
            "index",
            "vram_total",
            "vram_free",
            "torch_vram_total",
            "torch_vram_free",
        } <= set(device)
    assert document["devices"]


@BOTH_SPELLINGS
async def test_an_idle_server_has_nothing_in_its_queue(server: Server, prefix: str) -> None:
    assert (await server.get(f"{prefix}/queue")).json() == {"queue_running": [], "queue_pending": []}
    assert (await server.get(f"{prefix}/prompt")).json() == {"exec_info": {"queue_remaining": 0}}


@BOTH_SPELLINGS
async def test_features_announce_previews_and_the_upload_limit(server: Server, prefix: str) -> None:
    document = (await server.get(f"{prefix}/features")).json()
    assert document["supports_preview_metadata"] is True
    assert document["max_upload_size"] == 104857600
    if server.facts.modern:
        assert {"supports_model_type_tags", "extension", "node_replacements", "assets"} <= set(document)
        assert document["assets"] is False
    else:
        assert set(document) == {"supports_preview_metadata", "max_upload_size"}


@BOTH_SPELLINGS
async def test_model_lists_are_lists_and_an_unknown_folder_is_not_found(server: Server, prefix: str) -> None:
    folders = (await server.get(f"{prefix}/models")).json()
    assert {"checkpoints", "loras", "vae"} <= set(folders)
    assert all(isinstance(name, str) for name in (await server.get(f"{prefix}/models/checkpoints")).json())
    assert isinstance((await server.get(f"{prefix}/embeddings")).json(), list)
    assert (await server.get(f"{prefix}/models/nope")).status == 404


async def test_unknown_paths_are_not_found_and_empty(server: Server) -> None:
    for path in ("/nowhere", "/api/nowhere", "/jobs", "/interrupt", "/free", "/upload/image"):
        answer = await server.get(path)
        assert (path, answer.status, answer.body) == (path, 404, b"")


async def test_wrong_methods_are_refused(server: Server) -> None:
    for method, path in (("PUT", "/prompt"), ("DELETE", "/queue"), ("POST", "/view"), ("PUT", "/nowhere")):
        assert (path, (await server.request(method, path)).status) == (path, 405)


async def test_head_is_answered_wherever_get_is(server: Server) -> None:
    for path in ("/queue", "/system_stats", "/history/nobody", "/api/prompt"):
        head, whole = await server.request("HEAD", path), await server.get(path)
        assert (path, head.status, head.body) == (path, 200, b"")
        assert head.headers["Content-Type"] == whole.headers["Content-Type"]


async def test_jobs_routes_exist_only_on_newer_servers(server: Server) -> None:
    unknown = uuid.uuid4()
    listed = await server.get("/api/jobs", params={"limit": "1"})
    one = await server.get(f"/api/jobs/{unknown}")
    cancel = await server.post(f"/api/jobs/{unknown}/cancel", {})
    cancel_many = await server.post("/api/jobs/cancel", {"job_ids": []})
    if server.facts.modern:
        assert (listed.status, one.status) == (200, 404)
        assert one.json() == {"error": "Job not found"}
        assert set(listed.json()) == {"jobs", "pagination"}
        assert {"offset", "limit", "total", "has_more"} <= set(listed.json()["pagination"])
        assert (cancel.status, cancel.json()) == (200, {"cancelled": False})
        assert cancel_many.status == 200
    else:
        assert (listed.status, one.status, cancel.status, cancel_many.status) == (404, 404, 405, 405)


async def test_node_replacements_and_assets_exist_only_on_newer_servers(server: Server) -> None:
    replacements = await server.get("/node_replacements")
    assets = await server.get("/api/assets")
    if server.facts.modern:
        assert replacements.status == 200
        for alternatives in replacements.json().values():
            assert all({"new_node_id", "old_node_id"} <= set(item) for item in alternatives)
        assert (assets.status, assets.json()["error"]["code"]) == (503, "SERVICE_DISABLED")
    else:
        assert (replacements.status, assets.status) == (404, 404)


@pytest.mark.parametrize("path", ["/queue", "/history", "/free"])
@pytest.mark.parametrize("body", [b"", b"{", b"null", b"5"])
async def test_a_broken_body_crashes_the_handler(server: Server, path: str, body: bytes) -> None:
    assert crashed(await server.request("POST", path, data=body))


@pytest.mark.parametrize("path", ["/queue", "/history"])
async def test_delete_takes_a_list_of_ids_whatever_they_are(server: Server, path: str) -> None:
    for ids in (["nobody"], [], "ab", [None, 5]):
        answer = await server.post(path, {"delete": ids})
        assert (answer.status, answer.body) == (200, b"")
    assert crashed(await server.post(path, {"delete": None}))
    assert (await server.request("POST", path, data=b"{}")).status == 200


@pytest.mark.parametrize("body", [b"", b"{", b"{}"])
async def test_interrupt_takes_a_broken_body(server: Server, body: bytes) -> None:
    answer = await server.request("POST", "/interrupt", data=body)
    assert (answer.status, answer.body) == (200, b"")


@pytest.mark.parametrize("body", [b"[]", b"null", b'"x"', b"5"])
async def test_interrupt_crashes_on_json_that_is_no_object(server: Server, body: bytes) -> None:
    assert crashed(await server.request("POST", "/interrupt", data=body))


@pytest.mark.parametrize("document", [{}, {"unload_models": True}, {"free_memory": False}])
async def test_free_answers_at_once_and_empty(server: Server, document: dict[str, Any]) -> None:
    answer = await server.post("/free", document)
    assert (answer.status, answer.body) == (200, b"")


async def test_model_metadata_of_no_model_is_not_found(server: Server) -> None:
    assert (
        await server.get("/view_metadata/checkpoints", params={"filename": "no.safetensors"})
    ).status == 404
    assert (await server.get("/view_metadata/checkpoints")).status == 404
