# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""KV cache managers over groups with one page or several, and requests for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from hypothesis import strategies as st
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHash, get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from tests.unit.strategies import Prompt
from vllm_vtw.capacity import LayerGroup, LayerGroups
from vllm_vtw.kv.cache_manager import StagedKVCacheManager
from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.kv.stage_block_manager import StagedBlockHashes
from vllm_vtw.policy import Policy, Stage
from vllm_vtw.retention import Retention, request_retentions

init_none_hash(sha256)


BLOCK_SIZE = 8
NUM_BLOCKS = 60
MAX_MODEL_LEN = 400
ALL = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32)


def of_stage(stage: int, pages: int = 1, rank: int = 0) -> StageSpec:
    group = LayerGroup(stage, 4 // pages, pages, rank)
    return StageSpec.like(ALL, LayerGroups((LayerGroup(0, 4, 1), LayerGroup(2, 4, 1, 1), group)), group)


# A stage may be several groups; each has blocks of its own.
SPECS: dict[str, tuple[AttentionSpec, ...]] = {
    "one page": (ALL, of_stage(1), of_stage(1), of_stage(2)),
    "pages": (ALL, of_stage(1), of_stage(1, 3), of_stage(2, 2)),
    "pages in stage 0": (ALL, of_stage(0, 2), of_stage(1, 4), of_stage(2)),
    "pages in all of stage 0": (of_stage(0, 3), of_stage(1), of_stage(1, 2), of_stage(2, 2)),
    "two ranks": (of_stage(0), of_stage(0, 2, 1), of_stage(1, 1, 1), of_stage(2, 4, 1)),
}
LAYOUTS = pytest.mark.parametrize("layout", SPECS)
BEFORE_THE_DECODER = (of_stage(1), of_stage(1, 3), of_stage(2, 2))
"""The groups of a decoder whose first layer is one of stage 1."""

LAYERS = 12
EXITS = Policy((Stage(4, 0.0), Stage(8, 0.0)))
"""Two layers that requests may choose from, which are where the stages of `SPECS` begin."""
LOTS = Policy((Stage(4, 0.6), Stage(8, 0.2)), ranked_by="random")
"""Stages that begin there and draw lots."""

TEXT = 4
"""The token of texts, which answers are made of too: a prompt may go on as another was answered."""
TOKENS = {"text": TEXT, "question": 5, "cat": 9, "dog": 9}
PIECES = [(kind, size) for kind in TOKENS for size in (3, 8, 20)]
"""Few, so that many prompts begin alike."""


@dataclass(frozen=True)
class Ask:
    """A prompt of texts and pictures."""

    pieces: tuple[tuple[str, int], ...]

    @property
    def starts(self) -> list[int]:
        return list(accumulate((size for _, size in self.pieces), initial=0))

    @property
    def pictures(self) -> list[tuple[str, int, int]]:
        """What each shows, its start and its length."""
        placed = zip(self.pieces, self.starts[:-1], strict=True)
        return [(kind, start, size) for (kind, size), start in placed if kind in ("cat", "dog")]

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.starts[-1], tuple((start, start + size) for _, start, size in self.pictures))

    def in_blocks_of(self, block_size: int) -> "Ask":
        """The same with every piece as long beside a block as it is beside one of `BLOCK_SIZE`."""
        return Ask(tuple((kind, size * block_size // BLOCK_SIZE) for kind, size in self.pieces))

    def features(self) -> list[MultiModalFeatureSpec]:
        return [
            MultiModalFeatureSpec(
                None, "image", f"{kind}{size}", PlaceholderRange(start, size), mm_hash=f"{kind}{size}"
            )
            for kind, start, size in self.pictures
        ]

    def selected(self, stays: bool = False) -> tuple[Retention, ...]:
        """What the stages of `LOTS` retain, or what they do if the request chooses that everything stays."""
        return request_retentions(
            LOTS, self.features(), self.starts[-1], 1, 0, layer=LAYERS if stays else None
        )

    def leaving(self, exit_stage: int | None, align_to: int) -> tuple[Retention, ...]:
        """What the stages of `EXITS` retain if the request chooses one. None withdraws nothing."""
        layer = LAYERS if exit_stage is None else EXITS.stages[exit_stage - 1].layer
        return request_retentions(EXITS, self.features(), self.starts[-1], align_to, 0, layer)

    def request(
        self,
        request_id: str,
        retentions: tuple[Retention, ...] | None,
        block_size: int = BLOCK_SIZE,
        max_tokens: int = 50,
        ahead: int = 0,
    ) -> Request:
        request = Request(
            request_id,
            prompt_token_ids=[TOKENS[kind] for kind, size in self.pieces for _ in range(size)],
            sampling_params=SamplingParams(max_tokens=max_tokens),
            pooling_params=None,
            mm_features=self.features(),
            block_hasher=hasher(block_size, ahead),
        )
        if retentions is not None:
            request.block_hashes = StagedBlockHashes(request.block_hashes, retentions)
        return request


def hasher(block_size: int, ahead: int) -> Callable[[Request], list[BlockHash]]:
    """vLLM's hashes of blocks, each of which waits until so many tokens follow the block.

    Beside some drafters, those of vLLM 0.33 do.
    """
    of_vllm = get_request_block_hasher(block_size, sha256)

    def hashes(request: Request) -> list[BlockHash]:
        known = (request.num_tokens - ahead) // block_size - len(request.block_hashes)
        return of_vllm(request)[: max(known, 0)]

    return hashes


def asks(most: int = 6) -> st.SearchStrategy[Ask]:
    return st.builds(Ask, st.lists(st.sampled_from(PIECES), min_size=1, max_size=most).map(tuple))


def manager(
    enable_caching: bool, specs: Sequence[AttentionSpec], num_blocks: int = NUM_BLOCKS
) -> StagedKVCacheManager:
    block_size = specs[0].block_size
    groups = [KVCacheGroupSpec([f"layer.{index}"], spec) for index, spec in enumerate(specs)]
    config = KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    made = KVCacheManager(
        config,
        max_model_len=MAX_MODEL_LEN * block_size // BLOCK_SIZE,
        scheduler_block_size=block_size,
        hash_block_size=block_size,
        enable_caching=enable_caching,
    )
    StagedKVCacheManager.adopt(made)
    return made


def ends_step(manager: KVCacheManager) -> None:
    for stage in getattr(manager, "stage_managers", ()):
        stage.offer_parts()
    _, retained = manager.take_kv_cache_block_copies()
    manager.block_pool.free_blocks(retained)
