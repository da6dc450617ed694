# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Ranked stages: a ranking chooses which visual tokens go on into a stage.

The attention of the layer before the stage ranks them, or the decoder does by their states. This overwrites
the indices of `StageStep.kept` and `StageStep.gather`. How many tokens stay is known earlier, so attention
metadata are complete before it is known which tokens they are for, and the host never waits for the device.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionImpl

from vllm_vtw.rankings import AttentionRanking
from vllm_vtw.retention import Retention

KEY_DTYPES = ("auto", "float32", "bfloat16", "float16")
DIGIT = 64  # of numbers in a type that represents only a few of them exactly


@dataclass(frozen=True)
class RankedPrompt:
    """A prompt of the batch that ranks its visual tokens for one stage.

    "Before" is the stage before, whose last layer computes the ranking.

    Attributes:
        row: The prompt's row in the batch.
        before: Where its tokens lie among those that the stage before computes in this step.
        kept: Where its tokens lie among those that the stage computes.
        num_cached: Tokens of it that the stage before holds from earlier steps. They are text.
        num_prompt: Tokens of it that the stage before holds altogether.
        keeps_some: Whether any of the ranked tokens stays. If none does, nothing has to be ranked.
    """

    row: int
    before: slice
    kept: slice
    num_cached: int
    num_prompt: int
    keeps_some: bool

    @classmethod
    def of(
        cls,
        retentions: Sequence[Retention],
        stage: int,
        row: int,
        num_computed: int,
        before: slice,
        kept: slice,
    ) -> "RankedPrompt":
        """The prompt of a request at the border of `stage`.

        Args:
            retentions: The request's retention in every stage past the first.
            stage: 1 or deeper.
            row: As in the attributes.
            num_computed: Tokens of the request that earlier steps computed.
            before: As in the attributes.
            kept: As in the attributes.
        """
        one_step = retentions[stage - 1].one_step
        assert one_step is not None
        held = retentions[stage - 2].count if stage > 1 else int
        return cls(
            row,
            before,
            kept,
            num_cached=held(num_computed),
            num_prompt=held(one_step.stop),
            keeps_some=retentions[stage - 1].num_withdrawn < one_step.visual_tokens,
        )

    @property
    def last(self) -> int:
        """Index of the prompt's last token among the tokens of the stage before."""
        return self.before.start + self.num_prompt - 1 - self.num_cached


class RankedPrompts:
    """All prompts that rank their visual tokens for one stage in this step.

    Tensors have one row for each prompt and are as wide as the longest prompt needs.

    Args:
        prompts: One or more prompts.
        device: Where the model runs.

    Attributes:
        prompts: The prompts.
        longest: The largest `num_prompt`.
        targets: Indices among the stage's tokens of all tokens of these prompts, shape `(selected,)`.
    """

    def __init__(self, prompts: Sequence[RankedPrompt], device: torch.device) -> None:
        self.prompts = tuple(prompts)
        self.longest = max(prompt.num_prompt for prompt in prompts)
        starts = [prompt.before.start for prompt in prompts]
        lengths = [prompt.before.stop - prompt.before.start for prompt in prompts]
        counts = [prompt.kept.stop - prompt.kept.start for prompt in prompts]
        cached = [prompt.num_cached for prompt in prompts]
        width = max(lengths)
        numbers = async_tensor_h2d(np.array([starts, lengths, counts, cached]), device)
        self._starts, self._lengths, self._counts, self._cached = numbers[..., None]
        self._places = torch.arange(width, device=device)
        # Where the selected tokens stand in the rows, and which of the stage's tokens they become.
        sources = [row * width + np.arange(count) for row, count in enumerate(counts)]
        targets = [np.arange(prompt.kept.start, prompt.kept.stop) for prompt in prompts]
        moves = async_tensor_h2d(np.array([np.concatenate(sources), np.concatenate(targets)]), device)
        self._sources, self.targets = moves

    def select(
        self, scores: torch.Tensor | None, kept_before: torch.Tensor | None, is_candidate: torch.Tensor
    ) -> torch.Tensor:
        """Selects the tokens that stay.

        Args:
            scores: The score of every prompt token, shape `(prompts, longest)`, float32. None if every
                candidate of every prompt leaves.
            kept_before: Indices in the batch of the tokens of the stage before. None if it computes all.
            is_candidate: Whether each token of the batch is a ranked visual token, shape `(tokens,)`.

        Returns:
            Indices among the tokens of the stage before, in the order of `targets`, shape `(selected,)`.
        """
        exists = self._places < self._lengths
        before = torch.where(exists, self._starts + self._places, self._starts)
        in_batch = before if kept_before is None else kept_before[before]
        if scores is None:
            of_tokens = torch.zeros_like(before, dtype=torch.float32)
        else:
            of_tokens = scores.gather(1, (self._cached + self._places).clamp(max=self.longest - 1))
        order = ranking_order(of_tokens, is_candidate[in_batch], exists)
        selected = torch.where(self._places < self._counts, order, len(self._places)).sort(1).values
        return (self._starts + selected).flatten()[self._sources]


def ranking_order(scores: torch.Tensor, is_candidate: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Orders the tokens of each row: first those that stay anyway, then candidates by score, then padding.

    Candidates with the same score keep their order.

    Args:
        scores: Shape `(prompts, tokens)`, float32.
        is_candidate: Whether a token may leave, same shape.
        exists: False for padding, same shape.

    Returns:
        Indices into each row, same shape.
    """
    worth = torch.where(is_candidate, scores.nan_to_num(), torch.inf)
    worth = torch.where(exists, worth, -torch.inf)
    return worth.sort(dim=1, descending=True, stable=True).indices


def scores_of(
    ranking: AttentionRanking,
    prompts: RankedPrompts,
    query: torch.Tensor,
    keys_of: Callable[[RankedPrompt], torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """The scores of each prompt's tokens, over the heads of all tensor-parallel ranks.

    Args:
        ranking: What the prompts are ranked by.
        prompts: The prompts.
        query: Queries of the step's tokens, shape `(tokens, heads, head_size)`.
        keys_of: Returns the keys of a prompt's tokens, shape `(num_prompt, kv_heads, head_size)`.
        scale: As `AttentionRanking.score` takes it.

    Returns:
        Shape `(prompts, longest)`, float32.
    """
    scores = query.new_zeros((len(prompts.prompts), prompts.longest), dtype=torch.float32)
    # One prompt at a time: padded to the longest prompt, the keys of all prompts would take gigabytes.
    for row, prompt in zip(scores, prompts.prompts, strict=True):
        if prompt.keeps_some:
            row[: prompt.num_prompt] = ranking.score(query[prompt.last], keys_of(prompt), scale)
    # Every rank adds up in the same order. A difference in the last bit could select another token.
    return get_tp_group().all_gather(scores[None], dim=0).sum(0)


def scores_by_state(prompts: RankedPrompts, scores: torch.Tensor) -> torch.Tensor:
    """The scores of each prompt's tokens, given those of the tokens of a stage.

    Args:
        prompts: The prompts.
        scores: Of the tokens that the stage before computes in this step, shape `(tokens,)`.

    Returns:
        Shape `(prompts, longest)`, float32. Tokens of earlier steps, which are text, have zeros.
    """
    by_prompt = scores.new_zeros((len(prompts.prompts), prompts.longest))
    for row, prompt in zip(by_prompt, prompts.prompts, strict=True):
        computed = prompt.num_prompt - prompt.num_cached
        row[prompt.num_cached : prompt.num_prompt] = scores[prompt.before.start :][:computed]
    return by_prompt


def key_order(impl: Any, layer: torch.nn.Module, kv_cache: torch.Tensor) -> torch.Tensor:
    """Where the keys of one head lie in its part of a KV block, shape `(block_size, head_size)`.

    vLLM's CPU kernels pack keys in an order that depends on the instruction set. This function finds any
    order: it stores keys whose numbers count up from 1, and looks where the numbers are.

    It is needed for one case, a ranked prompt whose leading text was computed by an earlier step or request.
    Computing that text again would need no keys from the cache, but with 928 cached tokens before an image of
    576, prompts then took 3.7 to 3.9 times as long on the CPU.

    Args:
        impl: The layer's attention implementation.
        layer: The attention layer.
        kv_cache: The layer's KV cache, shape `(blocks, kv_heads, block_size, 2 * head_size)`.
    """
    _, heads, block_size, width = kv_cache.shape
    device, size = kv_cache.device, block_size * width // 2
    numbers = torch.arange(1, size + 1, device=device)  # 0 is what is not written
    found = torch.zeros(2 * size, dtype=torch.int64, device=device)
    slots = torch.arange(block_size, device=device)
    place = 1
    while place <= size:
        digits = (numbers // place % DIGIT).view(block_size, 1, width // 2).to(kv_cache.dtype)
        keys = digits.expand(-1, heads, -1).contiguous()
        block = torch.zeros_like(kv_cache[:1])
        impl.do_kv_cache_update(layer, keys, torch.zeros_like(keys), block, slots)
        found += block[0, 0].flatten().long() * place
        place *= DIGIT
    order = torch.empty(size, dtype=torch.int64, device=device)
    written = found.nonzero()[:, 0]
    order[found[written] - 1] = written
    return order.view(block_size, width // 2)


@functools.cache
def ranking_impl(impl: Any) -> type[AttentionImpl]:
    """Subclasses an attention implementation so that it also ranks tokens for the stage that follows."""

    class RankingImpl(impl):
        step: Any
        stage: int
        ranking: AttentionRanking
        order: torch.Tensor | None

        def forward(
            self,
            layer: torch.nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            *args: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            stage = self.step.stages[self.stage - 1]
            if stage is not None and stage.ranked is not None and attn_metadata is not None:
                scores = None
                if any(prompt.keeps_some for prompt in stage.ranked.prompts):

                    def keys_of(prompt: RankedPrompt) -> torch.Tensor:
                        start = prompt.before.start
                        computed = key[start : start + prompt.num_prompt - prompt.num_cached]
                        if prompt.num_cached == 0:
                            return computed
                        cached = self._cached_keys(prompt, layer, kv_cache, attn_metadata)
                        return torch.cat([cached, computed])

                    scores = scores_of(self.ranking, stage.ranked, query, keys_of, self.scale)
                stage.apply_ranking(scores)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)

        def _cached_keys(
            self, prompt: RankedPrompt, layer: torch.nn.Module, kv_cache: torch.Tensor, attn_metadata: Any
        ) -> torch.Tensor:
            """Keys of the text before a prompt's first image, as earlier steps stored them."""
            if self.order is None:
                self.order = key_order(self, layer, kv_cache)
            blocks = attn_metadata.block_table[prompt.row, : -(-prompt.num_cached // len(self.order))]
            keys = kv_cache[blocks].flatten(2)[:, :, self.order].transpose(1, 2).flatten(0, 1)
            return keys[: prompt.num_cached]

    assert issubclass(RankingImpl, AttentionImpl)
    return RankingImpl


def attach_ranking(attention: Attention, stage: int, step: Any, ranking: AttentionRanking) -> None:
    """Makes an attention layer rank tokens for the stage that begins after it.

    An attention implementation sees whole batches, even where the layers around it are compiled or captured
    in CUDA graphs. Changing its class leaves the layer's backend, and with it the KV-cache group, as it is.

    Args:
        attention: The last attention layer before the stage.
        stage: The stage.
        step: The worker's `CurrentStep`.
        ranking: What tokens are ranked by.

    Raises:
        ValueError: The layer's KV cache does not hold keys as they were computed.
    """
    if attention.kv_cache_dtype not in KEY_DTYPES:
        raise ValueError(
            f"--model-impl vtw cannot rank by keys in {attention.kv_cache_dtype}, which the checkpoint asks "
            "for: set --kv-cache-dtype to the type of the model"
        )
    impl: Any = attention.impl
    of_vllm: Any = type(impl)
    impl.__class__ = ranking_impl(of_vllm)
    impl.step, impl.stage, impl.ranking, impl.order = step, stage, ranking, None
