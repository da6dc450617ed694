# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The oracle of all families: transformers up to the decoder, then a loop over its layers that drops tokens.

It shares no code with the package. What is visual it sees from token ids.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.engine.image_orders import diverse, spread


class DecoderReachedError(Exception):
    """Ends a forward pass of the whole model once the decoder has got its inputs."""


@dataclass
class Encoded:
    """A prompt as the decoder gets it.

    Attributes:
        ids: The token ids.
        embeds: The embeddings of text and visual tokens, shape `(tokens, hidden_size)`.
        visual: The positions of visual tokens.
        items: For each image in turn, then each video, the number of its visual tokens.
        images: The number of images.
        positions: Their positions, shape `(3, tokens)`. None if each token's is its place.
        deepstack: For each of the first layers, what is added to visual tokens after it.
        image_end: The id of the token that ends an image, if it is part of the image. None if there is none.
    """

    ids: list[int]
    embeds: torch.Tensor
    visual: list[int]
    items: list[int]
    images: int
    positions: torch.Tensor | None = None
    deepstack: Sequence[torch.Tensor] = ()
    image_end: int | None = None

    def leaving(self, bridge: int, block_size: int, keep: float = 0.0, ranking: str = "uniform") -> set[int]:
        """The positions that leave: visual ones, and short gaps within an image.

        The prompt's last token stays, and of each image and video the fraction `keep`: evenly spread, or by
        "diversity" such that differ, with its first token if this follows no text. Where `block_size` is more
        than 1, only whole blocks leave.
        """
        by_features = ranking == "diversity"
        gone: set[int] = set()
        start = 0
        for number, size in enumerate(self.items):
            mine = set(self.visual[start : start + size])
            start += size
            if number < self.images and not by_features:
                for left, right in pairwise(sorted(mine)):
                    if right - left - 1 <= bridge:
                        mine.update(range(left, right))
            stay = int((Decimal(str(keep)) * len(mine)).to_integral_value(ROUND_CEILING))
            in_order = sorted(mine)
            order = diverse(self.embeds[in_order]) if by_features else spread(len(mine))
            gone |= {in_order[token] for token in order[stay:]}
            before = in_order[0] - 1
            if by_features and (before < 0 or before in self.visual or self.ids[before] == self.image_end):
                gone.discard(in_order[0])
        gone.discard(len(self.ids) - 1)
        blocks = (range(at, at + block_size) for at in range(0, len(self.ids), block_size))
        return {position for block in blocks if gone.issuperset(block) for position in block}


def _known(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers takes of a video's metadata."""
    return {key: value for key, value in metadata.items() if key != "do_sample_frames"}


def _as_published(positions: torch.Tensor, visual: Sequence[int]) -> torch.Tensor:
    """Lets text after visual tokens go on from the largest position so far, as Qwen2.5-VL's own code does.

    transformers 5.19 leaves positions in time out there, which are the largest ones in a video.

    Args:
        positions: Positions of a prompt, shape `(3, tokens)`.
        visual: The places of its visual tokens.
    """
    fixed, is_visual = positions.clone(), set(visual)
    for place in range(1, positions.shape[1]):
        behind = fixed[:, :place].max() + 1
        if place not in is_visual:
            fixed[:, place] = behind
        elif place - 1 not in is_visual:
            moved = behind - positions[0, place]
            fixed[:, place] = positions[:, place] + moved
        else:
            fixed[:, place] = positions[:, place] + moved
    return fixed


class FamilyOracle:
    """A float32 model of any family on transformers.

    Args:
        folder: The checkpoint. If transformers lacks the model, its twin is in the folder `twin` within it.
    """

    def __init__(self, folder: Path) -> None:
        if (folder / "twin").exists():
            folder /= "twin"
        self.model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.decoder: Any = self.model.get_decoder()
        config = self.model.config
        self.visual_ids = {
            getattr(config, name)
            for name in ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
            if getattr(config, name, None) is not None
        }

    def encode(self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Encoded:
        """Runs the processor and everything before the decoder.

        Args:
            text: The prompt, with one placeholder for each image and video.
            images: PIL images.
            videos: For each video its frames and their metadata.
        """
        given: dict[str, Any] = {"text": text, "return_tensors": "pt"}
        if images:
            given["images"] = list(images)
        if videos:
            given |= {
                "videos": [frames for frames, _ in videos],
                "video_metadata": [_known(metadata) for _, metadata in videos],
                "do_sample_frames": False,
            }
        inputs = self.processor(**given)
        ids = inputs["input_ids"][0].tolist()
        given_to_decoder = self._decoder_inputs(inputs)
        visual = [position for position, token in enumerate(ids) if token in self.visual_ids]
        alone = [self._visual_tokens(image) for image in images]
        items = [*alone, *([len(visual) - sum(alone)] if videos else [])]
        assert sum(items) == len(visual)
        positions = given_to_decoder.get("position_ids")
        return Encoded(
            ids,
            given_to_decoder["inputs_embeds"][0],
            visual,
            items,
            len(images),
            # A fourth row, the first one, has the places of the tokens.
            None if positions is None or positions.dim() < 3 else _as_published(positions[-3:, 0], visual),
            given_to_decoder.get("deepstack_visual_embeds") or (),
            self.processor.tokenizer.get_vocab().get("[IMG_END]"),
        )

    def _visual_tokens(self, image: Any) -> int:
        """The number of visual tokens of an image."""
        alone = self.processor(images=[image], text=self.processor.image_token, return_tensors="pt")
        return sum(token in self.visual_ids for token in alone["input_ids"][0].tolist())

    def _decoder_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        caught: dict[str, Any] = {}

        def catch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            caught.update(kwargs)
            raise DecoderReachedError

        hook = self.decoder.register_forward_pre_hook(catch, with_kwargs=True)
        with suppress(DecoderReachedError), torch.no_grad():
            self.model(**inputs)
        hook.remove()
        assert caught["inputs_embeds"] is not None
        return caught

    @torch.no_grad()
    def logits(self, encoded: Encoded, answer: Sequence[int], layer: int, leaving: set[int]) -> torch.Tensor:
        """Logits of the prompt's last token and of each token of an answer but the last.

        Args:
            encoded: The prompt.
            answer: Token ids of the answer.
            layer: The layer before which positions leave.
            leaving: These positions.
        """
        hidden = self._embedded(encoded, answer)
        positions = self._positions(encoded, len(hidden))
        kept = torch.tensor([position not in leaving for position in range(len(hidden))])
        assert layer >= len(encoded.deepstack)
        for index in range(len(self.decoder.layers)):
            if index == layer:
                hidden, positions = hidden[kept], positions[..., kept]
            hidden, _ = self._layer(index, hidden, positions)
            if index < len(encoded.deepstack):
                hidden[encoded.visual] += encoded.deepstack[index]
        return self.model.lm_head(self.decoder.norm(hidden[-len(answer) :]))

    @torch.no_grad()
    def ranked_logits(
        self, encoded: Encoded, answer: Sequence[int], schedule: Mapping[int, float], leaving: set[int]
    ) -> torch.Tensor:
        """The same under a schedule that ranks by what the prompt's last token attends to.

        Args:
            encoded: The prompt.
            answer: Token ids of the answer.
            schedule: By layer, the fraction of the positions in `leaving` that goes on from there.
            leaving: The positions that may leave.
        """
        last, everything, candidates = len(encoded.ids) - 1, len(leaving), sorted(leaving)
        hidden, weights = self._embedded(encoded, answer), torch.empty(0)
        positions = self._positions(encoded, len(hidden))
        here = list(range(len(hidden)))
        for index in range(len(self.decoder.layers)):
            if index in schedule:
                stay = int((Decimal(str(schedule[index])) * everything).to_integral_value(ROUND_CEILING))
                got = dict(zip(here, weights[:, here.index(last)].mean(0).tolist(), strict=True))
                candidates.sort(key=lambda position: (-got[position], position))
                gone = set(candidates[stay:])
                candidates = candidates[:stay]
                hidden = hidden[[position not in gone for position in here]]
                here = [position for position in here if position not in gone]
            hidden, weights = self._layer(index, hidden, positions[..., here])
            if index < len(encoded.deepstack):
                hidden[encoded.visual] += encoded.deepstack[index]
        return self.model.lm_head(self.decoder.norm(hidden[-len(answer) :]))

    @torch.no_grad()
    def margins(
        self, encoded: Encoded, gates: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    ) -> dict[int, float]:
        """By layer: by how much its gate is for withdrawing there, after layers that had all tokens.

        Args:
            encoded: The prompt, with text behind its last image.
            gates: By layer, the weights of the gate's first map and of its second.
        """
        hidden, found = encoded.embeds, {}
        for index in range(len(self.decoder.layers)):
            if index in gates:
                first, second = gates[index]
                others, last = hidden[max(encoded.visual) + 1 : -1], hidden[-1]
                stay, leave = second @ torch.nn.functional.gelu(first @ torch.cat([others.mean(0), last]))
                found[index] = float(leave - stay)
            hidden, _ = self._layer(index, hidden, self._positions(encoded, len(hidden)))
            if index < len(encoded.deepstack):
                hidden[encoded.visual] += encoded.deepstack[index]
        return found

    def _embedded(self, encoded: Encoded, answer: Sequence[int]) -> torch.Tensor:
        told = self.decoder.embed_tokens(torch.tensor(answer[:-1], dtype=torch.long))
        return torch.cat([encoded.embeds, told])

    def _positions(self, encoded: Encoded, count: int) -> torch.Tensor:
        """The positions of a prompt and the beginning of its answer, `count` tokens together."""
        if encoded.positions is None:
            return torch.arange(count)
        # All rows go on from the largest position of the prompt.
        behind = encoded.positions.max() + 1 + torch.arange(count - len(encoded.ids))
        return torch.cat([encoded.positions, behind.expand(3, -1)], dim=1)

    def _layer(
        self, index: int, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's output, and its attention weights, shape `(heads, tokens, tokens)`."""
        block, seen = self.decoder.layers[index], []
        mask = torch.full((len(hidden), len(hidden)), float("-inf")).triu(1)
        hook = block.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1][0]))
        out = block(
            hidden[None],
            attention_mask=mask[None, None],
            position_ids=positions[..., None, :],
            position_embeddings=self.decoder.rotary_emb(hidden[None], positions[..., None, :]),
        )
        hook.remove()
        return (out[0] if isinstance(out, tuple) else out)[0], seen[0]
