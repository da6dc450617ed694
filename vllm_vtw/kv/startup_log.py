# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What an engine logs at start-up about the withdrawal of visual tokens and the KV memory of an image."""

import logging
from collections.abc import Sequence

from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_vtw.capacity import TYPICAL_TEXT, LayerGroup, LayerGroups, best_partition, visual_tokens_held
from vllm_vtw.config import VTWConfig
from vllm_vtw.policy import BY_IMAGE, Policy, one_of
from vllm_vtw.startup.options import has_timestamps

logger = logging.getLogger("vllm.vtw")

WORTH_TELLING = 0.95
"""The largest share of its present memory that an image takes with a split over ranks that the log names."""


def log_startup(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, groups: LayerGroups, config: VTWConfig
) -> None:
    """Logs what is withdrawn, the KV-cache groups, and the KV memory of one image, also that in stock vLLM.

    It warns if the configuration saves little or no memory, and names a split of the layers over pipeline
    ranks that saves more.
    """
    policy, stages = config.policy, config.policy.stages
    budget = MultiModalBudget(vllm_config, MULTIMODAL_REGISTRY)
    largest = budget.mm_max_toks_per_item
    is_video = "video" in largest and "image" not in largest
    what, tokens = ("a video", largest["video"]) if is_video else ("an image", largest.get("image", 0))
    block_size = vllm_config.cache_config.block_size
    align_to = config.align_to(block_size)
    by_stage = visual_tokens_held(policy, 1, tokens, align_to)
    by_default = by_stage
    if policy.default_layer is not None:
        by_default = visual_tokens_held(policy, 1, tokens, align_to, policy.exit_stage(policy.default_layer))
    layer_token = kv_cache_config.kv_cache_groups[0].kv_cache_spec.page_size_bytes / block_size
    logger.info(
        "vtw: withdrawing %s of L = %d; KV cache groups: %s; "
        "%s of %d tokens takes %s %.2f MiB of KV cache, %.2f MiB in stock vLLM%s",
        _withdrawal(config),
        config.num_layers,
        " | ".join(
            " + ".join(_described(policy, group) for group in groups.groups if group.rank == rank)
            for rank in groups.ranks
        ),
        what,
        tokens,
        "about" if policy.gate is None else "at least",
        groups.layer_tokens(by_default) * layer_token / 2**20,
        groups.num_layers * tokens * layer_token / 2**20,
        ", on each rank" if vllm_config.parallel_config.tensor_parallel_size > 1 else "",
    )
    if stages and groups.saves_nothing(policy):
        logger.warning(
            "vtw: with these layers, requests take as much memory as in stock vLLM, or more: "
            "`vtw plan MODEL --layer K` shows how much memory other layers take"
        )
    elif stages and config.align and by_stage[-1] > tokens / 2:
        logger.warning(
            "vtw: with KV blocks of %d tokens, few of the %d tokens of %s are withdrawn, because only "
            'whole blocks are: use a smaller --block-size, or set "align": false',
            block_size,
            tokens,
            what,
        )
    elif stages and tokens:
        _warn_of_rounding(groups, by_stage, what, tokens, block_size)
    if stages and config.align and has_timestamps(vllm_config):
        logger.info(
            "vtw: of each frame of a video, which stands between timestamps, up to %d visual tokens stay, "
            'because only whole KV blocks are withdrawn: "align": false withdraws all of them',
            2 * (block_size - 1),
        )
    if stages and tokens and len(groups.ranks) > 1:
        _log_better_partition(groups, by_stage, policy)


def _warn_of_rounding(
    groups: LayerGroups, visual_held: Sequence[int], what: str, tokens: int, block_size: int
) -> None:
    """Warns if a typical request saves nothing because its tokens are rounded up to whole blocks."""
    held = [visual + TYPICAL_TEXT for visual in visual_held]
    taken = groups.blocks(held, block_size) * groups.width * len(groups.ranks)
    # In stock vLLM, every rank has as many blocks as the rank with the most layers.
    widest = max(sum(group.layers for group in groups.groups if group.rank == rank) for rank in groups.ranks)
    stock = -(-(tokens + TYPICAL_TEXT) // block_size) * widest * len(groups.ranks)
    if taken >= stock:
        logger.warning(
            "vtw: KV blocks of %d tokens are so large that a request of %s of %d tokens and %d text tokens "
            "takes %.2f times the memory that it takes in stock vLLM: use a smaller --block-size, if the "
            "backend has one, or compare layers with `vtw plan --block-size N`",
            block_size,
            what,
            tokens,
            TYPICAL_TEXT,
            taken / stock,
        )


def _log_better_partition(groups: LayerGroups, visual_held: Sequence[int], policy: Policy) -> None:
    """Names the split of the layers over pipeline ranks with which an image takes less memory."""
    request = [visual + TYPICAL_TEXT for visual in visual_held]
    layers = best_partition(policy, groups.num_layers, len(groups.ranks), request)
    better = LayerGroups.of(policy, groups.num_layers, layers)
    share = better.layer_tokens(visual_held) / groups.layer_tokens(visual_held)
    text = [1] * groups.num_stages
    if share < WORTH_TELLING:
        logger.info(
            "vtw: with VLLM_PP_LAYER_PARTITION=%s, an image takes %.2f of this memory and a text token %.2f; "
            "the rank with the most layers then takes the most time to decode",
            ",".join(str(len(of_rank)) for of_rank in layers),
            share,
            better.layer_tokens(text) / groups.layer_tokens(text),
        )


def _described(policy: Policy, group: LayerGroup) -> str:
    pages = f", {group.pages} pages a block" if group.pages > 1 else ""
    layers = "1 layer" if group.layers == 1 else f"{group.layers} layers"
    return f"{layers} ({_held(policy, group.stage)}{pages})"


def _withdrawal(config: VTWConfig) -> str:
    policy, num_layers = config.policy, config.num_layers
    stages = policy.stages
    default = num_layers if policy.default_layer is None else policy.default_layer
    if policy.ranking is not None:
        shares = ", ".join(f"{keep:g}" for keep in (*policy.offered_keeps, 1))
        chosen = f" (or {shares}, as requests choose)" if policy.offered_keeps else ""
        parts = [
            f"{stage.keep:.3g} of all{chosen if stage.keep else ''} stay from layer {stage.layer} on"
            for stage in stages
        ]
        whose = "each image's" if policy.ranking in BY_IMAGE else "a request's"
        return f"{whose} visual tokens by the ranking {policy.ranking!r}: {', '.join(parts)}"
    if policy.gate is not None:
        borders = ", ".join(str(stage.layer) for stage in stages)
        return f"every visual token at the layer that gates choose, one of {borders}"
    what = "whole blocks of visual tokens" if config.align else "every visual token"
    if policy.has_exits:
        offered = one_of(policy.offered_layers(num_layers))
        return f"{what} at the layer that a request chooses, one of {offered}, by default {default}"
    return f"{what} at layer K = {default}"


def _held(policy: Policy, stage: int) -> str:
    keep = policy.keeps[stage]
    if stage > 0 and policy.has_exits:
        return "all, or text"
    return {1.0: "all", 0.0: "text"}.get(keep, f"text and {keep:.3g} of the visual tokens")
