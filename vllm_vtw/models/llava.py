# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""LLaVA with withdrawal of visual tokens: the model class that `--model-impl vtw` selects."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_vtw.models.admission import with_admission_check
from vllm_vtw.models.decoder import StagedDecoder
from vllm_vtw.startup import vtw_config
from vllm_vtw.worker import runner_v1
from vllm_vtw.worker.current_step import CurrentStep

VLLM_PROCESSING = LlavaForConditionalGeneration._processor_factory


@MULTIMODAL_REGISTRY.register_processor(
    with_admission_check(VLLM_PROCESSING.processor),
    info=VLLM_PROCESSING.info,
    dummy_inputs=VLLM_PROCESSING.dummy_inputs,
)
class VTWLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """vLLM's LLaVA with a staged decoder. The weights are those of the checkpoint.

    Attributes:
        step: What the current step computes in each stage.
        decoder: Runs the layers of the language model.
        prepare_batch: Called by the seam into model runner V1 before each step. It does not exist under model
            runner V2, which uses `get_model_state_cls`.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vtw_config(vllm_config)
        self.step = CurrentStep(len(config.policy.stages), vllm_config.device_config.device)
        self.decoder = StagedDecoder(vllm_config, self.language_model.model, config.policy, self.step)
        # They are registered here, because the decoder is not a module.
        self.graph_inputs, self.gates = self.decoder.graph_inputs, self.step.gates
        if not vllm_config.use_v2_model_runner:
            self.prepare_batch = runner_v1.V1Batches(config, self.step).prepare
            runner_v1.install()

    def get_model_state_cls(self) -> type[ModelState]:
        """The class through which model runner V2 prepares each batch. vLLM calls this."""
        from vllm_vtw.worker.runner_v2 import VTWModelState

        return VTWModelState

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        return self.decoder(input_ids, positions, intermediate_tensors, inputs_embeds)
