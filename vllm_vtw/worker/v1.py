"""The seam into model runner V1: it tells the step which requests the batch holds."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.worker.gpu_input_batch import CachedRequestState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_vtw.config import VTWConfig
from vllm_vtw.retention import Retention, decided, request_retentions
from vllm_vtw.worker.exits import blocks_left
from vllm_vtw.worker.plan import Batch, Rows, reads_prompt_rows
from vllm_vtw.worker.seeded import allow_taking_back
from vllm_vtw.worker.step import CurrentStep

TARGET = "_build_attention_metadata"
EXTENSION_POINT = "_prepare_model_batch"
NEEDED_PARAMETERS = {"self", "num_reqs", "num_scheduled_tokens", "num_tokens_padded"}


def install() -> None:
    """Wraps the runner's metadata building, unless this vLLM calls the model's `prepare_batch` itself.

    Raises:
        RuntimeError: The method is not what the wrapper was written for.
    """
    if hasattr(GPUModelRunner, EXTENSION_POINT):
        return
    original = getattr(GPUModelRunner, TARGET, None)
    if getattr(original, "calls_prepare_batch", False):
        return
    if original is None or not inspect.signature(original).parameters.keys() >= NEEDED_PARAMETERS:
        raise RuntimeError(f"vllm-vtw does not know this vLLM's GPUModelRunner.{TARGET}")

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
    """Begins each step of a model runner V1 with the batch that it is about to run."""

    def __init__(self, config: VTWConfig, step: CurrentStep) -> None:
        self.config = config
        self.step = step
        step.settle = self._settle
        self.made_for: SamplingMetadata | None = None
        """The sampling metadata of the step before: the runner makes them anew when a request joins, leaves
        or moves, also where an id is used again."""
        self.known: dict[str, tuple[CachedRequestState, tuple[Retention, ...]]] = {}
        """By request id, with the request that it was made from: an id may be used again."""

    def prepare(
        self,
        runner: GPUModelRunner,
        num_reqs: int,
        num_scheduled_tokens: Mapping[str, int] | None,
        fixed_shape: bool,
    ) -> None:
        """What the runner calls before it builds attention metadata.

        Args:
            runner: Holds the requests and the batch.
            num_reqs: Rows of the batch, without padding.
            num_scheduled_tokens: By request; None in a dummy run, which has no requests.
            fixed_shape: A CUDA graph of the whole model replays the step.
        """
        self.runner = runner
        if num_scheduled_tokens is None:
            self.step.begin(None)
            return
        if runner.device.type == "cpu":
            allow_taking_back(runner, num_reqs)
        if runner.input_batch.sampling_metadata is not self.made_for:
            self.made_for = runner.input_batch.sampling_metadata
            self._take(runner, runner.input_batch.req_ids[:num_reqs])
        num_computed = runner.input_batch.num_computed_tokens_cpu[:num_reqs]
        self.step.begin(
            Batch(self.rows, num_computed, runner.query_start_loc.np[: num_reqs + 1]), fixed_shape
        )

    def _take(self, runner: GPUModelRunner, req_ids: list[str]) -> None:
        requests = [runner.requests[req_id] for req_id in req_ids]
        wanted = [request.sampling_params for request in requests]
        self.rows = Rows.of(
            [self._retentions(runner, request) for request in requests], any(map(reads_prompt_rows, wanted))
        )
        if len(self.known) > 2 * len(runner.requests):
            self.known = {req_id: known for req_id, known in self.known.items() if req_id in runner.requests}

    def _retentions(self, runner: GPUModelRunner, request: CachedRequestState) -> tuple[Retention, ...]:
        known, retentions = self.known.get(request.req_id, (None, ()))
        if known is not request or request.req_id in self.step.known_exits:
            block_size = runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
            align_to = self.config.align_to(block_size)
            retentions = request_retentions(
                self.config.policy, request.mm_features, request.num_prompt_tokens, align_to
            )
            exit_stage = self.step.known_exits.get(request.req_id)
            if exit_stage is not None:
                retentions = decided(retentions, exit_stage)
            self.known[request.req_id] = (request, retentions)
        return retentions

    def _settle(self, exits: Mapping[int, int]) -> None:
        """Keeps what gates decided, and drops the blocks from the rows that the scheduler takes back."""
        tables = self.runner.input_batch.block_table
        for row, exit_stage in exits.items():
            request = self.runner.requests[self.runner.input_batch.req_ids[row]]
            _, undecided = self.known[request.req_id]
            retentions = decided(undecided, exit_stage)
            self.known[request.req_id] = (request, retentions)
            self.step.exits[request.req_id] = exit_stage
            groups = self.runner.kv_cache_config
            for group, blocks in blocks_left(groups, retentions, request.num_prompt_tokens):
                del request.block_ids[group][blocks:]
                tables[group].num_blocks_per_row[row] = blocks
        self.made_for = None
