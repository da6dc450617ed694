# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What vLLM's configuration says of the policy and of the model."""

from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices

from vllm_vtw.capacity import LayerGroups
from vllm_vtw.config import KEYS, ModelShape, VTWConfig
from vllm_vtw.families import BY_ARCHITECTURE, FRAMES, PREFIX, Family, first_layer, supported_architecture
from vllm_vtw.policy import Policy
from vllm_vtw.startup.drafters import drafter_layers


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
    return VTWConfig.parse(
        options, model_shape(vllm_config), bool(vllm_config.cache_config.enable_prefix_caching)
    )


def model_shape(vllm_config: VllmConfig) -> ModelShape:
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
    """The KV-cache groups under a policy. They are the same in all processes of an engine.

    Raises:
        ValueError: The layers of a drafter for speculative decoding have no place in them.
    """
    num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    size = vllm_config.parallel_config.pipeline_parallel_size
    ranks = [range(*get_pp_indices(num_layers, rank, size)) for rank in range(size)]
    return LayerGroups.of(policy, num_layers, ranks, drafter_layers(vllm_config))
