"""The seam into model runner V2: a model state that tells the step which requests the batch holds."""

from collections.abc import Mapping
from typing import Any, NamedTuple

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
from vllm_vtw.retention import Retention, decided, request_retentions
from vllm_vtw.startup import vtw_config
from vllm_vtw.worker.exits import blocks_left
from vllm_vtw.worker.plan import Batch, Rows, reads_prompt_rows
from vllm_vtw.worker.step import CurrentStep


class Known(NamedTuple):
    """A request that the runner knows.

    Attributes:
        req_index: Its row of the runner's block tables.
        prompt_len: Tokens of its prompt as it came.
        retentions: Of every stage past the first.
        reads_prompt_rows: Whether it wants logprobs of its prompt.
    """

    req_index: int
    prompt_len: int
    retentions: tuple[Retention, ...]
    reads_prompt_rows: bool


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
        self.step.settle = self._settle
        self.known: dict[str, Known] = {}
        self.req_ids: list[str] = []
        """Of the step before: a batch of the same requests has the same rows."""

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.kv_cache_config, self.block_tables = kv_cache_config, block_tables
        self.align_to = self.config.align_to(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        retentions = request_retentions(
            self.config.policy, new_req_data.mm_features, new_req_data.prompt_len, self.align_to
        )
        exit_stage = self.step.known_exits.get(new_req_data.req_id)
        if exit_stage is not None:
            retentions = decided(retentions, exit_stage)
        reads = reads_prompt_rows(new_req_data.sampling_params)
        self.known[new_req_data.req_id] = Known(req_index, new_req_data.prompt_len, retentions, reads)
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
            reads = any(one.reads_prompt_rows for one in known)
            self.rows = Rows.of([one.retentions for one in known], reads)
            self.req_ids = req_ids
        return Batch(
            self.rows,
            input_batch.num_computed_tokens_np[:num_reqs],
            input_batch.query_start_loc_np[: num_reqs + 1],
        )

    def _settle(self, exits: Mapping[int, int]) -> None:
        """Keeps what gates decided, and drops the blocks from the rows that the scheduler takes back."""
        for row, exit_stage in exits.items():
            req_id = self.req_ids[row]
            known = self.known[req_id]
            retentions = decided(known.retentions, exit_stage)
            self.known[req_id] = known._replace(retentions=retentions)
            self.step.exits[req_id] = exit_stage
            for group, blocks in blocks_left(self.kv_cache_config, retentions, known.prompt_len):
                self.block_tables.num_blocks.np[group, known.req_index] = blocks
        self.req_ids = []
