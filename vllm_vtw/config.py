# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Reads and checks the `"vtw"` object of `--additional-config`."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_vtw.families import DEEPSTACK, how_to_find_a_layer
from vllm_vtw.policy import Policy, Stage, one_of
from vllm_vtw.untrusted_files import shorten

logger = logging.getLogger("vllm.vtw")

PUBLISHED_LAYERS = {
    ("llava", "llama", 32, 4096): 16,
    ("llava", "llama", 40, 5120): 20,
    ("llava_next", "llama", 32, 4096): 16,
    ("llava_next", "llama", 40, 5120): 20,
}
"""The withdrawal layers of arXiv 2405.05803, by model type, text model type, number of decoder layers and
hidden size. All of these models have Vicuna as their text model."""
VICUNA_VOCABULARY = range(32000, 32065)
"""The sizes of the vocabulary of a LLaVA with Vicuna. A LLaVA with Llama 3 can have the same shape otherwise,
but has a larger vocabulary."""
KEYS = ("layer", "layers", "policy", "align", "guard")
"""The keys that the `"vtw"` object may have."""
WHAT_IT_COSTS = (
    "Multiple-choice and yes/no questions mostly keep their answers there; captions and OCR do not. In "
    "published re-runs of LLaVA-1.5-7B at layer 16, MMBench goes from 64.1 to 64.0 and POPE from 85.9 to "
    "86.9, but CIDEr on Flickr30k from 74.9 to 44.5 and OCRBench from 31.5 to 5.2. `vtw calibrate MODEL "
    '--data FILE` finds a layer for your own data, and --additional-config \'{"vtw": {"layer": K}}\' sets it'
)
SCHEDULER = "vllm_vtw.kv.scheduler.make_scheduler"
GATED_WORKER = "vllm_vtw.worker.gated_worker.GatedWorker"
ORDERING_WORKER = "vllm_vtw.worker.ordering_worker.OrderingWorker"
PIPELINE_WORKER = "vllm_vtw.worker.pipeline_worker.PipelineWorker"
ADMISSION = "vtw_admission"
"""The attribute of vLLM's `ModelConfig` that holds an `Admission`."""
EXITS = "vtw_exits"
"""The attribute in which scheduler and workers send each other what gates decided.

It is a dict from request id to the first stage without the request's visual tokens, or None if they stay.
Workers set it on `ModelRunnerOutput` when gates have decided. The scheduler sets it on `SchedulerOutput`, for
requests that begin or resume in the step.
"""
WANTED = "vtw_wanted"
"""The attribute of `SchedulerOutput` that names images, by their `ImageKey`, whose tokens a worker has to
order by their features after the step."""
ORDERS = "vtw_orders"
"""The attribute in which scheduler and workers send each other orders of images, as `FeatureRanking.order`
returns them, in arrays of int32.

On `ModelRunnerOutput` it is a dict from an image's `ImageKey` to its order. On `SchedulerOutput`, it has one
such dict for each request that begins or resumes, or whose images have been ordered since its last step.
"""


@dataclass(frozen=True)
class ModelShape:
    """The properties of a checkpoint that the configuration depends on.

    Attributes:
        vocab_size: The number of tokens in the text model's vocabulary. None if it is not known.
        bridge: As in `Family`.
        first_layer: The first layer that visual tokens may be withdrawn at.
    """

    model_type: str
    text_model_type: str
    num_hidden_layers: int
    hidden_size: int
    vocab_size: int | None = None
    bridge: int = 0
    first_layer: int = 1

    @property
    def published_layer(self) -> int | None:
        """The published withdrawal layer. None if there is none."""
        shape = (self.model_type, self.text_model_type, self.num_hidden_layers, self.hidden_size)
        return PUBLISHED_LAYERS.get(shape) if self.vocab_size in VICUNA_VOCABULARY else None

    def as_dict(self) -> dict[str, Any]:
        """The `model` object of a policy file for this model."""
        return {
            "model_type": self.model_type,
            "num_hidden_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
        }


@dataclass(frozen=True)
class Admission:
    """What the API process needs to refuse requests that the policy cannot serve.

    Attributes:
        policy: What is withdrawn, and from which layers on.
        num_layers: As in `VTWConfig`.
        bridge: As in `VTWConfig`.
        max_step_tokens: The largest number of tokens that a step computes (`--max-num-batched-tokens`).
    """

    policy: Policy
    num_layers: int
    bridge: int
    max_step_tokens: int


@dataclass(frozen=True)
class VTWConfig:
    """The plugin's resolved configuration.

    Attributes:
        policy: What is withdrawn, and from which layers on.
        align: Whether only whole KV blocks of visual tokens are withdrawn. If not, every visual token is, as
            published.
        num_layers: The number of decoder layers.
        bridge: The largest gap within an image that is withdrawn with it, as in `Family`.
        guard_share: The fraction of finished requests whose answers are read again with the full model.
    """

    policy: Policy
    align: bool
    num_layers: int
    bridge: int = 0
    guard_share: float = 0.0

    @classmethod
    def parse(cls, options: Any, model: ModelShape, prefix_caching: bool) -> "VTWConfig":
        """Reads and checks the `"vtw"` object.

        Args:
            options: The object as the user gave it, or as `resolved` returned it.
            model: The model that is being served.
            prefix_caching: Whether prefix caching is on. It sets the default of `align`.

        Raises:
            ValueError: A key or value is not allowed. The message names the key, the value and what is
                allowed.
        """
        if not isinstance(options, dict):
            raise _error("", options, "has to be an object with keys among " + ", ".join(KEYS))
        unknown = [key for key in options if key not in KEYS]
        if unknown:
            raise _error(unknown[0], options[unknown[0]], "unknown key; allowed are " + ", ".join(KEYS))
        for key in ("layer", "layers"):
            if "policy" in options and key in options:
                raise _error(key, options[key], f'give either "{key}" or "policy", not both')
        policy = _policy(options, model)
        # Visual features that are added to the first layers' states would need places for all tokens.
        if policy.stages and policy.stages[0].layer < model.first_layer and model.first_layer > 1:
            raise _error(
                "policy",
                options.get("policy"),
                f"withdraws at layer {policy.stages[0].layer}, and the model adds visual features up to "
                f"layer {model.first_layer - 1}: the first stage may begin at layer {model.first_layer}",
            )
        align = options.get("align", prefix_caching and policy.withdraws_all)
        if type(align) is not bool:
            raise _error("align", align, "has to be true or false")
        if align and not policy.withdraws_all:
            raise _error("align", align, "has to be false for a policy that ranks visual tokens or has gates")
        share = _guard_share(options["guard"]) if "guard" in options else 0.0
        return cls(policy, align, model.num_hidden_layers, model.bridge, share)

    def align_to(self, block_size: int) -> int:
        """How many tokens are withdrawn at once: a block of `block_size` tokens if `align` is set, else 1."""
        return block_size if self.align else 1

    def resolved(self, model: ModelShape) -> dict[str, Any]:
        """These settings as options from which `parse` makes the same configuration in another process.

        They contain the policy itself in place of the path of its file.
        """
        return {
            "policy": self.policy.to_json(model.as_dict()),
            "align": self.align,
            **({"guard": {"share": self.guard_share}} if self.guard_share else {}),
        }


def _error(key: str, value: Any, allowed: str) -> ValueError:
    where = f'["{shorten(key)[1:-1]}"]' if key else ""
    return ValueError(f'--additional-config ["vtw"]{where} = {shorten(value)}: {allowed}')


def _policy(options: dict[str, Any], model: ModelShape) -> Policy:
    num_layers = model.num_hidden_layers
    if "policy" in options:
        return _read_policy(options["policy"], model)
    if "layers" in options:
        return _policy_of_layers(options["layers"], options.get("layer"), model)
    if "layer" in options:
        _check_layer("layer", options["layer"], model)
        return Policy.withdraw_at(options["layer"], num_layers)
    published = model.published_layer
    if published is not None:
        logger.info(
            "vtw: withdrawing visual tokens at layer %d, published for this model. %s",
            published,
            WHAT_IT_COSTS,
        )
        return Policy.withdraw_at(published, num_layers)
    raise ValueError(
        '--additional-config ["vtw"]: no withdrawal layer is published for this model, so "layer" or '
        f'"policy" has to be set. --additional-config \'{{"vtw": {{"layer": K}}}}\' sets it, with K '
        f"from {model.first_layer} to {num_layers}. The larger K is, the fewer answers change; "
        f"{how_to_find_a_layer(model.model_type)}"
    )


def _check_layer(key: str, layer: Any, model: ModelShape) -> None:
    least, num_layers = model.first_layer, model.num_hidden_layers
    if type(layer) is not int or not least <= layer <= num_layers:
        why = f". {DEEPSTACK.format(least)}" if least > 1 else ""
        allowed = f"an integer from {least} to {num_layers}, the number of decoder layers{why}"
        raise _error(key, layer, f"has to be {allowed}")


def _policy_of_layers(layers: Any, default: Any, model: ModelShape) -> Policy:
    if not isinstance(layers, list) or not layers:
        raise _error("layers", layers, "has to be a list of the layers that requests may choose from")
    for layer in layers:
        _check_layer("layers", layer, model)
    num_layers = model.num_hidden_layers
    stages = tuple(Stage(layer, 0.0) for layer in sorted(set(layers) - {num_layers}))
    offered = Policy(stages).offered_layers(num_layers)
    if default is None:
        return Policy(stages, layer=num_layers if stages and num_layers in layers else None)
    if type(default) is not int or default not in offered:
        raise _error("layer", default, f'has to be one of the "layers": {one_of(offered)}')
    return Policy(stages, layer=default)


def _guard_share(guard: Any) -> float:
    if not isinstance(guard, dict) or set(guard) != {"share"}:
        raise _error("guard", guard, 'has to be an object with the key "share"')
    share = guard["share"]
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise _error("guard", guard, '"share" has to be a number above 0, and at most 1')
    return float(share)


def _read_policy(source: Any, model: ModelShape) -> Policy:
    try:
        if isinstance(source, dict):
            return Policy.from_json(source, model.as_dict())  # written by `VTWConfig.resolved`
        if isinstance(source, str):
            return Policy.read(Path(source), model.as_dict())
    except ValueError as error:
        raise _error("policy", source, str(error)) from error
    raise _error("policy", source, "has to be the path of a policy file")
