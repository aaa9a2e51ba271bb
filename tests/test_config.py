"""The tree itself, and what of it may be shown."""

import msgspec
import pytest

from comfyd.config import ComfyUIConfig, Config, ServerConfig, masked, public


def test_the_tree_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Config().server.port = 1  # type: ignore[misc] # that is what is tested


def test_every_default_is_a_value_that_its_own_type_accepts() -> None:
    assert msgspec.convert(msgspec.to_builtins(Config()), Config) == Config()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://127.0.0.1:8188", "http://127.0.0.1:8188"),
        ("https://user:secret@host:1/path", "https://***@host:1/path"),
        ("https://user@host", "https://***@host"),
        ("https://a:b@c:d@host/x@y", "https://***@host/x@y"),
        ("http://host/a@b", "http://host/a@b"),
        ("user:secret@host", "user:secret@host"),
        ("", ""),
    ],
)
def test_a_url_is_shown_without_its_user(url: str, shown: str) -> None:
    assert masked(url) == shown


def test_public_has_every_section_and_no_password() -> None:
    config = Config(
        server=ServerConfig(public_url="https://me:hidden@example.com"),
        comfyui=(ComfyUIConfig(url="http://me:hidden@gpu:8188"), ComfyUIConfig(name="two")),
    )
    shown = public(config)
    assert set(shown) == set(Config.__struct_fields__)
    assert shown["comfyui"][0]["url"] == "http://***@gpu:8188"
    assert shown["comfyui"][1]["name"] == "two"
    assert shown["queue"]["workers"] == 32
    assert b"hidden" not in msgspec.json.encode(shown)
