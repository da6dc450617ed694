"""Stock vLLM and the plugin at one K, side by side, from a result's runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.serving.limits import Limits, limits
from vllm_vtw.search.price import Request

Run = Mapping[str, Any]
LITTLE = 1.1
"""A limit that is not worth much."""


@dataclass(frozen=True)
class Comparison:
    """The runs of one point, in the order of their visits.

    Args:
        point: As in the result.
        layer: K.
        stock: Runs of stock vLLM.
        vtw: Runs of the plugin.
        limits: What is possible.
        visual_tokens: Of a request.
    """

    point: Mapping[str, Any]
    layer: int
    stock: Sequence[Run]
    vtw: Sequence[Run]
    limits: Limits
    visual_tokens: int

    @property
    def label(self) -> str:
        value = f"{self.layer} {self.point['value']}" if self.point["sweep"] == "K" else self.point["value"]
        return f"{self.point['sweep']}: {value}"

    def means(self, part: str, metric: str) -> tuple[float, float]:
        """Of stock vLLM's runs and of the plugin's."""
        stock, vtw = (mean(run[part][metric] for run in runs) for runs in (self.stock, self.vtw))
        return stock, vtw

    def ratio(self, part: str, metric: str) -> float:
        """The plugin's over stock's."""
        stock, vtw = self.means(part, metric)
        return vtw / stock

    @property
    def speeds(self) -> list[float]:
        """The ratio of requests answered in a second, of each visit by itself."""
        return [
            vtw["output"]["request_throughput"] / stock["output"]["request_throughput"]
            for stock, vtw in zip(self.stock, self.vtw, strict=True)
        ]

    @property
    def short_of_memory(self) -> bool:
        """Whether stock vLLM had requests wait that it could have run."""
        workload = self.point["workload"]
        wanted = min(workload["requests"], workload["concurrency"] or workload["requests"])
        return mean(run["steps"]["most_running"] for run in self.stock) < wanted

    @property
    def prefill_share(self) -> float:
        return prefill_share(self.stock)

    @property
    def preemptions(self) -> tuple[float, float]:
        """Of all of stock vLLM's runs, and of the plugin's."""
        stock, vtw = (sum(run["preemptions"] for run in runs) for runs in (self.stock, self.vtw))
        return stock, vtw

    @property
    def prompt_seconds(self) -> tuple[float, float]:
        """In prompts, of a run of stock vLLM and of the plugin."""
        return self.means("steps", "prefill")

    @property
    def decode_seconds(self) -> tuple[float, float]:
        """Of the rest."""
        whole, prompts = self.means("steps", "seconds"), self.prompt_seconds
        return whole[0] - prompts[0], whole[1] - prompts[1]

    @property
    def reason(self) -> str:
        """Why there is little to win."""
        output = self.stock[0]["output"]
        tokens = output["total_input_tokens"] / output["completed"] + self.point["workload"]["output"]
        visual = self.visual_tokens / tokens
        if self.limits.speed < LITTLE:
            return f"{self.limits.speed:.2f} is possible: {visual:.0%} of a request's tokens are visual"
        prompts, decoding = (stock / vtw for stock, vtw in (self.prompt_seconds, self.decode_seconds))
        return (
            f"decoding, {1 - self.prefill_share:.0%} of stock's time, became {decoding:.2f} times as fast, "
            f"prompts {prompts:.2f} times"
        )


def prefill_share(runs: Sequence[Run]) -> float:
    """The part of their time that computed prompts."""
    return sum(run["steps"]["prefill"] for run in runs) / sum(run["steps"]["seconds"] for run in runs)


def compare(result: Mapping[str, Any]) -> list[Comparison]:
    """A comparison for every point and K of which both sides have run equally often."""
    model, compared = result["model"], []
    for number, point in enumerate(result["points"]):
        runs = [run for run in result["runs"] if run["point"] == number]
        stock = [run for run in runs if run["layer"] is None]
        for layer in point["layers"]:
            vtw = [run for run in runs if run["layer"] == layer]
            if not stock or len(stock) != len(vtw):
                continue
            prompt = stock[0]["output"]["total_input_tokens"] / stock[0]["output"]["completed"]
            visual = result["visual_tokens"] * point["workload"]["images"]
            possible = limits(
                Request(visual, prompt - visual, point["workload"]["output"]),
                layer=layer,
                num_layers=model["layers"],
                hidden_size=model["hidden"],
                layer_parameters=model["layer_parameters"],
                prefill_share=prefill_share(stock),
            )
            compared.append(Comparison(point, layer, stock, vtw, possible, visual))
    return compared
