"""What clients say of assets: what fits is taken as it is, all else is refused with the field's name."""

import pytest

from comfyd.api.v2 import asset_fields
from comfyd.api.v2.asset_fields import CONTENT_TYPE, FILE_PATH
from comfyd.errors import MalformedRequest

HASH = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "path",
    [
        "photo.png",
        "a photo (1).png",
        "input/photo.png",
        "input/sub/photo.png",
        "日本語 👩\u200d🚀.png",
        'a"b.png',
        "..png",
        "models",
        ".hidden",
        "x" * FILE_PATH,
    ],
)
def test_relative_names_of_inputs_are_paths(path: str) -> None:
    assert asset_fields.file_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "  ",
        "/photo.png",
        "//photo.png",
        "../photo.png",
        "input/../photo.png",
        "input/..",
        "..",
        ".",
        "./photo.png",
        "input/./photo.png",
        "input/",
        "input//photo.png",
        "input/ /photo.png",
        "photo.png/",
        "a\\b.png",
        "..\\b.png",
        "a\nb.png",
        "a\0b.png",
        "a\x7fb.png",
        "a\x85b.png",
        "a\u2028b.png",
        "x" * (FILE_PATH + 1),
        "models/checkpoints/x.safetensors",
        "checkpoints/x.safetensors",
        "Input/photo.png",
        "output/photo.png",
    ],
)
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(MalformedRequest) as caught:
        asset_fields.file_path(path)
    assert caught.value.details == {"field": "file_path"}
    assert caught.value.message.isprintable()


def test_a_model_is_told_that_it_is_not_placed() -> None:
    with pytest.raises(MalformedRequest, match=r"models/\.\.\. would place a file .* comfyd does not do"):
        asset_fields.file_path("models/checkpoints/x.safetensors")


def test_hashes_are_compared_in_small_letters() -> None:
    for text in (f"blake3:{HASH}", f"BLAKE3:{HASH.upper()}"):
        assert asset_fields.blake3_of(text, "hash") == HASH
    for text in ("", HASH, f"sha256:{HASH}", f"blake3:{HASH[1:]}", f"blake3:{HASH}0", f"blake3:{HASH[1:]}g"):
        with pytest.raises(MalformedRequest) as caught:
            asset_fields.blake3_of(text, "hash")
        assert caught.value.details == {"field": "hash"}


def test_content_types_are_media_types() -> None:
    for text in ("image/png", "image/svg+xml", "text/plain; charset=utf-8", "text/plain;charset=utf-8"):
        assert asset_fields.content_type(text) == text
    for text in (
        "",
        "image",
        "image/",
        "image/png\r\nX: y",
        "image/png ; \n",
        "image/png\r\n;a=b",
        "image/png\n;a=b",
        f"image/{'x' * CONTENT_TYPE}",
    ):
        with pytest.raises(MalformedRequest) as caught:
            asset_fields.content_type(text)
        assert caught.value.details == {"field": "content_type"}


def test_time_is_kept_within_its_bounds() -> None:
    assert asset_fields.keep_ms(60) == 60_000
    assert asset_fields.keep_ms_of("604800") == 604_800_000
    for seconds in (59, 604_801, -60, 0):
        with pytest.raises(MalformedRequest):
            asset_fields.keep_ms(seconds)
    for text in ("", "59", "604801", "60.0", "1e3", "-60", "٦٠٠", "6" * 5000, "60 "):
        with pytest.raises(MalformedRequest) as caught:
            asset_fields.keep_ms_of(text)
        assert caught.value.details == {"field": "expires_in"}
