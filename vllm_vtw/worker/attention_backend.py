# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The attention backend of a stage past the first: the model's own backend, given the stage's metadata."""

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

from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.worker.current_step import CurrentStep
from vllm_vtw.worker.step_buffers import SlotMapping, StepBuffer

# Backends whose kernels accept rows without a query in the middle of a batch.
BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN")


@functools.cache
def stage_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """Subclasses a backend so that its metadata describes the tokens that a stage computes and retains."""
    model_builder: Any = backend.get_builder_cls()

    class StageBuilder(model_builder):
        # With True, the KV-cache groups of one stage would share the metadata of the first group. CUDA graphs
        # of the second group would then not see the row lengths, which they read from a buffer of their own.
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
            self.stage = kv_cache_spec.stage
            layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
            assert isinstance(layer, StageAttention)
            self.step = layer.step
            # CUDA graphs read these tensors at the addresses that they captured.
            limits, device = vllm_config.scheduler_config, self.step.device
            self.seq_lens = StepBuffer(torch.zeros(limits.max_num_seqs, dtype=torch.int32, device=device))
            self.slots = SlotMapping(limits.max_num_batched_tokens, device)
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
            stage = self.step.stages[self.stage - 1]
            if stage is None:
                stage_metadata = self._dummy(common_attn_metadata)
            else:
                stage.set_ranks(common_attn_metadata.positions)
                stage.write_slots(self.slots, common_attn_metadata, self.kv_cache_spec.block_size)
                stage_metadata = stage.metadata(common_attn_metadata, self.seq_lens, self.slots)
            return super().build(common_prefix_len, stage_metadata, fast_build)

        def build_again(self) -> dict[str, Any]:
            """Builds the step's metadata again, by layer name, after the plan of the stage has changed."""
            return dict.fromkeys(self.layer_names, self.build(*self.given))

        def _dummy(self, batch: CommonAttentionMetadata) -> CommonAttentionMetadata:
            self.slots.clear(batch, self.kv_cache_spec.block_size)
            seq_lens = self.seq_lens.view(batch.num_reqs).copy_(batch.seq_lens)
            return batch.replace(seq_lens=seq_lens, slot_mapping=self.slots.view(batch.num_actual_tokens))

    assert issubclass(StageBuilder, AttentionMetadataBuilder)
    return subclass_attention_backend("Stage", backend, StageBuilder)


class StageAttention(Attention):
    """An attention layer of a stage past the first, with its own backend and KV-cache spec."""

    stage: int
    keep: float
    step: CurrentStep

    @classmethod
    def adopt(cls, attention: Attention, stage: int, keep: float, step: CurrentStep) -> None:
        """Changes the class of an attention layer that the model has built.

        Each model class builds its attention layers with arguments of its own. Changing the class afterwards
        keeps all of that, weights and quantization included.

        Args:
            attention: The layer.
            stage: The stage that it belongs to, 1 or deeper.
            keep: The fraction of visual tokens that the stage keeps.
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
        attention.stage, attention.keep, attention.step = stage, keep, step

    def get_attn_backend(self) -> type[AttentionBackend]:
        return stage_backend(super().get_attn_backend())

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        assert isinstance(spec, FullAttentionSpec)
        return StageSpec.like(spec, self.stage, self.keep)
