# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What cannot be served right is refused before anything starts, by name and with the way out."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.config import CompilationMode, ECTransferConfig, KVEventsConfig, KVTransferConfig
from vllm.engine.arg_utils import EngineArgs

from benchmarks.small_llava import SmallLlava
from tests.engine.drafters import draft_model
from tests.engine.engines import MODEL
from tests.engine.gates import LAYERS, gated, random_gates
from vllm_vtw.startup import connectors


def nixl(**options):
    return KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_both", **options)


OPTIONS = [
    (
        {"aux_output_config": {"enable_return_routed_experts": True}},
        "remove enable_return_routed_experts from --aux-output-config",
    ),
    ({"compilation_config": {"mode": 1}, "enforce_eager": False}, "compilation mode 1 .* remove -cc.mode=1"),
    (
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
        "decode context parallelism: remove --decode-context-parallel-size",
    ),
    (
        {"prefill_context_parallel_size": 2},
        "prefill context parallelism: remove --prefill-context-parallel-size",
    ),
    ({"enable_dbo": True}, "micro-batching: remove --enable-dbo"),
    (
        {"kv_transfer_config": KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")},
        "the KV connector ExampleConnector .* use NixlConnector, or .* remove --kv-transfer-config",
    ),
    (
        {"kv_transfer_config": nixl(kv_connector_extra_config={"bidirectional_kv_xfer": True})},
        "remove bidirectional_kv_xfer from --kv-transfer-config",
    ),
    (
        {"kv_offloading_size": 1.0},
        "KV offloading copies blocks with CUDA, .* remove --kv-offloading-size",
    ),
    (
        {"kv_offloading_size": 1.0, "kv_offloading_backend": "lmcache"},
        "LMCache .* remove --kv-offloading-backend",
    ),
    ({"kv_offloading_size": 1.0, "kv_transfer_config": nixl()}, "remove --kv-offloading-size or --kv-tr"),
    (
        {"kv_offloading_size": 1.0, "pipeline_parallel_size": 2},
        "--kv-offloading-size moves the blocks of one pool.*use --tensor-parallel-size, not --pipeline",
    ),
    (
        {"kv_cache_dtype": "int8_per_token_head"},
        "int8_per_token_head may keep scales .* use --kv-cache-dtype fp8",
    ),
    (
        {"kv_transfer_config": nixl(kv_connector_extra_config={"enforce_handshake_compat": False})},
        "remove enforce_handshake_compat from --kv-transfer-config",
    ),
    (
        {"kv_transfer_config": nixl(), "pipeline_parallel_size": 2},
        "--kv-transfer-config moves the blocks of one pool.*use --tensor-parallel-size, not --pipeline",
    ),
    (
        {"ec_transfer_config": ECTransferConfig(ec_connector="ECExampleConnector", ec_role="ec_both")},
        "encoder-cache connectors .* remove --ec-transfer-config",
    ),
    ({"prefix_match_unit": 16, "block_size": 32}, "whole KV blocks: remove --prefix-match-unit"),
    (
        {"kv_events_config": KVEventsConfig(enable_kv_cache_events=True)},
        "KV events .* remove --kv-events-config",
    ),
    ({"mm_encoder_only": True}, "--mm-encoder-only runs no decoder"),
    ({"ubatch_size": 2}, "micro-batching: remove --enable-dbo and --ubatch-size"),
    ({"enable_prompt_embeds": True}, "prompt embeddings .* remove --enable-prompt-embeds"),
    ({"kv_sharing_fast_prefill": True}, "fast prefill .* remove --kv-sharing-fast-prefill"),
    ({"disable_hybrid_kv_cache_manager": True}, "remove --disable-hybrid-kv-cache-manager"),
    ({"scheduler_cls": "elsewhere.Scheduler"}, "remove --scheduler-cls elsewhere.Scheduler"),
    ({"runner": "pooling"}, "--runner pooling .* use --runner generate"),
    (
        {"additional_config": {"layer": 2}},
        re.escape('["layer"]: the options of --model-impl vtw go under "vtw"'),
    ),
    ({"additional_config": {"vtw": {"layer": 99}}}, re.escape('["vtw"]["layer"] = 99: has to be an integer')),
]


RANKED = {
    "format": "vllm-vtw-policy/1",
    "model": {"model_type": "llava", "num_hidden_layers": MODEL.layers, "hidden_size": MODEL.hidden},
    "stages": [{"layer": 3, "keep": 0.5}],
    "ranking": "last-token-attention",
}
WITH_QUESTION = [
    ({"pipeline_parallel_size": 2}, "use --tensor-parallel-size, not --pipeline-parallel-size"),
    ({"max_num_scheduled_tokens": 64}, "set --max-num-batched-tokens, not --max-num-scheduled-tokens"),
    ({"long_prefill_token_threshold": 64}, "remove --long-prefill-token-threshold"),
    ({"kv_transfer_config": nixl()}, "would not know which tokens stayed: .* remove --kv-tr"),
]
WITH_RANKING = [*WITH_QUESTION, ({"kv_cache_dtype": "fp8"}, "remove --kv-cache-dtype fp8")]
WITH_GATES = [*WITH_QUESTION, ({"worker_cls": "elsewhere.Worker"}, "remove --worker-cls elsewhere.Worker")]


def configure(folder: Path, **options):
    defaults = {"model_impl": "vtw", "dtype": "float32", "max_model_len": 512, "enforce_eager": True}
    defaults["additional_config"] = {"vtw": {"layer": 3}}
    return EngineArgs(model=str(folder), **(defaults | options)).create_engine_config()


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=lambda value: next(iter(value), "")[:40])
def test_an_option(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        configure(checkpoint(MODEL), **options)


@pytest.mark.parametrize(("options", "message"), WITH_RANKING, ids=lambda value: next(iter(value), "")[:40])
def test_an_option_that_only_ranking_refuses(checkpoint, options, message):
    folder = checkpoint(MODEL)
    configure(folder, **options)
    with pytest.raises(ValueError, match=f"cannot rank visual tokens in this configuration:\n- .*{message}"):
        configure(folder, additional_config={"vtw": {"policy": RANKED}}, **options)


@pytest.mark.parametrize(("options", "message"), WITH_GATES, ids=lambda value: next(iter(value), "")[:40])
def test_an_option_that_only_gates_refuse(checkpoint, tmp_path, options, message):
    folder = checkpoint(MODEL)
    configure(folder, **options)
    gates = gated(tmp_path, random_gates(LAYERS), [0.0] * len(LAYERS))
    with pytest.raises(ValueError, match=f"cannot use gates in this configuration:\n- .*{message}"):
        configure(folder, additional_config={"vtw": gates.options}, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs_mode": "raw_logits"}, "remove --logprobs-mode raw_logits"),
        ({"mm_processor_cache_type": "shm"}, "remove --mm-processor-cache-type shm"),
        ({"enable_lora": True}, "set --lora-target-modules .* without lm_head"),
        ({"enable_lora": True, "lora_target_modules": ["model.lm_head"]}, "set --lora-target-modules "),
    ],
)
def test_an_option_that_only_a_guard_refuses(checkpoint, options, message):
    folder = checkpoint(MODEL)
    configure(folder, **options)
    with pytest.raises(ValueError, match=f'cannot have a "guard" in this configuration:\n- .*{message}'):
        configure(folder, additional_config={"vtw": {"layer": 3, "guard": {"share": 0.5}}}, **options)


def test_other_methods_of_speculative_decoding(checkpoint):
    states = {"method": "extract_hidden_states", "num_speculative_tokens": 1}
    states["draft_model_config"] = {"hf_config": {"eagle_aux_hidden_state_layer_ids": [1]}}
    message = r"with method 'extract_hidden_states': use one of ngram, eagle, eagle3, draft_model"
    with pytest.raises(ValueError, match=message):
        configure(checkpoint(MODEL), speculative_config=states)


def test_a_drafter_with_other_heads(checkpoint, tmp_path):
    folder = checkpoint(MODEL)
    drafter = draft_model(tmp_path / "draft", folder)
    file = tmp_path / "draft" / "config.json"
    config = json.loads(file.read_text()) | {"num_key_value_heads": 1}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"\(1 heads of 32 .*\(2 heads of 32 .*: use another drafter"):
        configure(folder, speculative_config=drafter)


@pytest.mark.parametrize(
    ("speculative", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, r"use another drafter"),
        ({"parallel_drafting": True}, "remove parallel_drafting from --speculative-config"),
    ],
)
def test_a_drafter_with_another_kv_cache(checkpoint, tmp_path, speculative, message):
    folder = checkpoint(MODEL)
    drafter = draft_model(tmp_path / "draft", folder)
    with pytest.raises(ValueError, match=message):
        configure(folder, speculative_config=drafter | speculative)


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ({"kv_transfer_config": nixl()}, "--kv-transfer-config"),
        ({"kv_offloading_size": 1}, "--kv-offloading-size"),
    ],
)
def test_a_drafter_beside_a_kv_connector(checkpoint, tmp_path, option, name):
    folder = checkpoint(MODEL)
    drafter = draft_model(tmp_path / "draft", folder)
    with pytest.raises(ValueError, match=f"a drafter beside {name} .* remove --speculative-config"):
        configure(folder, speculative_config=drafter, **option)


def test_a_ranking_by_image_beside_a_kv_connector(checkpoint):
    policy = RANKED | {"ranking": "uniform"}
    with pytest.raises(ValueError, match=r"the ranking 'uniform' beside .* remove --kv-transfer-config"):
        configure(checkpoint(MODEL), additional_config={"vtw": {"policy": policy}}, kv_transfer_config=nixl())


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ({"pipeline_parallel_size": 2}, "use --tensor-parallel-size, not --pipeline-parallel-size"),
        ({"worker_cls": "somebody.Worker"}, "remove --worker-cls somebody.Worker"),
        ({"disable_chunked_mm_input": True}, "remove --disable-chunked-mm-input"),
    ],
    ids=["pipeline", "worker", "chunks"],
)
def test_a_ranking_by_features(checkpoint, option, why):
    policy = RANKED | {"ranking": "diversity"}
    with pytest.raises(ValueError, match=rf"cannot rank visual tokens by their features.*[\s\S]*{why}"):
        configure(checkpoint(MODEL), additional_config={"vtw": {"policy": policy}}, **option)


def test_a_ranking_by_features_beside_a_drafter(checkpoint, tmp_path):
    folder = checkpoint(MODEL)
    policy = RANKED | {"ranking": "diversity"}
    with pytest.raises(ValueError, match=r"beside a ranking by features are untested: remove --speculative-"):
        configure(
            folder,
            speculative_config=draft_model(tmp_path / "draft", folder),
            additional_config={"vtw": {"policy": policy}},
        )


def test_ranking_beside_offloading(checkpoint, monkeypatch):
    monkeypatch.setattr(connectors, "current_platform", SimpleNamespace(is_cuda_alike=lambda: True))
    policy = {"vtw": {"policy": RANKED}}
    with pytest.raises(ValueError, match=r"which tokens stayed: .* remove .* --kv-offloading-size"):
        configure(checkpoint(MODEL), additional_config=policy, kv_offloading_size=1)


def test_a_drafter_and_pipeline_ranks(checkpoint, tmp_path):
    folder = checkpoint(MODEL)
    drafter = draft_model(tmp_path / "draft", folder)
    with pytest.raises(ValueError, match="use --tensor-parallel-size, not --pipeline-parallel-size"):
        configure(folder, speculative_config=drafter, pipeline_parallel_size=2)


def test_a_drafter_beside_a_shallow_layer(checkpoint, tmp_path):
    folder = checkpoint(SmallLlava(layers=32, hidden=32, heads=1, kv_heads=1))
    drafter = draft_model(tmp_path / "draft", folder)
    with pytest.raises(
        ValueError, match=r"the 2 layers of a drafter do not fit .* withdraw at a deeper layer"
    ):
        configure(folder, speculative_config=drafter, additional_config={"vtw": {"layer": 1}})


def test_a_drafter_beside_a_stage_at_layer_0(checkpoint, tmp_path):
    folder = checkpoint(MODEL)
    drafter = draft_model(tmp_path / "draft", folder)
    policy = RANKED | {"stages": [{"layer": 0, "keep": 0.5}], "ranking": "uniform"}
    with pytest.raises(ValueError, match=r"a drafter needs layers that hold all tokens, .* at layer 0: let"):
        configure(folder, speculative_config=drafter, additional_config={"vtw": {"policy": policy}})


def test_breakable_cuda_graphs(checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(ValueError, match=r"breakable CUDA graphs .* set VLLM_USE_BREAKABLE_CUDAGRAPH=0"):
        configure(checkpoint(MODEL))


def test_everything_that_stands_in_the_way_is_named_at_once(checkpoint):
    with pytest.raises(ValueError, match=r"--enable-dbo(.|\n)*--enable-prompt-embeds"):
        configure(checkpoint(MODEL), enable_dbo=True, enable_prompt_embeds=True)


@pytest.fixture
def altered(checkpoint, tmp_path):
    """The checkpoint with another `config.json`."""

    def alter(change) -> Path:
        folder = shutil.copytree(checkpoint(MODEL), tmp_path / "altered")
        file = folder / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(change(config)))
        return folder

    return alter


def test_a_text_model(altered):
    def text_only(config):
        return config["text_config"] | {"architectures": ["LlamaForCausalLM"]}

    message = (
        "--model-impl vtw does not support LlamaForCausalLM: supported are LlavaForConditionalGeneration"
    )
    with pytest.raises(ValueError, match=message):
        configure(altered(text_only))


def test_another_multimodal_model(altered):
    def gemma(config):
        return {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}

    with pytest.raises(ValueError, match="Gemma3ForConditionalGeneration: its layers have sliding windows"):
        configure(altered(gemma))


def test_no_layer(checkpoint):
    with pytest.raises(ValueError, match='so "layer" or "policy" has to be set'):
        configure(checkpoint(MODEL), additional_config={})


def test_another_text_backbone(altered):
    def gemma(config):
        text = {key: config["text_config"][key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
        return config | {"text_config": text | {"model_type": "gemma"}}

    with pytest.raises(ValueError, match="the text model is 'gemma'; supported are llama, mistral, qwen2"):
        configure(altered(gemma))


def test_a_sliding_window(altered):
    def mistral(config):
        return config | {
            "text_config": config["text_config"] | {"model_type": "mistral", "sliding_window": 128}
        }

    folder = altered(mistral)
    with pytest.raises(ValueError, match="sliding window") as refusal:
        configure(folder)
    way_out = re.search(r"--hf-overrides '(.*?)'", str(refusal.value))
    assert way_out is not None
    config = configure(folder, hf_overrides=json.loads(way_out[1]))
    assert config.model_config.hf_text_config.sliding_window is None


def test_what_is_accepted_sets_the_scheduler_and_settles_the_options(checkpoint):
    options = {"additional_config": {"other": 1, "vtw": {"layer": 3}}}
    config = configure(checkpoint(MODEL), enforce_eager=False, **options)
    assert config.scheduler_config.scheduler_cls == "vllm_vtw.kv.scheduler.make_scheduler"
    assert config.additional_config["other"] == 1
    assert config.additional_config["vtw"]["policy"]["stages"] == [{"layer": 3, "keep": 0.0}]
    assert config.additional_config["vtw"]["align"] is True
    assert config.compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE  # the CPU backend's own
    assert config.model_config.architecture == "VTWLlavaForConditionalGeneration"
