"""Signatures that the official library takes, and a secret that only its owner reads."""

import stat
import time
from pathlib import Path

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from comfyd.errors import ConfigError
from comfyd.webhooks import Signatures, secret_of
from tests.webhooks.rig import OLD_SECRET, SECRET

BODY = '{"type": "task.completed", "data": "Größe"}'.encode()
CANARY = "canary-5d1f"


def now() -> int:
    return time.time_ns() // 1_000_000


def test_the_official_library_verifies_what_is_signed() -> None:
    headers = Signatures(SECRET).headers("msg_1", now(), BODY)
    assert Webhook(SECRET).verify(BODY, headers)["data"] == "Größe"
    assert headers["webhook-id"] == "msg_1"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    assert headers["webhook-signature"].startswith("v1,")


@pytest.mark.parametrize("wrong", ["webhook-id", "webhook-timestamp", "webhook-signature", "body", "secret"])
def test_whatever_is_changed_on_the_way_is_noticed(wrong: str) -> None:
    headers = Signatures(SECRET).headers("msg_1", now(), BODY)
    others = {
        "webhook-id": "msg_2",
        "webhook-timestamp": str(int(headers["webhook-timestamp"]) + 1),
        "webhook-signature": Signatures(OLD_SECRET).headers("msg_1", now(), BODY)["webhook-signature"],
    }
    body = BODY + b" " if wrong == "body" else BODY
    secret = OLD_SECRET if wrong == "secret" else SECRET
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(body, {**headers, **({wrong: others[wrong]} if wrong in others else {})})


def test_during_a_rotation_both_secrets_verify() -> None:
    headers = Signatures(SECRET, [OLD_SECRET]).headers("msg_1", now(), BODY)
    assert len(headers["webhook-signature"].split(" ")) == 2
    for secret in (SECRET, OLD_SECRET):
        Webhook(secret).verify(BODY, headers)


def test_a_secret_is_in_no_repr() -> None:
    assert SECRET[6:] not in repr(vars(Signatures(SECRET)))


def test_the_secret_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "webhook.secret"
    secret = secret_of(file)
    assert secret_of(file) == secret
    assert secret_of(tmp_path / "other") != secret
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    Webhook(secret).verify(BODY, Signatures(secret).headers("msg_1", now(), BODY))


@pytest.mark.parametrize("content", [CANARY.encode(), b"", b"\xff\xfe" + CANARY.encode(), b"whsec_c2hvcnQ="])
def test_a_file_that_holds_no_secret_is_refused_without_what_it_holds(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "webhook.secret"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"webhook\.secret holds no webhook secret") as caught:
        secret_of(file)
    assert CANARY not in f"{caught.value} {caught.value!r} {caught.value.details}"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.dir: cannot use") as caught:
        secret_of(tmp_path / "missing" / "webhook.secret")
    assert len(str(caught.value).splitlines()) == 1
