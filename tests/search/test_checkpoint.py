# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Names of models that are not there: one line, which says what was looked for and what to do."""

from unittest.mock import patch

import pytest
from transformers import AutoConfig

from tests.search.command import vtw

TO_DO = "give a folder with a config.json, or the name of a model on the Hub"


def reason(err: str) -> str:
    """The last line, which has to have all that was said behind the usage."""
    _, _, said = err.partition("error: ")
    assert said.count("\n") == 1, err
    return said


@pytest.mark.parametrize("command", ["plan", "calibrate"])
@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model"])
def test_an_unknown_name_is_one_line(tmp_path, data, command, name):
    more = [f"--data={data}", f"--out={tmp_path}"] if command == "calibrate" else []
    ended = vtw(command, name, *more)
    assert (ended.status, ended.out) == (2, "")
    said = reason(ended.err)
    assert f"cannot read a model configuration from {name!r}: there is no such folder" in said
    assert "as HF_HUB_OFFLINE=1 is set" in said
    assert TO_DO in said


def test_without_a_network_it_is_said_that_the_hub_was_not_reached(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    of_transformers = OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your connection.")
    with patch.object(AutoConfig, "from_pretrained", side_effect=of_transformers):
        said = reason(vtw("plan", "nobody/no-such-model").err)
    assert (
        "it was not found on the Hugging Face Hub (We couldn't connect to 'https://huggingface.co'): " in said
    )
    assert "HF_HUB_OFFLINE" not in said
    assert TO_DO in said


def test_folders_without_a_good_configuration_are_told(tmp_path):
    for content, why in ((None, "the folder has no config.json"), ("{", "OSError: It looks like the config")):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        said = reason(vtw("plan", str(tmp_path)).err)
        assert f"cannot read a model configuration from {str(tmp_path)!r}: {why}" in said
    assert "no such file or folder" in reason(vtw("plan", str(tmp_path / "nowhere")).err)
