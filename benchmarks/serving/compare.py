# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Compares the runs of stock vLLM in a result with those of the plugin under one policy."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.serving.limits import Limits, limits
from benchmarks.serving.models import Model
from vllm_vtw.policy import BY_QUESTION, Policy, Stage
from vllm_vtw.search.price import RequestTokens

FORMAT = "vllm-vtw-serving/2"
Run = Mapping[str, Any]
LITTLE = 1.2
"""If the plugin answers fewer than this many times stock vLLM's requests per second, the tables say why."""


def named(policy: Policy) -> str:
    """A short description of a policy, such as `K = 16`."""
    if policy.ranking is None:
        return f"K = {policy.stages[0].layer}"
    kept = ", ".join(f"{stage.keep:g} from layer {stage.layer}" for stage in policy.stages)
    return f"keep {kept}" if policy.ranking == BY_QUESTION[0] else f"keep {kept} by {policy.ranking}"


def label(sweep: str, value: str, policy: Policy) -> str:
    """The name of a row in the tables.

    Args:
        sweep: What is varied, as in `Point`.
        value: The value that it has, as in `Point`.
        policy: The plugin's policy.
    """
    if sweep == "K":
        return f"K: {policy.stages[0].layer} {value}"
    return f"{sweep}: {named(policy)}" if sweep == "schedule" else f"{sweep}: {value}"


def read(file: Path) -> dict[str, Any]:
    """Reads the result file of a benchmark.

    Raises:
        ValueError: The file cannot be read, or is not such a result.
    """
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ValueError(f"{file} is no result of `python -m benchmarks.serving`")
    return result


@dataclass(frozen=True)
class Comparison:
    """The runs of one point, for stock vLLM and for the plugin with one policy.

    Args:
        point: The point, as in the result.
        model: The model that was served.
        policy: The plugin's policy.
        stock: The runs of stock vLLM, in the order in which they were made.
        vtw: The runs of the plugin, in the order in which they were made.
    """

    point: Mapping[str, Any]
    model: Model
    policy: Policy
    stock: Sequence[Run]
    vtw: Sequence[Run]

    @property
    def label(self) -> str:
        """The name of the row in the tables."""
        return label(self.point["sweep"], self.point["value"], self.policy)

    def means(self, part: str, metric: str) -> tuple[float, float]:
        """The mean of a metric over stock vLLM's runs, and over the plugin's.

        Args:
            part: The part of a run that has the metric, `"output"` or `"steps"`.
            metric: The key of the metric in it.
        """
        stock, vtw = (mean(run[part][metric] for run in runs) for runs in (self.stock, self.vtw))
        return stock, vtw

    def ratio(self, part: str, metric: str) -> float:
        """The plugin's mean of a metric divided by stock vLLM's. The arguments are those of `means`."""
        stock, vtw = self.means(part, metric)
        return vtw / stock

    @property
    def speed(self) -> float:
        """The plugin's requests answered per second, divided by stock vLLM's."""
        return self.ratio("output", "request_throughput")

    @property
    def speeds(self) -> list[float]:
        """`speed` for each pair of runs."""
        return [
            vtw["output"]["request_throughput"] / stock["output"]["request_throughput"]
            for stock, vtw in zip(self.stock, self.vtw, strict=True)
        ]

    @property
    def prompt_seconds(self) -> tuple[float, float]:
        """The seconds of a run that prompts took in stock vLLM, and in the plugin, as means over runs."""
        return self.means("steps", "prefill")

    @property
    def decode_seconds(self) -> tuple[float, float]:
        """The other seconds of a run in stock vLLM, and in the plugin, as means over runs."""
        whole, prompts = self.means("steps", "seconds"), self.prompt_seconds
        return whole[0] - prompts[0], whole[1] - prompts[1]

    @property
    def prefill_share(self) -> float:
        """The fraction of stock vLLM's time in which it computed prompts."""
        return self.prompt_seconds[0] / self.means("steps", "seconds")[0]

    @property
    def short_of_memory(self) -> bool:
        """Whether requests waited in stock vLLM because one more would not have fitted into the KV cache.

        If a prompt takes several steps, stock vLLM may begin too many at once, and preempt some later.
        """
        if any(run["preemptions"] for run in self.stock):
            return True
        workload = self.point["workload"]
        wanted = min(workload["requests"], workload["concurrency"] or workload["requests"])
        running, used = (self.means("steps", metric)[0] for metric in ("most_running", "most_kv"))
        return running < wanted and used * (1 + 1 / running) > 1

    @property
    def prefix_hits(self) -> float:
        """The fraction of prompt tokens that stock vLLM found in its prefix cache."""
        return sum(run["prefix_hits"] for run in self.stock) / sum(
            run["output"]["total_input_tokens"] for run in self.stock
        )

    @property
    def request(self) -> RequestTokens:
        """The mean numbers of tokens of a request."""
        output, workload = self.stock[0]["output"], self.point["workload"]
        visual = self.model.visual_tokens(workload.get("image_side")) * workload["images"]
        return RequestTokens(
            visual, output["total_input_tokens"] / output["completed"] - visual, workload["output"]
        )

    @property
    def limits(self) -> Limits | None:
        """What withdrawal can win at most. None with prefix caching, where requests share computed blocks."""
        if self.point["engine"]["prefix_caching"]:
            return None
        running = self.means("steps", "mean_running")[0]
        return limits(
            self.request, self.model, self.policy, self.prefill_share, running, self.short_of_memory
        )

    @property
    def reason(self) -> str:
        """Why withdrawal wins little at this point."""
        if self.limits is None:
            return f"{self.prefix_hits:.0%} of the prompts' tokens are in the prefix cache, on either side"
        known = []
        if not self.short_of_memory:
            known.append("memory suffices for all requests, so that no more run at once")
        elif self.limits.speed < LITTLE:
            request = self.request
            visual = request.visual / (request.visual + request.text + request.output)
            known.append(f"{visual:.0%} of a request's tokens are visual")
        prompts, decoding = (
            f"{stock / vtw:.2f} times as fast" if vtw else "none"
            for stock, vtw in (self.prompt_seconds, self.decode_seconds)
        )
        known.append(
            f"prompts, {self.prefill_share:.0%} of stock's time, became {prompts}, decoding {decoding}"
        )
        return "; ".join(known)


def compare(result: Mapping[str, Any]) -> list[Comparison]:
    """The comparisons of a result: one for every point and policy that has two runs of each side."""
    compared = []
    for number, point in enumerate(result["points"]):
        runs = [run for run in result["runs"] if run["point"] == number]
        stock = [run for run in runs if run["policy"] is None]
        for policy in point["policies"]:
            vtw = [run for run in runs if run["policy"] == policy]
            if len(stock) == len(vtw) == 2:
                stages = tuple(Stage(**stage) for stage in policy["stages"])
                served = Policy(stages, ranked_by=policy.get("ranked_by", BY_QUESTION[0]))
                compared.append(Comparison(point, Model(**result["model"]), served, stock, vtw))
    return compared
