"""What goes wrong at Google Cloud Storage, in plain words and with the key that mends it; never a secret."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import aiohttp
import msgspec

from comfyd.errors import ComfydError, StorageError

BUCKET: Final = "storage.gcs.bucket"
CREDENTIALS: Final = "storage.gcs.credentials"
ENDPOINT: Final = "storage.gcs.endpoint"
REGION: Final = "storage.gcs.region"

_LONGEST_REASON: Final = 200


class _Explained(msgspec.Struct, frozen=True, kw_only=True):
    message: str = ""


class _Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """How Google refuses: the storage with an object, the token service with two texts."""

    error: _Explained | str = ""
    error_description: str = ""


def failed(message: str, key: str) -> StorageError:
    """The error that names the key of the configuration that mends it."""
    return StorageError(message, details={"key": key})


@contextmanager
def translated(what: str, missing: ComfydError, forbidden: str = CREDENTIALS) -> Iterator[None]:
    """Let the driver's errors leave as `StorageError`, a 404 as `missing`; `forbidden` is the key of a 403.

    What holds the request, with its token or its session's url, is not chained.
    """
    try:
        yield
    except aiohttp.ClientResponseError as error:
        raise _refused(what, error, missing, forbidden) from None
    except aiohttp.ConnectionTimeoutError as error:
        raise failed(f"{what}: {unreached(error)}", ENDPOINT) from None
    except aiohttp.ClientConnectorError as error:
        raise failed(f"{what}: {unreached(error)}", ENDPOINT) from error
    except (aiohttp.ClientError, TimeoutError) as error:
        raise StorageError(f"{what}: {unreached(error)}") from error
    except (KeyError, TypeError, ValueError, msgspec.DecodeError) as error:
        raise failed(f"{what}: the answer is not one of Google Cloud Storage", ENDPOINT) from error


def _refused(
    what: str, error: aiohttp.ClientResponseError, missing: ComfydError, forbidden: str
) -> ComfydError:
    match error.status:
        case 401:
            return failed(f"{what}: the credentials are not accepted: {reason(error)}", CREDENTIALS)
        case 403:
            return failed(f"{what}: the credentials do not allow it: {reason(error)}", forbidden)
        case 404 | 410:
            return missing
        case status:
            return StorageError(f"{what}: Google Cloud Storage answered {status}: {reason(error)}")


def unreached(error: aiohttp.ClientError | TimeoutError) -> str:
    """Why there is no answer, and of whom where that is known."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot reach {error.host}:{error.port}: {error.os_error.strerror or error.os_error}"
    if isinstance(error, TimeoutError):
        return "there is no answer in time"
    return "the connection broke off"


def reason(error: aiohttp.ClientResponseError) -> str:
    """What Google says about a refusal, in one line; the status's own words where it says nothing."""
    status, _, body = error.message.partition(": ")
    try:
        said = msgspec.json.decode(body, type=_Refusal)
    except msgspec.DecodeError:
        return status
    text = said.error.message if isinstance(said.error, _Explained) else said.error_description or said.error
    return " ".join(text.split())[:_LONGEST_REASON] or status
