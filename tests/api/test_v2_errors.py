"""On the face of the Comfy API v2 every error wears its envelope and has its codes."""

import dataclasses
from typing import Any, Final

import pytest

from comfyd import errors
from comfyd.api.errors import COMFY_V2, OWN, answer
from comfyd.api.faces import speaks_comfy_v2
from comfyd.api.state import State
from comfyd.config import Config
from comfyd.errors import ComfydError, InsufficientStorage, StoreUnavailable
from tests.api.conftest import Edge, serving
from tests.support.comfy_v2 import check_error
from tests.support.logs import captured_logs

UNKNOWN = "5e1f6c1e-0000-4000-8000-00000000dead"
JOB = f"/api/v2/jobs/{UNKNOWN}"


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        (errors.MalformedRequest, 400, "invalid_request"),
        (errors.InvalidCursor, 400, "invalid_cursor"),
        (errors.BodyTooLarge, 413, "payload_too_large"),
        (errors.InputTooLarge, 413, "payload_too_large"),
        (errors.UnsupportedMediaType, 400, "invalid_request"),
        (errors.ForeignOrigin, 403, "forbidden_origin"),
        (errors.InvalidSignature, 403, "forbidden"),
        (errors.NotFound, 404, "not_found"),
        (errors.TaskNotFound, 404, "not_found"),
        (errors.AssetNotFound, 404, "not_found"),
        (errors.BlobNotFound, 404, "blob_not_found"),
        (errors.FileNotFound, 404, "output_unavailable"),
        (errors.OutputUnavailable, 404, "output_unavailable"),
        (errors.UnknownWorkflow, 422, "invalid_workflow"),
        (errors.InvalidWorkflow, 422, "invalid_workflow"),
        (errors.WorkflowFormatUi, 422, "workflow_format_ui"),
        (errors.MissingAsset, 422, "missing_asset"),
        (errors.InvalidInputs, 422, "invalid_inputs"),
        (errors.BlockedAddress, 422, "blocked_address"),
        (errors.IdempotencyKeyReuse, 422, "idempotency_key_reuse"),
        (errors.HashMismatch, 409, "hash_mismatch"),
        (errors.AssetInUse, 409, "asset_in_use"),
        (errors.QueueFull, 429, "queue_full"),
        (errors.StoreUnavailable, 503, "upstream_error"),
        (errors.StorageError, 503, "upstream_error"),
        (errors.InsufficientStorage, 507, "insufficient_storage"),
        (errors.DiskFull, 507, "insufficient_storage"),
        (errors.BackendUnreachable, 503, "upstream_unreachable"),
        (errors.BackendUnclear, 502, "upstream_error"),
        (errors.ConfigError, 500, "upstream_error"),
        (ComfydError, 500, "upstream_error"),
    ],
)
def test_errors_have_the_codes_of_the_contract(kind: type[ComfydError], status: int, code: str) -> None:
    response = answer(kind("what is wrong"), COMFY_V2)
    assert response.status_code == status
    body = response.body if isinstance(response.body, bytes) else bytes(response.body)
    assert f'"code":"{code}"'.encode() in body
    assert (response.headers.get("retry-after") is not None) == (status in {429, 503})


def test_errors_keep_their_own_words_on_the_other_face() -> None:
    for kind in (errors.TaskNotFound, errors.BodyTooLarge, errors.ForeignOrigin, errors.StoreUnavailable):
        assert OWN.code_of(kind) == kind.code


@pytest.mark.parametrize(
    ("path", "root", "ours"),
    [
        ("/api/v2/jobs", "", True),
        ("/api/v2", "", True),
        ("/api/v2x", "", False),
        ("/api/tasks", "", False),
        ("/mount/api/v2/jobs", "/mount", True),
        ("/api/v2/jobs", "/mount", True),
    ],
)
def test_face_is_told_by_the_path(path: str, root: str, ours: bool) -> None:
    assert speaks_comfy_v2({"path": path, "root_path": root}) is ours


OF_THE_ROUTER: Final = [
    ("GET", "/api/v2", 404, "not_found"),
    ("GET", "/api/v2/", 404, "not_found"),
    ("GET", "/api/v2/nothing", 404, "not_found"),
    ("GET", "/api/v2/jobs/", 404, "not_found"),
    ("GET", "/api/v2/jobs/nothing", 404, "not_found"),
    ("PUT", "/api/v2/jobs", 405, "invalid_request"),
    ("DELETE", JOB, 405, "invalid_request"),
    ("GET", f"{JOB}/cancel", 405, "invalid_request"),
    ("POST", "/api/v2/health", 405, "invalid_request"),
]


async def test_routers_own_errors_wear_the_envelope(edge: Edge) -> None:
    for method, path, status, code in OF_THE_ROUTER:
        async with edge.http.request(method, f"{edge.base}{path}") as response:
            assert response.headers["Content-Type"] == "application/json"
            assert response.headers["X-Comfy-Request-Id"]
            assert (response.status, check_error(await response.json())[0]) == (status, code), path


async def test_what_was_asked_for_is_not_repeated_at_any_length(edge: Edge) -> None:
    for method in ("GET", "POST"):
        for path in (f"/api/v2/{'x' * 9000}", f"/api/comfyui-interrupt/{'x' * 9000}"):
            status, body = await edge.call(method, path)
            assert (status, len(check_error(body)[1]) < 300) == (404, True), path


async def test_page_of_another_site_is_refused(edge: Edge) -> None:
    headers = {"Origin": "https://elsewhere.example"}
    status, body = await edge.call("POST", "/api/v2/jobs", json={}, headers=headers)
    assert (status, check_error(body)[0]) == (403, "forbidden_origin")


class Broken:
    """A database that raises the same at every verb."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        async def fail(*_: object) -> None:
            raise self._error

        return fail


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (StoreUnavailable("the database does not answer"), 503, "upstream_error"),
        (InsufficientStorage("the disk is full"), 507, "insufficient_storage"),
        (ZeroDivisionError("a secret detail"), 500, "upstream_error"),
    ],
)
async def test_failures_of_our_own_are_generic(
    config: Config, error: Exception, status: int, code: str
) -> None:
    def broken(state: State) -> State:
        store: Any = Broken(error)
        return dataclasses.replace(state, store=store)

    with captured_logs():
        async with serving(config, state=broken) as edge:
            for path in (JOB, f"{JOB}/events", f"{JOB}/workflow", "/api/v2/jobs"):
                async with edge.http.get(f"{edge.base}{path}") as response:
                    found, message = check_error(await response.json())
                    assert (response.status, found) == (status, code), path
                    assert ("Retry-After" in response.headers) == (status == 503)
                    assert "secret" not in message
            assert (await edge.call("GET", "/api/v2/health"))[0] == 200
