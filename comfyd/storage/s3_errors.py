"""What it means when an S3 server says no, in one line of plain words; knows no driver, asks nobody."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from comfyd.config import masked
from comfyd.errors import NotAccepted, StorageError

_LONGEST: Final = 200
"""Characters of the server's own words that are passed on."""

_CLOCK: Final = "this machine's clock is wrong by more than the server accepts"
_MEANINGS: Final[dict[str, tuple[str | None, str]]] = {
    "InvalidAccessKeyId": ("access_key", "the server does not know this access key"),
    "Unauthorized": ("access_key", "the server does not know this access key, or it may not do this"),
    "InvalidToken": ("access_key", "the server does not accept this session token"),
    "ExpiredToken": ("access_key", "the session token has expired"),
    "TokenRefreshRequired": ("access_key", "the session token has expired"),
    "SignatureDoesNotMatch": ("secret_key", "the secret key does not belong to this access key"),
    "NoSuchBucket": ("bucket", "there is no bucket {bucket!r}"),
    "InvalidBucketName": ("bucket", "{bucket!r} cannot be the name of a bucket"),
    "AuthorizationHeaderMalformed": ("region", "the bucket is not in region {region!r}{right}"),
    "AuthorizationQueryParametersError": ("region", "the bucket is not in region {region!r}{right}"),
    "IllegalLocationConstraintException": ("region", "the bucket is not in region {region!r}{right}"),
    "InvalidRegionName": ("region", "the bucket is not in region {region!r}{right}"),
    "PermanentRedirect": ("region", "the bucket is not in region {region!r}{right}"),
    "301": ("region", "the bucket is not in region {region!r}{right}"),
    "307": ("region", "the bucket is not in region {region!r}{right}"),
    "AllAccessDisabled": ("access_key", "the server has closed this account or bucket"),
    "AccountProblem": ("access_key", "the server has closed this account"),
    "RequestTimeTooSkewed": (None, _CLOCK),
    "RequestInTheFuture": (None, _CLOCK),
    "BadDigest": (None, "the bytes were damaged on their way"),
    "InvalidDigest": (None, "the bytes were damaged on their way"),
    "SlowDown": (None, "the server asks for fewer requests"),
    "NoSuchUpload": (None, "the server forgot the upload before it was complete"),
    "NotImplemented": ("endpoint", "the server does not speak enough of S3"),
}
_DENIED: Final = frozenset({"AccessDenied", "403"})
_TOO_LARGE: Final = frozenset({"EntityTooLarge"})


class NotS3(Exception):
    """An answer without what every answer of its kind tells. Never leaves the storage."""


def told(answer: Mapping[str, Any], field: str) -> str:
    """What an answer has to tell. Raises `NotS3`."""
    value = answer.get(field)
    if value is None:
        raise NotS3(field)
    return str(value)


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """An S3 server's answer that is not a success, as the driver found it."""

    code: str
    """S3's word, or the HTTP status where the answer has no body."""
    said: str
    region: str | None
    """Where the bucket really is, if the server tells."""


class Explainer(msgspec.Struct, frozen=True, kw_only=True):
    """Turns failures of one storage into `StorageError`. Lives as long as the storage."""

    storage: str
    """`s3` or `r2`: the table of the configuration."""
    bucket: str
    endpoint: str | None
    region: str
    secrets: tuple[str, ...]
    """What no message may hold, whatever the server says."""

    def refused(self, what: str, refusal: Refusal) -> StorageError:
        """The error for an answer; `what` is what could not be done."""
        if refusal.code in _TOO_LARGE:
            return NotAccepted(f"{what}: it is larger than {self.storage} takes")
        if refusal.code in _DENIED:
            said = self._plain(refusal.said)
            return self.error(
                what, "access_key", f"the access key may not do this in {self.bucket!r} ({said})"
            )
        if refusal.code == "InvalidArgument" and "access key" in refusal.said.lower():
            return self.error(what, "access_key", f"this is no access key ({self._plain(refusal.said)})")
        if refusal.code not in _MEANINGS:
            said = self._plain(refusal.said)
            return self.error(what, None, f"the server answers {self._plain(refusal.code)} ({said})")
        key, meaning = _MEANINGS[refusal.code]
        right = f" but in {refusal.region!r}" if refusal.region else ""
        return self.error(what, key, meaning.format(bucket=self.bucket, region=self.region, right=right))

    def unreachable(self, what: str, how: str) -> StorageError:
        """The error for a server that could not be asked; `how` says what happened."""
        key = "endpoint"
        if self.endpoint is None:  # the address is made from these
            key = "account_id" if self.storage == "r2" else "region"
        return self.error(what, key, f"{self.place} {how}")

    def error(self, what: str, key: str | None, reason: str) -> StorageError:
        """An error that names the key of the configuration that mends it, where one does."""
        if key == "region" and self.storage == "r2":
            key = "endpoint"  # the region of R2 is always `auto`; buckets of a jurisdiction have an endpoint
        path = None if key is None else f"storage.{self.storage}.{key}"
        return StorageError(
            f"{what}: {reason}" + (f"; see {path}" if path else ""),
            details={} if path is None else {"key": path},
        )

    @property
    def place(self) -> str:
        """The server, as messages name it."""
        if self.endpoint is not None:
            return masked(self.endpoint)
        return "Cloudflare R2" if self.storage == "r2" else f"Amazon S3 in {self.region}"

    def _plain(self, said: str) -> str:
        """The server's own words, as one short line without a secret."""
        line = " ".join(said.split()) or "no reason given"
        for secret in self.secrets:
            line = line.replace(secret, "***")
        return line[:_LONGEST]
