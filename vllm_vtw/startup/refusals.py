# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Options of vLLM that are refused, each with the way out."""

from collections.abc import Iterator

from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.config import CompilationMode, VllmConfig
from vllm.platforms import current_platform

from vllm_vtw.config import GATED_WORKER, ORDERING_WORKER, PIPELINE_WORKER, SCHEDULER
from vllm_vtw.families import ELSEWHERE, text_refusal
from vllm_vtw.policy import BY_ATTENTION, Policy
from vllm_vtw.startup.connectors import connector_refusals
from vllm_vtw.startup.drafters import drafter_layers, drafter_refusals
from vllm_vtw.startup.options import has_timestamps

KV_CACHE_TYPES = ("auto", "float32", "float16", "bfloat16")
"""The values of `--kv-cache-dtype` with which a KV cache holds keys and values as they were computed."""
QUANTIZED_KV_CACHE_TYPES = ("fp8", "fp8_e4m3", "fp8_e5m2")
"""Those that are quantized and supported."""


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Refuses options with which no policy can be served.

    Raises:
        ValueError: There are such options. The message names all of them and what to do instead.
    """
    _refuse("serve this configuration", list(_refusals(vllm_config)))


def refuse_unsupported_dynamic(vllm_config: VllmConfig, policy: Policy) -> None:
    """Refuses options with which this policy, which ranks visual tokens or has gates, cannot be served.

    Raises:
        ValueError: There are such options. The message names all of them and what to do instead.
    """
    what = "use gates" if policy.ranking is None else "rank visual tokens"
    _refuse(f"{what} in this configuration", list(_dynamic_refusals(vllm_config, policy)))


def refuse_unsupported_features(vllm_config: VllmConfig) -> None:
    """Refuses options with which images cannot be ranked by their features.

    Raises:
        ValueError: There are such options. The message names all of them and what to do instead.
    """
    refused = list(_worker_refusals(vllm_config, "a ranking by features", ORDERING_WORKER))
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        refused.insert(
            0,
            "the pipeline rank that computes features is not the one that answers the scheduler: use "
            "--tensor-parallel-size, not --pipeline-parallel-size",
        )
    if drafter_layers(vllm_config):
        refused.append(
            "a drafter's layers beside a ranking by features are untested: remove --speculative-config, or "
            "use one without a model of its own, such as ngram"
        )
    if vllm_config.scheduler_config.disable_chunked_mm_input:
        refused.append(
            "images are encoded before the step that computes their tokens: remove --disable-chunked-mm-input"
        )
    _refuse("rank visual tokens by their features in this configuration", refused)


def refuse_unsupported_guard(vllm_config: VllmConfig) -> None:
    """Refuses options with which a guard cannot read answers again.

    Raises:
        ValueError: There are such options. The message names all of them and what to do instead.
    """
    model, refused = vllm_config.model_config, []
    if model.logprobs_mode.endswith("logits"):
        refused.append(
            f"it compares log-probabilities, not logits: remove --logprobs-mode {model.logprobs_mode}"
        )
    if model.multimodal_config and model.multimodal_config.mm_processor_cache_type == "shm":
        refused.append(
            "it reads images again that the shared cache may have dropped: "
            "remove --mm-processor-cache-type shm"
        )
    lora = vllm_config.lora_config
    if lora is not None and any(name.endswith("lm_head") for name in lora.target_modules or ["lm_head"]):
        refused.append(
            "vLLM computes log-probabilities of prompts without, or with wrong, adapters of the LM head: set "
            "--lora-target-modules to the modules of your adapters, without lm_head"
        )
    _refuse('have a "guard" in this configuration', refused)


def _refuse(what: str, reasons: list[str]) -> None:
    if reasons:
        # vLLM's configuration classes print their arguments behind the message: on a line of their own.
        raise ValueError("\n- ".join([f"--model-impl vtw cannot {what}:", *reasons]) + "\n")


def _refusals(vllm_config: VllmConfig) -> Iterator[str]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    scheduler, speculative = vllm_config.scheduler_config, vllm_config.speculative_config

    yield from _model_refusals(vllm_config)
    if not isinstance(vllm_config.additional_config, dict | None):
        yield "--additional-config has to be a JSON object"
    if speculative is not None:
        yield from drafter_refusals(vllm_config)
    if vllm_config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE:
        yield "compilation mode 1 compiles the whole model at once: remove -cc.mode=1, vLLM's default is 3"
    if parallel.pipeline_parallel_size > 1:
        yield from _worker_refusals(vllm_config, "pipeline parallelism", PIPELINE_WORKER)
    if is_breakable_cudagraph_enabled():
        yield "breakable CUDA graphs fix each stage's number of tokens: set VLLM_USE_BREAKABLE_CUDAGRAPH=0"
    if parallel.decode_context_parallel_size > 1:
        yield "decode context parallelism: remove --decode-context-parallel-size"
    if parallel.prefill_context_parallel_size > 1:
        yield "prefill context parallelism: remove --prefill-context-parallel-size"
    if parallel.enable_dbo or parallel.ubatch_size > 1:
        yield "micro-batching: remove --enable-dbo and --ubatch-size"
    yield from connector_refusals(vllm_config)
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in KV_CACHE_TYPES + QUANTIZED_KV_CACHE_TYPES:
        yield (
            f"the KV cache type {cache_dtype} may keep scales in memory that KV cache groups share: use "
            f"--kv-cache-dtype fp8, or remove --kv-cache-dtype {cache_dtype}"
        )
    if vllm_config.cache_config.prefix_match_unit is not None:
        yield "requests can share only whole KV blocks: remove --prefix-match-unit"
    events = vllm_config.kv_events_config
    if events is not None and events.enable_kv_cache_events:
        yield "KV events would report withdrawn tokens as held by deep layers: remove --kv-events-config"
    if vllm_config.ec_transfer_config is not None:
        yield "encoder-cache connectors are untested: remove --ec-transfer-config"
    if model.enable_prompt_embeds:
        yield "prompt embeddings do not say which positions are visual: remove --enable-prompt-embeds"
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        yield "fast prefill skips tokens of the prompt by its own rule: remove --kv-sharing-fast-prefill"
    if scheduler.disable_hybrid_kv_cache_manager:
        yield "each stage needs its own KV cache groups: remove --disable-hybrid-kv-cache-manager"
    if scheduler.scheduler_cls not in (None, SCHEDULER):
        yield f"the plugin brings its own scheduler: remove --scheduler-cls {scheduler.scheduler_cls}"


def _model_refusals(vllm_config: VllmConfig) -> Iterator[str]:
    """The reasons that lie in the model and in what is asked of it."""
    model = vllm_config.model_config
    text = model.hf_text_config
    why_not = text_refusal(text.model_type, text.to_dict())
    if why_not is not None:
        yield str(why_not)
    if model.runner_type != "generate":
        yield f"--runner {model.runner_type} pools the states of withdrawn tokens, too: use --runner generate"
    if vllm_config.is_mm_encoder_only:
        yield f"--mm-encoder-only runs no decoder: {ELSEWHERE}"
    if model.is_moe and vllm_config.parallel_config.data_parallel_size > 1:
        yield (
            "data parallelism of a mixture of experts counts the tokens of the whole batch, not of a stage: "
            "use --tensor-parallel-size, not --data-parallel-size"
        )
    pruning = model.multimodal_config and model.multimodal_config.video_pruning_rate
    if pruning and has_timestamps(vllm_config):
        yield (
            "vLLM does not say where the timestamps between the frames of a pruned video are: remove "
            f"--video-pruning-rate {pruning:g}"
        )
    elif pruning and current_platform.is_cpu():
        yield f"vLLM fails with pruned videos on the CPU: remove --video-pruning-rate {pruning:g}"
    if model.uses_mrope and vllm_config.compilation_config.compile_sizes:
        yield (
            "code for one number of tokens reads M-RoPE's positions wrongly after tokens have left: remove "
            "compile_sizes from --compilation-config"
        )
    if vllm_config.aux_output_config.enable_return_routed_experts:
        yield (
            "deep layers route no withdrawn tokens: remove enable_return_routed_experts from "
            "--aux-output-config"
        )


def _dynamic_refusals(vllm_config: VllmConfig, policy: Policy) -> Iterator[str]:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if parallel.pipeline_parallel_size > 1:
        yield (
            "pipeline ranks do not tell each other which tokens stay: use --tensor-parallel-size, not "
            "--pipeline-parallel-size"
        )
    if policy.gate is not None:
        yield from _worker_refusals(vllm_config, "a policy with gates", GATED_WORKER)
    if vllm_config.kv_transfer_config is not None or cache.kv_offloading_size is not None:
        yield (
            "another engine would not know which tokens stayed: use a policy without a ranking or gates, or "
            "remove --kv-transfer-config and --kv-offloading-size"
        )
    if policy.ranking in BY_ATTENTION and cache.cache_dtype not in KV_CACHE_TYPES:
        yield (
            f"the ranking {policy.ranking!r} needs keys that are not quantized: remove --kv-cache-dtype "
            f"{cache.cache_dtype}"
        )
    scheduler = vllm_config.scheduler_config
    if (
        scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    ) < scheduler.max_num_batched_tokens:
        yield (
            "this policy computes a prompt in one step: set --max-num-batched-tokens, not "
            "--max-num-scheduled-tokens"
        )
    if scheduler.long_prefill_token_threshold > 0:
        yield "this policy computes a prompt in one step: remove --long-prefill-token-threshold"


def _worker_refusals(vllm_config: VllmConfig, what: str, worker: str) -> Iterator[str]:
    """The reasons why `what` cannot run, as far as it needs the plugin's class `worker`."""
    chosen = vllm_config.parallel_config.worker_cls
    if chosen not in ("auto", worker):
        yield f"{what} needs the plugin's own worker: remove --worker-cls {chosen}"
    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        yield f"{what} on {current_platform.device_name}: the plugin has workers for CUDA, ROCm and the CPU"
