"""Where values come from, who wins, and that every problem is said."""

import base64
import json
import os
from collections.abc import Mapping
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.config import (
    CfImagesStorageConfig,
    ComfyUIConfig,
    Config,
    GcsStorageConfig,
    R2StorageConfig,
    ServerConfig,
    StorageConfig,
)
from comfyd.errors import ConfigError
from comfyd.keys import defaults
from comfyd.settings import SEED_NAMES, load, named, require_private_bind

WHSEC_24 = "whsec_ThisIsAnExampleMakeYourOwnSecret"
WHSEC_64 = f"whsec_{base64.b64encode(bytes(64)).decode()}"


def from_environment(environ: Mapping[str, str]) -> Config:
    return load(None, environ, {}, None)


def from_text(folder: Path, text: str, environ: Mapping[str, str] | None = None) -> Config:
    path = folder / "comfyd.toml"
    path.write_text(text)
    return load(path, environ or {}, {}, None)


def problems_of(error: ConfigError) -> dict[str, str]:
    return {problem["key"]: problem["message"] for problem in error.details["problems"]}


def refused(environ: Mapping[str, str]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        from_environment(environ)
    return problems_of(caught.value)


def refused_text(folder: Path, text: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        from_text(folder, text)
    return problems_of(caught.value)


# --- precedence


def test_nothing_at_all_is_the_defaults() -> None:
    assert from_environment({}) == Config()


def test_each_place_beats_the_ones_below(tmp_path: Path) -> None:
    file, dotenv = tmp_path / "comfyd.toml", tmp_path / ".env"
    file.write_text("[server]\nport = 1\n[queue]\nworkers = 1\nprefetch = 1\nmax_attempts = 1\n")
    dotenv.write_text("COMFYD__SERVER__PORT=2\nCOMFYD__QUEUE__WORKERS=2\nCOMFYD__QUEUE__PREFETCH=2\n")
    environ = {"COMFYD__SERVER__PORT": "3", "COMFYD__QUEUE__WORKERS": "3"}
    config = load(file, environ, {"server.port": 4, "log.level": None}, dotenv)
    queue = config.queue
    assert (config.server.port, queue.workers, queue.prefetch, queue.max_attempts) == (4, 3, 2, 1)
    assert config.log.level == "info"


def test_our_names_beat_the_seeds_in_the_same_place() -> None:
    environ = {"LOG_LEVEL": "ERROR", "COMFYD__LOG__LEVEL": "debug", "COMFYUI_URL": "http://a:1"}
    config = from_environment({**environ, "COMFYD__COMFYUI__0__URL": "http://b:1"})
    assert (config.log.level, config.comfyui[0].url) == ("debug", "http://b:1")


def test_the_environment_of_the_process_is_neither_read_nor_changed(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("COMFYD__LOG__FILE=${PATH}\n")
    before = dict(os.environ)
    assert load(None, {}, {}, dotenv).log.file == "${PATH}"
    assert dict(os.environ) == before


# --- the environment


def test_every_key_can_be_set_by_its_variable() -> None:
    # A text that every key without a default takes, the urls among them.
    spelled = {key: "http://x" if key.endswith("url") else "xx" for key in defaults()}
    spelled |= {key: "https://xx" for key in defaults() if key.endswith(("endpoint", "_domain"))}
    spelled |= {"webhooks.secret": WHSEC_24, "webhooks.old_secrets": f"{WHSEC_64}, {WHSEC_24}"}
    environ = {
        "COMFYD__" + key.upper().replace(".", "__"): spelled[key] if default in (None, []) else str(default)
        for key, default in defaults().items()
    }
    config = from_environment(environ)
    assert (config.storage.local.dir, config.log.file) == ("xx", "xx")
    assert config.storage.usable == ("local", "s3", "r2", "gcs", "cf_images")
    assert config.storage.r2.public_domain == config.storage.r2.endpoint == "https://xx"
    assert config.outbound.allow == ("xx",)
    assert (config.webhooks.secret, config.webhooks.old_secrets) == (WHSEC_24, (WHSEC_64, WHSEC_24))
    assert (config.inputs, config.limits) == (Config().inputs, Config().limits)
    assert config.queue == Config().queue
    assert config.comfyui == (ComfyUIConfig(restart=("xx",)),)


def test_names_of_variables_are_taken_in_any_case_and_upper_case_wins() -> None:
    assert from_environment({"comfyd__server__port": "9"}).server.port == 9
    assert from_environment({"COMFYD__SERVER__PORT": "8", "comfyd__server__port": "9"}).server.port == 8


def test_further_servers_get_names_of_their_own() -> None:
    config = from_environment(
        {
            "COMFYD__COMFYUI__URL": "http://a:1",
            "COMFYD__COMFYUI__1__URL": "http://b:1/",
            "COMFYD__COMFYUI__1__IN_FLIGHT": "4",
        }
    )
    assert [(server.name, server.url, server.in_flight) for server in config.comfyui] == [
        ("comfyui", "http://a:1", 2),
        ("comfyui-2", "http://b:1", 4),
    ]


def test_a_list_in_json_replaces_the_one_of_the_file(tmp_path: Path) -> None:
    text = '[[comfyui]]\nurl = "http://a:1"\n[[comfyui]]\nurl = "http://b:1"\n'
    environ = {
        "COMFYD__COMFYUI": '[{"url": "http://c:1", "name": "c"}]',
        "COMFYD__COMFYUI__0__IN_FLIGHT": "3",
        "COMFYUI_URL": "http://loses:1",
    }
    (server,) = from_text(tmp_path, text, environ).comfyui
    assert (server.url, server.name, server.in_flight) == ("http://c:1", "c", 3)


def test_a_list_that_is_no_json_is_refused() -> None:
    assert "expected a JSON list of objects" in refused({"COMFYD__COMFYUI": "http://a:1"})["comfyui"]
    assert "expected at least one" in refused({"COMFYD__COMFYUI": "[]"})["comfyui"]


def test_an_empty_variable_counts_as_not_set() -> None:
    assert from_environment({"COMFYD__SERVER__PORT": "", "LOG_LEVEL": " ", "COMFYUI_URL": ""}) == Config()


def test_an_unknown_variable_is_refused_with_the_nearest_one() -> None:
    problems = refused({"COMFYD__SERVER__PROT": "1", "COMFYD__XYZZY": "1", "COMFYD__SERVER": "1"})
    assert "did you mean COMFYD__SERVER__PORT?" in problems["COMFYD__SERVER__PROT"]
    assert "COMFYD__XYZZY" in problems
    assert "expected a table of keys" in problems["server"]


# --- the seed's names


def test_every_name_of_the_seed_is_accepted() -> None:
    given = {
        "APP_ENV": "production",
        "LOG_LEVEL": "INFO",
        "TASK_API_URL": "http://localhost:8000/api",
        "COMFYUI_URL": "http://localhost:8188",
        "COMFYUI_CLIENT_ID": "fastapi-client",
        "STORAGE_PROVIDER": "CF_Images",
        "GCS_BUCKET_NAME": "in-google",
        "GCS_BUCKET_REGION": "europe-west1",
        "GOOGLE_APPLICATION_CREDENTIALS": "/etc/key.json",
        "R2_BUCKET_NAME": "in-r2",
        "R2_ACCOUNT_ID": "0123456789abcdef",
        "R2_ACCESS_KEY": "r2-access",
        "R2_SECRET_KEY": "r2-secret",
        "R2_PUBLIC_DOMAIN": "images.example.com",
        "CF_IMAGES_ACCOUNT_ID": "fedcba9876543210",
        "CF_IMAGES_API_TOKEN": "cf-token",
        "CF_IMAGES_DELIVERY_DOMAIN": "https://cdn.example.com",
    }
    assert set(SEED_NAMES) == set(given)
    config = from_environment(given)
    assert (config.log.format, config.log.level, config.client.url) == (
        "json",
        "info",
        "http://localhost:8000",
    )
    server = config.comfyui[0]
    assert (server.url, server.client_id) == ("http://localhost:8188", "fastapi-client")
    assert config.storage == StorageConfig(
        provider="cf_images",
        gcs=GcsStorageConfig(bucket="in-google", region="europe-west1", credentials="/etc/key.json"),
        r2=R2StorageConfig(
            bucket="in-r2",
            account_id="0123456789abcdef",
            access_key="r2-access",
            secret_key="r2-secret",  # noqa: S106 - an example
            public_domain="https://images.example.com",
        ),
        cf_images=CfImagesStorageConfig(
            account_id="fedcba9876543210",
            api_token="cf-token",  # noqa: S106 - an example
            delivery_domain="https://cdn.example.com",
        ),
    )


def test_a_key_is_named_with_its_older_name() -> None:
    assert named("storage.r2.bucket") == "storage.r2.bucket (R2_BUCKET_NAME)"
    assert named("storage.s3.bucket") == "storage.s3.bucket"


@pytest.mark.parametrize(
    ("app_env", "format_"),
    [("production", "json"), ("Development", "console"), ("staging", "auto"), ("", "auto")],
)
def test_app_env_chooses_the_format_of_the_log(app_env: str, format_: str) -> None:
    assert from_environment({"APP_ENV": app_env}).log.format == format_


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/api", "http://h:1/api/"])
def test_the_task_api_url_loses_its_api(url: str) -> None:
    assert from_environment({"TASK_API_URL": url}).client.url == "http://h:1"


@pytest.mark.parametrize(
    ("provider", "rest"),
    [
        ("local", {}),
        ("S3", {"COMFYD__STORAGE__S3__BUCKET": "xx"}),
        ("gcs", {"GCS_BUCKET_NAME": "xx"}),
        ("Cf_Images", {"CF_IMAGES_ACCOUNT_ID": "x", "CF_IMAGES_API_TOKEN": "x"}),
        (
            "R2",
            {"R2_BUCKET_NAME": "xx", "R2_ACCOUNT_ID": "x", "R2_ACCESS_KEY": "x", "R2_SECRET_KEY": "x"},
        ),
    ],
)
def test_each_storage_can_be_chosen(provider: str, rest: dict[str, str]) -> None:
    config = from_environment({"STORAGE_PROVIDER": provider, **rest})
    assert config.storage.provider == provider.lower()
    assert config.storage.missing(config.storage.provider) == ()


def test_another_storage_is_refused_in_a_plain_sentence() -> None:
    (message,) = refused({"STORAGE_PROVIDER": "ftp"}).values()
    assert message == (
        "storage.provider = 'ftp' (STORAGE_PROVIDER, environment): "
        "expected one of local, s3, r2, gcs, cf_images"
    )


def test_the_seeds_names_work_in_a_dotenv_file(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text('# mine\nexport COMFYUI_URL="http://gpu:8188"\nR2_SECRET_KEY=a$b\nLONELY\n')
    config = load(None, {}, {}, dotenv)
    assert config.comfyui[0].url == "http://gpu:8188"
    assert config.storage.r2.secret_key == "a$b"  # noqa: S105 - an example


# --- what is refused


def test_all_problems_are_said_in_one_go(tmp_path: Path) -> None:
    text = '[server]\nport = "x"\nhots = 1\n[queue]\nworkers = 0\n[log]\nlevel = "loud"\n[extra]\na = 1\n'
    with pytest.raises(ConfigError) as caught:
        from_text(tmp_path, text, {"COMFYD__DATA__DIRR": "x", "COMFYUI_URL": "nonsense"})
    problems = problems_of(caught.value)
    assert set(problems) == {
        "server.port",
        "server.hots",
        "queue.workers",
        "log.level",
        "extra.a",
        "COMFYD__DATA__DIRR",
        "comfyui.0.url",
    }
    assert len(caught.value.message.splitlines()) == len(problems)
    assert caught.value.details["key"] in problems
    assert problems["server.port"].startswith(
        f"server.port = 'x' ({tmp_path / 'comfyd.toml'}): expected a port"
    )
    assert "did you mean server.host?" in problems["server.hots"]


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("server = 3", "server", "expected a table of keys"),
        ("comfyui = 3", "comfyui", "expected a list of tables, [[comfyui]]"),
        ("comfyui = []", "comfyui", "at least one"),
        ('comfyui = ["http://a:1"]', "comfyui", "expected a list of tables"),
        ("[server.port]\na = 1", "server.port.a", "unknown key"),
        ("[server]\nport = {}", "server.port", "expected a port"),
        ("[queue]\nretry_delay = 600", "queue.retry_delay_max", "expected at least queue.retry_delay = 600"),
        (
            '[[comfyui]]\n[[comfyui]]\nurl="http://b:1"\nname="comfyui"',
            "comfyui.1.name",
            "comfyui.0 has it already",
        ),
        ("[[comfyui]]\n[[comfyui]]", "comfyui.1.url", "comfyui.0 has it already"),
        ("[storage]\nlocals = 1", "storage.locals", "did you mean storage.local.dir?"),
    ],
)
def test_a_wrong_shape_is_named(tmp_path: Path, text: str, key: str, words: str) -> None:
    assert words in refused_text(tmp_path, text)[key]


# --- storages


@pytest.mark.parametrize(
    ("environ", "messages"),
    [
        (
            {"STORAGE_PROVIDER": "r2", "R2_ACCOUNT_ID": "x", "R2_ACCESS_KEY": "x"},
            [
                "storage.r2.bucket (R2_BUCKET_NAME) is not set, and storage.provider = 'r2' needs it",
                "storage.r2.secret_key (R2_SECRET_KEY) is not set, and storage.provider = 'r2' needs it",
            ],
        ),
        (
            {"COMFYD__STORAGE__FALLBACK": "gcs"},
            ["storage.gcs.bucket (GCS_BUCKET_NAME) is not set, and storage.fallback = 'gcs' needs it"],
        ),
        (
            {"COMFYD__STORAGE__PROVIDER": "s3", "COMFYD__STORAGE__FALLBACK": "s3"},
            ["storage.s3.bucket is not set, and storage.provider = 's3' needs it"],
        ),
        (
            {
                "STORAGE_PROVIDER": "cf_images",
                "CF_IMAGES_ACCOUNT_ID": "x",
                "CF_IMAGES_API_TOKEN": "x",
                "COMFYD__STORAGE__FALLBACK": "cf_images",
            },
            [
                (
                    "storage.fallback = 'cf_images': expected another one, "
                    "for what Cloudflare Images does not take"
                )
            ],
        ),
        (
            {"COMFYD__STORAGE__S3__ACCESS_KEY": "x"},
            ["storage.s3.secret_key is not set, and storage.s3.access_key needs it"],
        ),
        (
            {"COMFYD__STORAGE__S3__SECRET_KEY": "x"},
            ["storage.s3.access_key is not set, and storage.s3.secret_key needs it"],
        ),
    ],
)
def test_half_a_storage_is_refused_with_what_it_lacks(environ: dict[str, str], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_environment(environ)
    assert caught.value.message.splitlines() == messages
    assert caught.value.details["key"] == messages[0].split()[0]


def test_half_a_storage_that_nobody_chose_is_no_problem() -> None:
    storage = from_environment({"R2_BUCKET_NAME": "xx", "CF_IMAGES_API_TOKEN": "x"}).storage
    assert storage.usable == ("local",)


def test_s3_takes_the_credentials_of_the_machine_without_keys() -> None:
    environ = {"STORAGE_PROVIDER": "s3", "COMFYD__STORAGE__S3__BUCKET": "results"}
    assert from_environment(environ).storage.s3.access_key is None


def test_a_list_of_texts_is_an_array_in_toml_and_has_commas_elsewhere(tmp_path: Path) -> None:
    text = '[outbound]\nallow = ["10.0.0.0/8", "minio.internal"]\n'
    assert from_text(tmp_path, text).outbound.allow == ("10.0.0.0/8", "minio.internal")
    environ = {"COMFYD__OUTBOUND__ALLOW": "192.168.0.0/16, GPU.lan"}
    assert from_text(tmp_path, text, environ).outbound.allow == ("192.168.0.0/16", "gpu.lan")
    environ = {"COMFYD__OUTBOUND__ALLOW": "null"}
    assert from_text(tmp_path, text, environ).outbound.allow == ()
    assert from_text(tmp_path, "[outbound]\nallow = []\n").outbound.allow == ()


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ('[outbound]\nallow = "10.0.0.0/8"', "outbound.allow", "expected a list of networks"),
        ("[outbound]\nallow = [10]", "outbound.allow", "outbound.allow = [10]"),
        ('[outbound]\nallow = ["10.0.0.1/8"]', "outbound.allow", "expected the network 10.0.0.0/8"),
        ("[[outbound.allow]]\nnet = 1", "outbound.allow.0.net", "unknown key"),
        ("[outbound.allow]\nnet = 1", "outbound.allow.net", "unknown key"),
        ("outbound = []", "outbound", "expected a table of keys"),
    ],
)
def test_a_list_of_texts_that_is_none_is_refused(tmp_path: Path, text: str, key: str, words: str) -> None:
    assert words in refused_text(tmp_path, text)[key]


# --- webhooks


@pytest.mark.parametrize("length", [24, 25, 26, 32, 62, 63, 64])
def test_a_secret_of_webhooks_has_24_to_64_bytes(length: int) -> None:
    secret = f"whsec_{base64.b64encode(bytes(length)).decode()}"
    assert from_environment({"COMFYD__WEBHOOKS__SECRET": secret}).webhooks.secret == secret


@pytest.mark.parametrize(
    "wrong",
    [
        *(f"whsec_{base64.b64encode(bytes(length)).decode()}" for length in (0, 1, 23, 65, 66, 67, 96)),
        WHSEC_24.removeprefix("whsec_"),
        WHSEC_24.replace("whsec_", "whpk_"),
        WHSEC_24 + "=",
        WHSEC_24[:-1],
        WHSEC_24[:-1] + "-",
        WHSEC_24[:-1] + "ä",
        WHSEC_24 + "\nA",
    ],
)
@pytest.mark.parametrize("key", ["secret", "old_secrets"])
def test_what_is_no_secret_of_webhooks_is_refused_by_its_key_alone(
    tmp_path: Path, key: str, wrong: str
) -> None:
    value = json.dumps(wrong if key == "secret" else [WHSEC_64, wrong])
    message = refused_text(tmp_path, f"[webhooks]\n{key} = {value}\n")[f"webhooks.{key}"]
    assert message == (
        f"webhooks.{key} = *** ({tmp_path / 'comfyd.toml'}): expected `whsec_` and 24 to 64 bytes in base64"
    )


@pytest.mark.parametrize("seconds", ["0", "-1", "31"])
def test_a_receiver_has_half_a_minute_at_most(seconds: str) -> None:
    assert "to 30" in refused({"COMFYD__WEBHOOKS__TIMEOUT": seconds})["webhooks.timeout"]


# --- secrets

CANARY = "canary-5d1f"


@pytest.mark.parametrize(
    "text",
    [
        f'[storage.r2]\nsecret_key = "{CANARY} with blanks"',
        f'[storage.r2]\nsecret_key = ["{CANARY}"]',
        f'[storage.r2]\nsecret_key = {{ "value" = "{CANARY}" }}',
        f'[[storage.r2.secret_key]]\nvalue = "{CANARY}"',
        f'[storage.r2]\nsecret_kye = "{CANARY}"',
        f'[storage.r2]\nsecret_kye = ["{CANARY}"]',
        f'[storage.s3]\naccess_key = ["{CANARY}"]',
        f'[webhooks]\nsecret = "{CANARY}"',
        f'[webhooks]\nsecret = ["{CANARY}"]',
        f'[webhooks]\nsecrets = "{CANARY}"',
        f'[webhooks]\nold_secrets = "{CANARY}"',
        f'[webhooks]\nold_secrets = ["{CANARY}"]',
        f'webhooks = "{CANARY}"',
        f'[storage]\nr2 = "{CANARY}"',
        f'[storage]\nr2 = ["{CANARY}"]',
        f'storage = "{CANARY}"',
        f'[storage.s3]\nsecret_key = "{CANARY}"',
        f'[storage.cf_images]\napi_token = "{CANARY} "',
        f'[storage.gcs]\ncredentials = \'{{"private_key": "{CANARY}"}}\'',
        f'[storage.s3]\nendpoint = "https://me:{CANARY}@s3.example.com"',
        f'[storage.s3]\nendpoint = ["https://me:{CANARY}@s3.example.com"]',
        f'comfyui = ["http://me:{CANARY}@gpu:8188"]',
        f'[storage.r2]\nsecret_key = "{CANARY}',
        f"[storage.r2]\nsecret_key = {CANARY}",
        f'[storage.r2]\nsecret_key = "{CANARY}"\nsecret_key = "{CANARY}"',
    ],
)
def test_no_error_about_a_file_repeats_a_secret(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_text(tmp_path, text)
    assert CANARY not in f"{caught.value} {caught.value!r} {caught.value.details}"
    assert caught.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("R2_SECRET_KEY", f"{CANARY} with blanks"),
        ("CF_IMAGES_API_TOKEN", f"Bearer {CANARY}"),
        ("COMFYD__WEBHOOKS__SECRET", f"whsec_{CANARY}"),
        ("COMFYD__WEBHOOKS__OLD_SECRETS", f"whsec_{CANARY},{CANARY}"),
        ("COMFYD__STORAGE__R2__SECRET_KYE", CANARY),
        ("COMFYD__STORAGE__R2__SECRET_KEY__X", CANARY),
        ("COMFYD__STORAGE__R2", f'{{"secret_key": "{CANARY}"}}'),
        ("COMFYD__STORAGE", CANARY),
        ("COMFYD__STORAGE__S3__SECRET_KEY", CANARY),
        ("GOOGLE_APPLICATION_CREDENTIALS", f'{{"private_key": "{CANARY}"}}'),
        ("COMFYD__COMFYUI", f'["http://me:{CANARY}@gpu:8188"]'),
        ("COMFYD__OUTBOUND__ALLOW", f"http://me:{CANARY}@host"),
    ],
)
def test_no_error_about_a_variable_repeats_a_secret(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_environment({name: value})
    assert CANARY not in f"{caught.value} {caught.value!r} {caught.value.details}"


def test_a_number_for_a_secret_is_refused_without_it(tmp_path: Path) -> None:
    message = refused_text(tmp_path, "[storage.r2]\nsecret_key = 123456\n")["storage.r2.secret_key"]
    file = tmp_path / "comfyd.toml"
    assert (
        message == f"storage.r2.secret_key = *** ({file}): expected a text of ASCII characters without blanks"
    )


# --- servers


def test_servers_are_numbered_without_a_gap() -> None:
    environ = {"COMFYD__COMFYUI__0__URL": "http://a:1", "COMFYD__COMFYUI__3__URL": "http://b:1"}
    assert "comfyui.1 is not" in refused(environ)["comfyui.3"]


def test_an_empty_table_changes_nothing(tmp_path: Path) -> None:
    assert from_text(tmp_path, "[server]\n[storage.local]\n[[comfyui]]\n") == Config()


def test_one_table_where_a_list_belongs_is_the_first_server(tmp_path: Path) -> None:
    assert from_text(tmp_path, '[comfyui]\nurl = "http://a:1"\n').comfyui[0].url == "http://a:1"
    assert from_text(tmp_path, "[comfyui]\n") == Config()


def test_broken_toml_is_refused_with_its_line(tmp_path: Path) -> None:
    message = refused_text(tmp_path, "[server]\nport = \n")[""]
    assert "comfyd.toml is not valid TOML" in message
    assert "line 2" in message


def test_a_number_without_end_is_refused(tmp_path: Path) -> None:
    assert "comfyd.toml is not valid TOML" in refused_text(tmp_path, f"[server]\nport = {'1' * 5000}\n")[""]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe=1")
    for path, dotenv, words in [
        (tmp_path / "missing.toml", None, "missing.toml cannot be read: No such file"),
        (tmp_path, None, "cannot be read: Is a directory"),
        (binary, None, "binary is not valid TOML"),
        (None, binary, "binary cannot be read"),
    ]:
        with pytest.raises(ConfigError, match=words):
            load(path, {}, {}, dotenv)


def test_a_url_in_an_error_shows_no_password() -> None:
    (message,) = refused({"COMFYUI_URL": "http://me:hidden@host/path"}).values()
    assert "hidden" not in message


def test_overrides_are_named_as_the_command_line() -> None:
    with pytest.raises(ConfigError, match=r"server.port = 70000 \(command line\)"):
        load(None, {}, {"server.port": 70000}, None)


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["url", "name", "in_flight", "request_timeout", "0", "nonsense"]),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                lambda inner: (
                    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
                ),
                max_leaves=6,
            ),
            max_size=4,
        ),
        max_size=4,
    )
)
def test_whatever_a_list_holds_it_loads_or_is_refused_with_its_key(tables: list[dict[str, Any]]) -> None:
    problems: list[dict[str, str]] = []
    try:
        from_environment({"COMFYD__COMFYUI": json.dumps(tables)})
    except ConfigError as error:
        problems = error.details["problems"]
    fits = len(tables) == 1 and not tables[0]
    assert all(problem["key"].startswith("comfyui") for problem in problems)
    assert not (fits and problems)


# --- listening


@pytest.mark.parametrize("host", [str(IPv4Address(0)), "::", "192.168.0.7", "gpu.example.com"])
def test_listening_for_strangers_needs_insecure(host: str) -> None:
    config = Config(server=ServerConfig(host=host))
    with pytest.raises(ConfigError, match="no API keys") as caught:
        require_private_bind(config, insecure=False)
    assert caught.value.details == {"key": "server.host"}
    require_private_bind(config, insecure=True)


def test_listening_for_this_machine_needs_nothing() -> None:
    require_private_bind(Config(), insecure=False)
