# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The model classes that `--model-impl vtw` selects: subclasses of vLLM's, made when they are asked for.

`VTWLlavaForConditionalGeneration` in this module is vLLM's `LlavaForConditionalGeneration` with a staged
decoder, and so on for every architecture in `families.py`. Weights, processors and encoders are vLLM's.
"""

import functools
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_vtw.families import BY_ARCHITECTURE, ELSEWHERE, PREFIX
from vllm_vtw.kv.groups import groups_of
from vllm_vtw.models.decoder import StagedDecoder, find_text_model
from vllm_vtw.models.processor import with_request_check
from vllm_vtw.startup.options import vtw_config
from vllm_vtw.worker import runner_v1
from vllm_vtw.worker.current_step import CurrentStep


def __getattr__(name: str) -> type:
    """Makes the class of this name when it is first asked for. vLLM's registry looks classes up by name."""
    architecture = name.removeprefix(PREFIX)
    if name == architecture or architecture not in BY_ARCHITECTURE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return served_model(architecture)


@functools.cache
def served_model(architecture: str) -> type:
    """A subclass of vLLM's model class whose decoder withdraws visual tokens.

    Args:
        architecture: The name of vLLM's model class.

    Raises:
        ValueError: vLLM's class may make objects of other classes, whose decoders would not be staged.
    """
    vllm_model: Any = ModelRegistry.models[architecture].load_model_cls()
    if vllm_model.__new__ not in (object.__new__, SupportsQuant.__new__):
        raise ValueError(
            f"--model-impl vtw does not support {architecture}: vLLM's class may make objects of other "
            f"classes, which would withdraw nothing: {ELSEWHERE}"
        )

    class Served(vllm_model):
        """vLLM's model with a staged decoder.

        Attributes:
            vtw_step: What the current step computes in each stage.
            prepare_batch: Called by the seam into model runner V1 before each step. It does not exist under
                model runner V2, which uses `get_model_state_cls`.
        """

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            config = vtw_config(vllm_config)
            self.vtw_step = CurrentStep(len(config.policy.stages), vllm_config.device_config.device)
            text_model = find_text_model(self.get_language_model())
            decoder = StagedDecoder.install(vllm_config, text_model, config.policy, self.vtw_step)
            # They are registered here, because the staged decoder is not a module.
            self.vtw_graph_inputs, self.vtw_gates = decoder.graph_inputs, self.vtw_step.gates
            if not vllm_config.use_v2_model_runner:
                self.prepare_batch = runner_v1.V1Batches(config, self.vtw_step).prepare
                runner_v1.install()

        def get_model_state_cls(self) -> type[ModelState]:
            """The class through which model runner V2 prepares each batch. vLLM calls this."""
            from vllm_vtw.worker.runner_v2 import VTWModelState

            return VTWModelState

        @classmethod
        def get_kv_cache_groups(
            cls, vllm_config: VllmConfig, kv_cache_spec: dict[str, KVCacheSpec]
        ) -> list[KVCacheGroupSpec]:
            """The model's KV-cache groups. vLLM calls this since 0.33; see `vllm_vtw.kv.groups`."""
            return groups_of(vllm_config, kv_cache_spec)

    Served.__name__ = Served.__qualname__ = f"{PREFIX}{architecture}"
    processing = vllm_model._processor_factory
    register = MULTIMODAL_REGISTRY.register_processor(
        with_request_check(processing.processor),
        info=processing.info,
        dummy_inputs=processing.dummy_inputs,
    )
    return register(Served)
