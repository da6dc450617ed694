# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What an engine logs at start-up about the withdrawal of visual tokens and the KV memory of an image."""

import logging

from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_vtw.capacity import LayerGroup, LayerGroups, visual_tokens_held
from vllm_vtw.config import VTWConfig
from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.policy import Policy

logger = logging.getLogger("vllm.vtw")


def log_startup(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: VTWConfig) -> None:
    """Logs what is withdrawn, the KV-cache groups, and the KV memory of one image, also that in stock vLLM.

    It warns if the configuration saves little or no memory.
    """
    num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    stages = config.policy.stages
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    groups = LayerGroups(
        tuple(
            LayerGroup(spec.stage, len(group.layer_names), spec.pages)
            if isinstance(spec, StageSpec)
            else LayerGroup(0, len(group.layer_names), 1)
            for spec, group in zip(specs, kv_cache_config.kv_cache_groups, strict=True)
        )
    )
    budget = MultiModalBudget(vllm_config, MULTIMODAL_REGISTRY)
    tokens = budget.mm_max_toks_per_item.get("image", 0)
    block_size = vllm_config.cache_config.block_size
    by_stage = visual_tokens_held(config.policy, 1, tokens, config.align_to(block_size))
    held = groups.layer_tokens(by_stage)
    bytes_per_token = specs[0].page_size_bytes / block_size
    logger.info(
        "vtw: withdrawing %s of L = %d; KV cache groups%s: %s; "
        "an image of %d tokens takes %s %.2f MiB of KV cache, %.2f MiB in stock vLLM%s",
        _withdrawal(config, num_layers),
        num_layers,
        " of the first pipeline rank" if vllm_config.parallel_config.pipeline_parallel_size > 1 else "",
        " + ".join(
            f"{group.layers} layers ({_held(config.policy, group.stage)})" for group in groups.groups
        ),
        tokens,
        "about" if config.policy.gate is None else "at least",
        held * bytes_per_token / 2**20,
        sum(group.layers for group in groups.groups) * tokens * bytes_per_token / 2**20,
        ", on each rank" if vllm_config.parallel_config.tensor_parallel_size > 1 else "",
    )
    if stages and groups.takes_more_than_stock(config.policy):
        logger.warning(
            "vtw: with these layers, padding of KV cache groups takes more memory than withdrawal saves: "
            "`vtw plan MODEL --layer K` shows how much memory other layers take"
        )
    if stages and config.align and by_stage[-1] > tokens / 2:
        logger.warning(
            "vtw: with KV blocks of %d tokens, few of the %d tokens of an image are withdrawn, because only "
            'whole blocks are: use a smaller --block-size, or set "align": false',
            block_size,
            tokens,
        )


def _withdrawal(config: VTWConfig, num_layers: int) -> str:
    stages = config.policy.stages
    if config.policy.ranking is not None:
        parts = (f"{stage.keep:.3g} of all stay from layer {stage.layer} on" for stage in stages)
        return f"the visual tokens that a prompt's last token attends to least: {', '.join(parts)}"
    if config.policy.gate is not None:
        borders = ", ".join(str(stage.layer) for stage in stages)
        return f"every visual token at the layer that gates choose, one of {borders}"
    what = "whole blocks of visual tokens" if config.align else "every visual token"
    return f"{what} at layer K = {stages[0].layer if stages else num_layers}"


def _held(policy: Policy, stage: int) -> str:
    keep = policy.keeps[stage]
    if stage > 0 and policy.gate is not None:
        return "all, or text"
    return {1.0: "all", 0.0: "text"}.get(keep, f"text and {keep:.3g} of the visual tokens")
