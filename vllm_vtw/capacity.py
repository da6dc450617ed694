"""What requests take of the KV cache: layers in groups, tokens in blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_vtw.policy import Policy

MAX_GROUPS_PER_STAGE = 2
"""At most, on average. Each has block tables and attention metadata of its own, which every step pays for."""


def max_groups(num_stages: int) -> int:
    """KV-cache groups that the layers of so many stages are split into at most."""
    return max(2, num_stages) * MAX_GROUPS_PER_STAGE


def layers_per_group(stage_sizes: Sequence[int], keeps: Sequence[float]) -> int:
    """How many layers every KV-cache group takes, so that requests with images take the least memory.

    vLLM gives all groups the same number of layers, and pads those of a stage that does not fill its own. In
    shallow stages padding costs more: visual tokens pay for it too. So tokens count half visual, half not.

    Args:
        stage_sizes: Layers of every stage.
        keeps: The fraction of visual tokens that each holds.
    """
    counts = {size: [-(-layers // size) for layers in stage_sizes] for size in range(1, max(stage_sizes) + 1)}

    def cost(size: int) -> tuple[float, int, int]:
        groups = sum(counts[size])
        held = sum(count * (1 + keep) for count, keep in zip(counts[size], keeps, strict=True))
        return size * held, size * groups, groups

    most = max_groups(len(stage_sizes))
    return min((size for size in counts if sum(counts[size]) <= most), key=cost)


@dataclass(frozen=True)
class LayerGroups:
    """The KV-cache groups of a decoder.

    Attributes:
        stages: The stage of each group.
        layers: How many layers each group holds, padding aside.
    """

    stages: tuple[int, ...]
    layers: tuple[int, ...]

    @classmethod
    def of(cls, policy: Policy, num_hidden_layers: int) -> "LayerGroups":
        """The groups that a policy's layers are split into."""
        sizes = [len(segment) for segment in policy.segments(num_hidden_layers)]
        width = layers_per_group(sizes, policy.keeps)
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

    def takes_more_than_stock(self, policy: Policy) -> bool:
        """Whether padding takes more than withdrawal saves, where half of the tokens are visual."""
        return self.width * sum(1 + policy.keeps[stage] for stage in self.stages) > 2 * sum(self.layers)

    def blocks(self, held: Sequence[int], block_size: int) -> int:
        """Blocks, each of `width` layers, of a request of which stage s holds `held[s]` tokens."""
        return sum(-(-held[stage] // block_size) for stage in self.stages)


def visual_tokens_held(
    policy: Policy, images: int, tokens_per_image: int, align_to: int, exit_stage: int | None = 1
) -> list[int]:
    """Visual tokens that each stage holds of a request whose images stand between texts.

    Args:
        policy: What is withdrawn.
        images: Of the request.
        tokens_per_image: Visual tokens.
        align_to: As in `withdrawn_per_image`.
        exit_stage: Where gates decide: the first stage without them.
    """
    everything = images * tokens_per_image
    if policy.ranking is not None:
        return [everything, *(stage.kept(everything) for stage in policy.stages)]
    left = images * (tokens_per_image - withdrawn_per_image(tokens_per_image, align_to))
    return [
        everything if exit_stage is None or stage < exit_stage else left
        for stage in range(len(policy.stages) + 1)
    ]


def withdrawn_per_image(tokens: int, align_to: int) -> int:
    """Visual tokens of one image that leave, wherever it stands between texts.

    Args:
        tokens: Of the image.
        align_to: 1 to withdraw by tokens; the block size to withdraw by whole blocks, of which the first and
            the last may be text in part, and stay.
    """
    return max(0, (tokens - align_to + 1) // align_to) * align_to
