# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The last token's attention, against attention written out head by head."""

from math import exp

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_vtw.rankings.last_token_attention import LastTokenAttention


@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_every_head_is_counted(tokens, kv_heads, queries_per_head, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(kv_heads * queries_per_head, 4, generator=generator)
    keys = torch.randn(tokens, kv_heads, 4, generator=generator)
    expected = [0.0] * tokens
    for head, vector in enumerate(query):
        of_head = keys[:, head // queries_per_head]
        weights = [exp(0.5 * float(vector @ key)) for key in of_head]
        expected = [total + weight / sum(weights) for total, weight in zip(expected, weights, strict=True)]
    assert LastTokenAttention().score(query, keys, 0.5).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_computed_in_float32(dtype):
    """In 16 bits, two keys that differ in a last place would get the same score."""
    keys = torch.tensor([[[1.0, 1.0]], [[1.0, 1 + 2**-7]]], dtype=dtype)
    scores = LastTokenAttention().score(torch.tensor([[1.0, 2**-4]], dtype=dtype), keys, 1.0)
    assert scores.dtype == torch.float32
    assert scores[0] < scores[1]
    assert float(scores.sum()) == pytest.approx(1.0)
