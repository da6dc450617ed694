# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What a server's metrics say about its guard, which reads some answers again with the full model."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from math import inf

from vllm_vtw.commands.metrics_page import plain
from vllm_vtw.untrusted_files import shorten

REQUESTS = "vllm:vtw_requests_total"
LEFT_OUT = "vllm:vtw_guard_left_out_total"
OF_ANSWERS = {
    "vllm:vtw_guard_requests_total": "requests",
    "vllm:vtw_guard_tokens_total": "tokens",
    "vllm:vtw_guard_greedy_tokens_total": "greedy_tokens",
    "vllm:vtw_guard_changed_tokens_total": "changed_tokens",
    "vllm:vtw_guard_logprob_difference_sum": "difference",
    "vllm:vtw_guard_logprob_difference_count": "compared_tokens",
}
"""The fields of `Answers` by the metric that counts them."""
OF_GATES = "vllm:vtw_exit_layer"
"""The metric of policies with gates."""
NAME = re.compile(r"(?:# (?:HELP|TYPE) )?(vllm:\w*)")
MAX_LINE = 4096
"""The number of characters of the longest line that is read. The parser is slow with long ones."""
MAX_COUNT = 2.0**53
"""Larger counts are refused. Floating point numbers count by ones up to this one."""


@dataclass(frozen=True)
class Answers:
    """The answers to requests of one task and layer that were read again.

    Attributes:
        task: The task that the requests named. Empty if they named none.
        layer: The layer at which their visual tokens left.
        requests: The number of requests.
        tokens: The number of tokens of the answers.
        greedy_tokens: How many of them were decoded greedily.
        changed_tokens: How many of these the full model would not have chosen.
        difference: The sum of the differences between a token's log-probability with and without withdrawal,
            in nats.
        compared_tokens: The number of differences. It is 0 under a policy that ranks visual tokens.
    """

    task: str
    layer: int
    requests: float = 0
    tokens: float = 0
    greedy_tokens: float = 0
    changed_tokens: float = 0
    difference: float = 0
    compared_tokens: float = 0


@dataclass
class GuardCounts:
    """What the guard of one served model counted in all engines.

    Attributes:
        model: The model's name.
        has_gates: Whether gates decide at which layer visual tokens leave.
        requests: The number of requests, whether they were read again or not.
        left_out: By the reason, the number of requests that were chosen and not read again.
        answers: What was read again, sorted by task and layer.
    """

    model: str
    has_gates: bool
    requests: float = 0
    left_out: defaultdict[str, float] = field(default_factory=lambda: defaultdict(int))
    answers: list[Answers] = field(default_factory=list)


def guard_counts(page: str) -> list[GuardCounts]:
    """What the page `/metrics` says, by model.

    Raises:
        ValueError: The page is not that of a server with a guard, or is broken. The message is one line.
        ImportError: prometheus_client is not installed.
    """
    from prometheus_client.parser import text_string_to_metric_families

    named = [(match[1], line) for line in page.split("\n") if (match := NAME.match(line))]
    names = {name for name, _ in named}
    if not names:
        raise ValueError("this is not a vLLM server, or one with --disable-log-stats: it has no vLLM metrics")
    if not any(name.startswith("vllm:vtw_") for name in names):
        raise ValueError("this vLLM server runs without --model-impl vtw: it has no metrics vllm:vtw_*")
    if not any(name.startswith("vllm:vtw_guard_") for name in names):
        raise ValueError(
            'this server\'s guard is off: set "guard": {"share": 0.01} under "vtw" in --additional-config'
        )
    ours = [line for name, line in named if name.startswith("vllm:vtw_")]
    if max(map(len, ours)) > MAX_LINE:
        raise ValueError(f"the server's metrics have a line of more than {MAX_LINE} characters")
    try:
        families = list(text_string_to_metric_families("\n".join(ours)))
    except Exception as error:  # of broken pages, the parser raises whatever happens
        raise ValueError(f"the server's metrics cannot be read: {shorten(error)}") from error
    has_gates = any(name.startswith(OF_GATES) for name in names)
    models: dict[str, GuardCounts] = {}
    counts: dict[tuple[str, str, int], dict[str, float]] = defaultdict(lambda: defaultdict(int))
    for sample in (sample for family in families for sample in family.samples):
        if sample.name not in (REQUESTS, LEFT_OUT, *OF_ANSWERS):
            continue
        labels, value = sample.labels, _checked(sample.name, sample.value)
        name = labels.get("model_name", "")
        model = models.setdefault(name, GuardCounts(name, has_gates))
        if sample.name == REQUESTS:
            model.requests += value
        elif sample.name == LEFT_OUT:
            model.left_out[labels.get("reason", "")] += value
        else:
            layer = _checked_layer(labels.get("layer", ""))
            counts[name, labels.get("task", ""), layer][OF_ANSWERS[sample.name]] += value
    for (name, task, layer), count in sorted(counts.items()):
        if count["changed_tokens"] > count["greedy_tokens"]:
            raise ValueError(
                f"the server's metrics cannot be right: of {count['greedy_tokens']:g} greedy tokens at layer "
                f"{layer}, task {plain(task) or 'none'}, {count['changed_tokens']:g} changed"
            )
        if count["requests"]:
            models[name].answers.append(Answers(task, layer, **count))
    return [models[name] for name in sorted(models)]


def _checked(name: str, value: float) -> float:
    is_sum = name.endswith("_sum")
    # A log-probability, and so a sum of differences, may be infinite.
    if not 0 <= value <= MAX_COUNT and not (is_sum and value == inf):
        raise ValueError(f"the server's metrics cannot be right: {name} is {shorten(value)}")
    return value if is_sum else int(value)


def _checked_layer(label: str) -> int:
    if not re.fullmatch("[0-9]{1,6}", label):
        raise ValueError(f"the server's metrics cannot be right: they have a layer {shorten(label)}")
    return int(label)
