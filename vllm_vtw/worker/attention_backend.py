# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The attention backend of a stage's layers: the model's own backend, given the stage's metadata."""

import copy
import functools
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    subclass_attention_backend,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from vllm_vtw.capacity import LayerGroup, LayerGroups
from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.worker.current_step import CurrentStep
from vllm_vtw.worker.pages import PagedCache, PageStrides, PageTable
from vllm_vtw.worker.step_buffers import SlotMapping, StepBuffer

# Backends whose kernels accept rows without a query in the middle of a batch.
BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN")


@functools.cache
def stage_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """Subclasses a backend so that its metadata describes the tokens that a stage computes and retains."""
    model_builder: Any = backend.get_builder_cls()

    class StageBuilder(model_builder):
        # `build` shares metadata between the groups of a stage. vLLM would not know of their page tables.
        supports_update_block_table = False

        def __init__(
            self,
            kv_cache_spec: StageSpec,
            layer_names: list[str],
            vllm_config: VllmConfig,
            *args: Any,
            **kw: Any,
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, *args, **kw)
            self.stage, self.pages = kv_cache_spec.stage, kv_cache_spec.pages
            layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
            assert isinstance(layer, StageAttention)
            self.layer, self.step = layer, layer.step
            limits, device = vllm_config.scheduler_config, self.step.device
            self.max_rows = limits.max_num_seqs
            # CUDA graphs read these tensors at the addresses that they captured.
            self.slots = SlotMapping(limits.max_num_batched_tokens, device)
            if self.stage not in self.step.seq_lens:
                seq_lens = torch.zeros(self.max_rows, dtype=torch.int32, device=device)
                self.step.seq_lens[self.stage] = StepBuffer(seq_lens)
            self.page_table: PageTable | None = None
            self.step.slots.update(dict.fromkeys(layer_names, self.slots))
            self.step.builders.update(dict.fromkeys(layer_names, self))

        @classmethod
        def get_cudagraph_support(
            cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
        ) -> AttentionCGSupport:
            # With prefills in the batch, the number of tokens differs from stage to stage. With decodes alone
            # it does not.
            support: AttentionCGSupport = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            most = AttentionCGSupport.UNIFORM_BATCH
            if vllm_config.speculative_config is not None and not vllm_config.use_v2_model_runner:
                # Runner V1 treats a chunk of a prompt that is as long as a draft as a decode, even if it has
                # images in it.
                most = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
            return min(support, most, key=lambda level: level.value)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            if self.step.gates is not None:
                self.given = (common_prefix_len, common_attn_metadata, fast_build)
            batch, stage = common_attn_metadata, self.step.of_stage(self.stage)
            block_table = self._page_table(batch)
            if stage is None:
                self.slots.clear(batch, block_table, self.kv_cache_spec.block_size)
            else:
                stage.set_ranks(batch.positions)
                stage.write_slots(self.slots, batch, block_table, self.kv_cache_spec.block_size)
            metadata = self.step.metadata.get(self.stage)
            if metadata is not None:
                # Another group of the stage has built it. Only blocks and slots are different here.
                metadata = copy.copy(metadata)
                metadata.block_table = block_table
                metadata.slot_mapping = self.slots.view(metadata.num_actual_tokens)
                return metadata
            seq_lens = self.step.seq_lens[self.stage]
            if stage is None:
                of_stage = copy.copy(batch)
                of_stage.seq_lens = seq_lens.view(batch.num_reqs).copy_(batch.seq_lens)
            else:
                of_stage = stage.metadata(batch, seq_lens)
            of_stage.block_table_tensor = block_table
            of_stage.slot_mapping = self.slots.view(of_stage.num_actual_tokens)
            metadata = super().build(common_prefix_len, of_stage, fast_build)
            self.step.metadata[self.stage] = metadata
            return metadata

        def build_again(self) -> dict[str, Any]:
            """Builds the step's metadata again, by layer name, after the plan of the stage has changed."""
            return dict.fromkeys(self.layer_names, self.build(*self.given))

        def _page_table(self, batch: CommonAttentionMetadata) -> torch.Tensor:
            """The block table that kernels read, in which every page is a block of its own."""
            block_table = batch.block_table_tensor
            if self.pages == 1:
                return block_table
            if self.page_table is None:
                self.page_table = PageTable(block_table, self.max_rows, self.layer.page_strides, self.pages)
            return self.page_table.write(block_table, -(-batch.max_seq_len // self.kv_cache_spec.block_size))

    assert issubclass(StageBuilder, AttentionMetadataBuilder)
    return subclass_attention_backend("Stage", backend, StageBuilder)


class StageAttention(Attention):
    """An attention layer of a stage, with its own backend and KV-cache spec.

    Layers past stage 0 are such layers, and those of stage 0 that are not stored as in stock vLLM: if their
    KV blocks hold several pages, or if there are several pipeline ranks.

    Attributes:
        groups: The model's KV-cache groups.
        group: The group that the layer belongs to.
        step: The worker's current step.
        page_strides: Where the layer's pages lie in its KV cache. It exists once vLLM has bound the KV cache.
    """

    groups: LayerGroups
    group: LayerGroup
    step: CurrentStep
    page_strides: PageStrides

    @classmethod
    def adopt(cls, attention: Attention, groups: LayerGroups, group: LayerGroup, step: CurrentStep) -> None:
        """Changes the class of an attention layer that the model has built.

        Each model class builds its attention layers with arguments of its own. Changing the class afterwards
        keeps all of that, weights and quantization included.

        Args:
            attention: The layer.
            groups: The model's KV-cache groups.
            group: The group that the layer belongs to.
            step: The worker's current step.

        Raises:
            ValueError: The layer's attention backend is not supported.
        """
        assert type(attention) is Attention, f"unexpected attention layer {type(attention).__name__}"
        backend = attention.get_attn_backend().get_name()
        if backend not in BACKENDS:
            raise ValueError(
                f"--model-impl vtw does not support the attention backend {backend}: "
                f"set --attention-backend to one of {', '.join(BACKENDS)}"
            )
        attention.__class__ = cls
        assert isinstance(attention, cls)
        attention.groups, attention.group, attention.step = groups, group, step

    def get_attn_backend(self) -> type[AttentionBackend]:
        return stage_backend(super().get_attn_backend())

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        assert isinstance(spec, FullAttentionSpec)
        return StageSpec.like(spec, self.groups, self.group)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        # The view is kept in `kv_cache` only, which vLLM resets to release the memory.
        view, self.page_strides = PagedCache.of(kv_cache, self.group.pages)
        super().bind_kv_cache(view)
