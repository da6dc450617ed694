"""The seam into vLLM's beam search: it is refused for prompts that retain other tokens when they grow.

vLLM's beam search sends the prompt and the tokens so far to the engine as a new prompt, for every token.
What is withdrawn of a prompt may depend on where it ends: on what its last token attends to, on the text
behind its last picture, or on whether that token is visual itself. A generated token must not be taken for
a prompt's last one.
"""

import functools
import inspect
from typing import Any

from vllm.entrypoints.generate.beam_search import utils
from vllm.entrypoints.generate.beam_search.utils import BeamSearchSequence

TARGET = "get_prompt"
EXTENSION_POINT = "NO_BEAM_SEARCH"
REFUSED = "no_beam_search"
"""Key of an engine's input: the reason why beam search may not go on from it."""
REASON = (
    "Beam search sends every generated token to the engine as the end of a new prompt, and the policy of "
    "--model-impl vtw withdraws this prompt's visual tokens by what it ends with: use sampling, or greedy "
    "decoding with temperature 0"
)


def refuse(engine_input: Any) -> None:
    """Marks an engine's input as one that beam search may not go on from."""
    engine_input[REFUSED] = REASON


def install() -> None:
    """Wraps what makes a prompt of a beam, unless this vLLM reads the mark itself.

    Raises:
        RuntimeError: The method is not what the wrapper was written for.
    """
    if hasattr(utils, EXTENSION_POINT):
        return
    original = getattr(BeamSearchSequence, TARGET, None)
    if hasattr(original, "reads_refusal"):
        return
    fields = getattr(BeamSearchSequence, "__dataclass_fields__", {})
    if (
        original is None
        or list(inspect.signature(original).parameters) != ["self"]
        or "orig_prompt" not in fields
    ):
        raise RuntimeError(
            f"vllm-vtw does not know this vLLM's BeamSearchSequence.{TARGET}: install vLLM 0.32.0"
        )

    @functools.wraps(original)
    def get_prompt(self: BeamSearchSequence) -> Any:
        reason = self.orig_prompt.get(REFUSED)
        if reason is not None:
            raise ValueError(reason)
        return original(self)

    get_prompt.reads_refusal = True  # type: ignore[attr-defined]
    setattr(BeamSearchSequence, TARGET, get_prompt)
