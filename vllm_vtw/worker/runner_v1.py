# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The seam into model runner V1: it tells the current step which requests the batch holds."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.worker.gpu_input_batch import CachedRequestState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_vtw.choice import choice_of
from vllm_vtw.config import VTWConfig
from vllm_vtw.retention import Retention, after_exit, request_retentions
from vllm_vtw.versions import unknown
from vllm_vtw.worker.current_step import CurrentStep
from vllm_vtw.worker.gates import blocks_after_exit
from vllm_vtw.worker.seeded_sampling import make_rewindable
from vllm_vtw.worker.step_plan import Batch, BatchRetentions, wants_prompt_logprobs

TARGET = "_build_attention_metadata"
EXTENSION_POINT = "_prepare_model_batch"
NEEDED_PARAMETERS = {"self", "num_reqs", "num_scheduled_tokens", "num_tokens_padded"}


def install() -> None:
    """Wraps the runner's method that builds attention metadata, so that it first calls `prepare_batch`.

    Does nothing where vLLM calls the model's `prepare_batch` by itself.

    Raises:
        RuntimeError: The method is not the one that the wrapper was written for.
    """
    if hasattr(GPUModelRunner, EXTENSION_POINT):
        return
    original = getattr(GPUModelRunner, TARGET, None)
    if getattr(original, "calls_prepare_batch", False):
        return
    if original is None or not inspect.signature(original).parameters.keys() >= NEEDED_PARAMETERS:
        raise unknown(f"GPUModelRunner.{TARGET}")

    @functools.wraps(original)
    def build_attention_metadata(self: GPUModelRunner, **given: Any) -> Any:
        prepare_batch = getattr(self.get_model(), "prepare_batch", None)
        if prepare_batch is not None:
            # The runner pads attention metadata only for CUDA graphs of the whole model.
            fixed_shape = given.get("num_tokens_padded") is not None
            prepare_batch(self, given["num_reqs"], given.get("num_scheduled_tokens"), fixed_shape)
        return original(self, **given)

    build_attention_metadata.calls_prepare_batch = True  # type: ignore[attr-defined]
    setattr(GPUModelRunner, TARGET, build_attention_metadata)


class V1Batches:
    """Begins each step of a model runner V1 with the batch that the runner is about to run.

    Args:
        config: The plugin's configuration.
        step: The worker's current step.
    """

    def __init__(self, config: VTWConfig, step: CurrentStep) -> None:
        self.config = config
        self.step = step
        step.record_exits = self._record_exits
        step.features_of = self._features_of
        # Asking a tensor's device for its type takes 14 microseconds in every step.
        self.on_cpu = step.device.type == "cpu"
        self.made_for: SamplingMetadata | None = None
        """The sampling metadata of the step before. The runner makes new ones whenever a request joins,
        leaves or moves to another row, also if a new request has the id of an old one."""
        self.tracked: dict[str, tuple[CachedRequestState, tuple[Retention, ...]]] = {}
        """By request id, the request and its retentions. An id may be used again, for another request."""

    def prepare(
        self,
        runner: GPUModelRunner,
        num_reqs: int,
        num_scheduled_tokens: Mapping[str, int] | None,
        fixed_shape: bool,
    ) -> None:
        """What the runner calls before it builds attention metadata.

        Args:
            runner: The runner, with its requests and its batch.
            num_reqs: Rows of the batch, without padding.
            num_scheduled_tokens: Tokens of the step, by request id. None in a dummy run, which has no
                requests.
            fixed_shape: Whether a CUDA graph of the whole model replays the step.
        """
        self.runner = runner
        if num_scheduled_tokens is None:
            self.step.begin(None)
            return
        if self.on_cpu:
            make_rewindable(runner, num_reqs)
        if runner.input_batch.sampling_metadata is not self.made_for or self.step.orders:
            self.made_for = runner.input_batch.sampling_metadata
            self._take(runner, runner.input_batch.req_ids[:num_reqs])
        num_computed = runner.input_batch.num_computed_tokens_cpu[:num_reqs]
        starts = runner.query_start_loc.np[: num_reqs + 1]
        self.step.begin(Batch(self.batch_retentions, num_computed, starts), fixed_shape)

    def _take(self, runner: GPUModelRunner, req_ids: list[str]) -> None:
        requests = [runner.requests[req_id] for req_id in req_ids]
        self.batch_retentions = BatchRetentions.of(
            [self._retentions(runner, request) for request in requests],
            any(wants_prompt_logprobs(request.sampling_params) for request in requests),
        )
        if len(self.tracked) > 2 * len(runner.requests):
            self.tracked = {
                req_id: kept for req_id, kept in self.tracked.items() if req_id in runner.requests
            }

    def _retentions(self, runner: GPUModelRunner, request: CachedRequestState) -> tuple[Retention, ...]:
        req_id = request.req_id
        tracked, retentions = self.tracked.get(req_id, (None, ()))
        if tracked is not request or req_id in self.step.begun or req_id in self.step.orders:
            block_size = runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
            align_to = self.config.align_to(block_size)
            choice = choice_of(self.config.policy, self.config.num_layers, request.sampling_params)
            retentions = request_retentions(
                self.config.policy,
                request.mm_features,
                request.num_prompt_tokens,
                align_to,
                self.config.bridge,
                choice.layer,
                choice.keep,
                self.step.orders.get(req_id, {}),
            )
            if req_id in self.step.known_exits:
                retentions = after_exit(retentions, self.step.known_exits[req_id])
            self.tracked[req_id] = (request, retentions)
        return retentions

    def _features_of(self, identifier: str) -> torch.Tensor | None:
        return self.runner.encoder_cache.get(identifier)

    def _record_exits(self, exits: Mapping[int, int | None]) -> None:
        """Keeps what gates decided, and drops from the rows the blocks that the scheduler will free."""
        tables = self.runner.input_batch.block_table
        for row, exit_stage in exits.items():
            request = self.runner.requests[self.runner.input_batch.req_ids[row]]
            _, before = self.tracked[request.req_id]
            retentions = after_exit(before, exit_stage)
            self.tracked[request.req_id] = (request, retentions)
            self.step.exits[request.req_id] = exit_stage
            groups = self.runner.kv_cache_config
            for group, blocks in blocks_after_exit(groups, retentions, request.num_prompt_tokens):
                del request.block_ids[group][blocks:]
                tables[group].num_blocks_per_row[row] = blocks
        self.made_for = None
