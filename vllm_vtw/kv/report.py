"""What an engine's KV cache means to a request with an image, in one line at start-up."""

from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_vtw.config import VTWConfig
from vllm_vtw.kv.spec import StageSpec


def startup_line(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: VTWConfig) -> str:
    """K, L, the KV-cache groups, and the KV memory of one image beside stock vLLM's."""
    num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    stages = config.policy.stages
    layer = stages[0].layer if stages else num_layers
    groups = kv_cache_config.kv_cache_groups
    shape = " + ".join(
        f"{len(group.layer_names)} layers ({'text' if isinstance(group.kv_cache_spec, StageSpec) else 'all'})"
        for group in groups
    )
    budget = MultiModalBudget(vllm_config, MULTIMODAL_REGISTRY)
    tokens = budget.mm_max_toks_per_item.get("image", 0)
    block_size = vllm_config.cache_config.block_size
    # With `align`, an image keeps what its first and last block share with other tokens.
    whole_blocks = max(0, (tokens - block_size + 1) // block_size)
    kept = tokens - whole_blocks * block_size if config.align else 0
    group_layers = max(len(group.layer_names) for group in groups)
    layer_tokens = sum(
        group_layers * (kept if isinstance(group.kv_cache_spec, StageSpec) else tokens) for group in groups
    )
    bytes_per_token = groups[0].kv_cache_spec.page_size_bytes / block_size
    ours, stock = (count * bytes_per_token / 2**20 for count in (layer_tokens, num_layers * tokens))
    mode = "whole blocks of visual tokens" if config.align else "every visual token"
    return (
        f"vtw: withdrawing {mode} at layer K = {layer} of L = {num_layers}; KV cache groups: {shape}; "
        f"an image of {tokens} tokens takes at most {ours:.2f} MiB of KV cache, {stock:.2f} MiB in stock vLLM"
    )
