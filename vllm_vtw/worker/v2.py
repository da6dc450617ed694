"""The seam into model runner V2: a model state that tells the step which requests the batch holds."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_vtw.config import VTWConfig
from vllm_vtw.retention import Retention, request_retentions
from vllm_vtw.startup import vtw_config
from vllm_vtw.worker.plan import Batch, Rows, reads_prompt_rows
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
        self.known: dict[str, tuple[tuple[Retention, ...], bool]] = {}
        """By request id: its retention, and whether it wants logprobs of its prompt."""
        self.req_ids: list[str] = []
        """Of the step before: a batch of the same requests has the same rows."""

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.align_to = self.config.align_to(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        retentions = request_retentions(
            self.config.policy, new_req_data.mm_features, new_req_data.prompt_len, self.align_to
        )
        self.known[new_req_data.req_id] = retentions, reads_prompt_rows(new_req_data.sampling_params)
        self.req_ids = []

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.known.pop(req_id, None)

    def prepare_attn(
        self, input_batch: InputBatch, cudagraph_mode: CUDAGraphMode, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        self.step.begin(self._batch(input_batch), fixed_shape=cudagraph_mode == CUDAGraphMode.FULL)
        return super().prepare_attn(input_batch, cudagraph_mode, *args, **kwargs)

    def _batch(self, input_batch: InputBatch) -> Batch | None:
        """What the step computes; None in a dummy run, whose requests are nobody's."""
        num_reqs = input_batch.num_reqs
        req_ids = input_batch.req_ids[:num_reqs]
        if req_ids != self.req_ids:
            if not all(req_id in self.known for req_id in req_ids):
                return None
            known = [self.known[req_id] for req_id in req_ids]
            self.rows = Rows.of([retentions for retentions, _ in known], any(reads for _, reads in known))
            self.req_ids = req_ids
        return Batch(
            self.rows,
            input_batch.num_computed_tokens_np[:num_reqs],
            input_batch.query_start_loc_np[: num_reqs + 1],
        )
