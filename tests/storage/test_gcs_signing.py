"""Urls of files on Google Cloud Storage: plain, signed, or none.

Signatures are checked with the account's public key, as Google does it. That Google then refuses a url that
was changed or has expired is not shown here: `fake-gcs-server` looks at no signature.
"""

import asyncio
import hashlib
import json
import urllib.request
from datetime import datetime
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding

from comfyd.clock import SystemClock
from comfyd.config import GcsStorageConfig
from comfyd.storage.gcs import open_gcs
from tests.storage.stands import local_file
from tests.support.clock import HandClock
from tests.support.gcs_server import GcsServer
from tests.support.strict_gcs import account_file, private_key

NOON = 1_700_049_600_000
"""2023-11-15 12:00:00 UTC."""


async def test_a_public_bucket_has_plain_urls(tmp_path: Path) -> None:
    config = GcsStorageConfig(
        bucket="b",
        prefix="out",
        public_url="https://cdn.example/",
        credentials=account_file(tmp_path),
    )
    async with open_gcs(config, SystemClock()) as storage:
        assert await storage.url("t/1/a b.png", None) == "https://cdn.example/out/t/1/a%20b.png"


async def test_without_a_key_comfyd_serves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_gcs(
        GcsStorageConfig(bucket="b", endpoint="http://127.0.0.1:9"), SystemClock()
    ) as storage:
        assert await storage.url("t/1/a", None) is None
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    async with open_gcs(GcsStorageConfig(bucket="b"), SystemClock()) as storage:  # on a machine of Google's
        assert await storage.url("t/1/a", None) is None
    user = {"type": "authorized_user", "client_id": "i", "client_secret": "s", "refresh_token": "r"}
    (tmp_path / "user.json").write_text(json.dumps(user))
    async with open_gcs(
        GcsStorageConfig(bucket="b", credentials=str(tmp_path / "user.json")), SystemClock()
    ) as storage:
        assert await storage.url("t/1/a", None) is None


def signature_of(url: str) -> tuple[str, bytes]:
    """The text that Google has signed for this url, by the rules of version 4, and the signature."""
    split = urlsplit(url)
    query, _, signature = split.query.partition("&X-Goog-Signature=")
    fields = {name: values[0] for name, values in parse_qs(query, strict_parsing=True).items()}
    assert list(fields) == sorted(fields)
    request = "\n".join(["GET", split.path, query, f"host:{split.netloc}", "", "host", "UNSIGNED-PAYLOAD"])
    scope = fields["X-Goog-Credential"].partition("/")[2]
    digest = hashlib.sha256(request.encode()).hexdigest()
    return "\n".join([fields["X-Goog-Algorithm"], fields["X-Goog-Date"], scope, digest]), bytes.fromhex(
        signature
    )


async def test_signed_urls_are_what_google_checks(tmp_path: Path) -> None:
    clock = HandClock(NOON + 250)
    config = GcsStorageConfig(bucket="b", prefix="out", url_expires=600.5, credentials=account_file(tmp_path))
    async with open_gcs(config, clock) as storage:
        url = str(await storage.url("t/1/a b.png", None))
    split = urlsplit(url)
    assert (split.scheme, split.netloc, split.path) == (
        "https",
        "storage.googleapis.com",
        "/b/out/t/1/a%20b.png",
    )
    fields = {name: values[0] for name, values in parse_qs(split.query).items()}
    scope = "comfyd@project.iam.gserviceaccount.com/20231115/auto/storage/goog4_request"
    assert fields["X-Goog-Credential"] == scope
    assert (fields["X-Goog-Date"], fields["X-Goog-Expires"]) == ("20231115T120000Z", "601")
    text, signature = signature_of(url)
    public = private_key().public_key()
    public.verify(signature, text.encode(), padding.PKCS1v15(), hashes.SHA256())
    for changed in (url.replace("a%20b.png", "other.png"), url.replace("Expires=601", "Expires=999")):
        text, signature = signature_of(changed)
        with pytest.raises(InvalidSignature):
            public.verify(signature, text.encode(), padding.PKCS1v15(), hashes.SHA256())


async def test_signed_urls_of_an_endpoint_lead_to_it(gcs_server: GcsServer, tmp_path: Path) -> None:
    config = GcsStorageConfig(bucket=gcs_server.make_bucket(), endpoint=gcs_server.endpoint)
    async with open_gcs(config, SystemClock()) as storage:
        await storage.put("t/1/a.txt", local_file(tmp_path / "made", b"hello", "a.txt", "text/plain"))
    config = msgspec.structs.replace(config, credentials=account_file(tmp_path))
    async with open_gcs(config, SystemClock()) as storage:
        url = str(await storage.url("t/1/a.txt", None))
    assert url.startswith(f"{gcs_server.endpoint}/{config.bucket}/t/1/a.txt?")
    text, signature = signature_of(url)
    private_key().public_key().verify(signature, text.encode(), padding.PKCS1v15(), hashes.SHA256())
    with await asyncio.to_thread(urllib.request.urlopen, url) as response:
        assert response.read() == b"hello"
        assert response.headers["Content-Disposition"] == "inline; filename*=UTF-8''a.txt"


async def test_a_url_stays_the_same_for_a_while_and_never_lives_longer_than_asked(tmp_path: Path) -> None:
    clock = HandClock(NOON)
    config = GcsStorageConfig(bucket="b", url_expires=1000, credentials=account_file(tmp_path))
    seen: dict[str, int] = {}
    async with open_gcs(config, clock) as storage:
        for _ in range(250):
            url = str(await storage.url("t/1/a", None))
            seen[url] = seen.get(url, 0) + 1
            signed = parse_qs(urlsplit(url).query)["X-Goog-Date"][0]
            left = (
                datetime.strptime(f"{signed}+0000", "%Y%m%dT%H%M%SZ%z").timestamp()
                + 1000
                - clock.now() / 1000
            )
            assert 900 < left <= 1000
            clock.advance(1000)
        assert str(await storage.url("t/1/b", None)) not in seen
    assert max(seen.values()) == 100


async def test_a_second_is_short_but_whole(tmp_path: Path) -> None:
    config = GcsStorageConfig(bucket="b", url_expires=1, credentials=account_file(tmp_path))
    async with open_gcs(config, HandClock(NOON + 999)) as storage:
        url = str(await storage.url("t/1/a", None))
    assert "X-Goog-Date=20231115T120000Z&X-Goog-Expires=1&" in url
