# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The seam into vLLM's beam search, which is refused for some prompts.

For every token, vLLM's beam search sends the prompt and the tokens generated so far to the engine as a new
prompt. What is withdrawn may depend on the end of the prompt: a ranking depends on what the last token
attends to, gates depend on the text after the last image, and a visual token is kept if it is the last one.
The stages of such a prompt would retain other tokens with every token that is added.
"""

import functools
import inspect
from typing import Any

from vllm.entrypoints.generate.beam_search import utils
from vllm.entrypoints.generate.beam_search.utils import BeamSearchSequence

from vllm_vtw.versions import unknown

TARGET = "get_prompt"
EXTENSION_POINT = "NO_BEAM_SEARCH"
REFUSED = "no_beam_search"
"""The key of an engine input that holds the reason why beam search is refused."""
REASON = (
    "Beam search sends every generated token to the engine as the end of a new prompt, and what the policy "
    "of --model-impl vtw withdraws from this prompt depends on how it ends: use sampling, or greedy decoding "
    "with temperature 0"
)


def refuse(engine_input: Any) -> None:
    """Marks an engine input as a prompt for which beam search is refused."""
    engine_input[REFUSED] = REASON


def install() -> None:
    """Wraps vLLM's method that makes the prompt of a beam, so that it reads the mark of `refuse`.

    Does nothing if vLLM reads the mark by itself (`patches/beam-search.diff`).

    Raises:
        RuntimeError: The method is not the one that the wrapper was written for.
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
        raise unknown(f"BeamSearchSequence.{TARGET}")

    @functools.wraps(original)
    def get_prompt(self: BeamSearchSequence) -> Any:
        reason = self.orig_prompt.get(REFUSED)
        if reason is not None:
            raise ValueError(reason)
        return original(self)

    get_prompt.reads_refusal = True  # type: ignore[attr-defined]
    setattr(BeamSearchSequence, TARGET, get_prompt)
