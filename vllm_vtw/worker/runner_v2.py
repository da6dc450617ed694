# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The seam into model runner V2: a model state that tells the current step which requests the batch holds."""

from collections.abc import Mapping
from dataclasses import replace
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

from vllm_vtw.choice import choice_of
from vllm_vtw.config import VTWConfig
from vllm_vtw.retention import Retention, after_exit, request_retentions
from vllm_vtw.startup.options import vtw_config
from vllm_vtw.worker.current_step import CurrentStep
from vllm_vtw.worker.gates import blocks_after_exit
from vllm_vtw.worker.step_plan import Batch, BatchRetentions, wants_prompt_logprobs


class TrackedRequest(NamedTuple):
    """A request that the runner knows.

    Attributes:
        req_index: Its row in the runner's block tables.
        new: What the scheduler said of it, without pixels.
        retentions: Its retention in every stage past the first.
        prompt_logprobs: Whether it wants logprobs of its prompt.
    """

    req_index: int
    new: NewRequestData
    retentions: tuple[Retention, ...]
    prompt_logprobs: bool


class VTWModelState(DefaultModelState):
    """vLLM's model state, which also tracks the retention of every request that the runner knows."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: Any,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.config: VTWConfig = vtw_config(vllm_config)
        self.step: CurrentStep = model.vtw_step
        self.step.record_exits = self._record_exits
        self.step.features_of = self._features_of
        self.tracked: dict[str, TrackedRequest] = {}
        self.req_ids: list[str] = []
        """Requests of the batch that `batch_retentions` was made for, in the order of its rows."""

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.kv_cache_config, self.block_tables = kv_cache_config, block_tables
        self.align_to = self.config.align_to(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        retentions = self._retentions(new_req_data)
        if new_req_data.req_id in self.step.known_exits:
            retentions = after_exit(retentions, self.step.known_exits[new_req_data.req_id])
        wants_logprobs = wants_prompt_logprobs(new_req_data.sampling_params)
        # Otherwise, this would keep pixels in memory that vLLM 0.33 lets go of.
        features = [replace(feature, data=None) for feature in new_req_data.mm_features]
        new = replace(new_req_data, mm_features=features)
        self.tracked[new_req_data.req_id] = TrackedRequest(req_index, new, retentions, wants_logprobs)
        self.req_ids = []

    def _retentions(self, request: NewRequestData) -> tuple[Retention, ...]:
        choice = choice_of(self.config.policy, self.config.num_layers, request.sampling_params)
        return request_retentions(
            self.config.policy,
            request.mm_features,
            request.prompt_len,
            self.align_to,
            self.config.bridge,
            choice.layer,
            choice.keep,
            self.step.orders.get(request.req_id, {}),
        )

    def _features_of(self, identifier: str) -> torch.Tensor | None:
        assert self.encoder_cache is not None
        return self.encoder_cache.encoder_outputs.get(identifier)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.tracked.pop(req_id, None)

    def prepare_attn(
        self, input_batch: InputBatch, cudagraph_mode: CUDAGraphMode, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        self.step.begin(self._batch(input_batch), fixed_shape=cudagraph_mode == CUDAGraphMode.FULL)
        return super().prepare_attn(input_batch, cudagraph_mode, *args, **kwargs)

    def _batch(self, input_batch: InputBatch) -> Batch | None:
        """What the step computes. None in a dummy run, whose requests nobody sent."""
        num_reqs = input_batch.num_reqs
        req_ids = input_batch.req_ids[:num_reqs]
        for req_id in self.step.orders.keys() & self.tracked.keys():
            request = self.tracked[req_id]
            self.tracked[req_id] = request._replace(retentions=self._retentions(request.new))
            self.req_ids = []
        if req_ids != self.req_ids:
            if not all(req_id in self.tracked for req_id in req_ids):
                return None
            requests = [self.tracked[req_id] for req_id in req_ids]
            self.batch_retentions = BatchRetentions.of(
                [request.retentions for request in requests],
                any(request.prompt_logprobs for request in requests),
            )
            self.req_ids = req_ids
        return Batch(
            self.batch_retentions,
            input_batch.num_computed_tokens_np[:num_reqs],
            input_batch.query_start_loc_np[: num_reqs + 1],
        )

    def _record_exits(self, exits: Mapping[int, int | None]) -> None:
        """Keeps what gates decided, and drops from the rows the blocks that the scheduler will free."""
        for row, exit_stage in exits.items():
            req_id = self.req_ids[row]
            request = self.tracked[req_id]
            retentions = after_exit(request.retentions, exit_stage)
            self.tracked[req_id] = request._replace(retentions=retentions)
            self.step.exits[req_id] = exit_stage
            for group, blocks in blocks_after_exit(self.kv_cache_config, retentions, request.new.prompt_len):
                self.block_tables.num_blocks.np[group, request.req_index] = blocks
        self.req_ids = []
