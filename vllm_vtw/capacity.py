"""What requests take of the KV cache: layers in groups, tokens in blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_vtw.policy import Policy

MAX_GROUPS = 4
"""Each has block tables and attention metadata of its own, which every step pays for."""


def layers_per_group(stage_sizes: Sequence[int]) -> int:
    """How many layers every KV-cache group takes, so that requests with images take the least memory.

    vLLM gives all groups the same number of layers, and pads those of a stage that does not fill its own. In
    stage 0, padding costs more: visual tokens pay for it too. So tokens count half visual, half not.

    Args:
        stage_sizes: Layers of every stage.
    """
    counts = {size: [-(-layers // size) for layers in stage_sizes] for size in range(1, max(stage_sizes) + 1)}

    def cost(size: int) -> tuple[int, int, int]:
        groups = sum(counts[size])
        return size * (counts[size][0] + groups), size * groups, groups

    most_groups = max(MAX_GROUPS, len(stage_sizes))
    return min((size for size in counts if sum(counts[size]) <= most_groups), key=cost)


@dataclass(frozen=True)
class Groups:
    """The KV-cache groups of a decoder.

    Attributes:
        stages: The stage of each group.
        layers: How many layers each group holds, padding aside.
    """

    stages: tuple[int, ...]
    layers: tuple[int, ...]

    @classmethod
    def of(cls, policy: Policy, num_hidden_layers: int) -> "Groups":
        """The groups that a policy's layers are split into."""
        sizes = [len(segment) for segment in policy.segments(num_hidden_layers)]
        width = layers_per_group(sizes)
        # Group i of n takes the i-th layer of every n, as in vLLM.
        split = [
            (stage, len(range(group, size, -(-size // width))))
            for stage, size in enumerate(sizes)
            for group in range(-(-size // width))
        ]
        stages, layers = zip(*split, strict=True)
        return cls(stages, layers)

    @property
    def width(self) -> int:
        """Layers that every group takes memory for."""
        return max(self.layers)

    @property
    def padding_fraction(self) -> float:
        """The part of the memory that no layer uses."""
        return 1 - sum(self.layers) / (self.width * len(self.layers))

    @property
    def takes_more_than_stock(self) -> bool:
        """Whether padding takes more than withdrawal saves, where half of the tokens are visual."""
        return self.width * (self.stages.count(0) + len(self.stages)) > 2 * sum(self.layers)

    def blocks(self, held: Sequence[int], block_size: int) -> int:
        """Blocks, each of `width` layers, of a request of which stage s holds `held[s]` tokens."""
        return sum(-(-held[stage] // block_size) for stage in self.stages)


def withdrawn_of_image(tokens: int, align_to: int) -> int:
    """Visual tokens of one image that leave, wherever it stands between texts.

    Args:
        tokens: Of the image.
        align_to: 1 to withdraw by tokens; the block size to withdraw by whole blocks, of which the first and
            the last may be text in part, and stay.
    """
    return max(0, (tokens - align_to + 1) // align_to) * align_to
