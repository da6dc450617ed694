# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Reads, checks and adjusts vLLM's configuration before an engine starts."""

from collections.abc import Iterator

from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.config import CompilationMode, KVTransferConfig, VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vllm_vtw.capacity import LayerGroups
from vllm_vtw.config import (
    ADMISSION,
    GATED_WORKER,
    KEYS,
    PIPELINE_WORKER,
    SCHEDULER,
    Admission,
    ModelShape,
    VTWConfig,
)
from vllm_vtw.families import (
    BY_ARCHITECTURE,
    ELSEWHERE,
    FRAMES,
    PREFIX,
    Family,
    first_layer,
    supported_architecture,
    text_refusal,
)
from vllm_vtw.gates import load_gates
from vllm_vtw.policy import Policy

_NIXL = "StagedNixlConnector", "vllm_vtw.connectors.nixl"
OFFLOADING, _ = _OFFLOAD = "StagedOffloadConnector", "vllm_vtw.connectors.offload"
CONNECTORS = dict.fromkeys(("NixlConnector", "NixlPullConnector", _NIXL[0]), _NIXL)
CONNECTORS |= dict.fromkeys(("SimpleCPUOffloadConnector", OFFLOADING), _OFFLOAD)
"""By KV connector of vLLM, the plugin's subclass of it and the module that has it."""
DRAFTERS = ("eagle", "eagle3", "draft_model")
"""The methods of speculative decoding with a model of their own that are supported."""


def vtw_config(vllm_config: VllmConfig) -> VTWConfig:
    """The plugin's configuration. It is the same in all processes of an engine.

    Raises:
        ValueError: An option of the plugin is not allowed or is not under `"vtw"`.
    """
    additional = vllm_config.additional_config or {}
    misplaced = [key for key in KEYS if key in additional]
    if misplaced and "vtw" not in additional:
        raise ValueError(
            f'--additional-config ["{misplaced[0]}"]: the options of --model-impl vtw go under "vtw", '
            f'as in \'{{"vtw": {{"{misplaced[0]}": ...}}}}\''
        )
    options = additional.get("vtw", {})
    return VTWConfig.parse(options, _model(vllm_config), bool(vllm_config.cache_config.enable_prefix_caching))


def _model(vllm_config: VllmConfig) -> ModelShape:
    model_config = vllm_config.model_config
    text = model_config.hf_text_config
    return ModelShape(
        model_config.hf_config.model_type,
        text.model_type,
        text.num_hidden_layers,
        text.hidden_size,
        text.vocab_size,
        _family(vllm_config).bridge,
        first_layer(model_config.hf_config),
    )


def _family(vllm_config: VllmConfig) -> Family:
    model_config = vllm_config.model_config
    # vLLM sets the first where it has resolved the class, to the plugin's own name of it.
    names = [name.removeprefix(PREFIX) for name in (model_config.architecture, *model_config.architectures)]
    architecture = supported_architecture(names)
    assert architecture is not None
    return BY_ARCHITECTURE[architecture]


def has_timestamps(vllm_config: VllmConfig) -> bool:
    """Whether text tokens stand between the visual tokens of a video's frames."""
    return FRAMES in _family(vllm_config).video


def layer_groups(vllm_config: VllmConfig, policy: Policy) -> LayerGroups:
    """The KV-cache groups under a policy. They are the same in all processes of an engine."""
    num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    size = vllm_config.parallel_config.pipeline_parallel_size
    ranks = [range(*get_pp_indices(num_layers, rank, size)) for rank in range(size)]
    return LayerGroups.of(policy, num_layers, ranks, drafter_layers(vllm_config))


def drafter_layers(vllm_config: VllmConfig) -> int:
    """The number of layers of a drafter for speculative decoding, which have a KV cache of all tokens."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method not in DRAFTERS:
        return 0
    layers: int = speculative.draft_model_config.hf_text_config.num_hidden_layers
    return layers


class VTWModelConfig(VerifyAndUpdateConfig):
    """vLLM's hook through which a model architecture checks and changes the configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuses what cannot be served correctly, and sets the options that the plugin needs.

        It sets the scheduler and, for policies with gates and for pipeline ranks, the worker. It replaces the
        user's `"vtw"` options by resolved ones, which mean the same in every process. vLLM calls this before
        the engine starts.

        Raises:
            ValueError: An option is not supported, or the policy or its gates cannot be used.
        """
        refuse_unsupported(vllm_config)
        config = vtw_config(vllm_config)
        vllm_config.additional_config = {
            **(vllm_config.additional_config or {}),
            "vtw": config.resolved(_model(vllm_config)),
        }
        scheduler = vllm_config.scheduler_config
        scheduler.scheduler_cls = SCHEDULER
        if config.policy.gate is not None:
            hidden_size = vllm_config.model_config.get_hidden_size()
            load_gates(config.policy.gate, [stage.layer for stage in config.policy.stages], hidden_size)
        if config.guard_share:
            refuse_unsupported_guard(vllm_config)
        if drafter_layers(vllm_config):
            layer_groups(vllm_config, config.policy)  # may have no place for them
        cache = vllm_config.cache_config
        if cache.kv_offloading_size is not None:
            vllm_config.kv_transfer_config = KVTransferConfig(
                kv_connector=OFFLOADING,
                kv_role="kv_both",
                kv_connector_extra_config={"cpu_bytes_to_use": cache.kv_offloading_size * 2**30},
            )
            cache.kv_offloading_size = None  # vLLM would choose its own connector
        transfer = vllm_config.kv_transfer_config
        if transfer is not None:
            connector, transfer.kv_connector_module_path = CONNECTORS[transfer.kv_connector]
            transfer.kv_connector = connector
            if connector == OFFLOADING:
                _refuse_to_offload(layer_groups(vllm_config, config.policy))
        admission = Admission(
            config.policy, config.num_layers, config.bridge, scheduler.max_num_batched_tokens
        )
        setattr(vllm_config.model_config, ADMISSION, admission)
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            vllm_config.parallel_config.worker_cls = PIPELINE_WORKER
        if config.policy.is_dynamic:
            refuse_unsupported_dynamic(vllm_config, config.policy)
            if config.policy.gate is not None:
                vllm_config.parallel_config.worker_cls = GATED_WORKER


def _refuse_to_offload(groups: LayerGroups) -> None:
    """Refuses groups with which vLLM cannot offload blocks.

    Raises:
        ValueError: vLLM needs a group that holds all tokens in blocks of one page.
    """
    if not any((group.stage, group.pages) == (0, 1) for group in groups.groups):
        raise ValueError(
            "--model-impl vtw cannot offload KV blocks if those of the first layers hold several pages: "
            "withdraw at a deeper layer, or remove --kv-offloading-size and --kv-transfer-config"
        )


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Refuses options with which no policy can be served.

    Raises:
        ValueError: There are such options. The message names all of them and what to do instead.
    """
    refused = list(_refusals(vllm_config))
    if refused:
        raise ValueError("--model-impl vtw cannot serve this configuration:\n- " + "\n- ".join(refused))


def refuse_unsupported_dynamic(vllm_config: VllmConfig, policy: Policy) -> None:
    """Refuses options with which this policy, which ranks visual tokens or has gates, cannot be served.

    Raises:
        ValueError: There are such options. The message names all of them and what to do instead.
    """
    refused = list(_dynamic_refusals(vllm_config, policy))
    if refused:
        what = "use gates" if policy.ranking is None else "rank visual tokens"
        raise ValueError(f"--model-impl vtw cannot {what} in this configuration:\n- " + "\n- ".join(refused))


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
    if refused:
        raise ValueError(
            '--model-impl vtw cannot have a "guard" in this configuration:\n- ' + "\n- ".join(refused)
        )


def _refusals(vllm_config: VllmConfig) -> Iterator[str]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    scheduler, speculative = vllm_config.scheduler_config, vllm_config.speculative_config

    yield from _model_refusals(vllm_config)
    if not isinstance(vllm_config.additional_config, dict | None):
        yield "--additional-config has to be a JSON object"
    if speculative is not None:
        yield from _drafter_refusals(vllm_config)
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
    if vllm_config.cache_config.kv_offloading_size is not None:
        yield from _offloading_refusals(vllm_config)
    if vllm_config.kv_transfer_config is not None:
        yield from _connector_refusals(vllm_config)
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


def _connector_refusals(vllm_config: VllmConfig) -> Iterator[str]:
    """The reasons that lie in a KV connector."""
    transfer = vllm_config.kv_transfer_config
    if transfer.kv_connector not in CONNECTORS:
        yield (
            f"the KV connector {transfer.kv_connector} may take blocks for those of all tokens: use "
            "NixlConnector or SimpleCPUOffloadConnector, or remove --kv-transfer-config"
        )
        return
    if CONNECTORS[transfer.kv_connector] == _OFFLOAD:
        yield from _host_refusals("--kv-transfer-config")
    if not transfer.get_from_extra_config("enforce_handshake_compat", True):
        yield (
            "engines that withdraw other tokens must not read each other's blocks: remove "
            "enforce_handshake_compat from --kv-transfer-config"
        )
    if transfer.get_from_extra_config("bidirectional_kv_xfer", False):
        yield (
            "the engine that prefills would not know at which layer the tokens of blocks that it reads back "
            "left: remove bidirectional_kv_xfer from --kv-transfer-config"
        )
    if drafter_layers(vllm_config):
        yield "a drafter beside a KV connector is untested: remove --speculative-config"
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        yield (
            "a KV connector knows one block pool, not one of each pipeline rank: use --tensor-parallel-size, "
            "not --pipeline-parallel-size"
        )


def _offloading_refusals(vllm_config: VllmConfig) -> Iterator[str]:
    """The reasons that lie in `--kv-offloading-size`."""
    if vllm_config.kv_transfer_config is not None:
        yield "several KV connectors are untested: remove --kv-offloading-size or --kv-transfer-config"
    if vllm_config.cache_config.kv_offloading_backend != "native":
        yield "LMCache takes blocks for those of all tokens: remove --kv-offloading-backend"
    yield from _host_refusals("--kv-offloading-size")


def _host_refusals(option: str) -> Iterator[str]:
    if not current_platform.is_cuda_alike():
        yield (
            f"KV offloading copies blocks with CUDA, which {current_platform.device_name} has not: "
            f"remove {option}"
        )


def _drafter_refusals(vllm_config: VllmConfig) -> Iterator[str]:
    """The reasons that lie in speculative decoding."""
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    if speculative.use_ngram():
        return
    if speculative.method not in DRAFTERS:
        methods = ", ".join(("ngram", *DRAFTERS))
        yield (
            f"speculative decoding with method {speculative.method!r}: use one of {methods}, or remove "
            "--speculative-config"
        )
        return
    if parallel.pipeline_parallel_size > 1:
        yield (
            f"pipeline ranks do not share the blocks of a drafter with method {speculative.method!r}: use "
            '--tensor-parallel-size, not --pipeline-parallel-size, or "method": "ngram"'
        )
    draft, model = speculative.draft_model_config, vllm_config.model_config
    cache_dtype = vllm_config.cache_config.cache_dtype
    shapes = [
        (one.get_num_kv_heads(ranks), one.get_head_size(), one.dtype, in_cache, one.get_sliding_window())
        for one, ranks, in_cache in (
            (draft, speculative.draft_parallel_config, speculative.kv_cache_dtype or cache_dtype),
            (model, parallel, cache_dtype),
        )
    ]
    if speculative.parallel_drafting:
        yield "parallel drafting is untested: remove parallel_drafting from --speculative-config"
    if shapes[0] != shapes[1]:
        described = [
            f"{heads} heads of {size} in {dtype}, --kv-cache-dtype {in_cache}, sliding window {window}"
            for heads, size, dtype, in_cache, window in shapes
        ]
        yield (
            f"the drafter's keys and values have another shape ({described[0]}) than the model's "
            f'({described[1]}), and would not fit in its KV blocks: use another drafter, or "method": "ngram"'
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
    if vllm_config.kv_transfer_config is not None:
        yield (
            "another engine would not know which tokens stayed: use a policy without a ranking or gates, or "
            "remove --kv-transfer-config and --kv-offloading-size"
        )
    if policy.ranking is not None and cache.cache_dtype not in ("auto", "bfloat16", "float16", "float32"):
        yield f"ranking needs keys that are not quantized: remove --kv-cache-dtype {cache.cache_dtype}"
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
