# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What a refused prompt leaves in the processor's cache, which the engine is taken to have as well."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.multimodal.inputs import PlaceholderRange
from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs

from vllm_vtw.config import ADMISSION, Admission
from vllm_vtw.models.admission import admission_processor
from vllm_vtw.models.beam_search import REFUSED
from vllm_vtw.policy import Policy, Stage

STEP = 30


class Cache:
    """As vLLM's in the API process: what it holds is not sent to the engine again."""

    def __init__(self) -> None:
        self.held: set[str] = set()

    def get_and_update_item(self, item: Any, item_hash: str) -> None:
        assert item is not None or item_hash in self.held
        self.held.add(item_hash)

    def invalidate(self, item_hash: str) -> None:
        self.held.discard(item_hash)


class Processor(BaseMultiModalProcessor):
    """Ten tokens for each picture, five of text before and behind them all."""

    _get_mm_fields_config = _get_prompt_updates = lambda self, *args: None

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        hashes = inputs.mm_data_items
        for one in hashes:
            inputs.cache.get_and_update_item(None if one in inputs.cache.held else "pixels", one)
        places = [PlaceholderRange(5 + 10 * number, 10) for number in range(len(hashes))]
        behind = 0 if inputs.prompt == "ends in a picture" else 5
        length = 5 + 10 * len(hashes) + behind
        return {"prompt_token_ids": [0] * length, "mm_placeholders": {"image": places} if places else {}}


def processed(cache: Cache, policy: Policy, *pictures: str, prompt: str = "text") -> dict[str, Any]:
    processor = object.__new__(admission_processor(Processor))
    model_config = SimpleNamespace(**{ADMISSION: Admission(policy, 0, STEP)})
    processor.info = SimpleNamespace(ctx=SimpleNamespace(model_config=model_config))
    items: Any = pictures
    return processor.apply(ProcessorInputs(prompt, items, cache=cache))


RANKED, FIXED = Policy((Stage(2, 0.5),)), Policy((Stage(2, 0.0),))


def test_a_refused_prompt_takes_back_what_it_added_and_nothing_else():
    cache = Cache()
    processed(cache, RANKED, "another user's")
    with pytest.raises(ValueError, match=r"has 35 tokens from its first image on.* a step has room for 30"):
        processed(cache, RANKED, "another user's", "new", "newer")
    assert cache.held == {"another user's"}
    processed(cache, RANKED, "another user's", "new")
    assert cache.held == {"another user's", "new"}


def test_a_fixed_layer_takes_prompts_of_any_length():
    assert len(processed(Cache(), FIXED, *"abcdef")["prompt_token_ids"]) == 70


def test_beam_search_is_refused_where_a_longer_prompt_retains_other_tokens():
    assert REFUSED in processed(Cache(), RANKED, "a")
    assert REFUSED not in processed(Cache(), RANKED)
    assert REFUSED not in processed(Cache(), FIXED, "a")
    assert REFUSED in processed(Cache(), FIXED, "a", prompt="ends in a picture")
