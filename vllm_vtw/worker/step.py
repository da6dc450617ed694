"""The step at hand, shared by a worker's runner, attention builders and model."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_vtw.retention import Question
from vllm_vtw.worker.buffers import Front, Slots
from vllm_vtw.worker.exits import Gates
from vllm_vtw.worker.plan import Batch, Rows, StagePlan, candidates, plan_stage
from vllm_vtw.worker.ranking import RankedPrompt, RankedPrompts


def longest_query(query_start_loc: np.ndarray) -> int:
    """The `max_query_len` of a batch, whose rows may have no tokens.

    Kernels take 1 for "every row has one token": FlashAttention 2 with grouped queries reshapes by the number
    of rows then. With starts `[0, 1, 1, 2]`, whose second row has no token, this is 2, which is a bound
    all the same.
    """
    lengths = np.diff(query_start_loc)
    longest = int(lengths.max())
    return longest if longest > 1 or lengths.all() else 2


class StageStep:
    """A stage's plan on the device.

    Attributes:
        kept: Indices in the batch of the tokens that the stage computes, shape `(kept,)`; None for all.
        gather: Indices of the same tokens among those of the stage before; None when both compute the same.
        num_tokens: How many they are.
        query_start_loc: Where each row's tokens start among them, shape `(rows + 1,)`.
        ranked: Prompts of which `choose` has to say what stays, before anything is gathered; None for none.

    Args:
        plan: The stage's plan.
        before: The stage before, past the first.
        withdrawn: `plan.withdrawn` on the device.
        batch: The requests.
        fixed_shape: A CUDA graph replays the step: withdrawn tokens are computed with the others, and only
            not stored.
    """

    def __init__(
        self,
        plan: StagePlan,
        before: "StageStep | None",
        withdrawn: torch.Tensor,
        batch: Batch,
        fixed_shape: bool,
    ) -> None:
        self.plan = plan
        self.withdrawn = withdrawn
        self._least_withdrawn = int(plan.withdrawn.min())
        self.kept: torch.Tensor | None = None
        self.gather: torch.Tensor | None = None
        self.ranked: RankedPrompts | None = None
        self.num_tokens = int(batch.query_start_loc[-1])
        self.query_start_loc = batch.query_start_loc
        self._starts_cpu: np.ndarray | None = None
        self._not_stored: torch.Tensor | None = None
        self._ranks: torch.Tensor | None = None
        device = withdrawn.device
        if plan.withdrawal is None:
            self._shifts = withdrawn.long()  # as positions are; subtracting takes twice as long otherwise
            if not batch.is_one_token_each:
                self._shifts = async_tensor_h2d(batch.repeat(plan.withdrawn), device)
            return
        self._shifts = async_tensor_h2d(plan.withdrawal.shifts, device)
        if fixed_shape:
            assert batch.is_one_token_each, "a chunk of several tokens cannot be cut in a graph"
            assert not plan.withdrawal.ranked
            self._not_stored = async_tensor_h2d(plan.withdrawal.left, device)
            return
        self.kept = async_tensor_h2d(plan.withdrawal.kept, device)
        self._shifts = self._shifts[self.kept]
        self.gather = self.kept
        self._kept_before = None if before is None else before.kept
        if before is not None and before.plan.withdrawal is not None:
            kept_before = before.plan.withdrawal.kept
            if len(kept_before) == len(self.kept):
                self.kept, self.gather = before.kept, None  # what was chosen for it
            else:
                gather = np.searchsorted(kept_before, plan.withdrawal.kept)
                self.gather = async_tensor_h2d(gather, device)
        self.num_tokens = len(plan.withdrawal.kept)
        self.query_start_loc = plan.withdrawal.query_start_loc
        self._starts_cpu = self.query_start_loc.astype(np.int32)
        self._starts = async_tensor_h2d(self._starts_cpu, device)

    def expect_choices(self, batch: Batch, stage: int, starts_before: np.ndarray, mask: torch.Tensor) -> None:
        """Prepares for what ranked prompts will choose.

        Args:
            batch: The requests.
            stage: This stage.
            starts_before: Where each row's tokens start among those of the stage before, shape `(rows + 1,)`.
            mask: Which tokens of the batch are ranked, shape `(tokens,)`.
        """
        assert self.plan.withdrawal is not None
        if self.gather is None or not self.plan.withdrawal.ranked:
            return
        starts = self.plan.withdrawal.query_start_loc
        self._mask = mask
        prompts = [
            RankedPrompt.of(
                batch.rows.retentions[row],
                stage,
                row,
                int(batch.num_computed[row]),
                slice(int(starts_before[row]), int(starts_before[row + 1])),
                slice(int(starts[row]), int(starts[row + 1])),
            )
            for row in self.plan.withdrawal.ranked
        ]
        self.ranked = RankedPrompts(prompts, self.withdrawn.device)

    def choose(self, scores: torch.Tensor | None) -> None:
        """Settles which tokens of the ranked prompts stay.

        Args:
            scores: As `RankedPrompts.staying` takes them.
        """
        assert self.ranked is not None
        assert self.kept is not None
        assert self.gather is not None
        staying = self.ranked.staying(scores, self._kept_before, self._mask)
        self.kept[self.ranked.targets] = staying if self._kept_before is None else self._kept_before[staying]
        self.gather[self.ranked.targets] = staying

    def begin_again(self) -> None:
        """Forgets where the tokens of the step before lay; the plan is the same as long as rows decode."""
        self._ranks = None

    def place(self, positions: torch.Tensor) -> None:
        """Settles the ranks of the stage's tokens.

        Args:
            positions: Of the tokens of the whole batch, shape `(at least tokens,)`.
        """
        if self._ranks is None:
            if self.kept is not None:
                positions = positions[self.kept]
            elif positions.shape[0] > self.num_tokens:
                positions = positions[: self.num_tokens]
            self._ranks = positions - self._shifts

    def write_slots(self, slots: Slots, batch: CommonAttentionMetadata, block_size: int) -> None:
        """Writes the KV slot of each of the stage's tokens under the block table of `batch`."""
        assert self._ranks is not None, "no group of this stage had its metadata built"
        starts = batch.query_start_loc if self._starts_cpu is None else self._starts
        slots.write(self.num_tokens, starts, self._ranks, batch.block_table_tensor, block_size)
        if self._not_stored is not None:
            slots.skip(self._not_stored)

    def metadata(
        self, batch: CommonAttentionMetadata, seq_lens: Front, slots: Slots
    ) -> CommonAttentionMetadata:
        """The batch's metadata as this stage has it: fewer tokens, shorter rows, other slots.

        Args:
            batch: Of all tokens, with rows padded where a CUDA graph wants it.
            seq_lens: Receives the rows' lengths, int32.
            slots: As `write_slots` left them.
        """
        rows = len(self.plan.withdrawn)
        lengths = seq_lens.view(batch.num_reqs)
        if rows == batch.num_reqs:
            torch.sub(batch.seq_lens, self.withdrawn, out=lengths)
        else:
            torch.sub(batch.seq_lens[:rows], self.withdrawn, out=lengths[:rows])
            lengths[rows:] = 0
        changed: dict[str, Any] = {}
        if self._starts_cpu is not None:
            assert batch.num_reqs == rows, "a step of a fixed shape gathers nothing"
            changed = {
                "query_start_loc": self._starts,
                "query_start_loc_cpu": torch.from_numpy(self._starts_cpu),
                "num_actual_tokens": self.num_tokens,
                "max_query_len": longest_query(self._starts_cpu),
            }
        return batch.replace(
            seq_lens=lengths,
            # A bound, as backends need it. The exact one would cost as much in every step as all lengths.
            max_seq_len=batch.max_seq_len - self._least_withdrawn,
            seq_lens_cpu_upper_bound=None,
            slot_mapping=slots.view(changed.get("num_actual_tokens", batch.num_actual_tokens)),
            # Rotary positions were applied before; what builders take from here would index the whole batch.
            positions=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
            **changed,
        )


class CurrentStep:
    """What the step being prepared, or run, means for each stage past the first.

    The runner's seam sets it before it builds attention metadata; builders and model read it after.

    Args:
        num_stages: Stages past the first.
        device: Where the model runs.
    """

    def __init__(self, num_stages: int, device: torch.device) -> None:
        self.num_stages = num_stages
        self.device = device
        self.stages: Sequence[StageStep | None] = (None,) * num_stages
        """By stage past the first; None in a dummy run, which computes everything and stores nothing."""
        self.slots: dict[str, Slots] = {}
        """By layer name: the KV slots of the layer's tokens."""
        self.prompt_logprobs = False
        """Whether anything will be read from the rows of withdrawn tokens."""
        self.gates: Gates | None = None
        """Set by the model, where the policy has them."""
        self.asked: dict[int, Question] = {}
        """By row: the prompts that gates have yet to decide about in this step."""
        self.settle: Callable[[dict[int, int]], None]
        """Set by the runner's seam: takes by row what gates decided in a step."""
        self.exits: dict[str, int] = {}
        """By request what gates decided, until the scheduler is told: the first stage without visual tokens,
        or the number of stages where they stay."""
        self.known_exits: dict[str, int | None] = {}
        """Of requests that begin or resume in this step, as the scheduler knows it."""
        self.builders: dict[str, Any] = {}
        """By layer name: what builds its group's attention metadata. vLLM makes them more than once."""
        self._decided: dict[int, int] = {}
        self._rows: Rows | None = None
        self._decoding: Rows | None = None
        """The rows of the step before, where all of them decoded past their last withdrawn token: the plan of
        their next tokens is the same."""

    def begin(self, batch: Batch | None, fixed_shape: bool = False) -> None:
        """Starts a step over `batch`; None for a dummy run.

        Args:
            batch: The requests.
            fixed_shape: A CUDA graph of the whole model replays the step.
        """
        if batch is None:
            self.stages = (None,) * self.num_stages
            self.prompt_logprobs = False
            self.asked = {}
            self._decoding = None
            return
        if batch.rows is self._decoding and batch.is_one_token_each:
            for stage in self.stages:
                assert stage is not None
                stage.begin_again()
            return
        self.prompt_logprobs = batch.rows.prompt_logprobs
        self.stages = stages = self._planned(batch, [], fixed_shape)
        self._expect_choices(batch, stages)
        self._decoding = batch.rows if batch.is_one_token_each and batch.is_settled else None
        # A graph of fixed shape holds decodes only, and no prompt that gates could decide about.
        self.asked = {} if fixed_shape else batch.asked()
        if self.asked:
            self._batch = batch
            self._decided = {}

    def _planned(self, batch: Batch, stages: list[StageStep], fixed_shape: bool) -> list[StageStep]:
        """The first `stages`, and those behind them for `batch`."""
        if batch.rows is not self._rows:
            self._rows = batch.rows
            self._num_withdrawn = async_tensor_h2d(batch.rows.num_withdrawn, self.device)
        for index in range(len(stages), self.num_stages):
            plan = plan_stage(batch, index + 1)
            withdrawn = (
                self._num_withdrawn[index] if plan.settled else async_tensor_h2d(plan.withdrawn, self.device)
            )
            before = stages[-1] if stages else None
            stages.append(StageStep(plan, before, withdrawn, batch, fixed_shape))
        return stages

    def decide(self, stage: int, hidden: torch.Tensor, residual: torch.Tensor) -> dict[str, Any]:
        """Asks the gates before `stage` about the prompts that still have their visual tokens.

        Args:
            stage: That is about to begin.
            hidden: Of the tokens of the stage before, shape `(tokens, hidden_size)`.
            residual: Likewise.

        Returns:
            The attention metadata that are others now, by layer name.
        """
        assert self.gates is not None
        before = self.stages[stage - 2] if stage > 1 else None
        starts = self._batch.query_start_loc if before is None else before.query_start_loc
        texts = []
        for row, question in self.asked.items():
            text = slice(int(starts[row + 1]) - question.text_tokens, int(starts[row + 1]))
            texts.append(hidden[text] + residual[text])
        leave = self.gates.leave(stage, texts)
        leaving = [row for row, leaves in zip(self.asked, leave, strict=True) if leaves]
        self._decided |= dict.fromkeys(leaving, stage)
        for row in leaving:
            del self.asked[row]
        if stage == self.num_stages:
            self._decided |= dict.fromkeys(self.asked, self.num_stages + 1)
            self.asked = {}
        if not self.asked:
            self.settle(self._decided)
        if not leaving:
            return {}
        self._batch = self._batch._replace(rows=self._batch.rows.decided(dict.fromkeys(leaving, stage)))
        as_before = [planned for planned in self.stages[: stage - 1] if planned is not None]
        self.stages = self._planned(self._batch, as_before, fixed_shape=False)
        builders = dict.fromkeys(self.builders.values())
        again = [builder.build_again() for builder in builders if builder.stage >= stage]
        return dict(chain.from_iterable(metadata.items() for metadata in again))

    def _expect_choices(self, batch: Batch, stages: Sequence[StageStep]) -> None:
        leaving = [(number, stage.plan.withdrawal) for number, stage in enumerate(stages, 1)]
        withdrawals = [(number, withdrawal) for number, withdrawal in leaving if withdrawal is not None]
        ranked = {row for _, withdrawal in withdrawals for row in withdrawal.ranked}
        if not ranked:
            return
        mask = async_tensor_h2d(candidates(batch, ranked), self.device)
        starts = batch.query_start_loc
        for number, withdrawal in withdrawals:
            stages[number - 1].expect_choices(batch, number, starts, mask)
            starts = withdrawal.query_start_loc
