# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Which requests are refused, and what a refused prompt leaves in the processor's cache."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import PlaceholderRange
from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs

from vllm_vtw.config import ADMISSION, Admission
from vllm_vtw.models import request_check
from vllm_vtw.models.beam_search import REFUSED
from vllm_vtw.models.processor import marking_processor
from vllm_vtw.policy import Gate, Policy, Stage

STEP, LAYERS = 30, 8
RANKED, FIXED = Policy((Stage(2, 0.5),)), Policy((Stage(2, 0.0),))
GATED = Policy((Stage(2, 0.0), Stage(4, 0.0)), Gate("gates", "0", (0.0, 0.0)))
SHARES = Policy((Stage(2, 0.5),), ranked_by="uniform", offered_keeps=(0.25, 0.5))
SEVERAL = Policy((Stage(2, 0.0), Stage(4, 0.0)), tasks={"ocr": 8, "yes-no": 2})


def prompt(num_pictures: int, behind: int = 5) -> dict[str, Any]:
    """Ten tokens for each picture, five of text before and `behind` after them all."""
    places = [PlaceholderRange(5 + 10 * number, 10) for number in range(num_pictures)]
    return {
        "type": "multimodal",
        "prompt_token_ids": [0] * (5 + 10 * num_pictures + behind),
        "mm_placeholders": {"image": places} if places else {},
        "mm_hashes": {"image": [f"picture {number}" for number in range(num_pictures)]},
        # vLLM leaves out what the engine has.
        "mm_kwargs": {"image": [None if number == 1 else "pixels" for number in range(num_pictures)]},
    }


def check(policy: Policy, asked: Any, **extra_args: Any) -> set[str]:
    """What a request leaves in the processor's cache."""
    cached = {"picture 0", "picture 1", "picture 2", "another user's"}
    renderer = SimpleNamespace(mm_processor_cache=SimpleNamespace(invalidate=cached.remove))
    model_config = SimpleNamespace(**{ADMISSION: Admission(policy, LAYERS, 0, STEP)})
    processor: Any = SimpleNamespace(model_config=model_config, renderer=renderer)
    try:
        request_check.check(processor, asked, SamplingParams(extra_args=extra_args))
    except VLLMValidationError as error:
        error.add_note(str(sorted(cached)))
        raise
    return cached


@pytest.mark.parametrize("policy", [RANKED, GATED])
def test_a_prompt_that_is_too_long_for_one_step_is_refused(policy: Policy):
    assert len(check(policy, prompt(2))) == 4
    with pytest.raises(
        VLLMValidationError, match=r"has 35 tokens from its first image on.* a step has room for 30"
    ):
        check(policy, prompt(3))
    assert len(check(policy, prompt(3), vtw_layer=LAYERS)) == 4, "nothing is decided about it"


def test_a_prompt_that_keeps_everything_may_be_long():
    policy = replace(RANKED, offered_keeps=(0.5, 0.7))
    assert len(check(policy, prompt(3), vtw_keep=1)) == 4
    with pytest.raises(VLLMValidationError, match="from its first image on"):
        check(policy, prompt(3), vtw_keep=0.7)


def test_a_fixed_layer_takes_prompts_of_any_length():
    check(FIXED, prompt(6))


def test_a_refused_prompt_takes_back_what_it_added_and_nothing_else():
    with pytest.raises(VLLMValidationError, match="vtw_layer") as refused:
        check(SEVERAL, prompt(3), vtw_layer=3)
    assert refused.value.__notes__ == [str(["another user's", "picture 1"])]


@pytest.mark.parametrize("asked", [prompt(1), {"type": "token", "prompt_token_ids": [1]}, "a raw prompt"])
@pytest.mark.parametrize(
    ("policy", "choice", "why"),
    [
        (SEVERAL, {"vtw_layer": 3}, r"'vtw_layer' = 3: .*offers 2, 4, 8 \(nothing is withdrawn\)"),
        (SEVERAL, {"vtw_layer": "4"}, "'vtw_layer' = '4': has to be an integer; this server offers 2, 4, 8"),
        (SEVERAL, {"vtw_layer": 4.0}, "'vtw_layer' = 4.0: "),
        (SEVERAL, {"vtw_layer": True}, "'vtw_layer' = True: "),
        (SEVERAL, {"vtw_task": "poetry"}, "'vtw_task' = 'poetry': .*has ocr, yes-no"),
        (SEVERAL, {"vtw_task": ["ocr"]}, "'vtw_task' = "),
        (SEVERAL, {"vtw_task": "ocr", "vtw_layer": 8}, "send one of them"),
        (
            SEVERAL,
            {"vtw_layers": 2},
            "'vtw_layers': unknown; a request may have 'vtw_layer', 'vtw_task' or 'vtw_keep'",
        ),
        (
            FIXED,
            {"vtw_task": "ocr"},
            "'vtw_task' = 'ocr': this server's policy has no tasks: send 'vtw_layer'",
        ),
        (FIXED, {"vtw_layer": 4}, r"offers 2, 8 \(nothing is withdrawn\)"),
        (RANKED, {"vtw_layer": 2}, r"offers 8 \(nothing is withdrawn\)"),
        (GATED, {"vtw_layer": 3}, "offers 2, 4, 8"),
        (Policy(()), {"vtw_layer": 2}, "offers 8"),
        (
            SHARES,
            {"vtw_keep": 0.3},
            r"'vtw_keep' = 0.3: this server offers 0.25, 0.5, 1 \(no visual token leaves at layer 2\)",
        ),
        (SHARES, {"vtw_keep": "0.5"}, "'vtw_keep' = '0.5': has to be a number; this server offers"),
        (SHARES, {"vtw_keep": True}, "'vtw_keep' = True: has to be a number; this server offers"),
        (SHARES, {"vtw_keep": 0.5, "vtw_layer": 8}, "'vtw_layer' and 'vtw_keep' both choose"),
        (
            RANKED,
            {"vtw_keep": 0.5},
            "'vtw_keep' = 0.5: this server's policy offers no shares: send no 'vtw_keep'",
        ),
    ],
)
def test_what_is_not_offered_is_refused(policy: Policy, choice: dict[str, Any], why: str, asked: Any):
    with pytest.raises(VLLMValidationError, match=why):
        check(policy, asked, **choice)


@pytest.mark.parametrize("choice", [{"vtw_layer": 2}, {"vtw_layer": 8}, {"vtw_task": "ocr"}, {"other": 3}])
def test_what_is_offered_is_not_refused(choice: dict[str, Any]):
    check(SEVERAL, prompt(2), **choice)


@pytest.mark.parametrize("keep", [0.25, 0.5, 1, 1.0])
def test_shares_that_are_offered_are_not_refused(keep: float):
    check(SHARES, prompt(9), vtw_keep=keep)


def test_another_engine_of_the_process_checks_nothing():
    stock: Any = SimpleNamespace(model_config=SimpleNamespace())
    request_check.check(stock, prompt(9), SamplingParams(extra_args={"vtw_layer": 99}))


class Processor(BaseMultiModalProcessor):
    _get_mm_fields_config = _get_prompt_updates = lambda self, *args: None

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return inputs.mm_data_items


def processed(policy: Policy, asked: dict[str, Any]) -> dict[str, Any]:
    processor = object.__new__(marking_processor(Processor))
    model_config = SimpleNamespace(**{ADMISSION: Admission(policy, LAYERS, 0, STEP)})
    processor.info = SimpleNamespace(ctx=SimpleNamespace(model_config=model_config))
    items: Any = asked
    return processor.apply(ProcessorInputs("", items))


def test_beam_search_is_refused_where_a_longer_prompt_retains_other_tokens():
    assert REFUSED in processed(RANKED, prompt(1))
    assert REFUSED not in processed(RANKED, prompt(0))
    assert REFUSED not in processed(FIXED, prompt(1))
    assert REFUSED in processed(FIXED, prompt(1, behind=0))


@pytest.mark.parametrize(("chosen", "layer"), [({}, 4), ({"vtw_layer": 2}, 2), ({"vtw_task": "ocr"}, 8)])
def test_another_engine_has_to_have_withdrawn_at_the_same_layer(chosen: dict[str, Any], layer: int):
    told = {"do_remote_prefill": True, "vtw_layer": layer}
    check(SEVERAL, prompt(1), kv_transfer_params=told, **chosen)
    check(SEVERAL, prompt(1), kv_transfer_params={"do_remote_decode": True}, **chosen)
    other = told | {"vtw_layer": layer - 1}
    with pytest.raises(
        VLLMValidationError, match=rf"at layer {layer - 1}, and this .* leave at layer {layer}"
    ):
        check(SEVERAL, prompt(1), kv_transfer_params=other, **chosen)
    del told["vtw_layer"]
    with pytest.raises(VLLMValidationError, match="at no layer that is known"):
        check(SEVERAL, prompt(1), kv_transfer_params=told, **chosen)


def test_streaming_input_is_refused():
    async def pieces():
        yield prompt(1)

    with pytest.raises(VLLMValidationError, match="send the whole prompt at once"):
        check(FIXED, pieces())
