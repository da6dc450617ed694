# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The hook through which vLLM's configuration is checked and adjusted."""

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_vtw.config import (
    ADMISSION,
    GATED_WORKER,
    ORDERING_WORKER,
    PIPELINE_WORKER,
    SCHEDULER,
    Admission,
)
from vllm_vtw.gates import load_gates
from vllm_vtw.policy import BY_FEATURES
from vllm_vtw.startup.connectors import use_own_connector
from vllm_vtw.startup.options import layer_groups, model_shape, vtw_config
from vllm_vtw.startup.refusals import (
    refuse_unsupported,
    refuse_unsupported_dynamic,
    refuse_unsupported_features,
    refuse_unsupported_guard,
)


class VTWModelConfig(VerifyAndUpdateConfig):
    """vLLM's hook through which a model architecture checks and changes the configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuses what cannot be served correctly, and sets the options that the plugin needs.

        It sets the scheduler, the KV connector if there is one and, for policies with gates, rankings by
        features and pipeline ranks, the worker. It replaces the user's `"vtw"` options by resolved ones,
        which mean the same in every process. vLLM calls this before the engine starts.

        Raises:
            ValueError: An option is not supported, or the policy or its gates cannot be used.
        """
        refuse_unsupported(vllm_config)
        config = vtw_config(vllm_config)
        vllm_config.additional_config = {
            **(vllm_config.additional_config or {}),
            "vtw": config.resolved(model_shape(vllm_config)),
        }
        scheduler = vllm_config.scheduler_config
        scheduler.scheduler_cls = SCHEDULER
        if config.policy.gate is not None:
            hidden_size = vllm_config.model_config.get_hidden_size()
            load_gates(config.policy.gate, [stage.layer for stage in config.policy.stages], hidden_size)
        if config.guard_share:
            refuse_unsupported_guard(vllm_config)
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
        if config.policy.ranking in BY_FEATURES:
            refuse_unsupported_features(vllm_config)
            vllm_config.parallel_config.worker_cls = ORDERING_WORKER
        groups = layer_groups(vllm_config, config.policy)  # may have no place for a drafter's layers
        use_own_connector(vllm_config, config.policy, groups)
