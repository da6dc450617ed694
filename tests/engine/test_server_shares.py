# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vllm serve` with a ranking by features, whose requests choose how much of their images stays."""

import json
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from benchmarks.server import serving
from tests.engine.engines import MODEL, A, Ask, B
from tests.engine.test_image_rankings import assert_selected, policy
from tests.engine.test_server import OPTIONS, chat, samples


def test_requests_choose_a_share(checkpoint, reference, tmp_path):
    oracle = reference(checkpoint(MODEL))
    content = policy({0: 0.5, 5: 0.0}, "diversity")["policy"] | {"keeps": [0.1, 0.25]}
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(content))
    options = f"--additional-config={json.dumps({'vtw': {'policy': str(file)}})}"
    with serving(checkpoint(MODEL), *OPTIONS, options) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        for keep in (None, 0.1, 0.25, 1):
            body: dict[str, Any] = {"vllm_xargs": {} if keep is None else {"vtw_keep": keep}}
            answer = chat(client, A, extra_body=body)
            schedule = {0: keep or 0.5, 5: 0.0}
            assert_selected(oracle, Ask("", "", (A,)), Answer(answer), schedule, "diversity", [])
        for wrong, why in (
            (
                {"vtw_keep": 0.2},
                r"'vtw_keep' = 0.2: this server offers 0.1, 0.25, 0.5, 1 \(no visual",
            ),
            ({"vtw_keep": 0.1, "vtw_layer": MODEL.layers}, "both choose what is withdrawn"),
        ):
            with pytest.raises(BadRequestError, match=why):
                chat(client, B, extra_body={"vllm_xargs": wrong})
        assert chat(client, B).choices[0].token_ids, "the picture of the refused request is missing"
        counted = {
            sample.labels["layer"]: sample.value
            for sample in samples(server)
            if sample.name == "vllm:vtw_requests_total"
        }
        # Of the request that keeps everything before layer 5, the first tokens leave there.
        assert counted == {"0": 4, "5": 1}


class Answer:
    """A chat's answer with the names that vLLM's offline API has for its parts."""

    def __init__(self, answer: Any) -> None:
        self.prompt_token_ids = answer.prompt_token_ids
        self.outputs = answer.choices
