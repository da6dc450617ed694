"""What an engine's KV cache means to a request with an image, in one line at start-up."""

import logging

from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_vtw.capacity import withdrawn_of_image
from vllm_vtw.config import VTWConfig
from vllm_vtw.kv.spec import StageSpec

logger = logging.getLogger("vllm.vtw")


def log_startup(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: VTWConfig) -> None:
    """Logs K, L, the KV-cache groups, and the KV memory of one image beside stock vLLM's."""
    num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    stages = config.policy.stages
    groups = [
        (len(group.layer_names), isinstance(group.kv_cache_spec, StageSpec))
        for group in kv_cache_config.kv_cache_groups
    ]
    budget = MultiModalBudget(vllm_config, MULTIMODAL_REGISTRY)
    tokens = budget.mm_max_toks_per_item.get("image", 0)
    block_size = vllm_config.cache_config.block_size
    withdrawn = withdrawn_of_image(tokens, config.align_to(block_size))
    # Every group takes the memory of the largest.
    group_layers = max(layers for layers, _ in groups)
    held = sum(group_layers * (tokens - withdrawn if is_stage else tokens) for _, is_stage in groups)
    in_stock = sum(layers for layers, _ in groups) * tokens
    bytes_per_token = kv_cache_config.kv_cache_groups[0].kv_cache_spec.page_size_bytes / block_size
    logger.info(
        "vtw: withdrawing %s at layer K = %d of L = %d; KV cache groups%s: %s; "
        "an image of %d tokens takes about %.2f MiB of KV cache, %.2f MiB in stock vLLM%s",
        "whole blocks of visual tokens" if config.align else "every visual token",
        stages[0].layer if stages else num_layers,
        num_layers,
        " of the first pipeline rank" if vllm_config.parallel_config.pipeline_parallel_size > 1 else "",
        " + ".join(f"{layers} layers ({'text' if is_stage else 'all'})" for layers, is_stage in groups),
        tokens,
        held * bytes_per_token / 2**20,
        in_stock * bytes_per_token / 2**20,
        ", on each rank" if vllm_config.parallel_config.tensor_parallel_size > 1 else "",
    )
    if held > in_stock:
        logger.warning(
            "vtw: at this layer, padding of KV cache groups takes more memory than withdrawal saves: "
            "`vtw plan MODEL --layer K` shows what others take"
        )
    if stages and config.align and withdrawn < tokens / 2:
        logger.warning(
            "vtw: blocks of %d tokens leave little of an image of %d tokens to withdraw by whole blocks: "
            'take a smaller --block-size, or set "align": false',
            block_size,
            tokens,
        )
