# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The part of published checkpoints' config.json that says what the architecture is.

As in the files on the Hugging Face Hub, keys are left out where transformers' default holds. The files of
LLaVA-OneVision and InternVL3 were not at hand: theirs are put together from the scripts that converted these
checkpoints, the configurations that were converted, and what others printed of the result. Those of
GLM-4.1V and GLM-4.5V are put together from what others printed of them, and Qwen2-VL's is the copy in a model
made from it, compared with what others printed of the original.
"""

from typing import Any

# OpenAI's CLIP, of which LLaVA has the 336-pixel variant.
CLIP = {
    "model_type": "clip_vision_model",
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    **{"image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000},
}
INTERNVIT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
LLAVA = {
    "projector_hidden_act": "gelu",
    **{"vision_config": CLIP, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
}
LLAVA_NEXT = LLAVA | {
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "use_image_newline_parameter": True,
}
VICUNA = {
    "_name_or_path": "lmsys/vicuna-7b-v1.5",
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32064},
    **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-05},
}
QWEN2_7B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
    **{"num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0},
    **{"max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "use_sliding_window": False},
}
# Of Qwen2-VL and Qwen2.5-VL. The text model's keys stand at the top level.
QWEN_VL_7B = QWEN2_7B | {
    **{"vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654},
    **{"image_token_id": 151655, "video_token_id": 151656, "vocab_size": 152064},
    **{"tie_word_embeddings": False, "sliding_window": 32768, "max_window_layers": 28},
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
QWEN_VISION = {
    **{"depth": 32, "num_heads": 16, "in_chans": 3, "patch_size": 14, "spatial_patch_size": 14},
    **{"spatial_merge_size": 2, "temporal_patch_size": 2},
}
QWEN3_VL = {
    **{"image_token_id": 151655, "video_token_id": 151656, "tie_word_embeddings": False},
    **{"vision_start_token_id": 151652, "vision_end_token_id": 151653},
}
QWEN3_TEXT = {
    **{"head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144, "rms_norm_eps": 1e-06},
    **{"attention_bias": False, "rope_theta": 5000000},
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
}
QWEN3_VISION = {
    **{"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16, "in_channels": 3},
    **{"hidden_act": "gelu_pytorch_tanh", "num_position_embeddings": 2304, "patch_size": 16},
    **{"spatial_merge_size": 2, "temporal_patch_size": 2, "deepstack_visual_indexes": [8, 16, 24]},
}
GLM_TEXT = {
    **{"hidden_size": 4096, "vocab_size": 151552, "max_position_embeddings": 65536, "rms_norm_eps": 1e-05},
    **{"attention_bias": True, "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]},
}
GLM_VISION = {
    **{"hidden_size": 1536, "depth": 24, "num_heads": 12, "image_size": 336, "patch_size": 14},
    **{"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 4096, "rms_norm_eps": 1e-05},
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": LLAVA
    | {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        **{"image_token_index": 32000, "pad_token_id": 32001, "vocab_size": 32064},
        "text_config": VICUNA,
    },
    "mistral-community/pixtral-12b": {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {
            "model_type": "mistral",
            **{"hidden_size": 5120, "intermediate_size": 14336, "num_hidden_layers": 40, "head_dim": 128},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 131072},
            **{"max_position_embeddings": 1024000, "rope_theta": 1000000000.0, "rms_norm_eps": 1e-05},
            "sliding_window": None,
        },
        "vision_config": {
            "model_type": "pixtral",
            **{"head_dim": 64, "hidden_act": "silu", "image_size": 1024, "patch_size": 16},
            "rope_theta": 10000.0,
        },
    },
    "llava-hf/llava-v1.6-mistral-7b-hf": LLAVA_NEXT
    | {
        "model_type": "llava_next",
        "architectures": ["LlavaNextForConditionalGeneration"],
        **{"image_token_index": 32000, "vocab_size": 32064},
        "text_config": {
            "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
            **{"model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 32064},
            **{"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 32768},
            **{"rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None},
        },
    },
    "llava-hf/LLaVA-NeXT-Video-7B-hf": LLAVA_NEXT
    | {
        "model_type": "llava_next_video",
        "architectures": ["LlavaNextVideoForConditionalGeneration"],
        **{"image_token_index": 32001, "video_token_index": 32000},
        **{"image_seq_length": 576, "video_seq_length": 288},
        **{"spatial_pool_mode": "average", "spatial_pool_out_channels": 1024, "spatial_pool_stride": 2},
        "text_config": VICUNA | {"rope_scaling": {"factor": 2.5, "type": "linear"}, "pad_token_id": 0},
    },
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": {
        "model_type": "llava_onevision",
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        **{"image_token_index": 151646, "video_token_index": 151647, "vision_aspect_ratio": "anyres_max_9"},
        "image_grid_pinpoints": [
            [384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)
        ],
        **{"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        "use_image_newline_parameter": True,
        # The window's size is there, although the window is not used.
        "text_config": QWEN2_7B | {"vocab_size": 152128, "sliding_window": 131072, "max_window_layers": 28},
        "vision_config": {
            **{"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304},
            **{"num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384, "patch_size": 14},
            "vision_use_head": False,
        },
    },
    "OpenGVLab/InternVL2-8B": {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        },
        **{"force_image_size": 448, "downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1},
        **{"min_dynamic_patch": 1, "max_dynamic_patch": 12, "use_thumbnail": True},
        "llm_config": {
            "model_type": "internlm2",
            "architectures": ["InternLM2ForCausalLM"],
            **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 92553, "bias": False},
            **{"max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 1000000},
            "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        },
        "vision_config": INTERNVIT
        | {"model_type": "intern_vit_6b", "image_size": 448, "patch_size": 14, "norm_type": "layer_norm"},
    },
    "OpenGVLab/InternVL3-8B-hf": {
        "model_type": "internvl",
        "architectures": ["InternVLForConditionalGeneration"],
        **{"image_token_id": 151667, "image_seq_length": 256, "downsample_ratio": 0.5},
        "text_config": QWEN2_7B
        | {
            **{"vocab_size": 151674, "sliding_window": None},
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        },
        "vision_config": INTERNVIT
        | {"model_type": "internvl_vision", "image_size": [448, 448], "patch_size": [14, 14]},
    },
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": {
        "model_type": "mistral3",
        "architectures": ["Mistral3ForConditionalGeneration"],
        **{"image_token_index": 10, "multimodal_projector_bias": False, "projector_hidden_act": "gelu"},
        **{"spatial_merge_size": 2, "vision_feature_layer": -1},
        "text_config": {
            "model_type": "mistral",
            **{"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "head_dim": 128},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 131072},
            **{"max_position_embeddings": 131072, "rope_theta": 1000000000.0, "rms_norm_eps": 1e-05},
            "sliding_window": None,
        },
        "vision_config": {
            **{"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64},
            **{"num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 1540, "patch_size": 14},
            **{"hidden_act": "silu", "rope_theta": 10000.0},
        },
    },
    "Qwen/Qwen2-VL-7B-Instruct": QWEN_VL_7B
    | {
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "vision_config": QWEN_VISION | {"embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4},
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": QWEN_VL_7B
    | {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "max_position_embeddings": 128000,
        "vision_config": QWEN_VISION
        | {
            **{"hidden_size": 1280, "intermediate_size": 3420, "hidden_act": "silu", "out_hidden_size": 3584},
            **{"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2},
        },
    },
    "Qwen/Qwen3-VL-8B-Instruct": QWEN3_VL
    | {
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": QWEN3_TEXT
        | {
            **{"model_type": "qwen3_vl_text", "hidden_size": 4096, "intermediate_size": 12288},
            **{"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8},
        },
        "vision_config": QWEN3_VISION | {"model_type": "qwen3_vl", "out_hidden_size": 4096},
    },
    "Qwen/Qwen3-VL-30B-A3B-Instruct": QWEN3_VL
    | {
        "model_type": "qwen3_vl_moe",
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "text_config": QWEN3_TEXT
        | {
            **{"model_type": "qwen3_vl_moe_text", "hidden_size": 2048, "intermediate_size": 6144},
            **{"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4},
            **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
            **{"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
        },
        "vision_config": QWEN3_VISION | {"model_type": "qwen3_vl_moe", "out_hidden_size": 2048},
    },
    "zai-org/GLM-4.1V-9B-Thinking": {
        "model_type": "glm4v",
        "architectures": ["Glm4vForConditionalGeneration"],
        **{"image_token_id": 151343, "video_token_id": 151344, "tie_word_embeddings": False},
        "text_config": GLM_TEXT
        | {
            **{"model_type": "glm4v_text", "intermediate_size": 13696, "num_hidden_layers": 40},
            **{"num_attention_heads": 32, "num_key_value_heads": 2},
        },
        "vision_config": GLM_VISION | {"intermediate_size": 13696},
    },
    "zai-org/GLM-4.5V": {
        "model_type": "glm4v_moe",
        "architectures": ["Glm4vMoeForConditionalGeneration"],
        **{"image_token_id": 151363, "video_token_id": 151364, "tie_word_embeddings": False},
        "text_config": GLM_TEXT
        | {
            **{"model_type": "glm4v_moe_text", "intermediate_size": 10944, "num_hidden_layers": 46},
            **{"num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "use_qk_norm": False},
            **{"n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8},
            **{"moe_intermediate_size": 1408, "first_k_dense_replace": 1, "norm_topk_prob": True},
            **{"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
        },
        "vision_config": GLM_VISION | {"intermediate_size": 10944},
    },
    "HuggingFaceTB/SmolVLM-Instruct": {
        "model_type": "idefics3",
        "architectures": ["Idefics3ForConditionalGeneration"],
        **{"image_token_id": 49153, "image_seq_len": 81, "scale_factor": 3, "vocab_size": 49155},
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "head_dim": 64},
            **{"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49155},
            **{"rms_norm_eps": 1e-05, "rope_theta": 273768.0, "tie_word_embeddings": False},
        },
        "vision_config": {
            **{"model_type": "idefics3", "hidden_size": 1152, "intermediate_size": 4304},
            **{"num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14},
        },
    },
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": {
        "model_type": "smolvlm",
        "architectures": ["SmolVLMForConditionalGeneration"],
        **{"image_token_id": 49190, "pad_token_id": 128002, "scale_factor": 4, "vocab_size": 49280},
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "architectures": ["VLlama3ForCausalLM"],
            **{"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "head_dim": 64},
            **{"num_attention_heads": 15, "num_key_value_heads": 5, "vocab_size": 49280},
            **{"max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000},
            "pad_token_id": 2,
        },
        "vision_config": {
            **{"model_type": "smolvlm_vision", "hidden_size": 768, "num_attention_heads": 12},
            **{"image_size": 512, "patch_size": 16, "tie_word_embeddings": False},
        },
    },
}

# It attends over a window of 4096 tokens. LLaVAs over it exist, such as BakLLaVA.
MISTRAL_V01 = {
    "_name_or_path": "mistralai/Mistral-7B-v0.1",
    **{"model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 32000},
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768},
    **{"rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096},
}
