# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The step that is being prepared or run, as a worker's runner, attention builders and model share it."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_vtw.retention import OneStepPrefill, Orders
from vllm_vtw.worker.gates import Gates
from vllm_vtw.worker.stage_step import StageStep
from vllm_vtw.worker.step_buffers import SlotMapping, StepBuffer
from vllm_vtw.worker.step_plan import Batch, BatchRetentions, StagePlan, plan_stage, ranked_tokens


class CurrentStep:
    """What the current step computes in each stage past the first.

    The seam into the model runner calls `begin` before the runner builds attention metadata. The attention
    builders and the model read the rest.

    Args:
        num_stages: Number of stages past the first.
        device: Where the model runs.

    Attributes:
        stages: For each stage past the first, its tokens. None in a dummy run, which computes every token in
            every stage and stores nothing.
        stage_0: The same for layers of stage 0 that are not stored as in stock vLLM.
        seq_lens: By stage, the buffer that the lengths of its rows are in.
        metadata: By stage, the attention metadata that one of its KV-cache groups has built for this step.
        slots: By layer name, the KV slots of the layer's tokens.
        prompt_logprobs: Whether something reads the final states of withdrawn tokens.
        gates: The policy's gates, set by the model. None if there are none.
        gated_prompts: By row, the prompts that gates have yet to decide about in this step.
        record_exits: Set by the seam into the model runner. It is called with the decisions of a step: for
            each row the exit stage, None where the visual tokens stay.
        exits: By request id, decisions that the scheduler has not been told yet.
        begun: Ids of the requests that begin or resume in this step. What the worker knew about them is void.
        known_exits: By request id, what gates have decided about these requests before.
        orders: By request id, the orders of images that this step told the worker, as `request_retentions`
            takes them.
        features_of: Set by the seam into the model runner. Returns what the encoder has computed of an image,
            by its identifier, shape `(tokens, at least hidden_size)`, or None if the cache does not hold it.
        builders: By layer name, the builder of its attention metadata. vLLM makes builders more than once;
            the last one counts.
    """

    record_exits: Callable[[dict[int, int | None]], None]
    features_of: Callable[[str], torch.Tensor | None]

    def __init__(self, num_stages: int, device: torch.device) -> None:
        self.num_stages = num_stages
        self.device = device
        self.stages: Sequence[StageStep | None] = (None,) * num_stages
        self.stage_0: StageStep | None = None
        self.seq_lens: dict[int, StepBuffer] = {}
        self.metadata: dict[int, Any] = {}
        self.slots: dict[str, SlotMapping] = {}
        self.prompt_logprobs = False
        self.gates: Gates | None = None
        self.gated_prompts: dict[int, OneStepPrefill] = {}
        self.exits: dict[str, int | None] = {}
        self.begun: set[str] = set()
        self.known_exits: dict[str, int | None] = {}
        self.orders: dict[str, Orders] = {}
        self.builders: dict[str, Any] = {}
        self._row_exits: dict[int, int | None] = {}
        self._retentions: BatchRetentions | None = None
        self._decoding: BatchRetentions | None = None
        """The batch of the step before, if all its requests decoded. Their next step has the same plan."""

    def begin(self, batch: Batch | None, fixed_shape: bool = False) -> None:
        """Starts a step.

        Args:
            batch: What the step computes. None for a dummy run.
            fixed_shape: Whether a CUDA graph of the whole model replays the step.
        """
        self.metadata = {}
        if batch is None:
            self.stages = (None,) * self.num_stages
            self.stage_0 = None
            self.prompt_logprobs = False
            self.gated_prompts = {}
            self._decoding = None
            return
        if batch.retentions is self._decoding and batch.is_one_token_each:
            for stage in (self.stage_0, *self.stages):
                if stage is not None:
                    stage.reset_ranks()
            return
        self.prompt_logprobs = batch.retentions.prompt_logprobs
        self.stages = stages = self._planned(batch, [], fixed_shape)
        if 0 in self.seq_lens:
            plan = StagePlan(np.zeros(len(batch.num_computed), dtype=np.int32), is_final=True)
            self.stage_0 = StageStep(plan, None, torch.zeros_like(self._num_withdrawn[0]), batch, fixed_shape)
        self._prepare_ranking(batch, stages)
        self._decoding = batch.retentions if batch.is_one_token_each and batch.is_past_withdrawn else None
        # A graph of fixed shape replays decodes only.
        self.gated_prompts = {} if fixed_shape else batch.gated_prompts()
        if self.gated_prompts:
            self._batch = batch
            self._row_exits = {}

    def of_stage(self, stage: int) -> StageStep | None:
        """What the step computes in a stage. None in a dummy run."""
        return self.stages[stage - 1] if stage else self.stage_0

    def _planned(self, batch: Batch, stages: list[StageStep], fixed_shape: bool) -> list[StageStep]:
        """The first few `stages`, followed by new plans of all deeper ones."""
        if batch.retentions is not self._retentions:
            self._retentions = batch.retentions
            self._num_withdrawn = async_tensor_h2d(batch.retentions.num_withdrawn, self.device)
        for index in range(len(stages), self.num_stages):
            plan = plan_stage(batch, index + 1)
            num_withdrawn = (
                self._num_withdrawn[index]
                if plan.is_final
                else async_tensor_h2d(plan.num_withdrawn, self.device)
            )
            before = stages[-1] if stages else None
            stages.append(StageStep(plan, before, num_withdrawn, batch, fixed_shape))
        return stages

    def ask_gates(self, stage: int, hidden: torch.Tensor, residual: torch.Tensor) -> dict[str, Any]:
        """Asks the gates before a stage about the prompts that still have their visual tokens.

        Args:
            stage: The stage that is about to begin.
            hidden: Hidden states of the tokens of the stage before, shape `(tokens, hidden_size)`.
            residual: Their residual stream, same shape.

        Returns:
            By layer name, the attention metadata that changed because visual tokens leave.
        """
        assert self.gates is not None
        before = self.stages[stage - 2] if stage > 1 else None
        starts = self._batch.query_start_loc if before is None else before.query_start_loc
        texts = []
        for row, prompt in self.gated_prompts.items():
            text = slice(int(starts[row + 1]) - prompt.text_tokens, int(starts[row + 1]))
            texts.append(hidden[text] + residual[text])
        leave = self.gates.leave(stage, texts)
        leaving = [row for row, leaves in zip(self.gated_prompts, leave, strict=True) if leaves]
        self._row_exits |= dict.fromkeys(leaving, stage)
        for row in leaving:
            del self.gated_prompts[row]
        if stage == self.num_stages:
            self._row_exits |= dict.fromkeys(self.gated_prompts, None)
            self.gated_prompts = {}
        if not self.gated_prompts:
            self.record_exits(self._row_exits)
        if not leaving:
            return {}
        retentions = self._batch.retentions.after_exits(dict.fromkeys(leaving, stage))
        self._batch = self._batch._replace(retentions=retentions)
        unchanged = [planned for planned in self.stages[: stage - 1] if planned is not None]
        self.stages = self._planned(self._batch, unchanged, fixed_shape=False)
        self.metadata = {planned: built for planned, built in self.metadata.items() if planned < stage}
        builders = dict.fromkeys(self.builders.values())
        rebuilt = [builder.build_again() for builder in builders if builder.stage >= stage]
        return dict(chain.from_iterable(metadata.items() for metadata in rebuilt))

    def _prepare_ranking(self, batch: Batch, stages: Sequence[StageStep]) -> None:
        splits = [(number, stage.plan.split) for number, stage in enumerate(stages, 1)]
        present = [(number, split) for number, split in splits if split is not None]
        rows = {row for _, split in present for row in split.ranked}
        if not rows:
            return
        mask = async_tensor_h2d(ranked_tokens(batch, rows), self.device)
        starts: np.ndarray = batch.query_start_loc
        for number, split in present:
            stages[number - 1].prepare_ranking(batch, number, starts, mask)
            starts = split.query_start_loc
