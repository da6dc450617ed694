# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The unit file for systemd and its options."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.options import DEPLOY, assert_withdraws_at_16, parsed

UNIT = DEPLOY / "vllm-vtw.service"
MOST_EXPOSED = 40
"""Of 100. A service that hardens nothing has 96."""


def command() -> list[str]:
    """What the unit runs."""
    (line,) = re.findall("^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
    return shlex.split(line)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="Debian's package `systemd` has it")
def test_systemd_takes_the_unit(tmp_path):
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(command()[0], sys.executable))
    security = f"--threshold={MOST_EXPOSED}"
    for analysis in (["verify"], ["security", "--offline=true", "--no-pager", security]):
        done = subprocess.run(
            ["systemd-analyze", *analysis, unit], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_the_service_withdraws():
    program, *arguments, file = command()
    assert Path(program).name == "vllm"
    assert Path(file).name == "vllm-vtw.yaml"
    args = parsed(*arguments, str(DEPLOY / "vllm-vtw.yaml"))
    assert_withdraws_at_16(args.model_impl, args.additional_config)
    assert args.host == "127.0.0.1"
