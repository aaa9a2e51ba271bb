"""The tree itself, and what of it may be shown."""

import msgspec
import pytest

from comfyd.config import (
    SECRET_FIELDS,
    CfImagesStorageConfig,
    ComfyUIConfig,
    Config,
    GcsStorageConfig,
    R2StorageConfig,
    S3StorageConfig,
    ServerConfig,
    StorageConfig,
    StorageName,
    WebhooksConfig,
    masked,
    public,
)

CANARY = "canary-5d1f"

FULL = StorageConfig(
    s3=S3StorageConfig(bucket="results", access_key=CANARY, secret_key=CANARY),
    r2=R2StorageConfig(bucket="results", account_id="account", access_key=CANARY, secret_key=CANARY),
    gcs=GcsStorageConfig(bucket="results", credentials=CANARY),
    cf_images=CfImagesStorageConfig(account_id="account", api_token=CANARY),
)
"""With every secret that there is."""


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


def test_public_and_repr_show_no_secret_but_whether_there_is_one() -> None:
    config = Config(storage=FULL, comfyui=(ComfyUIConfig(restart=("curl", CANARY)),))
    assert public(config)["comfyui"][0]["restart"] == ["***", "***"]
    shown = public(config)["storage"]
    assert {shown["r2"]["secret_key"], shown["cf_images"]["api_token"], shown["gcs"]["credentials"]} == {
        "***"
    }
    assert shown["r2"]["bucket"] == "results"
    assert public(Config())["storage"]["r2"]["secret_key"] is None
    for text in (
        str(public(config)),
        repr(config),
        str(config),
        f"{config.storage!r}",
        str(config.storage.s3),
    ):
        assert CANARY not in text
    assert "bucket='results'" in repr(config.storage.s3)
    assert CANARY not in str([row for table in (FULL.s3, FULL.r2) for row in table.__rich_repr__()])


def test_the_secrets_of_webhooks_are_shown_nowhere() -> None:
    config = Config(webhooks=WebhooksConfig(secret=CANARY, old_secrets=(CANARY, CANARY)))
    shown = public(config)["webhooks"]
    assert (shown["secret"], shown["old_secrets"]) == ("***", ["***", "***"])
    assert public(Config())["webhooks"] == {"timeout": 15.0, "secret": None, "old_secrets": []}
    assert CANARY not in f"{public(config)} {config!r} {config.webhooks}"
    assert "old_secrets=()" in repr(WebhooksConfig())


def test_the_full_example_has_every_secret_there_is() -> None:
    names = [
        (table, field)
        for table in StorageConfig.__struct_fields__[3:]
        for field in getattr(FULL, table).__struct_fields__
        if field in SECRET_FIELDS
    ]
    elsewhere = {"restart", "secret", "old_secrets"}  # of a `[[comfyui]]` and of `[webhooks]`
    assert {field for _, field in names} | elsewhere == SECRET_FIELDS
    assert all(getattr(getattr(FULL, table), field) == CANARY for table, field in names)


def test_a_repr_shows_no_password_of_a_url() -> None:
    assert "hidden" not in repr(Config(comfyui=(ComfyUIConfig(url="http://me:hidden@gpu:8188"),)))


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("local", ()),
        ("s3", ("bucket",)),
        ("r2", ("bucket", "account_id", "access_key", "secret_key")),
        ("gcs", ("bucket",)),
        ("cf_images", ("account_id", "api_token")),
    ],
)
def test_a_storage_says_which_keys_it_needs(name: StorageName, missing: tuple[str, ...]) -> None:
    assert StorageConfig().missing(name) == missing
    assert FULL.missing(name) == ()
    assert (name in StorageConfig().usable) == (not missing)


def test_what_is_set_up_can_be_named_by_requests() -> None:
    assert StorageConfig().usable == ("local",)
    assert FULL.usable == ("local", "s3", "r2", "gcs", "cf_images")
