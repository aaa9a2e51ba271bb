"""What each key accepts, and the words for what it does not."""

import contextlib
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.guard import parse_allow
from comfyd.keys import Unfit, convert, defaults, is_loopback, is_secret, nearest, shown, slot


def parts(key: str) -> tuple[str, ...]:
    return tuple(key.split("."))


def test_every_key_has_a_type_and_accepts_its_default() -> None:
    for key, default in defaults().items():
        converted = convert(parts(key), default, text=False)
        assert (list(converted) if isinstance(converted, tuple) else converted) == default, key


def test_a_path_that_is_no_key_says_what_it_is() -> None:
    assert slot(parts("server")) == "section"
    assert slot(parts("comfyui")) == "list"
    assert slot(parts("comfyui.3")) == "section"
    assert slot(parts("storage.local")) == "section"
    assert slot(parts("storage.cf_images")) == "section"
    for unknown in (
        "serve",
        "server.prt",
        "server.port.x",
        "comfyui.x",
        "comfyui.0.0",
        "comfyui.1000.url",
        "outbound.allow.0",
        "storage.r2.secret_kye",
        "storage.r2.secret_key.x",
        "",
    ):
        assert slot(parts(unknown)) == "unknown", unknown


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("server.port", 65536, "a port from 0 (any free one) to 65535"),
        ("server.port", -1, "a port from 0"),
        ("server.port", "8000", "a port from 0"),
        ("server.port", True, "a port from 0"),
        ("server.grace", float("nan"), "seconds from 0"),
        ("server.grace", float("inf"), "seconds from 0"),
        ("server.grace", -0.1, "seconds from 0"),
        ("server.host", "", "a text that is not empty"),
        ("server.host", "http://127.0.0.1", "a host name or an address alone"),
        ("server.host", "127.0.0.1:8000", "a host name or an address alone"),
        ("server.host", "[::1]", "a host name or an address alone"),
        ("server.public_url", 3, "a text"),
        ("server.public_url", "example.com", "http://host:port"),
        ("server.public_url", "https://example.com/?a=1", "without ? or #"),
        ("queue.url", "redis://localhost", "the only queue of this version"),
        ("queue.workers", 0, "from 1 to 1024"),
        ("queue.workers", 1025, "from 1 to 1024"),
        ("queue.prefetch", -1, "from 0 to 1024"),
        ("comfyui.0.in_flight", 65, "from 1 to 64"),
        ("comfyui.0.in_flight", 0, "from 1 to 64"),
        ("comfyui.0.name", "two words", "a word of"),
        ("comfyui.0.request_timeout", 0, "seconds above 0"),
        ("comfyui.0.url", "ftp://host", "http://host:port"),
        ("comfyui.0.url", "http://", "http://host:port"),
        ("comfyui.0.url", "http://host:0", "http://host:port"),
        ("comfyui.0.url", "http://host:99999", "http://host:port"),
        ("comfyui.0.url", "http://host:port", "http://host:port"),
        ("comfyui.0.url", "http://host/prompt", "without the path /prompt"),
        ("comfyui.0.url", "http://host#x", "without ? or #"),
        ("comfyui.0.url", "http://ho st", "without blanks"),
        ("comfyui.0.url", "http://host\\x", "without blanks or backslashes"),
        ("storage.provider", "ftp", "one of local, s3, r2, gcs, cf_images"),
        ("storage.provider", 7, "one of local, s3, r2, gcs, cf_images"),
        ("storage.s3.bucket", "s3://results", "a bucket's name alone"),
        ("storage.r2.bucket", "results/today", "a bucket's name alone"),
        ("storage.gcs.bucket", "results\n", "a bucket's name alone"),
        ("storage.s3.endpoint", "s3.example.com", "http://host:port"),
        ("storage.s3.endpoint", "https://me:hidden@s3.example.com", "without a user and password"),
        ("storage.s3.url_expires", 604_801, "to 604800, a week"),
        ("storage.s3.url_expires", 0, "seconds from 1"),
        ("storage.s3.prefix", "/results", "folders of letters"),
        ("storage.s3.prefix", "results/", "folders of letters"),
        ("storage.s3.prefix", "a/../b", "folders of letters"),
        ("storage.s3.prefix", "a\n", "folders of letters"),
        ("storage.s3.secret_key", "two words", "without blanks"),
        ("storage.r2.secret_key", "ends with a line\n", "without blanks"),
        ("storage.r2.access_key", "schlüssel", "ASCII"),
        ("storage.r2.access_key", "", "without blanks"),
        ("storage.cf_images.api_token", 7, "without blanks"),
        ("storage.r2.account_id", "https://abc.r2.cloudflarestorage.com", "a word of"),
        ("storage.r2.endpoint", "https://abc.r2.cloudflarestorage.com/results", "without the path /results"),
        ("storage.r2.endpoint", "https://me@abc.r2.cloudflarestorage.com", "without a user and password"),
        ("storage.r2.public_domain", "images.example.com/?a", "without ? or #"),
        ("storage.r2.public_domain", "me:hidden@images.example.com", "without a user and password"),
        ("storage.r2.public_domain", "//images.example.com", "http://host:port"),
        ("storage.r2.public_domain", "ftp://images.example.com", "http://host:port"),
        ("storage.gcs.credentials", '{"type": "service_account"}', "the path of a service account's JSON"),
        ("storage.cf_images.endpoint", "api.cloudflare.com", "http://host:port"),
        ("storage.cf_images.variant", "w=100/h=100", "a word of"),
        ("inputs.max_bytes", 0, "a whole number from 1"),
        ("inputs.at_once", 65, "from 1 to 64"),
        ("inputs.attempts", 21, "from 1 to 20"),
        ("inputs.timeout", 0, "seconds above 0"),
        ("inputs.keep", 0, "seconds above 0"),
        ("limits.inline_bytes", 67_108_865, "from 0 to 67108864"),
        ("limits.upload_bytes", 0, "a whole number from 1"),
        ("queue.retention_bytes", -1, "a whole number from 0"),
        ("outbound.allow", "10.0.0.0/8", "a list of networks"),
        ("outbound.allow", [7], "a list of networks"),
        ("log.level", "loud", "one of debug, info, warning, error"),
        ("log.access", "maybe", "true or false"),
        ("limits.body_bytes", 0, "a whole number from 1"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_in_words(key: str, value: Any, expected: str) -> None:
    with pytest.raises(Unfit) as caught:
        convert(parts(key), value, text=False)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("server.port", " 9000 ", 9000),
        ("server.grace", "2.5", 2.5),
        ("server.grace", "1e3", 1000.0),
        ("log.access", "true", True),
        ("log.access", "FALSE", False),
        ("log.level", "WARNING", "warning"),
        ("log.level", "Warn", "warning"),
        ("log.level", "CRITICAL", "error"),
        ("log.file", "null", None),
        ("log.file", "nulls.log", "nulls.log"),
        ("data.dir", "null", "null"),
        ("data.dir", "8000", "8000"),
        ("storage.provider", "LOCAL", "local"),
        ("storage.provider", "CF_Images", "cf_images"),
        ("storage.fallback", "S3", "s3"),
        ("storage.r2.secret_key", " 123 ", "123"),
        ("storage.r2.secret_key", "null", None),
        ("storage.r2.public_domain", "images.example.com", "https://images.example.com"),
        ("storage.r2.public_domain", "http://images.example.com/a/", "http://images.example.com/a"),
        ("storage.s3.public_url", "cdn.example.com/results/", "https://cdn.example.com/results"),
        ("storage.gcs.public_url", "localhost:9000", "https://localhost:9000"),
        ("storage.cf_images.delivery_domain", "example.com", "https://example.com"),
        ("storage.s3.endpoint", "https://example.com/storage/s3/", "https://example.com/storage/s3"),
        ("storage.gcs.credentials", "/etc/comfyd/key.json", "/etc/comfyd/key.json"),
        ("storage.s3.prefix", "comfyd/results", "comfyd/results"),
        ("storage.s3.url_expires", "3600", 3600.0),
        ("outbound.allow", "10.0.0.0/8, minio.internal,", ("10.0.0.0/8", "minio.internal")),
        ("outbound.allow", "null", ()),
        ("queue.url", "SQLite", "sqlite"),
        ("comfyui.url", "http://127.0.0.1:8188/", "http://127.0.0.1:8188"),
        ("client.url", "https://example.com/comfyd/", "https://example.com/comfyd"),
        ("server.host", "::1", "::1"),
    ],
)
def test_text_becomes_the_type_of_its_key(key: str, text: str, value: object) -> None:
    assert convert(parts(key), text, text=True) == value


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "", "ten"])
def test_text_that_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(Unfit):
        convert(parts("queue.timeout"), text, text=True)


@pytest.mark.parametrize(
    ("entry", "kept"),
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("192.168.1.2", "192.168.1.2"),
        ("192.168.1.2/32", "192.168.1.2/32"),
        ("fd00::/8", "fd00::/8"),
        ("FD00:0::1", "fd00::1"),
        ("minio.internal", "minio.internal"),
        ("MinIO", "minio"),
        ("my_host-1.example.com", "my_host-1.example.com"),
        ("3com.example", "3com.example"),
        (" localhost ", "localhost"),
    ],
)
def test_what_may_be_reached_is_a_network_an_address_or_a_name(entry: str, kept: str) -> None:
    assert convert(parts("outbound.allow"), [entry], text=False) == (kept,)


@given(st.text("0189abfx.:/-_%[]* é", max_size=12) | st.text(max_size=6))
def test_whatever_may_be_reached_is_understood_by_the_guard(entry: str) -> None:
    kept: Any = ()
    with contextlib.suppress(Unfit):
        kept = convert(parts("outbound.allow"), [entry], text=False)
    allowed = parse_allow(kept)
    assert len(allowed.names) + len(allowed.networks) == len(kept)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("10.0.0.1/8", "expected the network 10.0.0.0/8 or the address 10.0.0.1, not '10.0.0.1/8'"),
        ("10.0.0.0/33", "expected a network such as 10.0.0.0/8, not '10.0.0.0/33'"),
        ("10.0.0.0/255.0.0.0", "expected a network"),
        ("10.0.0.0/0.255.255.255", "expected a network"),
        ("10.0.0.0/-1", "expected a network"),
        ("10.0.0.0/", "expected a network"),
        ("fd00::/129", "expected a network"),
        *[
            (entry, f"addresses and host names, not {entry!r}")
            for entry in (
                "",
                "*",
                "*.internal",
                "127.1",
                "2130706433",
                "0x7f.0x1",
                "host.0x",
                "010.0.0.1",
                "10.0.0.256",
                "10.0.0",
                "http://minio.internal",
                "minio.internal:9000",
                "minio.internal/",
                "minio.internal.",
                "minio internal",
                "-minio",
                "[::1]",
                "fe80::1%eth0",
                "bücher.example",
                "①.example",
            )
        ],
        ("http://me:hidden@host", "not 'http://***@host'"),
        ("a" * 64, "not 'aaa"),
        (".".join(["a" * 60] * 5), "not 'aaa"),
    ],
)
def test_what_is_none_of_them_is_refused(entry: str, words: str) -> None:
    with pytest.raises(Unfit) as caught:
        convert(parts("outbound.allow"), ["localhost", entry], text=False)
    assert words in str(caught.value)


def test_levels_are_taken_in_any_case_from_a_file_too() -> None:
    assert convert(parts("log.level"), "INFO", text=False) == "info"


def test_a_near_name_is_proposed_and_a_far_one_is_not() -> None:
    assert nearest("server.prot", list(defaults())) == "; did you mean server.port?"
    assert nearest("xyzzy", list(defaults())) == ""


def test_shown_values_are_short_and_hold_no_password() -> None:
    assert shown("http://me:hidden@host") == "'http://***@host'"
    assert shown(7) == "7"
    assert len(shown("x" * 500)) < 90
    assert len(shown(["x"] * 500)) < 90


def test_shown_values_hold_no_password_however_deep() -> None:
    deep = {"a": ["http://me:hidden@host", ("http://me:hidden@host", 7)]}
    assert shown(deep) == "{'a': ['http://***@host', ['http://***@host', 7]]}"


def test_an_unusable_url_is_refused_without_repeating_a_part_of_it() -> None:
    for url in ("http://me:hidden@host:port", "http://me:hid/den@host", "http://me:hidden@ho\u2100st"):
        with pytest.raises(Unfit) as caught:
            convert(parts("server.public_url"), url, text=False)
        assert "hid" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        ("storage.s3.access_key", True),
        ("storage.s3.secret_key", True),
        ("storage.r2.access_key", True),
        ("storage.r2.secret_key", True),
        ("storage.cf_images.api_token", True),
        ("storage.gcs.credentials", True),
        ("storage.r2.secret_key.nested", True),
        ("storage.r2", True),
        ("storage", True),
        ("storage.local", False),
        ("storage.r2.bucket", False),
        ("comfyui", False),
        ("outbound.allow", False),
    ],
)
def test_secrets_and_what_holds_them_are_not_shown(key: str, secret: bool) -> None:
    assert is_secret(parts(key)) == secret
    assert shown("canary", parts(key)) == ("***" if secret else "'canary'")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LocalHost"])
def test_loopback_is_known(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", [str(IPv4Address(0)), "::", "192.168.1.2", "example.com", "localhost.example.com"]
)
def test_what_others_may_reach_is_not_loopback(host: str) -> None:
    assert not is_loopback(host)
