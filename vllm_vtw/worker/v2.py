"""The seam into model runner V2: a model state that tells the step which requests the batch holds."""

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_vtw.config import VTWConfig
from vllm_vtw.retention import Retention, request_retentions
from vllm_vtw.startup import vtw_config
from vllm_vtw.worker.plan import Batch
from vllm_vtw.worker.step import CurrentStep


class VTWModelState(DefaultModelState):
    """vLLM's state of a model, which also keeps every request's retention while the runner knows it."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: Any,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.config: VTWConfig = vtw_config(vllm_config)
        self.step: CurrentStep = model.step
        self.retentions: dict[str, tuple[Retention, ...]] = {}

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.align_to = self.config.align_to(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self.retentions[new_req_data.req_id] = request_retentions(
            self.config.policy, new_req_data.mm_features, new_req_data.prompt_len, self.align_to
        )

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.retentions.pop(req_id, None)

    def prepare_attn(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        rows = input_batch.num_reqs
        # The requests of a dummy run are nobody's.
        known = [self.retentions.get(req_id) for req_id in input_batch.req_ids[:rows]]
        retentions = [retention for retention in known if retention is not None]
        self.step.begin(
            Batch(
                retentions,
                input_batch.num_computed_tokens_np[:rows].astype(np.int64),
                input_batch.num_scheduled_tokens[:rows].astype(np.int64),
            )
            if len(retentions) == rows
            else None
        )
        return super().prepare_attn(input_batch, *args, **kwargs)
