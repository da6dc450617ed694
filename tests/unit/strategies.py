# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Hypothesis strategies for prompts, and a slow, simple computation of what a stage holds of them."""

from dataclasses import dataclass

from hypothesis import strategies as st

from vllm_vtw.retention import Retention, Span, prompt_retention


@dataclass(frozen=True)
class Prompt:
    """A prompt's length, and the spans of its images."""

    length: int
    spans: tuple[Span, ...]

    def retention(self, align_to: int) -> Retention:
        return prompt_retention(self.spans, self.length, align_to)

    def held(self, num_tokens: int, align_to: int) -> list[int]:
        """The positions among the first `num_tokens` that a stage holds, found one by one."""
        visual = {position for start, stop in self.spans for position in range(start, stop)}
        visual.discard(self.length - 1)
        held = []
        for position in range(num_tokens):
            block = position // align_to
            if not all(other in visual for other in range(block * align_to, (block + 1) * align_to)):
                held.append(position)
        return held


@st.composite
def prompts(draw: st.DrawFn, longest_piece: int = 40) -> Prompt:
    """Prompts of up to six pieces of text or image in any order. Images may touch."""
    pieces = draw(st.lists(st.tuples(st.booleans(), st.integers(1, longest_piece)), min_size=1, max_size=6))
    spans, length = [], 0
    for is_image, size in pieces:
        if is_image:
            spans.append((length, length + size))
        length += size
    return Prompt(length, tuple(spans))


ALIGNMENTS = st.sampled_from([1, 2, 8, 16])
