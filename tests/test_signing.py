"""Signed urls: good for what was signed and no longer than that; and the key that signs them."""

import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.errors import ConfigError, InvalidSignature
from comfyd.signing import KEY_BYTES, Signer, key_of
from tests.support.clock import HandClock

PATH = "5e1f6c1e-0000-4000-8000-000000000001/1/2_0_a.png"
KEY = bytes(range(KEY_BYTES))
HOUR = 3_600_000


def signed(signer: Signer, path: str = PATH) -> tuple[str, str]:
    """Expiry and signature of a fresh url."""
    query = signer.query(path)
    assert query.startswith("?")
    values = parse_qs(query[1:], strict_parsing=True)
    return values["expires"][0], values["signature"][0]


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def signer(clock: HandClock) -> Signer:
    return Signer(KEY, HOUR, clock)


def test_a_url_is_good_until_it_expires_and_not_a_moment_longer(signer: Signer, clock: HandClock) -> None:
    expires, signature = signed(signer)
    assert int(expires) == (clock.now() + HOUR) // 1000
    signer.check(PATH, expires, signature)
    clock.advance(HOUR - 1)
    signer.check(PATH, expires, signature)
    clock.advance(1)
    with pytest.raises(InvalidSignature, match="expired"):
        signer.check(PATH, expires, signature)
    signer.check(PATH, *signed(signer))


def test_what_was_not_signed_is_refused(signer: Signer) -> None:
    expires, signature = signed(signer)
    other = f"{'0' if signature[0] != '0' else '1'}{signature[1:]}"
    wrong: list[tuple[str, str | None, str | None]] = [
        (PATH, None, None),
        (PATH, expires, None),
        (PATH, None, signature),
        (PATH, "", ""),
        (PATH, expires, ""),
        (PATH, expires, other),
        (PATH, expires, signature.upper()),
        (PATH, expires, signature[:-1]),
        (PATH, expires, "ä\udcff"),
        (PATH, str(int(expires) + 1), signature),
        (PATH, f"0{expires}", signature),
        (PATH, f" {expires}", signature),
        (PATH, "never", signature),
        (PATH, "9" * 5_000, signature),
        (PATH.replace("2_0", "2_1"), expires, signature),
        (f"{PATH}/", expires, signature),
        (f"/{PATH}", expires, signature),
        (PATH.upper(), expires, signature),
    ]
    for path, until, mark in wrong:
        with pytest.raises(InvalidSignature, match="missing or wrong"):
            signer.check(path, until, mark)


@given(path=st.text(), expires=st.text(), signature=st.text())
def test_nobody_guesses_and_nothing_breaks_it(path: str, expires: str, signature: str) -> None:
    with pytest.raises(InvalidSignature):
        Signer(KEY, HOUR, HandClock()).check(path, expires, signature)


def test_where_none_is_required_none_is_made_and_a_wrong_one_is_refused_all_the_same(
    signer: Signer, clock: HandClock
) -> None:
    lax = Signer(KEY, 0, clock)
    assert lax.query(PATH) == ""
    assert (lax.required, signer.required) == (False, True)
    lax.check(PATH, None, None)
    expires, signature = signed(signer)  # made before `url_expires` was set to 0
    lax.check(PATH, expires, signature)
    with pytest.raises(InvalidSignature):
        lax.check(f"{PATH}x", expires, signature)
    clock.advance(HOUR)
    with pytest.raises(InvalidSignature):
        lax.check(PATH, expires, signature)


def test_another_key_makes_other_signatures(signer: Signer, clock: HandClock) -> None:
    with pytest.raises(InvalidSignature):
        Signer(KEY[::-1], HOUR, clock).check(PATH, *signed(signer))


def test_no_message_holds_the_signature_that_would_be_right(signer: Signer) -> None:
    expires, signature = signed(signer)
    with pytest.raises(InvalidSignature) as caught:
        signer.check(PATH, expires, signature[:-1])
    assert signature not in f"{caught.value.message}{caught.value.details}"


def test_the_key_is_made_once_for_nobody_else_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "url.key"
    key = key_of(file)
    assert len(key) == KEY_BYTES
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key_of(file) == key
    assert [path.name for path in tmp_path.iterdir()] == ["url.key"]
    (tmp_path / "other").mkdir()
    assert key_of(tmp_path / "other" / "url.key") != key


def test_a_start_that_was_killed_while_it_made_the_key_is_followed_by_one_that_makes_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "url.new").write_bytes(b"half")
    (tmp_path / "url.new").chmod(0o644)
    key = key_of(tmp_path / "url.key")
    assert len(key) == KEY_BYTES
    assert stat.S_IMODE((tmp_path / "url.key").stat().st_mode) == 0o600


def test_the_name_of_a_new_key_is_synced_to_the_disk(tmp_path: Path) -> None:
    """A hook that sees every call to the system cannot be taken out again: so in a process of its own."""
    script = """
        import os, sys
        from pathlib import Path
        from comfyd.signing import key_of
        folder = Path(sys.argv[1])
        def seen(event, details):
            if event == "os.rename" and str(details[1]).endswith("url.key"):
                print("renamed", flush=True)
            if event == "open" and details[0] == str(folder) and details[2] & os.O_DIRECTORY:
                print("folder opened", flush=True)
        sys.addaudithook(seen)
        key_of(folder / "url.key")
        key_of(folder / "url.key")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split("\n") == ["renamed", "folder opened", ""]


@pytest.mark.parametrize("content", [b"", b"short", bytes(KEY_BYTES + 1)])
def test_a_damaged_key_is_told_in_words_and_not_replaced(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "url.key"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        key_of(file)
    assert str(file) in caught.value.message
    assert caught.value.details == {"key": "data.dir"}
    assert file.read_bytes() == content


def test_a_key_that_cannot_be_made_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"a file")
    with pytest.raises(ConfigError, match=r"data\.dir: cannot use .*url\.key: Not a directory"):
        key_of(tmp_path / "data" / "url.key")
    (tmp_path / "url.key").mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        key_of(tmp_path / "url.key")
