# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Which tokens stay, against sorting; and keys out of caches of any order."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_vtw.retention import OneStepPrefill, Retention
from vllm_vtw.worker.ranking import RankedPrompt, RankedPrompts, key_order

TOKENS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5]), st.booleans()), min_size=1, max_size=12)
CPU = torch.device("cpu")


@given(st.lists(TOKENS, min_size=1, max_size=4), st.booleans(), st.data())
def test_the_most_attended_to_stay_and_the_first_where_it_ties(prompts, all_before, data):
    """Prompts one behind the other, of which a stage before has computed all tokens, or every second."""
    before = kept = 0
    made, expected = [], []
    for row, tokens in enumerate(prompts):
        candidates = [at for at, (_, may_leave) in enumerate(tokens) if may_leave]
        count = data.draw(st.integers(0, len(candidates)))
        best = [at for _, at in sorted((-tokens[at][0], at) for at in candidates)][:count]
        staying = sorted({*range(len(tokens))} - set(candidates) | set(best))
        expected += [before + at for at in staying]
        spans = slice(before, before + len(tokens)), slice(kept, kept + len(staying))
        made.append(RankedPrompt(row, *spans, num_cached=0, num_prompt=len(tokens), keeps_some=count > 0))
        before, kept = before + len(tokens), kept + len(staying)
    ranked = RankedPrompts(made, CPU)
    attention = torch.full((len(prompts), ranked.longest), torch.nan)
    for row, tokens in zip(attention, prompts, strict=True):
        row[: len(tokens)] = torch.tensor([got for got, _ in tokens])
    mask = torch.tensor([may_leave for tokens in prompts for _, may_leave in tokens])
    kept_before = None if all_before else 2 * torch.arange(before)
    in_batch = mask if all_before else mask.repeat_interleave(2)
    assert ranked.select(attention, kept_before, in_batch).tolist() == expected
    assert ranked.targets.tolist() == list(range(kept))


def test_tokens_behind_cached_text_and_behind_the_prompt():
    """Two cached tokens; then a prompt's picture and last token; then a token that was generated before."""
    prompt = RankedPrompt(0, slice(0, 5), slice(0, 4), num_cached=2, num_prompt=6, keeps_some=True)
    ranked = RankedPrompts([prompt], CPU)
    attention = torch.tensor([[0.9, 0.9, 0.1, 0.3, 0.2, 0.8]])
    is_candidate = torch.tensor([True, True, True, False, False])
    assert ranked.select(attention, None, is_candidate).tolist() == [1, 2, 3, 4]
    none_stays = RankedPrompts([replace(prompt, kept=slice(0, 2), keeps_some=False)], CPU)
    assert none_stays.select(None, None, is_candidate).tolist() == [3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shuffled", [False, True])
def test_keys_are_found_wherever_a_backend_puts_them(dtype, shuffled):
    heads, block_size, head_size = 3, 32, 80
    size = block_size * head_size
    own = torch.randperm(size, generator=torch.Generator().manual_seed(0))

    def update(layer, key, value, kv_cache, slots):
        """As vLLM's backends: a key beside its value, or all keys first, in an order of the kernels' own."""
        for slot, keys, values in zip(slots.tolist(), key, value, strict=True):
            block, at = divmod(slot, block_size)
            if shuffled:
                for head in range(heads):
                    places = own.view(block_size, head_size)[at]
                    kv_cache[block, head].view(-1)[places] = keys[head]
                    kv_cache[block, head].view(-1)[size + places] = values[head]
            else:
                kv_cache[block, :, at] = torch.cat([keys, values], -1)

    cache = torch.zeros(4, heads, block_size, 2 * head_size, dtype=dtype)
    keys = torch.randn(4 * block_size, heads, head_size, dtype=dtype)
    update(None, keys, torch.randn_like(keys), cache, torch.arange(4 * block_size))
    layer = torch.nn.Module()
    order = key_order(SimpleNamespace(do_kv_cache_update=update), layer, cache)
    found = cache.flatten(2)[:, :, order].transpose(1, 2).flatten(0, 1)
    assert found.equal(keys)


def test_where_a_prompt_ends_among_the_tokens_of_a_stage():
    """Twenty tokens behind four that are cached; six of the twelve visual ones left before."""
    one_step = OneStepPrefill(6, 24, ((6, 12), (14, 20)), 20, False)
    retentions = (Retention([(6, 12)], 6, one_step), Retention([(6, 12), (14, 18)], 6, one_step))
    first = RankedPrompt.of(retentions, 1, 3, 4, before=slice(10, 30), kept=slice(10, 24))
    assert (first.num_cached, first.num_prompt, first.last, first.keeps_some) == (4, 24, 29, True)
    second = RankedPrompt.of(retentions, 2, 3, 4, before=slice(10, 24), kept=slice(10, 20))
    assert (second.num_cached, second.num_prompt, second.last, second.keeps_some) == (4, 18, 23, True)
    none = RankedPrompt.of(
        (Retention([(6, 12), (14, 20)], 6, one_step),), 1, 0, 0, slice(0, 24), slice(0, 12)
    )
    assert not none.keeps_some
