# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Stands in for CUDA graphs on a CPU, under model runner V2 and vLLM's own compiler.

As a pytest plugin it lets an engine take the way of a CUDA machine: `VLLM_COMPILE`, piecewise graphs in mixed
batches, graphs of the whole model in decodes. A replay here is what it is there, computed anew: the function
that was captured runs on the tensors that it was captured with, where they lie, and its results go to where
they went. What a step puts elsewhere, the replay does not see.
"""

import collections
import weakref
from collections.abc import Callable
from typing import Any

import torch

from tests.engine import triton_interpreter

assert triton_interpreter.os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"

from vllm import _custom_ops as ops
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu import cudagraph_utils

from vllm_vtw.worker.current_step import CurrentStep

SIZES = [8, 16, 32]
replays: collections.Counter = collections.Counter()
"""By mode and token count."""
captures: collections.Counter = collections.Counter()


class StaticGraph:
    """What vLLM wraps a piece of a compiled graph in."""

    def __init__(
        self, runnable: Callable, vllm_config: VllmConfig, runtime_mode: CUDAGraphMode, **_: Any
    ) -> None:
        self.runnable, self.runtime_mode = runnable, runtime_mode
        self.captured: dict[Any, tuple[tuple, Any]] = {}

    def __call__(self, *args: Any) -> Any:
        context = get_forward_context()
        if context.cudagraph_runtime_mode != self.runtime_mode:
            return self.runnable(*args)
        key = context.batch_descriptor
        if key not in self.captured:
            assert capturing, f"no graph was captured for {key}"
            captures[self.runtime_mode.name, key.num_tokens] += 1
            self.captured[key] = args, self.runnable(*args)
            return self.captured[key][1]
        replays[self.runtime_mode.name, key.num_tokens] += 1
        inputs, outputs = self.captured[key]
        assert [_place(arg) for arg in args] == [_place(arg) for arg in inputs]
        for old, new in zip(_tensors(outputs), _tensors(self.runnable(*inputs)), strict=True):
            old.copy_(new)
        return outputs


def _place(arg: Any) -> Any:
    return (arg.data_ptr(), arg.shape) if isinstance(arg, torch.Tensor) else arg


def _tensors(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else [one for one in output if one is not None]


capturing = False


def capture(self: Any, create_forward_fn: Callable, progress_bar_desc: str = "") -> None:
    """In place of `CudaGraphManager.capture`."""
    global capturing  # noqa: PLW0603
    capturing = True
    for mode in (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL):
        for desc in self._capture_descs.get(mode, []):
            create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
            forward = create_forward_fn(desc, warmup=False)
            if mode == CUDAGraphMode.PIECEWISE:
                forward(mode)
            else:
                forward(CUDAGraphMode.NONE)
                captures[mode.name, desc.num_tokens] += 1
                self.graphs[desc] = forward
    capturing = False
    self._graphs_captured = True


def run_fullgraph(self: Any, desc: Any) -> None:
    """In place of `CudaGraphManager.run_fullgraph`: what was captured knows nothing of a later plan."""
    replays[desc.cg_mode.name, desc.num_tokens] += 1
    plans = [(step, step.stages) for step in steps]
    for step in steps:
        step.stages = (None,) * step.num_stages
    self.graphs[desc](CUDAGraphMode.NONE)
    for step, stages in plans:
        step.stages = stages


def remember(self: Any, *args: Any) -> None:
    """In place of `CurrentStep.__init__`."""
    original_init(self, *args)
    steps.add(self)


steps: weakref.WeakSet[CurrentStep] = weakref.WeakSet()
original_init = CurrentStep.__init__
CurrentStep.__init__ = remember  # type: ignore[assignment]


def build(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of `CPUAttentionMetadataBuilder.build`: the schedule follows the lengths, as in a kernel."""
    metadata = original_build(self, *args, **kwargs)
    metadata.__class__ = Rescheduled
    metadata.schedule = lambda: ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(metadata.seq_lens),
        num_heads=self.num_heads,
        num_kv_heads=self.num_kv_heads,
        head_dim=self.head_dim,
        seq_lens=metadata.seq_lens,
        dtype=self.dtype,
        query_start_loc=metadata.query_start_loc,
        causal=metadata.causal,
        sliding_window_size=self.window_size,
        isa=self.isa,
        enable_kv_split=True,
        kv_cache_dtype=self.kv_cache_dtype,
    )
    return metadata


original_build = CPUAttentionMetadataBuilder.build


class Rescheduled(CPUAttentionMetadata):
    @property
    def scheduler_metadata(self) -> torch.Tensor:
        return self.schedule()

    @scheduler_metadata.setter
    def scheduler_metadata(self, _: Any) -> None: ...


def check_and_update_config(cls: Any, vllm_config: VllmConfig) -> None:
    """In place of the platform's, which would switch all of it off."""
    config = vllm_config.compilation_config
    asynchronous, mode = vllm_config.scheduler_config.async_scheduling, config.cudagraph_mode
    original_check(cls, vllm_config)
    vllm_config.scheduler_config.async_scheduling = asynchronous
    config.mode = CompilationMode.VLLM_COMPILE
    config.cudagraph_mode = mode or CUDAGraphMode.FULL_AND_PIECEWISE
    config.cudagraph_capture_sizes, config.max_cudagraph_capture_size = SIZES, SIZES[-1]
    config.compile_sizes = []


def compile_or_warm_up_model(self: Any) -> Any:
    """In place of the CPU worker's, which captures nothing."""
    times = original_warm_up(self)
    self.model_runner.capture_model(profile_only=True)
    return times


original_check: Any = CpuPlatform.check_and_update_config.__func__
original_warm_up = CPUWorker.compile_or_warm_up_model
CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
CpuPlatform.get_static_graph_wrapper_cls = classmethod(lambda cls: f"{__name__}.StaticGraph")
CpuPlatform.get_global_graph_pool = lambda self: None
CPUWorker.compile_or_warm_up_model = compile_or_warm_up_model
CPUAttentionMetadataBuilder.build = build
CPUAttentionMetadataBuilder._cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
cudagraph_utils.CudaGraphManager.capture = capture
cudagraph_utils.CudaGraphManager.run_fullgraph = run_fullgraph
# It looks for CUDA operators by name.
FixFunctionalizationPass.__call__ = lambda self, graph: None
torch.accelerator.empty_cache = lambda: None
torch.accelerator.get_memory_info = lambda *_: (0, 0)
# Inductor asks for the compiler behind Triton, which the interpreter has none of.
torch.utils._triton.triton_hash_with_backend = lambda: "interpreter"  # type: ignore[assignment]
