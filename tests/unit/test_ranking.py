"""Which tokens stay, against sorting; and keys out of caches of any order."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_vtw.retention import Question, Retention
from vllm_vtw.worker.ranking import RankedPrompt, chosen, key_order

TOKENS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5]), st.booleans()), min_size=1, max_size=12)


@given(TOKENS, st.data())
def test_the_most_attended_to_stay_and_the_first_where_it_ties(tokens, data):
    attention = torch.tensor([got for got, _ in tokens])
    is_candidate = torch.tensor([may_leave for _, may_leave in tokens])
    candidates = [at for at, (_, may_leave) in enumerate(tokens) if may_leave]
    kept = data.draw(st.integers(0, len(candidates)))
    best = sorted(candidates, key=lambda at: (-tokens[at][0], at))[:kept]
    expected = sorted({*range(len(tokens))} - set(candidates) | set(best))
    assert chosen(attention, is_candidate, len(tokens) - len(candidates) + kept).tolist() == expected


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
    question = Question(6, 24, ((6, 12), (14, 20)), 20, False)
    retentions = (Retention([(6, 12)], 6, question), Retention([(6, 12), (14, 18)], 6, question))
    first = RankedPrompt.of(retentions, 1, 3, 4, before=slice(10, 30), kept=slice(10, 24))
    assert (first.num_cached, first.num_prompt, first.last, first.keeps_some) == (4, 24, 29, True)
    second = RankedPrompt.of(retentions, 2, 3, 4, before=slice(10, 24), kept=slice(10, 20))
    assert (second.num_cached, second.num_prompt, second.last, second.keeps_some) == (4, 18, 23, True)
    none = RankedPrompt.of(
        (Retention([(6, 12), (14, 20)], 6, question),), 1, 0, 0, slice(0, 24), slice(0, 12)
    )
    assert not none.keeps_some
