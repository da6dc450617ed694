# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Speculative decoding: which drafters are supported, and with what."""

from collections.abc import Iterator

from vllm.config import VllmConfig

DRAFTERS = ("eagle", "eagle3", "draft_model")
"""The methods with a model of their own that are supported."""


def drafter_layers(vllm_config: VllmConfig) -> int:
    """The number of layers of a drafter for speculative decoding, which have a KV cache of all tokens."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method not in DRAFTERS:
        return 0
    layers: int = speculative.draft_model_config.hf_text_config.num_hidden_layers
    return layers


def drafter_refusals(vllm_config: VllmConfig) -> Iterator[str]:
    """The reasons that lie in speculative decoding."""
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    if speculative.use_ngram():
        return
    if speculative.method not in DRAFTERS:
        methods = ", ".join(("ngram", *DRAFTERS))
        yield (
            f"speculative decoding with method {speculative.method!r}: use one of {methods}, or remove "
            "--speculative-config"
        )
        return
    if parallel.pipeline_parallel_size > 1:
        yield (
            f"pipeline ranks do not share the blocks of a drafter with method {speculative.method!r}: use "
            '--tensor-parallel-size, not --pipeline-parallel-size, or "method": "ngram"'
        )
    draft, model = speculative.draft_model_config, vllm_config.model_config
    cache_dtype = vllm_config.cache_config.cache_dtype
    shapes = [
        (one.get_num_kv_heads(ranks), one.get_head_size(), one.dtype, in_cache, one.get_sliding_window())
        for one, ranks, in_cache in (
            (draft, speculative.draft_parallel_config, speculative.kv_cache_dtype or cache_dtype),
            (model, parallel, cache_dtype),
        )
    ]
    if speculative.parallel_drafting:
        yield "parallel drafting is untested: remove parallel_drafting from --speculative-config"
    if shapes[0] != shapes[1]:
        described = [
            f"{heads} heads of {size} in {dtype}, --kv-cache-dtype {in_cache}, sliding window {window}"
            for heads, size, dtype, in_cache, window in shapes
        ]
        yield (
            f"the drafter's keys and values have another shape ({described[0]}) than the model's "
            f'({described[1]}), and would not fit in its KV blocks: use another drafter, or "method": "ngram"'
        )
