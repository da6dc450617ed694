# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The command that draws the dashboard, from metrics of a real server through a real Prometheus."""

import shutil

import pytest
from PIL import Image

from tools import dashboard_picture
from tools.dashboard import panels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Debian's package `prometheus` has it"),
]


def test_every_panel_has_data(tmp_path, capsys):
    file = tmp_path / "dashboard.png"
    dashboard_picture.main(["--seconds=40", f"--out={file}"])
    assert f"{len(panels())} panels" in capsys.readouterr().out
    assert file.stat().st_size < 200_000
    with Image.open(file) as picture:
        assert picture.width == 1200
