"""Every error that comfyd raises on purpose, as one tree; never an HTTP status (see `api/errors.py`).

ComfydError                      code, message, details, retryable
├── ConfigError                  the configuration cannot be used; `details["key"]` names the key
├── RequestError                 what a client sent cannot be accepted
│   ├── MalformedRequest         not the JSON, type or field that the route takes
│   │   └── InvalidCursor        not a word that a list gave
│   ├── BodyTooLarge             longer than `limits.body_bytes` or `limits.upload_bytes`
│   ├── UnsupportedMediaType     a body of another kind than the route takes
│   ├── ForeignOrigin            a browser sent it on behalf of another site
│   ├── NotFound                 no such task, workflow, file, delivery or route
│   │   ├── TaskNotFound
│   │   ├── UnknownWorkflow
│   │   ├── FileNotFound
│   │   ├── DeliveryNotFound
│   │   ├── AssetNotFound
│   │   └── BlobNotFound         no asset has bytes of this hash
│   ├── Conflict                 the task is not in a state that allows this
│   ├── InvalidWorkflow          a graph that ComfyUI could not run; `details["node_errors"]`
│   │   └── WorkflowFormatUi     the editor's own format instead of the API format
│   ├── MissingAsset             the graph names an asset that is none; `details["missing_ids"]`
│   ├── HashMismatch             the bytes are not those that were announced
│   ├── AssetInUse               an output is deleted with its task only
│   ├── InvalidInputs            `details["inputs"]` names each wrong one
│   ├── InputError               a file that a request names or brings cannot be used
│   │   ├── BlockedAddress       its url leads to an address that is not public
│   │   ├── InvalidUrl           its url is none that is fetched
│   │   ├── HostNotFound         its url's host has no address
│   │   ├── TooManyRedirects
│   │   ├── InputTooLarge        in bytes or in pixels
│   │   ├── InputTooSlow         it came too slowly, or took too long
│   │   ├── UnsupportedContent   it is not of the kind that the input takes
│   │   ├── InvalidDataUri       not a data URI in base64
│   │   ├── InputNotFound        no upload has this reference
│   │   └── FetchFailed          its server refused it or broke off
│   ├── StorageNotConfigured     `output.storage` names one that cannot be used
│   ├── InvalidSignature         a signed url was changed, or has expired
│   ├── IdempotencyKeyReuse      the same key with another body
│   └── QueueFull                more queued tasks than `limits.queued_tasks`
├── TemplateError                a workflow template that cannot be read; names file and line
├── StoreError                   the database
│   ├── StoreUnavailable         it does not answer, or was broken by an earlier error
│   ├── InsufficientStorage      the disk is full
│   └── StaleClaim               the attempt is no longer the live one of its task
├── CredentialsLost              comfyd was restarted, and had them in memory only
├── StorageError                 a file could not be written, read or deleted: an artefact or an input
│   ├── DiskFull                 this machine's own disk has no room
│   └── NotAccepted              this storage will never take this file
├── MediaError                   an output could not be converted or stripped as was asked
└── BackendError                 ComfyUI
    ├── BackendUnreachable       refused before a byte was sent: nothing happened there
    ├── BackendUnclear           no answer, or one that proves nothing: it may have happened
    ├── BackendRejected          ComfyUI says the prompt is invalid; `details["node_errors"]`
    │   └── PartlyRejected       it would run only a part of the graph
    └── OutputUnavailable        an output file is gone, short or not served
"""

from collections.abc import Mapping
from typing import Any, ClassVar


class ComfydError(Exception):
    """The root. `message` is for people, `code` for programs, `details` is JSON; none holds a secret."""

    code: ClassVar[str] = "internal_error"
    retryable: bool = False

    def __init__(self, message: str, *, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = dict(details or {})


class ConfigError(ComfydError):
    """The configuration cannot be used; `details["key"]` is the path of the key where there is one."""

    code = "invalid_configuration"


class RequestError(ComfydError):
    """What a client sent cannot be accepted; nothing was stored and nothing was run."""

    code = "invalid_request"


class MalformedRequest(RequestError):
    """The body, a query parameter or a header is not of the shape that the route takes."""


class InvalidCursor(MalformedRequest):
    """The cursor of a list is none that it gave."""

    code = "invalid_cursor"


class BodyTooLarge(RequestError):
    """The body is longer than `limits.body_bytes`, or for uploads `limits.upload_bytes`."""

    code = "body_too_large"


class UnsupportedMediaType(RequestError):
    """The body is of another media type than the route takes."""

    code = "unsupported_media_type"


class ForeignOrigin(RequestError):
    """A browser sent it on behalf of another site."""

    code = "foreign_origin"


class NotFound(RequestError):
    """What the path names does not exist."""

    code = "not_found"


class TaskNotFound(NotFound):
    """No task has this id."""

    code = "task_not_found"


class UnknownWorkflow(NotFound):
    """No workflow template has this name."""

    code = "workflow_not_found"


class FileNotFound(NotFound):
    """No stored file has this key."""

    code = "file_not_found"


class DeliveryNotFound(NotFound):
    """No delivery of a webhook has this id (any more: it goes with its task)."""

    code = "delivery_not_found"


class AssetNotFound(NotFound):
    """No asset has this id (any more)."""

    code = "asset_not_found"


class BlobNotFound(NotFound):
    """No asset of the caller has bytes of this hash."""

    code = "blob_not_found"


class MissingAsset(RequestError):
    """The graph names assets that are none; `details["missing_ids"]` are their ids, where they have one."""

    code = "missing_asset"


class HashMismatch(RequestError):
    """The bytes are not those whose hash was announced; nothing was kept."""

    code = "hash_mismatch"


class AssetInUse(RequestError):
    """The asset is the output of a task, and is deleted with that only."""

    code = "asset_in_use"


class Conflict(RequestError):
    """The task's status does not allow this."""

    code = "conflict"


class InvalidWorkflow(RequestError):
    """The graph cannot run; `details["node_errors"]` is `{node_id: {class_type, title, errors: [...]}}`."""

    code = "invalid_workflow"


class WorkflowFormatUi(InvalidWorkflow):
    """The graph is in the format of ComfyUI's editor, not in its API format."""

    code = "workflow_format_ui"


class InvalidInputs(RequestError):
    """Input values do not fit; `details["inputs"]` is `{name: [message, ...]}`."""

    code = "invalid_inputs"


class InputError(RequestError):
    """A file that a request names or brings cannot be used; `details["input"]` is its `node.input`.

    Where the url is not a file's but `webhook_url`, it is `details["field"]` that says so.
    """


class BlockedAddress(InputError):
    """The url leads to an address that is not public, and that `outbound.allow` does not name."""

    code = "blocked_address"


class InvalidUrl(InputError):
    """The url is none that is fetched: another scheme, no host, a user or password in it."""

    code = "invalid_url"


class HostNotFound(InputError):
    """The url's host has no address."""

    code = "host_not_found"


class TooManyRedirects(InputError):
    """The url leads on and on."""

    code = "too_many_redirects"


class InputTooLarge(InputError):
    """The file has more bytes than `inputs.max_bytes`, or the picture more pixels than `inputs.pixels`."""

    code = "input_too_large"


class InputTooSlow(InputError):
    """The file came slower than `inputs.min_rate`, or took longer than `inputs.timeout`."""

    code = "input_too_slow"


class UnsupportedContent(InputError):
    """The file's content is not of the kind that the input takes, whatever its name and type say."""

    code = "unsupported_content"


class InvalidDataUri(InputError):
    """Not a data URI in base64."""

    code = "invalid_data_uri"


class InputNotFound(InputError):
    """No upload has this reference (any more)."""

    code = "input_not_found"


class FetchFailed(InputError):
    """The url's server refused it, or broke off; `retryable` where another try may help."""

    code = "fetch_failed"

    def __init__(
        self, message: str, *, details: Mapping[str, Any] | None = None, retryable: bool = True
    ) -> None:
        super().__init__(message, details=details)
        self.retryable = retryable


class StorageNotConfigured(RequestError):
    """`output.storage` names a storage that is not configured."""

    code = "storage_not_configured"


class InvalidSignature(RequestError):
    """The signature of a file's url is wrong or has expired."""

    code = "invalid_signature"


class IdempotencyKeyReuse(RequestError):
    """The idempotency key was used before with another body."""

    code = "idempotency_key_reuse"


class QueueFull(RequestError):
    """As many tasks are queued as `limits.queued_tasks` allows; `details["retry_after"]` is in seconds."""

    code = "queue_full"


class TemplateError(ComfydError):
    """A workflow template cannot be read; `details` holds `file` and, where known, `line`."""

    code = "invalid_template"


class StoreError(ComfydError):
    """The database could not do what it was asked."""

    code = "store_unavailable"


class StoreUnavailable(StoreError):
    """The database does not answer, or an earlier error broke it."""

    retryable = True


class InsufficientStorage(StoreError):
    """The disk is full."""

    code = "insufficient_storage"
    retryable = True


class StaleClaim(StoreError):
    """The attempt is no longer the live one of its task: whoever holds it drops its work."""

    code = "stale_claim"


class CredentialsLost(ComfydError):
    """The task's credentials were in the memory of a process that is gone."""

    code = "credentials_lost"


class StorageError(ComfydError):
    """A file could not be written, read or deleted: an artefact in its storage, an input on the disk."""

    code = "storage_error"
    retryable = True


class DiskFull(StorageError):
    """This machine's own disk has no room for a file."""

    code = "insufficient_storage"


class NotAccepted(StorageError):
    """This storage will never take this file: its kind or its size."""

    code = "storage_not_accepted"
    retryable = False


class MediaError(ComfydError):
    """An output could not be converted, or stripped of its metadata, as was asked."""

    code = "media_error"


class BackendError(ComfydError):
    """ComfyUI did not do what it was asked."""

    code = "backend_error"
    retryable = True


class BackendUnreachable(BackendError):
    """The connection was refused before a byte was sent: nothing happened there."""

    code = "backend_unreachable"


class BackendUnclear(BackendError):
    """No answer, or one that proves nothing: what was asked may have happened (Q6, Q20)."""

    code = "backend_unclear"


class BackendRejected(BackendError):
    """ComfyUI says that the prompt is invalid; `details["node_errors"]` in the shape of `InvalidWorkflow`."""

    code = "invalid_workflow"
    retryable = False


class PartlyRejected(BackendRejected):
    """ComfyUI took the prompt but would run only its valid outputs (Q11); it was taken back."""

    code = "partial_validation"


class OutputUnavailable(BackendError):
    """An output file is gone, shorter than announced, or not served."""

    code = "output_unavailable"
