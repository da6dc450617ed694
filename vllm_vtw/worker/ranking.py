"""Ranked stages: the attention of a prompt's last token chooses which visual tokens go on.

A layer's attention ranks for the stage that begins behind it: it writes the indices of the tokens that stay
over those that stood for them. As only their number was promised, all metadata are right before it is known
which they are, and nothing waits for the device.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionImpl

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


def chosen(attention: torch.Tensor, is_candidate: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` tokens that stay: all that may not leave, then the most attended to.

    Args:
        attention: That each token got, shape `(tokens,)`, float32.
        is_candidate: Whether it may leave, shape `(tokens,)`.
        count: Of those that may not leave, and of more.
    """
    order = (
        torch.where(is_candidate, attention.nan_to_num(), torch.inf)
        .sort(descending=True, stable=True)
        .indices
    )
    return order[:count].sort().values


def attention_of(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """The attention that one token pays to others, summed over the heads of all ranks, shape `(tokens,)`.

    Args:
        query: Of the token, shape `(heads, head_size)`.
        keys: Of the others, shape `(tokens, kv_heads, head_size)`.
        scale: Of the products.
    """
    heads = query.float().unflatten(0, (keys.shape[1], -1))
    weights = (torch.einsum("kgd,nkd->kgn", heads, keys.float()) * scale).softmax(-1)
    # Summed in one order on every rank: a last bit could choose another token.
    return get_tp_group().all_gather(weights.sum((0, 1))[None], dim=0).sum(0)


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
            if stage is not None and attn_metadata is not None:
                for prompt in stage.ranked:
                    attention = self._attention(prompt, layer, query, kv_cache, attn_metadata)
                    stage.choose(prompt, attention)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)

        def _attention(
            self,
            prompt: RankedPrompt,
            layer: torch.nn.Module,
            query: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
        ) -> torch.Tensor:
            """The attention that tokens of the step got of the prompt's last one."""
            attention = query.new_zeros(prompt.before.stop - prompt.before.start, dtype=torch.float32)
            if not prompt.keeps_some:
                return attention
            if self.order is None:
                self.order = key_order(self, layer, kv_cache)
            blocks = attn_metadata.block_table[prompt.row, : -(-prompt.num_prompt // len(self.order))]
            keys = kv_cache[blocks].flatten(2)[:, :, self.order].transpose(1, 2).flatten(0, 1)
            of_prompt = attention_of(query[prompt.last], keys[: prompt.num_prompt], self.scale)
            attention[: prompt.num_prompt - prompt.num_cached] = of_prompt[prompt.num_cached :]
            return attention

    assert issubclass(RankingImpl, AttentionImpl)
    return RankingImpl


def rank_behind(attention: Attention, stage: int, step: Any) -> None:
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
    impl.step, impl.stage, impl.order = step, stage, None
