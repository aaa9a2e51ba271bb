"""What each key accepts, and the words for what it does not."""

from ipaddress import IPv4Address
from typing import Any

import pytest

from comfyd.keys import Unfit, convert, defaults, is_loopback, nearest, shown, slot


def parts(key: str) -> tuple[str, ...]:
    return tuple(key.split("."))


def test_every_key_has_a_type_and_accepts_its_default() -> None:
    for key, default in defaults().items():
        assert convert(parts(key), default, text=False) == default, key


def test_a_path_that_is_no_key_says_what_it_is() -> None:
    assert slot(parts("server")) == "section"
    assert slot(parts("comfyui")) == "list"
    assert slot(parts("comfyui.3")) == "section"
    assert slot(parts("storage.local")) == "section"
    for unknown in (
        "serve",
        "server.prt",
        "server.port.x",
        "comfyui.x",
        "comfyui.0.0",
        "comfyui.1000.url",
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
        ("storage.provider", "s3", "local: this version stores on its own disk only"),
        ("storage.provider", 7, "local: this version stores on its own disk only"),
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


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LocalHost"])
def test_loopback_is_known(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", [str(IPv4Address(0)), "::", "192.168.1.2", "example.com", "localhost.example.com"]
)
def test_what_others_may_reach_is_not_loopback(host: str) -> None:
    assert not is_loopback(host)
