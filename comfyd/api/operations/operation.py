"""What a row that describes a route is made of, and what many of them share; never a route."""

from typing import Any, Final

import msgspec

from comfyd import errors
from comfyd.api import schemas
from comfyd.api.parameters import Parameter
from comfyd.errors import ComfydError

Row = tuple[str, str]
"""Method and path, as in `routes.ROUTES`."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of a route that is no error: of a struct, or of a media type, or without a body."""

    status: int
    description: str
    kind: type | None = None
    media_type: str | None = None


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One route."""

    id: str
    tag: str
    summary: str
    description: str = ""
    parameters: tuple[Parameter, ...] = ()
    body: type | None = None
    body_description: str | None = None
    uploads: bool = False
    """Whether the body is files: a form, or the bytes of one."""
    form: dict[str, Any] | None = None
    """The schema of a body that is a form."""
    examples: dict[str, Any] = {}
    answers: tuple[Answer, ...]
    errors: tuple[type[ComfydError], ...] = ()


JSON: Final = "application/json"

BODY: Final = (errors.MalformedRequest, errors.BodyTooLarge, errors.UnsupportedMediaType)
STORE: Final = (errors.StoreUnavailable,)
FILE_ERRORS: Final = (
    errors.InputError,
    errors.BlockedAddress,
    errors.InvalidUrl,
    errors.InputTooLarge,
    errors.UnsupportedContent,
    errors.InvalidDataUri,
    errors.InputNotFound,
)
"""What may be wrong with the files that a request names or brings."""
ACCEPTED: Final = (
    *BODY,
    errors.UnknownWorkflow,
    errors.InvalidWorkflow,
    errors.WorkflowFormatUi,
    errors.MissingAsset,
    errors.InvalidInputs,
    *FILE_ERRORS,
    errors.StorageNotConfigured,
    errors.IdempotencyKeyReuse,
    errors.QueueFull,
    *STORE,
    errors.InsufficientStorage,
)

DONE: Final = Answer(
    status=200, description="The task, ended while the client waited.", kind=schemas.TaskView
)
QUEUED: Final = Answer(status=202, description="The task: durable, and to be run.", kind=schemas.TaskView)
