# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The worker class for rankings by features. It orders the tokens of images that the encoder has computed."""

from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_vtw.config import ORDERS, WANTED
from vllm_vtw.rankings import FEATURE_RANKINGS
from vllm_vtw.retention import ImageKey
from vllm_vtw.startup.options import vtw_config
from vllm_vtw.worker.current_step import CurrentStep
from vllm_vtw.worker.platform_worker import PlatformWorker, annotated


class OrderingWorker(PlatformWorker):
    """The platform's worker, with orders of images added to what it receives and returns.

    It is selected by `--worker-cls`, which the plugin sets where the policy ranks by features.
    """

    def load_model(self, *args: Any, **options: Any) -> None:
        super().load_model(*args, **options)
        self.withdrawal_policy = vtw_config(self.vllm_config).policy
        assert self.withdrawal_policy.ranking is not None
        self.feature_ranking = FEATURE_RANKINGS[self.withdrawal_policy.ranking]()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        step: CurrentStep = self.model_runner.get_model().vtw_step
        step.orders = getattr(scheduler_output, ORDERS, {})
        self.wanted_images = getattr(scheduler_output, WANTED, [])
        return super().execute_model(scheduler_output)

    def sample_tokens(self, *args: Any) -> Any:
        output = super().sample_tokens(*args)
        if output is None or not self.wanted_images:
            return output  # there is none on other ranks, and if the step has failed
        return annotated(output, ORDERS, self._orders())

    def _orders(self) -> dict[ImageKey, npt.NDArray[np.int32]]:
        step: CurrentStep = self.model_runner.get_model().vtw_step
        hidden_size = self.model_config.get_hidden_size()
        orders = {}
        for identifier, num_tokens in self.wanted_images:
            features = step.features_of(identifier)
            if features is None or len(features) != num_tokens:
                continue  # the scheduler ends the request
            count = self.withdrawal_policy.most_kept(num_tokens)
            # Some models append what they add to the states of deeper layers.
            order = self.feature_ranking.order(features[:, :hidden_size], count)
            orders[identifier, num_tokens] = order.to("cpu").numpy().astype(np.int32)
        return orders
