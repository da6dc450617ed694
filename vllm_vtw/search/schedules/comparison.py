# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Compares a policy that was found with other methods and plain baselines that cost no more."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from vllm_vtw.policy import BY_IMAGE, Policy, Stage
from vllm_vtw.search.data.sample import Sample
from vllm_vtw.search.divergence import TaskDivergence
from vllm_vtw.search.model import HFModel
from vllm_vtw.search.price import Price
from vllm_vtw.search.schedules.baselines import baselines
from vllm_vtw.search.schedules.lower_resolution import at_lower_resolution
from vllm_vtw.search.schedules.sample_at_layer import SampleAtLayer, divergence_by_task
from vllm_vtw.search.schedules.schedule import keeps_by_layer


@dataclass(frozen=True)
class Comparison:
    """Compares policies on the same samples.

    Attributes:
        model: The model.
        samples: The samples, as the data has them, and before layer 0.
        price: Computes what policies cost.
        share: The cost that is compared, such as `Price.flops_share`.
        first_layer: The first layer at which visual tokens may be withdrawn by what a decoder has computed.
        max_tokens: The most tokens of an answer.
    """

    model: HFModel
    samples: Sequence[tuple[Sample, SampleAtLayer]]
    price: Price
    share: Callable[[Policy], float]
    first_layer: int
    max_tokens: int

    def of(self, name: str, policy: Policy) -> dict[str, dict[str, Any]]:
        """What a policy, and others that cost no more, do to answers.

        Args:
            name: The name of the policy.
            policy: The policy.

        Returns:
            By the name that reports show: what is withdrawn, what it costs and how answers change, as
            `result.json` holds it. The first one is the policy itself.
        """
        policies = {name: policy}
        policies |= baselines(policy, range(self.first_layer, self.price.num_layers), self.share)
        found = {
            other: self._measured(one)
            for other, one in tqdm(policies.items(), unit="policy", desc="comparing")
        }
        return found | self._at_lower_resolution(self.share(policy))

    def _measured(self, policy: Policy) -> dict[str, Any]:
        samples = (sample.ranked_by(policy.ranked_by) for _, sample in self.samples)
        keeps = keeps_by_layer(policy, self.price.num_layers)
        written = policy.to_json({})
        return {
            "stages": written["stages"],
            "ranking": written["ranking"],
            **self._cost(policy),
            "curves": _as_json(divergence_by_task(self.model, samples, 0, keeps)),
        }

    def _cost(self, policy: Policy) -> dict[str, float]:
        return {
            "prefill_flops_share": self.price.flops_share(policy),
            "kv_share": self.price.kv_share(policy),
        }

    def _at_lower_resolution(self, most: float) -> dict[str, dict[str, Any]]:
        """The same pictures at a lower resolution, if they cost no more than `most`."""

        def costs_as(keep: float) -> Policy:
            return Policy((Stage(0, keep),), ranked_by=BY_IMAGE[0])

        shrunk = at_lower_resolution(
            self.model, self.samples, self.max_tokens, lambda keep: self.share(costs_as(keep)) <= most
        )
        if shrunk is None:
            return {}
        everywhere = [1.0] * self.price.num_layers
        return {
            f"resolution, {shrunk.scale:.3g} of width and height": {
                "stages": [],
                "ranking": None,
                "visual_tokens": shrunk.keep,
                **self._cost(costs_as(shrunk.keep)),
                "curves": _as_json(divergence_by_task(self.model, shrunk.samples, 0, everywhere)),
            }
        }


def _as_json(curves: dict[str, TaskDivergence]) -> dict[str, Any]:
    return {task: asdict(curve) for task, curve in curves.items()}
