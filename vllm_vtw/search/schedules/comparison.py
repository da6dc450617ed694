# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Compares a policy that was found with other methods and plain baselines that cost no more."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from vllm_vtw.policy import BY_IMAGE, Policy, Stage
from vllm_vtw.search.data.sample import Sample
from vllm_vtw.search.divergence import AnswerDivergence, TaskDivergence
from vllm_vtw.search.model import HFModel
from vllm_vtw.search.price import Price
from vllm_vtw.search.schedules.baselines import PLAIN, baselines
from vllm_vtw.search.schedules.lower_resolution import affordable_resolution, at_resolution
from vllm_vtw.search.schedules.sample_at_layer import SampleAtLayer
from vllm_vtw.search.schedules.schedule import keeps_by_layer

Differences = dict[str, list[AnswerDivergence]]
"""How the answers to samples change, by task."""


@dataclass(frozen=True)
class Comparison:
    """Compares policies on the same samples.

    Attributes:
        model: The model.
        sources: The samples, as the data has them.
        price: Computes what policies cost.
        share: The cost that is compared, such as `Price.flops_share`.
        first_layer: The first layer at which visual tokens may be withdrawn by what a decoder has computed.
        max_tokens: The most tokens of an answer.
    """

    model: HFModel
    sources: Sequence[Sample]
    price: Price
    share: Callable[[Policy], float]
    first_layer: int
    max_tokens: int

    def of(self, name: str, policy: Policy, samples: Iterable[SampleAtLayer]) -> dict[str, dict[str, Any]]:
        """What a policy, and others that cost no more, do to answers.

        Args:
            name: The name of the policy.
            policy: The policy.
            samples: The samples before layer 0, in the order of `sources`. One is held at a time.

        Returns:
            By the name that reports show: what is withdrawn, what it costs, whether it is a plain baseline,
            and how answers change, as `result.json` holds it. The first one is the policy itself.
        """
        num_layers = self.price.num_layers
        policies = {name: policy}
        policies |= baselines(policy, range(self.first_layer, num_layers), self.share)
        most = self.share(policy)
        resolution = affordable_resolution(
            self.model,
            self.sources,
            self.price.request.visual,
            self.max_tokens,
            lambda keep: self.share(_with_fewer_tokens(keep)) <= most,
        )
        changes: dict[str, Differences] = {other: defaultdict(list) for other in policies}
        of_smaller: Differences = defaultdict(list)
        pairs = zip(self.sources, samples, strict=True)
        for source, sample in tqdm(pairs, total=len(self.sources), unit="sample", desc="comparing"):
            for other, one in policies.items():
                ranked, keeps = sample.ranked_by(one.ranked_by), keeps_by_layer(one, num_layers)
                changes[other][sample.task].append(
                    ranked.run_layers(self.model, 0, keeps).difference(self.model)
                )
            if resolution is not None:
                smaller = at_resolution(self.model, source, sample, self.max_tokens, resolution.scale)
                read = smaller.run_layers(self.model, 0, [1.0] * num_layers)
                of_smaller[sample.task].append(read.difference(self.model))
        found = {other: self._written(one, changes[other]) for other, one in policies.items()}
        if resolution is not None:
            same = self._written(_with_fewer_tokens(resolution.keep), of_smaller)
            same |= {"stages": [], "ranking": None, "visual_tokens": resolution.keep}
            found[f"resolution, {resolution.scale:.3g} of width and height"] = same
        found[name]["plain"] = False
        return found

    def _written(self, policy: Policy, changes: Differences) -> dict[str, Any]:
        written = policy.to_json({})
        curves = {task: asdict(TaskDivergence.of(of_task)) for task, of_task in changes.items()}
        return {
            "stages": written["stages"],
            "ranking": written["ranking"],
            "plain": policy.ranking in PLAIN,
            "prefill_flops_share": self.price.flops_share(policy),
            "kv_share": self.price.kv_share(policy),
            "curves": curves,
        }


def _with_fewer_tokens(keep: float) -> Policy:
    """A policy that costs what requests with a fraction of the visual tokens do."""
    return Policy((Stage(0, keep),), ranked_by=BY_IMAGE[0])
