"""Errors in the words of the Comfy API v2: what differs from comfyd's own; never raised or answered here.

The tables name what stands nearest above an error, as those of `comfyd.api.errors` do, which has the rest.
"""

from collections.abc import Mapping
from typing import Final

from comfyd.errors import (
    BackendUnclear,
    BackendUnreachable,
    BlobNotFound,
    BodyTooLarge,
    ComfydError,
    DiskFull,
    FileNotFound,
    ForeignOrigin,
    InputTooLarge,
    InsufficientStorage,
    InvalidSignature,
    NotFound,
    OutputUnavailable,
    RequestError,
    UnknownWorkflow,
    UnsupportedMediaType,
)


class InvalidField(RequestError):
    """A field of a body that can be read is of the wrong type, or says what it may not."""


class InvalidLabels(RequestError):
    """The labels of a job are too many or too long, or no text."""

    code = "metadata_invalid"


class InvalidLabelFilter(RequestError):
    """The labels that a list is asked for are none."""

    code = "invalid_metadata_filter"


STATUSES: Final[dict[type[ComfydError], int]] = {
    UnknownWorkflow: 422,
    UnsupportedMediaType: 400,
    OutputUnavailable: 404,
    BackendUnreachable: 503,
    BackendUnclear: 502,
}
CODES: Final[dict[type[ComfydError], str | None]] = {
    ComfydError: "upstream_error",
    RequestError: None,
    NotFound: "not_found",
    BlobNotFound: None,
    FileNotFound: "output_unavailable",
    UnknownWorkflow: "invalid_workflow",
    BodyTooLarge: "payload_too_large",
    InputTooLarge: "payload_too_large",
    UnsupportedMediaType: "invalid_request",
    ForeignOrigin: "forbidden_origin",
    InvalidSignature: "forbidden",
    InsufficientStorage: None,
    DiskFull: None,
    OutputUnavailable: None,
    BackendUnreachable: "upstream_unreachable",
}
"""None where the error's own code is known there."""
FRAMEWORK_CODES: Final[Mapping[int, str]] = {404: "not_found"}
