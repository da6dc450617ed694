"""Ranked stages: the attention of a prompt's last token chooses which visual tokens go on.

A layer's attention ranks for the stage that begins behind it: it writes the indices of the tokens that stay
over those that stood for them. As only their number was promised, all metadata are right before it is known
which they are, and nothing waits for the device.
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

from vllm_vtw.rankings import Ranking
from vllm_vtw.retention import Retention

KEY_DTYPES = ("auto", "float32", "bfloat16", "float16")
DIGIT = 64  # of numbers in a type that holds few of them exactly


@dataclass(frozen=True)
class RankedPrompt:
    """A prompt of the batch at the border before a ranked stage.

    Attributes:
        row: Of the batch.
        before: Where its tokens begin and end among those of the stage before.
        kept: The same among those of the stage.
        num_cached: Tokens that the stage before holds of earlier steps.
        num_prompt: Tokens that it holds of the whole prompt.
        keeps_some: Whether any of the ranked tokens stays. None has to be ranked otherwise.
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
        """The prompt of a request with these retentions, of every stage past the first, at `stage`."""
        question = retentions[stage - 1].question
        assert question is not None
        held = retentions[stage - 2].count if stage > 1 else int
        return cls(
            row,
            before,
            kept,
            num_cached=held(num_computed),
            num_prompt=held(question.stop),
            keeps_some=retentions[stage - 1].num_withdrawn < question.visual_tokens,
        )

    @property
    def last(self) -> int:
        """Index of the prompt's last token among the tokens of the stage before."""
        return self.before.start + self.num_prompt - 1 - self.num_cached


class RankedPrompts:
    """All prompts that rank at one border, with what is counted of them on the device.

    Tensors of several prompts have a row for each, as long as the longest one's.

    Args:
        prompts: One or more.
        device: Where the model runs.
    """

    def __init__(self, prompts: Sequence[RankedPrompt], device: torch.device) -> None:
        self.prompts = tuple(prompts)
        self.longest = max(prompt.num_prompt for prompt in prompts)
        lengths = [prompt.before.stop - prompt.before.start for prompt in prompts]
        counts = [prompt.kept.stop - prompt.kept.start for prompt in prompts]
        width = max(lengths)
        starts, cached = (
            [prompt.before.start for prompt in prompts],
            [prompt.num_cached for prompt in prompts],
        )
        numbers = async_tensor_h2d(np.array([starts, lengths, counts, cached]), device)
        self._starts, self._lengths, self._counts, self._cached = numbers[..., None]
        self._places = torch.arange(width, device=device)
        # Where those that stay stand in the rows, and where they go.
        sources = [row * width + np.arange(count) for row, count in enumerate(counts)]
        targets = [np.arange(prompt.kept.start, prompt.kept.stop) for prompt in prompts]
        moves = async_tensor_h2d(np.array([np.concatenate(sources), np.concatenate(targets)]), device)
        self._sources, self.targets = moves

    def staying(
        self, scores: torch.Tensor | None, kept_before: torch.Tensor | None, is_candidate: torch.Tensor
    ) -> torch.Tensor:
        """Indices among the tokens of the stage before of those that stay, in the order of `targets`.

        Args:
            scores: Of each token of the prompts, shape `(prompts, longest)`, float32; None where all that may
                leave do.
            kept_before: Indices in the batch of the tokens of the stage before; None where it computes all.
            is_candidate: Whether each token of the batch may leave, shape `(tokens,)`.
        """
        exists = self._places < self._lengths
        before = torch.where(exists, self._starts + self._places, self._starts)
        in_batch = before if kept_before is None else kept_before[before]
        if scores is None:
            got = torch.zeros_like(before, dtype=torch.float32)
        else:
            got = scores.gather(1, (self._cached + self._places).clamp(max=self.longest - 1))
        order = ranked(got, is_candidate[in_batch], exists)
        staying = torch.where(self._places < self._counts, order, len(self._places)).sort(1).values
        return (self._starts + staying).flatten()[self._sources]


def ranked(scores: torch.Tensor, is_candidate: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """The places of each row: those that may not leave, then those with the highest scores, then padding.

    Args:
        scores: Of each token, shape `(prompts, tokens)`, float32.
        is_candidate: Whether it may leave, same shape.
        exists: False for padding, same shape.
    """
    worth = torch.where(is_candidate, scores.nan_to_num(), torch.inf)
    worth = torch.where(exists, worth, -torch.inf)
    return worth.sort(dim=1, descending=True, stable=True).indices


def scores_of(
    ranking: Ranking,
    prompts: RankedPrompts,
    query: torch.Tensor,
    keys_of: Callable[[RankedPrompt], torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """The scores of each prompt's tokens over the heads of all ranks, shape `(prompts, longest)`, float32.

    Args:
        ranking: What the prompts rank by.
        prompts: That rank.
        query: Of the tokens of the step, shape `(tokens, heads, head_size)`.
        keys_of: Returns the keys of a prompt's tokens, shape `(num_prompt, kv_heads, head_size)`.
        scale: Of the products.
    """
    scores = query.new_zeros((len(prompts.prompts), prompts.longest), dtype=torch.float32)
    # Prompt by prompt: padded to the longest one, the keys of all would take gigabytes.
    for row, prompt in zip(scores, prompts.prompts, strict=True):
        if prompt.keeps_some:
            row[: prompt.num_prompt] = ranking.score(query[prompt.last], keys_of(prompt), scale)
    # Summed in one order on every rank: a last bit could choose another token.
    return get_tp_group().all_gather(scores[None], dim=0).sum(0)


def key_order(impl: Any, layer: torch.nn.Module, kv_cache: torch.Tensor) -> torch.Tensor:
    """Where a head's keys of one block lie in its part of the cache, shape `(block_size, head_size)`.

    The CPU's kernels have an order of their own for every instruction set. Keys that number their places show
    any.

    Args:
        impl: Of the layer's attention.
        layer: The attention layer.
        kv_cache: Its cache, shape `(blocks, kv_heads, block_size, 2 * head_size)`.
    """
    _, heads, block_size, width = kv_cache.shape
    device, size = kv_cache.device, block_size * width // 2
    numbers = torch.arange(1, size + 1, device=device)  # what is not written stays 0
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
    """Subclasses an attention implementation so that it also ranks for the stage that begins behind it."""

    class RankingImpl(impl):
        step: Any
        stage: int
        ranking: Ranking
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
                stage.choose(scores)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)

        def _cached_keys(
            self, prompt: RankedPrompt, layer: torch.nn.Module, kv_cache: torch.Tensor, attn_metadata: Any
        ) -> torch.Tensor:
            """The keys of the text before a prompt's first picture, which earlier steps computed."""
            if self.order is None:
                self.order = key_order(self, layer, kv_cache)
            blocks = attn_metadata.block_table[prompt.row, : -(-prompt.num_cached // len(self.order))]
            keys = kv_cache[blocks].flatten(2)[:, :, self.order].transpose(1, 2).flatten(0, 1)
            return keys[: prompt.num_cached]

    assert issubclass(RankingImpl, AttentionImpl)
    return RankingImpl


def rank_behind(attention: Attention, stage: int, step: Any, ranking: Ranking) -> None:
    """Makes an attention layer rank for `stage`, which begins behind it.

    Its implementation sees whole batches also where the layers around it are compiled or captured. Changing
    the object's class leaves the layer's backend, and so its KV-cache group, as they are.

    Raises:
        ValueError: Its keys are not kept as they were computed.
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
