"""Which key of the configuration a failure names, where no server could be asked."""

import msgspec
import pytest

from comfyd.storage.s3_errors import Explainer, NotS3, Refusal, told

S3 = Explainer(storage="s3", bucket="pictures", endpoint=None, region="eu-west-1", secrets=("sesame",))
R2 = msgspec.structs.replace(S3, storage="r2", region="auto")


def test_an_address_that_is_made_from_a_setting_names_that_setting() -> None:
    error = S3.unreachable("s3", "cannot be reached")
    assert error.message == "s3: Amazon S3 in eu-west-1 cannot be reached; see storage.s3.region"
    error = R2.unreachable("r2", "cannot be reached")
    assert error.message == "r2: Cloudflare R2 cannot be reached; see storage.r2.account_id"


def test_r2_has_no_region_to_mend() -> None:
    refusal = Refusal(code="InvalidRegionName", said="", region=None)
    assert R2.refused("r2", refusal).details == {"key": "storage.r2.endpoint"}


@pytest.mark.parametrize("code", ["Odd", "AccessDenied", "InvalidArgument"])
def test_the_servers_own_words_stay_one_short_line_without_secrets(code: str) -> None:
    said = "the access key\r\nsesame " + "is odd " * 100
    message = S3.refused("s3", Refusal(code=code, said=said, region=None)).message
    assert "sesame" not in message
    assert "***" in message
    assert "\n" not in message
    assert len(message) < 350


def test_what_is_not_told_is_not_s3() -> None:
    assert told({"ETag": "x"}, "ETag") == "x"
    with pytest.raises(NotS3):
        told({}, "ETag")
