"""The comparison with the official proxy, run briefly."""

import pytest

from tests.sdk.versus_proxy import main


@pytest.mark.comfyui  # with what needs an installation of its own, which is made on first use
@pytest.mark.timeout(400)
def test_comfyd_loses_nothing_beside_the_proxy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--jobs", "10", "--watchers", "20"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["comfyd", "comfy-api-proxy"]
    assert [row[-2] for row in rows if row[0] == "right"] == ["10", "10"]
    assert [row[-2] for row in rows if row[0] == "served"] == ["20"]
