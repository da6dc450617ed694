"""Reads and checks the `"vtw"` object of `--additional-config`."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_vtw.files import shorten
from vllm_vtw.policy import Policy

logger = logging.getLogger("vllm.vtw")

# The layers of arXiv 2405.05803, by (model type, text model type, decoder layers, hidden size).
PUBLISHED_LAYERS = {
    ("llava", "llama", 32, 4096): 16,
    ("llava", "llama", 40, 5120): 20,
}
# The decoders whose layers are called as `layer(positions, hidden_states, residual)`.
TEXT_MODELS = ("llama", "mistral", "qwen2")
SERVED_MODEL_TYPES = ("llava",)
KEYS = ("layer", "policy", "align")
WHAT_IT_COSTS = (
    "Multiple-choice and yes/no questions mostly keep their answers there; captions and OCR do not. In "
    "published re-runs of LLaVA-1.5-7B at layer 16, MMBench goes from 64.1 to 64.0 and POPE from 85.9 to "
    "86.9, but CIDEr on Flickr30k from 74.9 to 44.5 and OCRBench from 31.5 to 5.2. `vtw calibrate MODEL "
    '--data FILE` finds a layer for your own data, and --additional-config \'{"vtw": {"layer": K}}\' sets it'
)
SCHEDULER = "vllm_vtw.kv.scheduler.make_scheduler"
WORKER = "vllm_vtw.worker.gated_worker.GatedWorker"
ADMISSION = "vtw_admission"
"""Attribute of vLLM's `ModelConfig`, where the processor of a model can see it: an `Admission`."""
EXITS = "vtw_exits"
"""Attribute by which scheduler and workers tell each other what gates decided, by request the first stage
without its visual tokens: of vLLM's `SchedulerOutput`, about requests that begin or resume, and of its
`ModelRunnerOutput`."""


@dataclass(frozen=True)
class ModelShape:
    """What the configuration has to know of the checkpoint."""

    model_type: str
    text_model_type: str
    num_hidden_layers: int
    hidden_size: int

    def as_dict(self) -> dict[str, Any]:
        """The `model` object of a policy file."""
        return {
            "model_type": self.model_type,
            "num_hidden_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
        }


@dataclass(frozen=True)
class Admission:
    """What decides whether a request can be served right, before it is queued.

    Attributes:
        policy: What is withdrawn, and before which layers.
        max_step_tokens: The most tokens of a step.
    """

    policy: Policy
    max_step_tokens: int


@dataclass(frozen=True)
class VTWConfig:
    """The plugin's resolved configuration.

    Attributes:
        policy: What is withdrawn, and from which layers on.
        align: Withdraw by whole KV blocks (`True`), or every visual token, as published (`False`).
    """

    policy: Policy
    align: bool

    @classmethod
    def parse(cls, options: Any, model: ModelShape, prefix_caching: bool) -> "VTWConfig":
        """Resolves the options of a user, or those of `resolved`, to the same configuration.

        Raises:
            ValueError: Names the key, its value and what is allowed.
        """
        if not isinstance(options, dict):
            raise _error("", options, "has to be an object with keys among " + ", ".join(KEYS))
        unknown = [key for key in options if key not in KEYS]
        if unknown:
            raise _error(unknown[0], options[unknown[0]], "unknown key; allowed are " + ", ".join(KEYS))
        if "layer" in options and "policy" in options:
            raise _error("layer", options["layer"], 'give either "layer" or "policy", not both')
        policy = _policy(options, model)
        align = options.get("align", prefix_caching and not policy.is_dynamic)
        if type(align) is not bool:
            raise _error("align", align, "has to be true or false")
        if align and policy.is_dynamic:
            raise _error("align", align, "has to be false for a policy that ranks visual tokens or has gates")
        return cls(policy, align)

    def align_to(self, block_size: int) -> int:
        """Withdrawal goes by so many tokens at once."""
        return block_size if self.align else 1

    def resolved(self, model: ModelShape) -> dict[str, Any]:
        """These settings as options that `parse` reads the same anywhere, without the policy's file."""
        return {"policy": self.policy.to_file(model.as_dict()), "align": self.align}


def _error(key: str, value: Any, allowed: str) -> ValueError:
    where = f'["{shorten(key)[1:-1]}"]' if key else ""
    return ValueError(f'--additional-config ["vtw"]{where} = {shorten(value)}: {allowed}')


def _policy(options: dict[str, Any], model: ModelShape) -> Policy:
    num_layers = model.num_hidden_layers
    if "policy" in options:
        return _read_policy(options["policy"], model)
    if "layer" in options:
        layer = options["layer"]
        if type(layer) is not int or not 1 <= layer <= num_layers:
            raise _error("layer", layer, f"has to be an integer from 1 to {num_layers}, the decoder's layers")
        return Policy.withdraw_at(layer, num_layers)
    published = PUBLISHED_LAYERS.get((model.model_type, model.text_model_type, num_layers, model.hidden_size))
    if published is not None:
        logger.info(
            "vtw: withdrawing visual tokens at layer %d, published for LLaVA-1.5 of this shape. %s",
            published,
            WHAT_IT_COSTS,
        )
        return Policy.withdraw_at(published, num_layers)
    layer = max(1, num_layers // 2)
    logger.warning(
        "vtw: no withdrawal layer is published for this model: taking %d, half of its %d layers. %s",
        layer,
        num_layers,
        WHAT_IT_COSTS,
    )
    return Policy.withdraw_at(layer, num_layers)


def _read_policy(source: Any, model: ModelShape) -> Policy:
    try:
        if isinstance(source, dict):
            return Policy.from_file(source, model.as_dict())  # `resolved` wrote it
        if isinstance(source, str):
            return Policy.read(Path(source), model.as_dict())
    except ValueError as error:
        raise _error("policy", source, str(error)) from error
    raise _error("policy", source, "has to be the path of a policy file")
